"""A gzip stream read so that it can be entered again later: inflating stops at every deflate block.

Only zlib's own C interface has the stops. It is called through ctypes: zlib-ng's, in the library that its
Python package brings along, inflates at 1.7 times the speed of zlib and stops at the same places. The gzip
framing is handled here, because that leaves the checksum to isal, which is ten times as fast.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from nydus.errors import FormatError, NydusError

_Z_BLOCK = 5
_Z_STREAM_END, _Z_BUF_ERROR = 1, -5
_AT_BLOCK, _LAST_BLOCK = 128, 64
WINDOW = 32768
#: Plain bytes that go into one buffer, besides the window before them.
_BUFFER = 2 << 20
#: Up to so many plain bytes are inflated without letting other threads run: some 100 µs.
_LITTLE = 64 << 10
#: A gzip header with a name or comment beyond this is refused.
_MAX_HEADER = 1 << 16


class _Stream(ctypes.Structure):
    # As in zlib. What follows is narrower in zlib-ng, but lies within the same size, and is not used here.
    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


@dataclass(frozen=True)
class Library:
    """The functions of a zlib, all of which take the address of a :class:`_Stream`.

    Attributes:
        inflate: other threads run meanwhile.
        inflate_little: other threads wait: handing the interpreter over and back can take longer than to
            inflate some KiB.
    """

    start: Callable[[int], int]
    inflate: Callable[[int, int], int]
    inflate_little: Callable[[int, int], int]
    reset: Callable[[int], int]
    end: Callable[[int], int]


@cache
def zlib_ng() -> Library | None:
    """The zlib-ng inside the Python package of that name, if its functions can be seen from outside."""
    from zlib_ng import zlib_ng as module

    try:
        return _library(module.__file__, "zng_inflate", "zng_inflateInit2")
    except (OSError, AttributeError):
        return None


@cache
def zlib() -> Library:
    """The system's zlib."""
    try:
        return _library("libz.so.1", "inflate", "inflateInit2_", b"1", ctypes.sizeof(_Stream))
    except OSError:
        raise NydusError("indexing gzip layers needs zlib-ng or the system's zlib (libz.so.1)") from None


def _library(path: str, prefix: str, start: str, *version: bytes | int) -> Library:
    """Load a library; ``version`` is what the caller of zlib was compiled for, of which 1 is compared."""
    free, held = ctypes.CDLL(path), ctypes.PyDLL(path)
    begin, reset, end = free[start], free[f"{prefix}Reset"], free[f"{prefix}End"]
    inflate, inflate_little = free[prefix], held[prefix]
    for function in (inflate, inflate_little):
        function.argtypes = [ctypes.c_void_p, ctypes.c_int]
    reset.argtypes = end.argtypes = [ctypes.c_void_p]
    return Library(
        lambda stream: int(begin(ctypes.c_void_p(stream), -15, *version)), inflate, inflate_little, reset, end
    )


@dataclass(slots=True)
class Boundary:
    """A place where inflating can start.

    Attributes:
        member: number of the gzip member.
        in_offset, out_offset: position in the stored and in the plain stream.
        bits: how many bits of ``previous``, the byte before ``in_offset``, belong to what follows.
    """

    member: int
    in_offset: int
    out_offset: int
    bits: int = 0
    previous: int = 0


class GzipWindow:
    """The plain bytes of a gzip stream, inflated no further than they are asked for.

    Has the methods of :class:`nydus.build.stream.Window`.

    Args:
        pieces: the stored bytes.
        library: what inflates.

    Attributes:
        position: plain bytes given out or passed over.
        boundary: the last start of a deflate block.

    Raises (all methods):
        FormatError: the stream is damaged or cut short.
    """

    def __init__(self, pieces: Iterator[bytes], where: str = "", library: Library | None = None) -> None:
        from isal import isal_zlib

        self.where = where
        self.position = 0
        self._crc32 = isal_zlib.crc32
        self._pieces = pieces
        self._input = b""
        self._input_end = 0  # where the input ends in the stored stream
        self._last_byte = 0  # of the input before
        self._skipped = 0
        self._padding = 0  # how much of what was skipped may be missing at the end
        self._ended = False
        self._out = 0  # plain bytes inflated, without the rest of the buffer
        self._checked = 0  # … of which are in the checksum
        self._member = -1
        self._member_start = 0
        self._crc = 0
        self._dictionary: bytes | None = None
        self._library = library or zlib_ng() or zlib()
        self._stream = _Stream()
        self._address = ctypes.addressof(self._stream)
        if self._library.start(self._address):
            raise NydusError("zlib cannot be initialized")
        self._use_buffer(b"", _BUFFER)
        self._next_member()

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            self._library.end(self._address)

    @property
    def consumed(self) -> int:
        """Stored bytes used for the plain bytes up to :attr:`position`; after :meth:`skip`, for fewer."""
        return self._input_end - int(self._stream.avail_in)

    def dictionary(self) -> bytes:
        """The up to 32768 plain bytes before :attr:`boundary`, as far as they are of the same member."""
        if self._dictionary is None:
            end = self.boundary.out_offset - self._start
            low = max(self._member_start - self._start, end - WINDOW)
            self._dictionary = bytes(self._view[low:end])
        return self._dictionary

    def take(self, size: int) -> memoryview:
        """Exactly the next ``size`` bytes; the view stays valid for as long as it is held."""
        if self._skipped:
            self.settle()
        if self._inflate(size) < size:
            raise self._too_early()
        self.position += size
        end = self._out - self._start
        return self._view[end - size : end]

    def header(self) -> bytes | None:
        """The next 512 bytes; None at the end of the stream."""
        if self._skipped > WINDOW:
            self.settle()
        skipped, self._skipped = self._skipped, 0
        found = self._inflate(skipped + 512) - skipped
        if -self._padding <= found <= 0:
            return None
        if found < 512:
            raise self._too_early()
        self.position += 512
        end = self._out - self._start
        return bytes(self._view[end - 512 : end])

    def skip(self, size: int) -> None:
        """Pass over bytes; the work is done together with what is read next."""
        self._skipped += size
        self._padding = 0
        self.position += size

    def pad(self, size: int) -> None:
        """Pass over padding, which may be missing at the end of the stream."""
        self.skip(size)
        self._padding = size

    def settle(self) -> None:
        """Inflate up to :attr:`position`, so that :attr:`consumed` and :attr:`boundary` are of there."""
        while self._skipped:
            step = min(self._skipped, _BUFFER)
            found = self._inflate(step)
            self._skipped -= found
            if found < step:
                if self._skipped > self._padding:
                    raise self._too_early()
                self._skipped = 0

    def drain(self) -> None:
        """Read to the end, so that every checksum has been compared and the whole layer was seen."""
        self.settle()
        while not self._ended:
            self._inflate(WINDOW)
        for piece in self._pieces:
            self._input_end += len(piece)

    def _too_early(self) -> FormatError:
        return FormatError("the stream ends too early", where=self.where, offset=self._out)

    def _use_buffer(self, window: bytes | memoryview, size: int) -> None:
        """Go on in a new buffer, behind a copy of ``window``."""
        buffer = np.empty(len(window) + size, np.uint8)
        self._view = buffer.data
        self._view[: len(window)] = window
        self._start = self._out - len(window)  # the plain position of the start of the buffer
        self._room = size
        self._stream.next_out = buffer.ctypes.data + len(window)

    def _inflate(self, size: int) -> int:
        """Append ``size`` bytes to the buffer, fewer at the end of the stream; returns how many."""
        if size > self._room:
            self.dictionary()
            self._check()
            used = self._out - self._start
            self._use_buffer(self._view[max(0, used - WINDOW) : used], max(size, _BUFFER))
        if not size or self._ended:
            return 0
        stream, address = self._stream, self._address
        inflate = self._library.inflate if size > _LITTLE else self._library.inflate_little
        end = self._out + size
        stream.avail_out = left = size
        while left:
            if not stream.avail_in and not self._refill():
                raise FormatError(
                    "the gzip stream ends inside a member", where=self.where, offset=self._input_end
                )
            code = inflate(address, _Z_BLOCK)
            left = stream.avail_out
            if not code:
                kind = stream.data_type
                if kind & _AT_BLOCK and not kind & _LAST_BLOCK:
                    self._note_boundary(end - left, kind & 7)
            elif code == _Z_STREAM_END:
                self._out = end - left
                self._trailer()
                if not self._next_member():
                    break
            elif code != _Z_BUF_ERROR:
                reason = stream.msg.decode() if stream.msg else f"zlib error {code}"
                raise FormatError(f"not a gzip stream: {reason}", where=self.where, offset=self.consumed)
        self._out = end - left
        self._room -= size - left
        return size - left

    def _note_boundary(self, out: int, bits: int) -> None:
        used = len(self._input) - self._stream.avail_in
        # The byte of pending bits was consumed, from this piece of input or the one before.
        previous = (self._input[used - 1] if used else self._last_byte) if bits else 0
        self.boundary = Boundary(self._member, self.consumed, out, bits, previous)
        self._dictionary = None

    def _refill(self) -> bool:
        piece = next(self._pieces, b"")
        if not piece:
            return False
        self._input_end += len(piece)
        if self._input:
            self._last_byte = self._input[-1]
        self._input = piece
        # The bytes object is kept in _input for as long as zlib may read it.
        address = ctypes.cast(ctypes.c_char_p(piece), ctypes.c_void_p).value
        self._stream.next_in, self._stream.avail_in = address, len(piece)
        return True

    def _check(self) -> None:
        """Take what was inflated into the checksum."""
        start = self._start
        self._crc = self._crc32(self._view[self._checked - start : self._out - start], self._crc)
        self._checked = self._out

    def _bytes(self, size: int) -> bytes:
        """The next stored bytes, outside of deflate data; fewer only at the end."""
        stream = self._stream
        found = b""
        while len(found) < size and (stream.avail_in or self._refill()):
            start = len(self._input) - stream.avail_in
            part = self._input[start : start + size - len(found)]
            stream.avail_in -= len(part)
            stream.next_in += len(part)
            found += part
        return found

    def _exactly(self, size: int) -> bytes:
        found = self._bytes(size)
        if len(found) < size:
            raise FormatError("the gzip stream is cut short", where=self.where, offset=self.consumed)
        return found

    def _trailer(self) -> None:
        self._check()
        trailer = self._exactly(8)
        size = (self._out - self._member_start) & 0xFFFF_FFFF
        expected = (int.from_bytes(trailer[:4], "little"), int.from_bytes(trailer[4:], "little"))
        if (self._crc, size) != expected:
            raise FormatError(
                "wrong checksum or length of a gzip member",
                where=self.where,
                offset=self.consumed - 8,
                expected=expected,
                found=(self._crc, size),
            )

    def _next_member(self) -> bool:
        """Go behind the header of the next member; False if there is none."""
        if self._bytes(2) != b"\x1f\x8b":
            if self._member < 0:
                raise FormatError("not a gzip stream", where=self.where, offset=0)
            self._ended = True  # nothing, or padding
            return False
        method, flags = self._exactly(8)[:2]
        if method != 8 or flags & 0xE0:
            raise FormatError("unknown kind of gzip member", where=self.where, offset=self.consumed - 10)
        if flags & 4:
            self._exactly(int.from_bytes(self._exactly(2), "little"))
        for flag in (8, 16):
            length = 0
            while flags & flag and self._exactly(1) != b"\0":
                length += 1
                if length > _MAX_HEADER:
                    raise FormatError("a gzip header is too long", where=self.where, offset=self.consumed)
        if flags & 2:
            self._exactly(2)
        self._library.reset(self._address)
        self._member += 1
        self._member_start = self._out
        self._crc = 0
        self.boundary = Boundary(self._member, self.consumed, self._out)
        self._dictionary = b""
        return True
