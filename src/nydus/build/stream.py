"""Bytes of a layer as a stream: plain, gzip or zstd in, one forward-only window of plain bytes out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import FileIO
from typing import Any, Protocol

from nydus.errors import FormatError, NydusError

#: Plain bytes handed over at once. Large enough that a block costs microseconds of Python for each MiB.
BLOCK = 1 << 20
_GZIP = b"\x1f\x8b\x08"
_ZSTD = b"\x28\xb5\x2f\xfd"
#: The largest zstd window accepted (that of ``zstd --long=27``), so that a frame cannot ask for gigabytes.
_ZSTD_WINDOW = 1 << 27


def keep_memory() -> None:
    """Have this process keep freed memory of up to 256 MiB for its next blocks (glibc only).

    Otherwise most blocks go back to the kernel, which clears their pages each time they are taken again.
    """
    import ctypes

    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    with suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)


class Source(Protocol):
    """What a layer is read from: a file, a FIFO, a socket. ``read(n)`` returns b"" only at the end."""

    def read(self, size: int, /) -> bytes: ...


def blocks(source: Source, where: str = "", raw: Callable[[bytes], object] | None = None) -> Iterator[bytes]:
    """The plain bytes of a plain, gzip (any number of members) or zstd (any number of frames) stream.

    Args:
        source: the stream; read to its end, so that whoever feeds a FIFO is never cut off.
        where: its name for error messages.
        raw: called with every piece of the stored bytes, in order.

    Raises:
        FormatError: the compressed stream is damaged or cut short.
    """
    head = b""
    while len(head) < 4 and (piece := source.read(BLOCK)):
        head += piece
    pieces = _pieces(head, source, raw)
    if head.startswith(_GZIP):
        return _gunzip(pieces, where)
    if head.startswith(_ZSTD):
        return _unzstd(pieces, where)
    return pieces


def tap(source: Source, raw: Callable[[bytes], object]) -> Iterator[bytes]:
    """The stored bytes of a stream, each piece given to ``raw`` first."""
    return _pieces(source.read(BLOCK), source, raw)


def _pieces(head: bytes, source: Source, raw: Callable[[bytes], object] | None) -> Iterator[bytes]:
    piece = head
    while piece:
        if raw is not None:
            raw(piece)
        yield piece
        piece = source.read(BLOCK)


def _gunzip(pieces: Iterator[bytes], where: str) -> Iterator[bytes]:
    """Inflate every member; what follows the last one (padding, usually) is read and ignored."""
    from isal import igzip_lib

    failure: Any = igzip_lib.error  # its stub calls it an instance

    def member() -> igzip_lib.IgzipDecompressor:
        return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)

    position = 0
    inflater = member()
    started = False
    rest = b""
    for piece in pieces:
        # Small steps: the tail behind each member is copied, which would be quadratic for tiny members.
        for start in range(0, len(piece), BLOCK // 8):
            data = rest + piece[start : start + BLOCK // 8]
            rest = b""
            while data or not inflater.needs_input:
                if not started:
                    if len(data) < 2:
                        rest, data = data, b""
                        break
                    if not data.startswith(_GZIP[:2]):
                        for _ in pieces:  # not a member: drain
                            pass
                        return
                try:
                    out = inflater.decompress(data, BLOCK)
                except failure as error:
                    raise FormatError(f"not a gzip stream: {error}", where=where, offset=position) from None
                started = True
                data = b""
                if out:
                    yield out
                if inflater.eof:
                    data = inflater.unused_data
                    inflater = member()
                    started = False
                    if not data:
                        break
                elif not out:
                    break
            position += BLOCK // 8
    if started:
        raise FormatError("the gzip stream ends inside a member", where=where, offset=position)


def _unzstd(pieces: Iterator[bytes], where: str) -> Iterator[bytes]:
    import zstandard

    class Joined:
        """The pieces as the reader object that zstandard wants."""

        def read(self, size: int = -1) -> bytes:
            return next(pieces, b"")

    joined: Any = Joined()
    reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(
        joined, read_size=BLOCK, read_across_frames=True
    )
    while True:
        try:
            block = reader.read(BLOCK)
        except zstandard.ZstdError as error:
            raise FormatError(f"not a zstd stream: {error}", where=where) from None
        if not block:
            return
        yield block


def ahead(produce: Iterator[bytes], depth: int = 4) -> Iterator[bytes]:
    """The same blocks, made in a thread of their own up to ``depth`` blocks ahead.

    Closing the iterator (or dropping it) ends the thread at its next block.
    """
    done = object()
    ready: queue.Queue[object] = queue.Queue(depth)
    stopped = threading.Event()

    def run() -> None:
        last: object = done
        try:
            for block in produce:
                while not stopped.is_set():
                    try:
                        ready.put(block, timeout=0.5)
                        break
                    except queue.Full:
                        continue
                if stopped.is_set():
                    return
        except BaseException as error:
            last = error
        while not stopped.is_set():
            try:
                ready.put(last, timeout=0.5)
                return
            except queue.Full:
                continue

    threading.Thread(target=run, name="layer-reader", daemon=True).start()
    try:
        while True:
            item = ready.get()
            if item is done:
                return
            if isinstance(item, BaseException):
                raise item
            assert isinstance(item, bytes)
            yield item
    finally:
        stopped.set()


class Window:
    """A forward-only view of a stream that gives out runs of bytes without copying where it can.

    Attributes:
        position: offset in the stream of the next byte.
    """

    def __init__(self, source: Iterator[bytes], where: str = "") -> None:
        self._blocks = source
        self._view = memoryview(b"")
        self._next = 0
        self.position = 0
        self.where = where

    def take(self, size: int) -> memoryview:
        """Exactly the next ``size`` bytes; the view stays valid for as long as it is held.

        Raises:
            FormatError: the stream ends first.
        """
        start, end = self._next, self._next + size
        if end <= len(self._view):
            self._next = end
            self.position += size
            return self._view[start:end]
        parts = [self._view[start:]]
        have = len(parts[0])
        while have < size:
            block = next(self._blocks, None)
            if block is None:
                raise FormatError("the stream ends too early", where=self.where, offset=self.position + have)
            parts.append(memoryview(block))
            have += len(block)
        self._view = parts[-1]
        self._next = len(self._view) - (have - size)
        parts[-1] = self._view[: self._next]
        self.position += size
        return memoryview(b"".join(parts))

    def skip(self, size: int) -> None:
        """Pass over ``size`` bytes without keeping them."""
        while size > 0:
            step = min(size, BLOCK)
            self.take(step)
            size -= step

    def pad(self, size: int) -> None:
        """Pass over padding, which may be missing at the end of the stream."""
        while size > 0 and self._fill():
            step = min(size, len(self._view) - self._next)
            self._next += step
            self.position += step
            size -= step

    def header(self) -> bytes | None:
        """The next 512 bytes; None at the end of the stream.

        Raises:
            FormatError: the stream ends within them.
        """
        return bytes(self.take(512)) if self._fill() else None

    def _fill(self) -> bool:
        """Have a byte to give out; False at the end of the stream."""
        while self._next == len(self._view):
            block = next(self._blocks, None)
            if block is None:
                return False
            self._view, self._next = memoryview(block), 0
        return True

    def drain(self) -> None:
        """Read to the end, for the sake of whoever writes the other end of a pipe."""
        self.position += len(self._view) - self._next
        self._view, self._next = memoryview(b""), 0
        for block in self._blocks:
            self.position += len(block)


def open_source(path: str) -> FileIO:
    """Open a regular file, FIFO or character device for :func:`blocks`.

    Raises:
        NydusError: it cannot be opened, or is a directory.
    """
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise NydusError(f"{path}: cannot read the source: {error.strerror}") from None
