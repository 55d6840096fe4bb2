"""A gzip stream read so that it can be entered again later: inflating stops at every deflate block.

Only zlib's own interface has the stops, so the system's libz is called through ctypes. The gzip framing is
handled here, because that leaves the checksum to isal, which is ten times as fast.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from nydus.errors import FormatError, NydusError

_Z_BLOCK = 5
_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR = 0, 1, -5
_AT_BLOCK, _LAST_BLOCK = 128, 64
WINDOW = 32768
#: Plain bytes kept besides the window.
_BUFFER = 4 << 20
#: A gzip header with a name or comment beyond this is refused.
_MAX_HEADER = 1 << 16


class _Stream(ctypes.Structure):
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


@cache
def _libz() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libz.so.1")
    except OSError:
        raise NydusError("indexing gzip layers needs the system's zlib (libz.so.1)") from None
    pointer = ctypes.POINTER(_Stream)
    library.inflate.argtypes = [pointer, ctypes.c_int]
    library.inflateInit2_.argtypes = [pointer, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.inflateReset.argtypes = library.inflateEnd.argtypes = [pointer]
    library.zlibVersion.restype = ctypes.c_char_p
    return library


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

    Attributes:
        position: plain bytes given out or passed over.
        consumed: stored bytes used for them.
        boundary: the last start of a deflate block.

    Raises (all methods):
        FormatError: the stream is damaged or cut short.
    """

    def __init__(self, pieces: Iterator[bytes], where: str = "") -> None:
        from isal import isal_zlib

        self.where = where
        self.position = 0
        self._pieces = pieces
        self._input = b""
        self._base = 0  # position of the input in the stored stream
        self._skipped = 0
        self._ahead = 0  # bytes read by at_end() and not yet taken
        self._ended = False
        # Plain bytes, at least the last 32 KiB of them: buffer[0] is plain byte number _start.
        self._buffer = bytearray(WINDOW + _BUFFER)
        self._start = 0
        self._dictionary: bytes | None = None
        self._out = 0
        self._member = -1
        self._member_start = 0
        self._crc = 0
        self._stream = _Stream()
        self._reference = ctypes.byref(self._stream)
        self._crc32 = isal_zlib.crc32
        self._library = _libz()
        library = self._library
        if library.inflateInit2_(self._reference, -15, library.zlibVersion(), ctypes.sizeof(_Stream)):
            raise NydusError("zlib cannot be initialized")
        self._use_buffer(self._buffer)
        self._next_member()

    @property
    def consumed(self) -> int:
        return self._base + len(self._input) - int(self._stream.avail_in)

    def __del__(self) -> None:
        if hasattr(self, "_library"):
            self._library.inflateEnd(self._reference)

    def dictionary(self) -> bytes:
        """The up to 32768 plain bytes before :attr:`boundary`, as far as they are of the same member."""
        if self._dictionary is None:
            end = self.boundary.out_offset - self._start
            low = max(self._member_start - self._start, end - WINDOW)
            self._dictionary = bytes(self._view[low:end])
        return self._dictionary

    def take(self, size: int) -> memoryview:
        """Exactly the next ``size`` bytes, as a view that the next call may overwrite."""
        if self._skipped:
            self.settle()
        if self._ahead:
            # The header that at_end() has read is just before what follows.
            ahead, self._ahead = self._ahead, 0
            if size < ahead:
                self._ahead = ahead - size
            elif size > ahead:
                self._inflate(size - ahead, keep=ahead)
        else:
            self._inflate(size)
            ahead = 0
        end = self._out - self._start - self._ahead
        if self._out - self._ahead - self.position < size:
            raise FormatError("the stream ends too early", where=self.where, offset=self._out)
        self.position += size
        return self._view[end - size : end]

    def skip(self, size: int) -> None:
        """Pass over bytes; the work is done together with what is read next."""
        if self._ahead:
            step = min(size, self._ahead)
            self.take(step)
            size -= step
        self._skipped += size
        self.position += size
        if self._skipped > WINDOW:
            self.settle()

    def settle(self) -> None:
        """Inflate up to :attr:`position`, so that :attr:`consumed` and :attr:`boundary` are of there."""
        while self._skipped:
            step = min(self._skipped, WINDOW)
            before = self._out
            self._inflate(step)
            if self._out - before < step:
                raise FormatError("the stream ends too early", where=self.where, offset=self._out)
            self._skipped -= step

    def at_end(self) -> bool:
        """Whether nothing is left; reads the next 512 bytes, a tar header, to know."""
        if not self._ahead:
            step = self._skipped
            if step > WINDOW:
                self.settle()
                step = 0
            before = self._out
            self._inflate(step + 512)
            if self._out - before < step:
                raise FormatError("the stream ends too early", where=self.where, offset=self._out)
            self._skipped = 0
            self._ahead = self._out - before - step
        return not self._ahead

    def drain(self) -> None:
        """Read to the end, so that every checksum has been compared and the whole layer was seen."""
        self.settle()
        while not self._ended:
            self._inflate(WINDOW)
        for piece in self._pieces:
            self._base += len(piece)

    def _use_buffer(self, buffer: bytearray) -> None:
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._memory = ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))

    def _make_room(self, size: int, keep: int) -> None:
        """Move the window to the front of the buffer, and get a larger one for a larger chunk."""
        self.dictionary()
        keep = max(WINDOW, keep)
        used = self._out - self._start
        tail = bytes(self._view[max(0, used - keep) : used])
        if len(self._buffer) < keep + size:
            self._use_buffer(bytearray(keep + size))
        self._view[: len(tail)] = tail
        self._start = self._out - len(tail)

    def _inflate(self, size: int, keep: int = 0) -> None:
        """Append ``size`` bytes to the buffer, fewer at the end of the stream; leave ``keep`` before them."""
        if not size or self._ended:
            return
        if self._out - self._start + size > len(self._buffer):
            self._make_room(size, keep)
        stream, inflate, reference = self._stream, self._library.inflate, self._reference
        begin = self._out
        end = begin + size
        stream.next_out = self._memory + begin - self._start
        stream.avail_out = left = size
        checked = begin
        while left:
            if not stream.avail_in and not self._refill():
                raise FormatError(
                    "the gzip stream ends inside a member", where=self.where, offset=self.consumed
                )
            code = inflate(reference, _Z_BLOCK)
            left = stream.avail_out
            self._out = end - left
            if code == _Z_STREAM_END:
                self._check(checked)
                checked = self._out
                self._trailer()
                if not self._next_member():
                    break
                stream.next_out, stream.avail_out = self._memory + checked - self._start, left
            elif code:
                if code != _Z_BUF_ERROR:
                    reason = stream.msg.decode() if stream.msg else f"zlib error {code}"
                    raise FormatError(f"not a gzip stream: {reason}", where=self.where, offset=self.consumed)
            elif stream.data_type & _AT_BLOCK and not stream.data_type & _LAST_BLOCK:
                self._note_boundary(stream.data_type & 7)
        self._check(checked)

    def _note_boundary(self, bits: int) -> None:
        used = len(self._input) - self._stream.avail_in
        # The byte of pending bits was consumed, from this piece of input or the one before.
        previous = (self._input[used - 1] if used else self._last_byte) if bits else 0
        self.boundary = Boundary(self._member, self._base + used, self._out, bits, previous)
        self._dictionary = None

    _last_byte = 0

    def _refill(self) -> bool:
        piece = next(self._pieces, b"")
        if not piece:
            return False
        self._base += len(self._input)
        if self._input:
            self._last_byte = self._input[-1]
        self._input = piece
        # The bytes object is kept in _input for as long as zlib may read it.
        address = ctypes.cast(ctypes.c_char_p(piece), ctypes.c_void_p).value
        self._stream.next_in, self._stream.avail_in = address, len(piece)
        return True

    def _check(self, start: int) -> None:
        """Take the bytes from plain position ``start`` into the checksum."""
        if start < self._out:
            self._crc = self._crc32(self._view[start - self._start : self._out - self._start], self._crc)

    def _byte(self) -> int | None:
        """The next stored byte, outside of deflate data."""
        stream = self._stream
        if not stream.avail_in and not self._refill():
            return None
        value: int = self._input[len(self._input) - stream.avail_in]
        stream.avail_in -= 1
        stream.next_in += 1
        return value

    def _bytes(self, size: int) -> bytes:
        found = bytearray()
        for _ in range(size):
            value = self._byte()
            if value is None:
                raise FormatError("the gzip stream is cut short", where=self.where, offset=self.consumed)
            found.append(value)
        return bytes(found)

    def _trailer(self) -> None:
        trailer = self._bytes(8)
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
        first = self._byte()
        second = self._byte() if first == 0x1F else None
        if second != 0x8B:
            if self._member < 0:
                raise FormatError("not a gzip stream", where=self.where, offset=0)
            self._ended = True  # nothing, or padding
            return False
        method, flags = self._bytes(8)[:2]
        if method != 8 or flags & 0xE0:
            raise FormatError("unknown kind of gzip member", where=self.where, offset=self.consumed - 10)
        if flags & 4:
            self._bytes(int.from_bytes(self._bytes(2), "little"))
        for flag in (8, 16):
            length = 0
            while flags & flag and self._bytes(1) != b"\0":
                length += 1
                if length > _MAX_HEADER:
                    raise FormatError("a gzip header is too long", where=self.where, offset=self.consumed)
        if flags & 2:
            self._bytes(2)
        self._library.inflateReset(self._reference)
        self._member += 1
        self._member_start = self._out
        self._crc = 0
        self.boundary = Boundary(self._member, self.consumed, self._out)
        self._dictionary = b""
        return True
