"""``nydusd``: serves Nydus images as mounted file systems (nydusd.md §1).

Parsed by argparse: a daemon's start-up time is part of a container's, and click costs 25 ms of it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import nydus
from nydus.errors import NydusError

if TYPE_CHECKING:
    from nydus.daemon.options import Options

_UNSUPPORTED = ("virtiofs", "nbd", "uffd", "singleton")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Runs a daemon until it ends; returns the exit status."""
    parser = _parser()
    arguments, ignored = parser.parse_known_args(argv)
    if arguments.mode not in (None, "fuse"):
        if arguments.mode in _UNSUPPORTED:
            parser.error(f"the mode {arguments.mode!r} is not supported; there is only 'fuse'")
        ignored.append(arguments.mode)
    if arguments.version:
        print(_version())
        return 0
    if arguments.warm is not None:
        from nydus.daemon import warm

        return warm.serve(arguments.warm, run)
    try:
        options = _options(arguments, parser)
        return _serve(options, ignored)
    except NydusError as error:
        print(f"nydusd: {error}", file=sys.stderr)
        return 1


def _serve(options: Options, ignored: list[str]) -> int:
    import logging

    from nydus.daemon import logs, worker
    from nydus.daemon.supervisor import Supervisor

    logs.set_up(options.log_level, options.log_file, options.log_rotation_size)
    log = logging.getLogger(__name__)
    if ignored:
        log.warning("ignoring unknown options: %s", " ".join(ignored))
    _raise_descriptor_limit(options.rlimit_nofile)
    worker.preload(options.backend_type())
    return Supervisor(options).run()


def _raise_descriptor_limit(wanted: int) -> None:
    """As far as allowed; never a reason to fail."""
    if not wanted:
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in ((wanted, max(hard, wanted)), (min(hard, wanted), hard)):
        if soft >= limit[0]:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            return
        except (ValueError, OSError):
            continue


def _options(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Options:
    from nydus.daemon.logs import LEVELS
    from nydus.daemon.options import Options

    if arguments.mountpoint is None:
        parser.error("--mountpoint is required")
    if arguments.shared_dir is not None:
        parser.error("--shared-dir (passthrough) is not supported")
    if arguments.writable:
        parser.error("--writable is not supported: mount an overlayfs on the image")
    if arguments.localfs_dir is not None and arguments.config is not None:
        parser.error("--localfs-dir and --config exclude each other")
    if arguments.bootstrap is not None and arguments.localfs_dir is None and arguments.config is None:
        parser.error("--bootstrap needs --config or --localfs-dir")
    if (arguments.id is None) != (arguments.supervisor is None):
        parser.error("--id and --supervisor need each other")
    if arguments.upgrade and arguments.supervisor is None:
        parser.error("--upgrade needs --supervisor")
    if not 1 <= arguments.fuse_threads <= 1024:
        parser.error("--fuse-threads is not between 1 and 1024")
    if arguments.log_level not in LEVELS:
        parser.error(f"--log-level is not one of {', '.join(LEVELS)}")
    if not arguments.virtual_mountpoint.startswith("/"):
        parser.error("--virtual-mountpoint is not absolute")
    return Options(
        mountpoint=_absolute(arguments.mountpoint),
        apisock=_absolute(arguments.apisock) if arguments.apisock else None,
        bootstrap=_absolute(arguments.bootstrap) if arguments.bootstrap else None,
        config=_absolute(arguments.config) if arguments.config else None,
        localfs_dir=_absolute(arguments.localfs_dir) if arguments.localfs_dir else None,
        virtual_mountpoint=arguments.virtual_mountpoint,
        prefetch_files=_prefetch_list(arguments.prefetch_files) if arguments.prefetch_files else None,
        threads=arguments.fuse_threads,
        provider=arguments.provider or os.environ.get("NYDUS_PROVIDER"),
        failover_policy=arguments.failover_policy,
        id=arguments.id,
        supervisor=_absolute(arguments.supervisor) if arguments.supervisor else None,
        upgrade=arguments.upgrade,
        log_level=arguments.log_level,
        log_file=_absolute(arguments.log_file) if arguments.log_file else None,
        log_rotation_size=arguments.log_rotation_size,
        rlimit_nofile=arguments.rlimit_nofile,
    )


def _absolute(path: str) -> Path:
    # Not resolve(): the mountpoint may be a dead mount, which cannot be looked into.
    return Path(os.path.abspath(path))  # noqa: PTH100


def _prefetch_list(path: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise NydusError(f"{path}: cannot read the prefetch list: {error}") from None
    for line in lines:
        if line and not line.startswith("/"):
            raise NydusError(f"{path}: {line!r} is not an absolute path")
    return [line for line in lines if line]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nydusd",
        description="Serve Nydus images as mounted file systems.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("mode", nargs="?", help="fuse (default)")
    add("-A", "--apisock", metavar="PATH", help="administration socket")
    add("-C", "--config", metavar="PATH", help="configuration (JSON)")
    add("-M", "--mountpoint", metavar="DIR", help="where to mount")
    add("-B", "--bootstrap", metavar="PATH", help="image metadata; without it images are mounted by the API")
    add("-D", "--localfs-dir", metavar="DIR", help="directory of blobs and cache, instead of --config")
    add("-m", "--virtual-mountpoint", metavar="PATH", default="/", help="where the image appears in it")
    add("-s", "--shared-dir", metavar="DIR", help=argparse.SUPPRESS)
    add("--prefetch-files", metavar="PATH", help="list of absolute paths to fetch ahead, one a line")
    add("--fuse-threads", "--thread-num", type=int, default=4, metavar="N", help="serving threads (4)")
    add("--failover-policy", choices=("none", "resend", "flush"), default="resend")
    add("--provider", choices=("auto", "blobfs", "fuse"), help="how to mount (default: what works best)")
    add("--writable", action="store_true", help=argparse.SUPPRESS)
    add("--id", metavar="ID", help="name of this daemon for its controller")
    add("--supervisor", metavar="PATH", help="the controller's socket")
    add("--upgrade", action="store_true", help="wait for a takeover")
    add("-l", "--log-level", metavar="LEVEL", default="info", help="trace, debug, info, warn or error")
    add("-L", "--log-file", metavar="PATH")
    add("--log-rotation-size", type=int, default=0, metavar="MIB")
    add("--rlimit-nofile", type=int, default=1_000_000, metavar="N")
    add("--dedup-db", metavar="PATH", help=argparse.SUPPRESS)
    add("--warm", type=int, metavar="FD", help=argparse.SUPPRESS)
    add("-V", "--version", action="store_true")
    return parser


def _version() -> str:
    version = nydus.__version__
    return (
        f"nydusd \rVersion: \tv{version}\nGit Commit: \tv{version}\nBuild Time: \t\n"
        f"Profile: \trelease\nRustc: \tPython {sys.version.split()[0]}"
    )


if __name__ == "__main__":
    main()
