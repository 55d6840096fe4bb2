"""The processes: starting a nydusd, finding out what became of it, stopping it."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from nydus.daemon.client import DaemonClient, DaemonError
from nydus.errors import MountError, NydusError
from nydus.mount import syscalls

log = logging.getLogger(__name__)

START_TIMEOUT = 30.0
"""Seconds a daemon may take until it serves; a registry that does not answer is given up before that."""
STOP_TIMEOUT = 10.0
_LAST_BREATH = 1.0


class Launcher(Protocol):
    """What starts daemons: :class:`nydus.daemon.spawn.WarmParent`, or a stand-in."""

    def spawn(self, argv: list[str], *, log: Path | str | None = None) -> int:
        """Start one and return its pid at once."""
        ...

    def exit_status(self, pid: int) -> int | None:
        """Its exit status, None while it runs."""
        ...


class Daemon:
    """One nydusd process, ours or adopted, known by its API socket.

    Args:
        socket_path: its API socket.
        mountpoint: the mount it serves (dedicated), or the directory that holds its mounts (shared).
        log_file: where its output goes.
    """

    def __init__(self, socket_path: Path, mountpoint: Path, log_file: Path) -> None:
        self.socket_path, self.mountpoint, self.log_file = socket_path, mountpoint, log_file
        self.client = DaemonClient(socket_path)

    def start(self, launcher: Launcher, arguments: list[str], *, state: str = "RUNNING") -> None:
        """Start it and wait until it serves, or until it is in another ``state``.

        Raises:
            NydusError: it ended, or did not serve in time; the text ends with the daemon's own words.
        """
        self._await_end()
        for directory in (self.socket_path.parent, self.mountpoint, self.log_file.parent):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.socket_path.unlink(missing_ok=True)
        said = self.log_file.stat().st_size if self.log_file.exists() else 0
        argv = ["fuse", *arguments, "--mountpoint", str(self.mountpoint), "--apisock", str(self.socket_path)]
        argv += ["--log-file", str(self.log_file)]
        pid = launcher.spawn(argv, log=self.log_file)
        end = time.monotonic() + START_TIMEOUT
        pause = 0.002
        while True:
            try:
                if self.client.state() == state:
                    return
            except DaemonError as error:
                if error.status is not None:
                    raise
            status = launcher.exit_status(pid)
            if status is not None:
                ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
                raise NydusError(f"nydusd {ended}: {self.last_words(said)}")
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                raise NydusError(f"nydusd did not serve within {START_TIMEOUT:g} s: {self.last_words(said)}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)

    def alive(self) -> bool:
        """It answers and serves."""
        try:
            return self.client.state() == "RUNNING"
        except DaemonError:
            return False

    def process(self) -> int | None:
        """A pid descriptor of the process that listens on the socket, None if nobody does."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(2)
            try:
                connection.connect(str(self.socket_path))
                credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                pid = int(struct.unpack("3i", credentials)[0])
                return os.pidfd_open(pid)
            except OSError:
                return None

    def gone(self) -> bool:
        """Nobody listens on the socket any more; waits for one that is just ending."""
        descriptor = self.process()
        if descriptor is None:
            return True
        try:
            try:
                wait = STOP_TIMEOUT if self.client.state() == "STOPPED" else 0
            except DaemonError:
                wait = _LAST_BREATH
            waiter = select.poll()
            waiter.register(descriptor, select.POLLIN)
            return bool(waiter.poll(wait * 1000))
        finally:
            os.close(descriptor)

    def stop(self) -> None:
        """End it with all its mounts, whatever state it is in. Never raises for a daemon that is gone."""
        descriptor = self.process()
        if descriptor is not None:
            try:
                _end(descriptor, signal.SIGTERM)
            finally:
                os.close(descriptor)
        detach(self.mountpoint)
        self.socket_path.unlink(missing_ok=True)

    def kill(self) -> None:
        """End its process, but leave its mounts to a successor."""
        descriptor = self.process()
        if descriptor is not None:
            try:
                _end(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)

    def _await_end(self) -> None:
        """Wait until no thread of a killed predecessor takes requests any more, which would be lost with it.

        All its processes listen on the socket. The wait is short: one that was killed inside a mount cannot
        end before its successor answers.
        """
        end = time.monotonic() + _LAST_BREATH
        while time.monotonic() < end:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_LAST_BREATH)
                try:
                    connection.connect(str(self.socket_path))
                except OSError:
                    return
            time.sleep(0.005)

    def last_words(self, offset: int = 0) -> str:
        """The last line of its log, not before ``offset``."""
        try:
            with open(self.log_file, "rb") as file:
                file.seek(max(offset, file.seek(0, os.SEEK_END) - 65536))
                lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            lines = []
        return lines[-1] if lines else "it said nothing"


class Watcher:
    """Calls back when a watched daemon's process ends. One thread for all."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._lock = threading.Lock()
        self._watched: dict[int, Callable[[], None]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="daemon-watcher", daemon=True)
        self._thread.start()

    def watch(self, daemon: Daemon, ended: Callable[[], None]) -> bool:
        """Watch ``daemon`` until it ends. False if it is gone already."""
        descriptor = daemon.process()
        if descriptor is None:
            return False
        with self._lock:
            self._watched[descriptor] = ended
        self._poll.register(descriptor, select.EPOLLIN)
        return True

    def close(self) -> None:
        """Stop watching."""
        self._closed = True
        self._thread.join()
        for descriptor in self._watched:
            os.close(descriptor)
        self._poll.close()

    def _run(self) -> None:
        while not self._closed:
            for descriptor, _ in self._poll.poll(0.2):
                self._poll.unregister(descriptor)
                with self._lock:
                    ended = self._watched.pop(descriptor)
                os.close(descriptor)
                try:
                    ended()
                except Exception:
                    log.exception("cannot deal with the end of a daemon")


def is_mounted(path: Path) -> bool:
    """Something is mounted exactly there, whether it works or not."""
    wanted = os.fsencode(path)
    with open("/proc/self/mountinfo", "rb") as table:
        return any(_unescape(line.split(b" ", 5)[4]) == wanted for line in table)


def mounts_below(path: Path) -> list[Path]:
    """Mount points at and below a directory, innermost and newest first."""
    prefix = os.fsencode(path)
    found = []
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            where = _unescape(line.split(b" ", 5)[4])
            if where == prefix or where.startswith(prefix + b"/"):
                found.append(Path(os.fsdecode(where)))
    return found[::-1]


def detach(path: Path) -> None:
    """Take away whatever is mounted at or below ``path``, even if its server is dead or it is in use.

    Raises:
        MountError: the kernel refuses.
    """
    for where in mounts_below(path):
        try:
            syscalls.detach(where)
        except OSError as error:
            raise MountError(f"cannot unmount {where}: {error.strerror}") from error


def _unescape(field: bytes) -> bytes:
    if b"\\" not in field:
        return field
    for code in (b"040", b"011", b"012", b"134"):
        field = field.replace(b"\\" + code, bytes([int(code, 8)]))
    return field


def _end(descriptor: int, first: signal.Signals) -> None:
    """Signal a process until it is gone: politely, then not."""
    waiter = select.poll()
    waiter.register(descriptor, select.POLLIN)
    for number in (first, signal.SIGKILL):
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return
        if waiter.poll(STOP_TIMEOUT * 1000):
            return
    log.error("a daemon does not end")
