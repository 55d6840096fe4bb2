"""The snapshotter's TOML configuration (``version = 1``), in the reference's keys.

An absent key has its default; an empty string counts as absent; every other value is taken as it is written.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from nydus.durations import duration
from nydus.errors import ConfigError

DEFAULT_ROOT = "/var/lib/containerd/io.containerd.snapshotter.v1.nydus"
DEFAULT_ADDRESS = "/run/containerd-nydus/containerd-nydus-grpc.sock"
MAX_ROOT = 70
"""Bytes: the API sockets below the root must fit in the 108 bytes of a socket address."""


class _Section(msgspec.Struct, kw_only=True):
    pass


class Debug(_Section):
    """``[system.debug]``."""

    daemon_cpu_profile_duration_secs: int = 0
    pprof_address: str = ""


class System(_Section):
    """``[system]``: the controller API."""

    enable: bool = False
    address: str = "/run/containerd-nydus/system.sock"
    uid: int = 0
    gid: int = 0
    debug: Debug = msgspec.field(default_factory=Debug)


class Daemon(_Section):
    """``[daemon]``: how nydusd is run."""

    nydusd_path: str = ""
    nydusimage_path: str = ""
    nydusd_config: str = ""
    recover_policy: str = "failover"
    fs_driver: str = "fusedev"
    threads_number: int = 0
    log_rotation_size: int = 100
    failover_policy: str = "resend"


class Cgroup(_Section):
    """``[cgroup]``."""

    enable: bool = False
    memory_limit: str = ""


class Log(_Section):
    """``[log]``."""

    log_to_stdout: bool = False
    level: str = "info"
    dir: str = ""
    log_rotation_max_size: int = 200
    log_rotation_max_backups: int = 5
    log_rotation_max_age: int = 0
    log_rotation_local_time: bool = True
    log_rotation_compress: bool = True


class Metrics(_Section):
    """``[metrics]``."""

    address: str = ""
    hung_io_interval: str = "10s"
    collect_interval: str = "1m"


class Mirrors(_Section):
    """``[remote.mirrors_config]``."""

    dir: str = ""


class Auth(_Section):
    """``[remote.auth]``."""

    enable_kubeconfig_keychain: bool = False
    kubeconfig_path: str = ""
    enable_cri_keychain: bool = False
    image_service_address: str = "/run/containerd/containerd.sock"
    enable_kubelet_credential_providers: bool = False
    credential_provider_config: str = ""
    credential_provider_bin_dir: str = ""
    credential_renewal_interval: str = "0s"


class Remote(_Section):
    """``[remote]``."""

    convert_vpc_registry: bool = False
    skip_ssl_verify: bool = False
    mirrors_config: Mirrors = msgspec.field(default_factory=Mirrors)
    auth: Auth = msgspec.field(default_factory=Auth)


class SnapshotOptions(_Section):
    """``[snapshot]``."""

    enable_nydus_overlayfs: bool = False
    nydus_overlayfs_path: str = "nydus-overlayfs"
    enable_kata_volume: bool = False
    sync_remove: bool = False
    enable_overlayfs_volatile: bool = False


class CacheManager(_Section):
    """``[cache_manager]``: ``gc_period`` is how long a cached blob stays after its last image left."""

    disable: bool = False
    gc_period: str = "0s"
    cache_dir: str = ""


class Image(_Section):
    """``[image]``."""

    public_key_file: str = ""
    validate_signature: bool = False


class Tarfs(_Section):
    """``[experimental.tarfs]``."""

    enable_tarfs: bool = False
    mount_tarfs_on_host: bool = False
    tarfs_hint: bool = False
    max_concurrent_proc: int = 0
    export_mode: str = ""


class Experimental(_Section):
    """``[experimental]``."""

    enable_stargz: bool = False
    enable_referrer_detect: bool = False
    enable_index_detect: bool = False
    enable_backend_source: bool = False
    tarfs: Tarfs = msgspec.field(default_factory=Tarfs)


class Config(_Section):
    """The whole file. :func:`load` gives one that is complete and checked."""

    version: int = 1
    root: str = DEFAULT_ROOT
    address: str = DEFAULT_ADDRESS
    uid: int = 0
    gid: int = 0
    daemon_mode: str = "dedicated"
    cleanup_on_close: bool = False
    system: System = msgspec.field(default_factory=System)
    daemon: Daemon = msgspec.field(default_factory=Daemon)
    cgroup: Cgroup = msgspec.field(default_factory=Cgroup)
    log: Log = msgspec.field(default_factory=Log)
    metrics: Metrics = msgspec.field(default_factory=Metrics)
    remote: Remote = msgspec.field(default_factory=Remote)
    snapshot: SnapshotOptions = msgspec.field(default_factory=SnapshotOptions)
    cache_manager: CacheManager = msgspec.field(default_factory=CacheManager)
    image: Image = msgspec.field(default_factory=Image)
    experimental: Experimental = msgspec.field(default_factory=Experimental)

    @property
    def root_path(self) -> Path:
        """The root directory."""
        return Path(self.root)

    @property
    def cache_dir(self) -> Path:
        """Where the blob cache is."""
        return Path(self.cache_manager.cache_dir or self.root_path / "cache")

    @property
    def log_dir(self) -> Path:
        """Where the logs are."""
        return Path(self.log.dir or self.root_path / "logs")

    @property
    def shared(self) -> bool:
        """One daemon for all images, rather than one for each."""
        return self.daemon_mode == "shared"


def load(path: Path | None, overrides: dict[str, Any]) -> tuple[Config, list[str]]:
    """Read a configuration file, put ``overrides`` (``"daemon.fs_driver": value``; None is skipped) over it.

    Returns:
        The checked configuration, and one warning for each key that is unknown or has no effect here.

    Raises:
        ConfigError: the file cannot be read, a key has the wrong type, a value cannot be used.
    """
    where = str(path) if path else "command line"
    document: dict[str, Any] = {}
    if path is not None:
        try:
            document = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not TOML: {error}") from None
        if document.get("version") != 1:
            raise ConfigError(
                f"{path}: unsupported configuration version {document.get('version', 'none')}, expected 1"
            )
    document = _without_empty(document)
    for key, value in overrides.items():
        if value is not None:
            _set(document, key.split("."), value)
    try:
        config = msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
    warnings = [f"{where}: unknown key {key} is ignored" for key in _unknown(document, Config, "")]
    _check(config, where)
    return config, warnings + _without_effect(config)


def _check(config: Config, where: str) -> None:
    def refuse(key: str, value: object, advice: str) -> None:
        raise ConfigError(f"{where}: {key} = {value!r}: {advice}")

    if config.daemon_mode == "multiple":
        config.daemon_mode = "dedicated"
    if config.daemon_mode not in ("dedicated", "shared"):
        why = "not supported yet" if config.daemon_mode == "none" else "invalid daemon mode"
        refuse("daemon_mode", config.daemon_mode, f"{why}; use dedicated (or multiple), or shared")
    if config.daemon.fs_driver != "fusedev":
        known = config.daemon.fs_driver in ("fscache", "blockdev", "proxy", "nodev")
        why = "not supported yet" if known else "unknown driver"
        refuse("daemon.fs_driver", config.daemon.fs_driver, f"{why}; use fusedev")
    if config.daemon.recover_policy not in ("none", "restart", "failover"):
        refuse("daemon.recover_policy", config.daemon.recover_policy, "use none, restart or failover")
    if config.daemon.failover_policy not in ("none", "resend", "flush"):
        refuse("daemon.failover_policy", config.daemon.failover_policy, "use none, resend or flush")
    if not 0 <= config.daemon.threads_number <= 1024:
        refuse("daemon.threads_number", config.daemon.threads_number, "use 0 to 1024")
    if config.image.validate_signature:
        refuse("image.validate_signature", True, "not supported yet")
    if config.log.level not in ("trace", "debug", "info", "warn", "error"):
        refuse("log.level", config.log.level, "use trace, debug, info, warn or error")
    config.root = os.path.realpath(config.root)
    if len(os.fsencode(config.root)) > MAX_ROOT:
        refuse("root", config.root, f"longer than {MAX_ROOT} bytes, the sockets below it could not be bound")
    mirrors = config.remote.mirrors_config.dir
    if mirrors and not os.path.isdir(mirrors):  # noqa: PTH112 (a path that is too long is no directory)
        refuse("remote.mirrors_config.dir", mirrors, "no such directory")
    for key, text in (("cache_manager.gc_period", config.cache_manager.gc_period),):
        try:
            duration(text)
        except ConfigError as error:
            raise ConfigError(f"{where}: {key}: {error}") from None


def _without_effect(config: Config) -> list[str]:
    """What is asked for and not there yet; none of it changes what a container sees."""
    auth, experimental = config.remote.auth, config.experimental
    asked = {
        "system.enable": config.system.enable,
        "metrics.address": bool(config.metrics.address),
        "cgroup.enable": config.cgroup.enable,
        "snapshot.enable_kata_volume": config.snapshot.enable_kata_volume,
        "remote.auth.enable_kubeconfig_keychain": auth.enable_kubeconfig_keychain,
        "remote.auth.enable_cri_keychain": auth.enable_cri_keychain,
        "remote.auth.enable_kubelet_credential_providers": auth.enable_kubelet_credential_providers,
        "experimental.enable_stargz": experimental.enable_stargz,
        "experimental.enable_referrer_detect": experimental.enable_referrer_detect,
        "experimental.enable_index_detect": experimental.enable_index_detect,
        "experimental.enable_backend_source": experimental.enable_backend_source,
        "experimental.tarfs.enable_tarfs": experimental.tarfs.enable_tarfs,
    }
    return [f"{key} is not supported yet and has no effect" for key, wanted in asked.items() if wanted]


def _without_empty(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_empty(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value != ""
    }


def _set(table: dict[str, Any], path: list[str], value: object) -> None:
    for key in path[:-1]:
        table = table.setdefault(key, {})
    table[path[-1]] = value


def _unknown(table: dict[str, Any], section: type[msgspec.Struct], prefix: str) -> list[str]:
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(section)}
    found = []
    for key, value in table.items():
        if key not in fields:
            found.append(prefix + key)
        elif isinstance(value, dict):
            found += _unknown(value, fields[key], f"{prefix}{key}.")
    return found
