"""File descriptors that stay valid for as long as somebody uses them."""

from __future__ import annotations

import os
from pathlib import Path


class OpenFile:
    """An open file whose descriptor is closed with the last reference to this object.

    A thread in the middle of ``pread`` holds a reference, so that another one may drop the file at any time:
    the number of a closed descriptor could belong to another file by then, and give its bytes.
    """

    __slots__ = ("fd", "path")

    def __init__(self, path: Path, flags: int, mode: int = 0o644) -> None:
        self.fd = -1
        self.path = path
        self.fd = os.open(path, flags | os.O_CLOEXEC, mode)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end of the file."""
        data = os.pread(self.fd, size, offset)
        if len(data) == size or not data:
            return data
        parts = [data]
        done = len(data)
        while done < size and (data := os.pread(self.fd, size - done, offset + done)):
            parts.append(data)
            done += len(data)
        return b"".join(parts)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """All of ``data``, or OSError."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self.fd, view, offset)
            view = view[done:]
            offset += done
