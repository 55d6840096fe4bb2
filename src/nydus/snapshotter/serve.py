"""The snapshotter as a process: from a configuration to a served socket, and the way back."""

from __future__ import annotations

import logging
import logging.handlers
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from nydus.daemon.spawn import WarmParent
from nydus.errors import ConfigError
from nydus.snapshotter.config import Config
from nydus.snapshotter.daemons import Launcher
from nydus.snapshotter.database import Database, RootLock
from nydus.snapshotter.images import Images
from nydus.snapshotter.service import create_server
from nydus.snapshotter.snapshotter import Snapshotter
from nydus.snapshotter.store import Store
from nydus.snapshotter.template import Template

log = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds that running calls get to finish at the end."""
_LEVELS = {"trace": "DEBUG", "debug": "DEBUG", "info": "INFO", "warn": "WARNING", "error": "ERROR"}


def serve(config: Config, warnings: list[str]) -> None:
    """Serve until SIGTERM or SIGINT; daemons and their mounts stay unless ``cleanup_on_close`` is set.

    Raises:
        NydusError: the root is in use, the address taken, the template wrong, nydusd missing.
    """
    # Two descriptors of each daemon are kept; a thousand images are not too many.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    root = config.root_path
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.callback(RootLock(root).close)
        _set_up_logging(config)
        for warning in warnings:
            log.warning("%s", warning)
        database = Database(root / "metadata.db")
        stack.callback(database.close)
        store = Store(database, root / "snapshots")
        mirrors = config.remote.mirrors_config.dir
        template = Template(
            Path(config.daemon.nydusd_config) if config.daemon.nydusd_config else None,
            config.cache_dir,
            Path(mirrors) if mirrors else None,
            skip_verify=config.remote.skip_ssl_verify,
        )
        images = Images(config, database, store, _launcher(config, stack), template)
        stack.callback(lambda: images.close(unmount=config.cleanup_on_close))
        server = create_server(
            Snapshotter(config, store, images), Path(config.address), uid=config.uid, gid=config.gid
        )
        wait_for_stop = _catch_signals()
        server.start()
        images.recover()
        log.info("serving on %s, root %s, %s daemons", config.address, root, config.daemon_mode)
        wait_for_stop()
        log.info("stopping")
        server.stop(GRACE).wait()


class Command:
    """Starts daemons by running a program, for a nydusd that is not ours."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def spawn(self, argv: list[str], *, log: Path | str | None = None) -> int:
        """Start one; it gets a session of its own so that it outlives us."""
        for process in list(self._running.values()):
            process.poll()  # those that have ended must not stay as zombies
        with open(log or os.devnull, "ab") as output:
            process = subprocess.Popen(
                [self._program, *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._running[process.pid] = process
        return process.pid

    def exit_status(self, pid: int) -> int | None:
        """Its return code, None while it runs."""
        status = self._running[pid].poll()
        if status is not None:
            del self._running[pid]
        return status


def _launcher(config: Config, stack: ExitStack) -> Launcher:
    program = config.daemon.nydusd_path
    ours = Path(sys.executable).with_name("nydusd")
    if program and Path(program).resolve() != ours.resolve():
        found = shutil.which(program)
        if found is None:
            raise ConfigError(f"daemon.nydusd_path: {program} is no program; leave it out to use our own")
        return Command(found)
    warm = WarmParent()
    warm.start()
    stack.callback(warm.close)
    return warm


def _catch_signals() -> Callable[[], None]:
    """What waits for SIGTERM or SIGINT; from a second one on, the process ends at once."""
    # The kernel may hand a signal to any thread: only the wakeup descriptor wakes the main one in every case.
    wake, waker = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(waker, False)
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            os._exit(1)
        caught.append(number)

    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)

    def wait() -> None:
        os.read(wake, 1)

    return wait


def _set_up_logging(config: Config) -> None:
    handlers: list[logging.Handler] = []
    if config.log.log_to_stdout:
        handlers.append(logging.StreamHandler(sys.stdout))
    else:
        config.log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        handlers.append(
            logging.handlers.RotatingFileHandler(
                config.log_dir / "nydus-snapshotter.log",
                maxBytes=config.log.log_rotation_max_size << 20,
                backupCount=config.log.log_rotation_max_backups,
            )
        )
        errors = logging.StreamHandler()
        errors.setLevel(logging.WARNING)
        handlers.append(errors)
    logging.basicConfig(
        level=_LEVELS[config.log.level],
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=handlers,
    )
