"""Handing state and descriptors to a controller and taking them from it (nydusd.md §4.1).

The daemon is always the client: one connection for a transfer, no framing, the end of the stream ends it.
Descriptors go with the first bytes: ``/dev/fuse``, then the blobfs mount.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from nydus.daemon import state as states
from nydus.daemon.state import State
from nydus.errors import NydusError

_TIMEOUT = 10.0
_LIMIT = 64 << 20
_MAX_DESCRIPTORS = 16


def push(path: Path, state: State, descriptors: list[int]) -> None:
    """Gives a controller all it needs to start a successor."""
    data = states.encode(state)
    with _connect(path) as connection:
        try:
            sent = socket.send_fds(connection, [data], descriptors)
            connection.sendall(data[sent:])
        except OSError as error:
            raise NydusError(f'Upgrade(DaemonAbnormal(UpgradeManager("{path}: {error}")))') from None


def pull(path: Path) -> tuple[State, tuple[int | None, int | None]]:
    """Takes a predecessor's state from a controller, with its descriptors where it had any."""
    descriptors: list[int] = []
    data = b""
    try:
        with _connect(path) as connection:
            try:
                while True:
                    part, more, _, _ = socket.recv_fds(connection, 1 << 16, _MAX_DESCRIPTORS)
                    descriptors += more
                    data += part
                    if not part:
                        break
                    if len(data) > _LIMIT:
                        raise NydusError(f"{path}: the state is larger than {_LIMIT} bytes")
            except OSError as error:
                raise NydusError(f'Upgrade(DaemonAbnormal(UpgradeManager("{path}: {error}")))') from None
        state = states.decode(data, str(path))
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    for extra in descriptors[2:]:
        os.close(extra)
    device = descriptors[0] if descriptors else None
    mount = descriptors[1] if len(descriptors) > 1 else None
    return state, (device, mount)


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(_TIMEOUT)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        text = f"StorageBackendError(CreateUnixStream({path}: {error.strerror or error}))"
        raise NydusError(f'Upgrade(DaemonAbnormal(UpgradeManager("{text}")))') from None
    return connection
