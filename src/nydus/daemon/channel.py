"""What a worker tells its supervisor: framed messages on a stream socket, descriptors beside them."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Sequence
from enum import IntEnum

_HEAD = struct.Struct("<II")
_LIMIT = 64 << 20


class Message(IntEnum):
    STATE = 1  # the encoded state
    DESCRIPTORS = 2  # /dev/fuse and, where it is known, the blobfs mount; the body says how many
    READY = 3  # started: everything the command line names is mounted
    FAILED = 4  # could not start: the reason
    BUSY = 6  # b"1": a mount begins, in which the worker waits for itself; b"0": none is going on
    BYE = 5  # stopping: the descriptors are of no more use


class Sender:
    """The worker's end. Thread-safe; silent when the supervisor is gone, which ends the worker anyway."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()

    def send(self, kind: Message, body: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        with self._lock:
            try:
                head = _HEAD.pack(kind, len(body))
                if descriptors:
                    socket.send_fds(self._socket, [head], list(descriptors))
                    self._socket.sendall(body)
                else:
                    self._socket.sendall(head + body)
            except OSError:
                pass

    def send_descriptors(self, *descriptors: int) -> None:
        valid = [descriptor for descriptor in descriptors if descriptor >= 0]
        self.send(Message.DESCRIPTORS, bytes([len(valid)]), valid)


class Receiver:
    """The supervisor's end, which never blocks."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.setblocking(False)
        self._data = bytearray()
        self._descriptors: list[int] = []
        self.ended = False

    def receive(self) -> list[tuple[Message, bytes, list[int]]]:
        """All whole messages that have come. The caller owns the descriptors."""
        while not self.ended:
            try:
                data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 16, 4)
            except BlockingIOError:
                break
            except OSError:
                data, descriptors = b"", []
            self._descriptors += descriptors
            self._data += data
            self.ended = not data
        messages = []
        while len(self._data) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._data)
            if length > _LIMIT:
                self.ended = True
                break
            if len(self._data) < _HEAD.size + length:
                break
            body = bytes(self._data[_HEAD.size : _HEAD.size + length])
            del self._data[: _HEAD.size + length]
            descriptors = []
            if kind == Message.DESCRIPTORS:
                count = body[0] if body else 0
                descriptors, self._descriptors = self._descriptors[:count], self._descriptors[count:]
            messages.append((Message(kind), body, descriptors))
        return messages

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
        self.socket.close()
