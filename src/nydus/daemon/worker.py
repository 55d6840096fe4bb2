"""The process that serves: one :class:`~nydus.daemon.server.Daemon`, its API, and the signals that end it."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from nydus.daemon import state as states
from nydus.daemon.channel import Message, Sender
from nydus.daemon.options import Options
from nydus.errors import NydusError
from nydus.mount import syscalls

if TYPE_CHECKING:
    from nydus.daemon.server import Daemon

log = logging.getLogger(__name__)

_DRAIN = 1.0  # seconds that running reads get before a successor is to answer them
_FLUSH = 2.0  # seconds for the caches to be written down


def preload(backend: str = "") -> None:
    """Imports what a worker needs, so that those forked later need not.

    Args:
        backend: type of the only backend that is known to be needed; an HTTP client takes as long to import
            as an image to mount.
    """
    from nydus.daemon import api, server
    from nydus.storage import cache, config
    from nydus.storage.backends import localfs

    if backend in ("", "registry"):
        from nydus.storage.backends import registry

        del registry
    del api, server, cache, config, localfs


def run(
    options: Options,
    listener: socket.socket | None,
    connection: socket.socket,
    saved: bytes | None,
    descriptors: tuple[int, ...],
    takeover: bool,
) -> int:
    """Serves until told to end; returns the exit status.

    Args:
        options: the command line.
        listener: the API socket, already listening.
        connection: to the supervisor.
        saved: the last state of a dead predecessor, with its ``descriptors`` (/dev/fuse, blobfs mount).
        takeover: wait for the controller's ``takeover`` instead of mounting.
    """
    from nydus.daemon.api import ApiServer
    from nydus.daemon.server import Daemon

    syscalls.name_process("nydusd-worker")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stop = Stop()
    # The kernel may hand a signal to any thread: only this wakes the main one in every case.
    signal.set_wakeup_fd(stop.waker, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.request())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    to_supervisor = Sender(connection)
    daemon = Daemon(
        options,
        report=lambda state: to_supervisor.send(Message.STATE, states.encode(state)),
        descriptors=to_supervisor.send_descriptors,
        busy=lambda busy: to_supervisor.send(Message.BUSY, b"1" if busy else b"0"),
    )
    try:
        state = states.decode(saved) if saved is not None else None
        if state is not None and state.state in ("READY", "RUNNING"):
            daemon.restore(state, *(*descriptors, None, None)[:2])
            if state.state == "RUNNING":
                daemon.resume()
        elif not takeover:
            daemon.start()
    except NydusError as error:
        to_supervisor.send(Message.FAILED, str(error).encode())
        if options.log_file is not None:  # else the user has read it already
            log.error("cannot start: %s", error)
        return 1
    if listener is not None:
        ApiServer(daemon, listener, stop).start()
    to_supervisor.send(Message.READY)
    threading.Thread(target=_watch_mounts, args=(daemon, stop), name="mounts", daemon=True).start()
    keep_mounts = stop.wait()
    log.info("stopping%s", "; the mounts stay for a successor" if keep_mounts else "")
    daemon.stop(keep_mounts=keep_mounts)
    to_supervisor.send(Message.BYE)
    if keep_mounts:
        _drain(daemon)
    # The connection ends with its last descriptor, which wakes readers that wait for a backend with EIO.
    flush = threading.Thread(target=daemon.flush, daemon=True)
    flush.start()
    flush.join(_FLUSH)
    return 0


class Stop:
    """The wish to end, from a signal handler or any thread."""

    def __init__(self) -> None:
        self._wake, self.waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.keep_mounts = False

    def request(self, *, keep_mounts: bool = False) -> None:
        self.keep_mounts = keep_mounts
        with suppress(BlockingIOError):
            os.write(self.waker, b"x")

    def wait(self) -> bool:
        """Returns whether the mounts are to stay."""
        select.select([self._wake], [], [])
        return self.keep_mounts


def _watch_mounts(daemon: Daemon, stop: Stop) -> None:
    """Ends a daemon whose only mount was unmounted by somebody else."""
    with open("/proc/self/mountinfo", "rb") as file:
        poll = select.poll()
        poll.register(file, select.POLLPRI | select.POLLERR)
        while True:
            poll.poll()
            time.sleep(0.1)  # mount tables change in bursts
            try:
                if not daemon.check_mounts():
                    stop.request()
                    return
            except (OSError, ValueError) as error:
                log.warning("reading the mount table: %s", error)


def _drain(daemon: Daemon) -> None:
    end = time.monotonic() + _DRAIN
    blobfs = daemon.devices.blobfs
    if blobfs is None:
        return
    blobfs.leave()
    while blobfs.inflight() and time.monotonic() < end:
        time.sleep(0.01)
