"""What the successors of daemons need, kept while the daemons live (nydusd.md §4.1).

When a daemon is killed as a whole, its open ``/dev/fuse`` goes with it and the kernel answers every read of
its mounts with EIO from then on. While another process holds that descriptor readers wait, and a successor
that is given it goes on. Whoever holds it without having a successor started keeps readers waiting for ever.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from nydus.daemon.client import DaemonClient
from nydus.errors import NydusError

_TIMEOUT = 10.0
_LIMIT = 64 << 20
_MAX_DESCRIPTORS = 16


class _Estate(NamedTuple):
    """The state of a daemon, which only daemons understand, and its open descriptors."""

    state: bytes
    descriptors: list[int]

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


class Keeper:
    """Keeps state and descriptors of daemons, by their names. Calls for one name must not run side by side.

    Args:
        directory: of the sockets that daemons connect to (``--supervisor``); its path is short.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._estates: dict[str, _Estate] = {}

    def socket_path(self, name: str) -> Path:
        """Where a daemon finds us."""
        return self._directory / f"{name}.sock"

    def __contains__(self, name: str) -> bool:
        return name in self._estates

    def receive(self, name: str, client: DaemonClient) -> None:
        """Have a daemon hand over what its successor needs, in place of what it did before.

        Raises:
            DaemonError: it refuses, or is dead.
            NydusError: nothing came of it.
        """
        received: list[_Estate] = []
        try:
            with self._visit(name, lambda connection: received.append(_receive(connection))):
                client.send_state()
        except BaseException:
            # Of one that died while it answered. Nobody would ever let go of these descriptors.
            for estate in received:
                estate.close()
            raise
        if not received:
            raise NydusError(f"daemon {name} has not handed over its descriptors")
        self._replace(name, received[0])

    def give(self, name: str, client: DaemonClient) -> None:
        """Have a successor, which waits for it, take over. What it was given is kept all the same.

        Raises:
            DaemonError: it refuses, or is dead.
        """
        estate = self._estates[name]

        def send(connection: socket.socket) -> None:
            sent = socket.send_fds(connection, [estate.state], estate.descriptors)
            connection.sendall(estate.state[sent:])

        with self._visit(name, send):
            client.take_over()

    def drop(self, name: str) -> None:
        """Keep nothing of a daemon any more: if it is dead, its readers get EIO."""
        self._replace(name, None)

    def close(self) -> None:
        """Drop everything."""
        for name in list(self._estates):
            self.drop(name)

    def _replace(self, name: str, estate: _Estate | None) -> None:
        with self._lock:
            previous = self._estates.pop(name, None)
            if estate is not None:
                self._estates[name] = estate
        if previous is not None:
            previous.close()

    @contextmanager
    def _visit(self, name: str, talk: Callable[[socket.socket], None]) -> Iterator[None]:
        """Lets one daemon connect during the block; ``talk`` has ended when the block has."""
        path = self.socket_path(name)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
            listener.bind(str(path))
            listener.listen(1)

            def serve() -> None:
                with suppress(OSError):  # the daemon says what happened
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(_TIMEOUT)
                        talk(connection)

            thread = threading.Thread(target=serve, name="keeper", daemon=True)
            thread.start()
            try:
                yield
            finally:
                with suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)  # nobody waits any more for one that does not come
                thread.join()
                path.unlink(missing_ok=True)


def _receive(connection: socket.socket) -> _Estate:
    data, descriptors = bytearray(), list[int]()
    try:
        while len(data) <= _LIMIT:
            part, more, _, _ = socket.recv_fds(connection, 1 << 16, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
            descriptors += more
            data += part
            if not part:
                return _Estate(bytes(data), descriptors)
        raise OSError(f"more than {_LIMIT} bytes")
    except BaseException:
        _Estate(b"", descriptors).close()
        raise
