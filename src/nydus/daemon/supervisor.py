"""The process that a user starts: it keeps what must survive, and replaces the worker that may die.

The supervisor is single-threaded, so that it can fork at any time. It holds a second copy of the FUSE
descriptors and the worker's last report. When the worker dies it forks a successor at once, which has the
kernel send again what was not answered; readers only wait a little. The supervisor never mounts and never
looks into a mount: whoever waits for FUSE must not be the one who has to start the next server.

When the supervisor itself dies the kernel kills the worker: the daemon is one thing, with one pid.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from nydus.daemon import worker
from nydus.daemon.channel import Message, Receiver
from nydus.daemon.lock import MountLock, is_ours
from nydus.daemon.options import Options
from nydus.errors import NydusError
from nydus.mount import syscalls, table

log = logging.getLogger(__name__)

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_STOP_SECONDS = 5.0  # for the worker to unmount
_QUICK = 10.0  # a worker that lived shorter than this did not get far
_GIVE_UP = 10  # crashes of such workers in a row
_POLL = 100  # ms between looks at a worker that may be dead but not reapable


class Supervisor:
    """Runs one daemon until it ends.

    Args:
        options: its command line.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._listener: socket.socket | None = None
        self._bound: Path | None = None
        self._inode: tuple[int, int] | None = None
        self._descriptors: list[int] = []
        self._state: bytes | None = None
        self._ready = self._busy = self._bye = False
        self._dying: list[int] = []
        self._stopping = 0.0
        self._crashes = 0
        self._lock = MountLock(options.mountpoint)

    def run(self) -> int:
        """Returns the exit status. Raises NydusError where the daemon cannot even be tried."""
        wake, waker = socket.socketpair()
        wake.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        for number in (*_STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(number, _ignore)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        try:
            takeover = self._prepare()
            gc.freeze()
            return self._run(wake, takeover)
        finally:
            self._close_descriptors()
            self._remove_socket()
            self._lock.release()
            signal.set_wakeup_fd(-1)
            wake.close()
            waker.close()

    # Before the first worker

    def _prepare(self) -> bool:
        """Makes sure that the place is free. Returns whether to wait for a takeover."""
        options = self.options
        if options.apisock is not None and _answers(options.apisock):
            raise NydusError(f"{options.apisock}: another daemon serves this socket")
        takeover = options.upgrade
        if not takeover:
            dead = self._lock.acquire()
            if dead and options.supervisor is not None:
                takeover = True  # its mounts may still be alive in the controller's hands
            elif dead:
                while (left := table.at(options.mountpoint)) is not None and is_ours(left):
                    syscalls.detach(options.mountpoint)
                    log.warning("unmounted what a dead daemon left at %s", options.mountpoint)
        if not takeover and not options.mountpoint.is_dir():
            raise NydusError(f"{options.mountpoint}: the mountpoint is not a directory")
        if options.apisock is not None:
            self._bind(options.apisock)
        return takeover

    def _bind(self, path: Path) -> None:
        """Binds beside the final name: clients take the socket's existence for a finished start."""
        aside = path.with_name(f".nydusd-{os.getpid()}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        folder = -1
        try:
            aside.unlink(missing_ok=True)
            folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            # A socket's name may have 107 bytes; this one has a few whatever the folder is called.
            listener.bind(f"/proc/self/fd/{folder}/{aside.name}")
            listener.listen(256)
        except OSError as error:
            listener.close()
            raise NydusError(f"{path}: cannot make the API socket: {error.strerror or error}") from None
        finally:
            if folder >= 0:
                os.close(folder)
        self._listener, self._bound = listener, aside

    def _publish(self) -> None:
        if self._bound is not None and self.options.apisock is not None:
            self._bound.rename(self.options.apisock)
            self._bound = self.options.apisock
            info = self._bound.lstat()
            self._inode = (info.st_dev, info.st_ino)

    def _remove_socket(self) -> None:
        """Removes our socket, but not a successor's of the same name."""
        if self._listener is not None:
            self._listener.close()
        if self._bound is None:
            return
        with suppress(OSError):
            info = self._bound.lstat()
            if self._inode in (None, (info.st_dev, info.st_ino)):
                self._bound.unlink()

    # Workers

    def _run(self, wake: socket.socket, takeover: bool) -> int:
        pid, receiver, born = *self._fork(takeover), time.monotonic()
        while True:
            poll = select.poll()
            poll.register(wake, select.POLLIN)
            if not receiver.ended:
                poll.register(receiver.socket, select.POLLIN)
            # A worker killed while it mounts cannot be reaped until a successor answers what it asked of
            # itself: only the state of its main thread tells that it is dead.
            patient = not (self._busy or self._stopping)
            events = {fd for fd, _ in poll.poll(None if patient else _POLL)}
            if wake.fileno() in events:
                numbers = _drain(wake)
                if _STOP_SIGNALS & set(numbers) and not self._stopping:
                    self._stopping = time.monotonic()
                    _kill(pid, signal.SIGTERM)
            self._hear(receiver)
            if self._stopping and time.monotonic() - self._stopping > _STOP_SECONDS:
                log.error("the worker does not end; killing it")
                self._close_descriptors()
                _kill(pid, signal.SIGKILL)
                self._bye, self._stopping = True, time.monotonic()
            status = _reap(pid)
            self._dying = [other for other in self._dying if _reap(other) is None]
            if status is None and not (self._busy and self._ready and _is_zombie(pid)):
                continue
            if status is None:
                self._dying.append(pid)
            self._hear(receiver)
            receiver.close()
            if status == 0 or self._bye:
                return 0
            if not self._ready:
                return 1 if status is None or status < 0 else status
            if not self._go_on(status, time.monotonic() - born):
                return 1
            self._busy = False
            pid, receiver, born = *self._fork(takeover), time.monotonic()
            if self._stopping:
                _kill(pid, signal.SIGTERM)  # somebody must unmount

    def _fork(self, takeover: bool) -> tuple[int, Receiver]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        # A signal that comes before the worker can handle it must wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.set_wakeup_fd(-1)
                syscalls.die_with_parent(signal.SIGKILL)
                if os.getppid() == parent:
                    ours.close()
                    status = worker.run(
                        self.options, self._listener, theirs, self._state, tuple(self._descriptors), takeover
                    )
            except BaseException:
                log.exception("defect in the worker")
            finally:
                with suppress(Exception):
                    logging.shutdown()
                os._exit(status)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        theirs.close()
        return pid, Receiver(ours)

    def _hear(self, receiver: Receiver) -> None:
        for kind, body, descriptors in receiver.receive():
            if kind == Message.STATE:
                self._state = body
                if self._ready:
                    self._lock.adopt()
            elif kind == Message.BUSY:
                self._busy = body == b"1"
            elif kind == Message.DESCRIPTORS:
                self._close_descriptors()
                self._descriptors = descriptors
            elif kind == Message.READY and not self._ready:
                self._ready = True
                self._publish()
            elif kind == Message.FAILED:
                print(f"nydusd: {body.decode(errors='replace')}", file=sys.stderr, flush=True)
            elif kind == Message.BYE:
                self._close_descriptors()
                self._bye = True
                self._stopping = self._stopping or time.monotonic()

    def _go_on(self, status: int | None, lived: float) -> bool:
        """Whether to start another worker after one died."""
        crashed = status not in (None, -signal.SIGKILL)
        self._crashes = (self._crashes + crashed) if lived < _QUICK else int(crashed)
        why = f"was killed by signal {-(status or -9)}" if (status or -9) < 0 else f"ended with {status}"
        if self._crashes >= _GIVE_UP:
            log.error("the worker %s; %d crashes in a row: giving up", why, self._crashes)
            return False
        log.warning("the worker %s after %.1f s; its successor takes over", why, lived)
        if self._crashes > 1:
            time.sleep(min(2.0, 0.05 * 2**self._crashes))
        return True

    def _close_descriptors(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def _ignore(number: int, frame: object) -> None:
    """Only wakes the loop."""


def _drain(wake: socket.socket) -> bytes:
    with suppress(BlockingIOError):
        return wake.recv(4096)
    return b""


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _reap(pid: int) -> int | None:
    """The exit status of a child, negative for a signal; None while it lives."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 1
    return os.waitstatus_to_exitcode(status) if found else None


def _is_zombie(pid: int) -> bool:
    """Whether the main thread is dead though other threads keep the process from being reaped."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(2)
        try:
            client.connect(str(path))
        except TimeoutError:
            return True
        except OSError:
            return False
        return True
