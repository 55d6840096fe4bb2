"""``containerd-nydus-grpc``: containerd's proxy snapshotter for Nydus images."""

from __future__ import annotations

from pathlib import Path

import click

from nydus import __version__
from nydus.cli.lazy import run
from nydus.errors import NydusError

_REPLACED = {
    "nydusd_path": ("--nydusd-path", "--nydusd"),
    "nydusimg_path": ("--nydusimg-path", "--nydus-image"),
    "cache_dir": ("--cache-dir", "cache_manager.cache_dir in --config"),
    "daemon_backend": ("--daemon-backend", "--fs-driver"),
    "nydusd_thread_num": ("--nydusd-thread-num", "daemon.threads_number in --config"),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(path_type=Path), help="Configuration file (TOML).")
@click.option("--root", help="Directory for snapshots, cache, sockets and logs.")
@click.option("--address", help="UNIX socket to serve on.")
@click.option("--nydus-image", help="Path of nydus-image.")
@click.option("--nydusd", help="Path of a nydusd other than ours.")
@click.option("--nydusd-config", "--config-path", help="Template of the daemons' configuration (JSON).")
@click.option("--nydus-overlayfs-path", help="Path or name of nydus-overlayfs.")
@click.option(
    "--daemon-mode", help="dedicated (or multiple): one daemon for each image; shared: one for all."
)
@click.option("--fs-driver", help="fusedev.")
@click.option("--log-level", help="trace, debug, info, warn or error.")
@click.option(
    "--log-to-stdout/--no-log-to-stdout", default=None, help="Log to standard output, not to a file."
)
@click.option("--nydusd-path", hidden=True)
@click.option("--nydusimg-path", hidden=True)
@click.option("--cache-dir", hidden=True)
@click.option("--daemon-backend", hidden=True)
@click.option("--nydusd-thread-num", type=int, hidden=True)
@click.option("--async-remove", is_flag=True, hidden=True)
@click.option("--enable-stargz", is_flag=True, hidden=True)
@click.version_option(__version__, prog_name="containerd-nydus-grpc")
def containerd_nydus_grpc(
    config: Path | None,
    root: str | None,
    address: str | None,
    nydus_image: str | None,
    nydusd: str | None,
    nydusd_config: str | None,
    nydus_overlayfs_path: str | None,
    daemon_mode: str | None,
    fs_driver: str | None,
    log_level: str | None,
    log_to_stdout: bool | None,
    async_remove: bool,
    enable_stargz: bool,
    **replaced: str | int | None,
) -> None:
    """Serve containerd's snapshots API, so that Nydus images start before they are pulled."""
    from nydus.snapshotter.config import load

    overrides = {
        "root": root,
        "address": address,
        "daemon_mode": daemon_mode,
        "daemon.nydusimage_path": nydus_image or replaced["nydusimg_path"],
        "daemon.nydusd_path": nydusd or replaced["nydusd_path"],
        "daemon.nydusd_config": nydusd_config,
        "daemon.fs_driver": fs_driver or replaced["daemon_backend"],
        "daemon.threads_number": replaced["nydusd_thread_num"],
        "cache_manager.cache_dir": replaced["cache_dir"],
        "snapshot.nydus_overlayfs_path": nydus_overlayfs_path,
        "experimental.enable_stargz": enable_stargz or None,
        "log.level": log_level,
        "log.log_to_stdout": log_to_stdout,
    }
    settings, warnings = load(config, overrides)
    warnings += [
        f"{option} is an old name; use {new}"
        for key, (option, new) in _REPLACED.items()
        if replaced[key] is not None
    ]
    if async_remove:
        warnings.append(
            "--async-remove has no effect: removal never waits unless snapshot.sync_remove is set"
        )

    from nydus.snapshotter.serve import serve

    try:
        serve(settings, warnings)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise NydusError(f"{where}{error.strerror or error}") from error


def main() -> None:
    run(containerd_nydus_grpc, "containerd-nydus-grpc")


if __name__ == "__main__":
    main()
