"""What the command line of ``nydusd`` says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nydus.daemon import config as configs
from nydus.errors import ConfigError


@dataclass(slots=True)
class Options:
    """See nydusd.md §1.2 and §1.3. Paths are absolute."""

    mountpoint: Path
    apisock: Path | None = None
    bootstrap: Path | None = None
    config: Path | None = None
    localfs_dir: Path | None = None
    virtual_mountpoint: str = "/"
    prefetch_files: list[str] | None = None
    threads: int = 4
    provider: str | None = None
    failover_policy: str = "resend"
    id: str | None = None
    supervisor: Path | None = None
    upgrade: bool = False
    log_level: str = "info"
    log_file: Path | None = None
    log_rotation_size: int = 0
    rlimit_nofile: int = 1_000_000

    @property
    def shared(self) -> bool:
        """Whether the mountpoint is an empty directory that images are mounted below."""
        return self.bootstrap is None or self.virtual_mountpoint != "/"

    def config_text(self) -> str:
        """The configuration document of the command line's own image."""
        if self.localfs_dir is not None:
            return configs.for_localfs(self.localfs_dir)
        if self.config is not None:
            return configs.read_text(self.config)
        raise ConfigError("--bootstrap needs --config or --localfs-dir")

    def backend_type(self) -> str:
        """The backend type of the command line's own image; empty where there is none to be found."""
        if self.bootstrap is None:
            return ""
        try:
            return configs.backend_type(self.config_text())
        except ConfigError:
            return ""  # said when it is mounted
