"""Bounds-checked access to bytes that nobody vouches for."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from nydus.errors import FormatError

Source = bytes | bytearray | memoryview | mmap.mmap


class Buffer:
    """Some bytes with a name; every access outside of them is a :class:`FormatError` that says where.

    Arrays are views: copy what must outlive the buffer.
    """

    __slots__ = ("data", "size", "where")

    def __init__(self, data: Source, where: str = "") -> None:
        self.data = np.frombuffer(data, np.uint8) if len(data) else np.zeros(0, np.uint8)
        self.size = len(self.data)
        self.where = where

    def check(self, offset: int, length: int, what: str) -> None:
        """Require that ``length`` bytes at ``offset`` exist."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                f"{what} of {length} bytes reaches beyond the end ({self.size} bytes)",
                where=self.where,
                offset=offset,
            )

    def bytes(self, offset: int, length: int, what: str) -> bytes:
        self.check(offset, length, what)
        return self.data[offset : offset + length].tobytes()

    def array(self, offset: int, count: int, dtype: npt.DTypeLike, what: str) -> npt.NDArray[Any]:
        """``count`` consecutive records, as a view."""
        kind = np.dtype(dtype)
        self.check(offset, count * kind.itemsize, what)
        return self.data[offset : offset + count * kind.itemsize].view(kind)

    def gather(self, offsets: npt.NDArray[Any], dtype: npt.DTypeLike, what: str) -> npt.NDArray[Any]:
        """One record from each byte offset (u8, any alignment, any order), copied."""
        kind = np.dtype(dtype)
        if not len(offsets):
            return np.zeros(0, kind)
        top = int(offsets.max())
        self.check(top, kind.itemsize, what)
        windows = np.lib.stride_tricks.sliding_window_view(self.data, kind.itemsize)
        return np.ascontiguousarray(windows[offsets]).view(kind).reshape(-1)

    def error(
        self, what: str, offset: int | None = None, *, found: object = None, expected: object = None
    ) -> FormatError:
        return FormatError(what, where=self.where, offset=offset, found=found, expected=expected)
