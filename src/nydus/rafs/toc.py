"""Tar headers of blob sections, and the table of contents at the end of a blob; rafs.md 3.5 and 3.6."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nydus.errors import FormatError
from nydus.rafs import codec
from nydus.rafs.model import Compression

#: ``read(offset, size)`` gives exactly ``size`` bytes of a blob.
Read = Callable[[int, int], bytes]

IMAGE_BLOB = "image.blob"
BLOB_META = "blob.meta"
BLOB_META_HEADER = "blob.meta.header"
BLOB_DIGEST = "blob.digest"
IMAGE_BOOT = "image.boot"
TOC = "rafs.blob.toc"

HEADER_SIZE = 512
#: A TOC is searched for in this many bytes at the end of a blob.
TAIL_SIZE = 4096
#: No bootstrap is larger; a declared size beyond it is not believed.
MAX_BOOTSTRAP = 1 << 31

_ENTRY = np.dtype(
    [
        ("flags", "<u4"),
        ("reserved", "<u4"),
        ("name", "V16"),
        ("digest", "V32"),
        ("offset", "<u8"),
        ("compressed_size", "<u8"),
        ("size", "<u8"),
        ("padding", "V48"),
    ]
)
assert _ENTRY.itemsize == 128

_COMPRESSIONS = {1: Compression.NONE, 2: Compression.ZSTD, 4: Compression.LZ4_BLOCK}
_FLAGS = {kind: flag for flag, kind in _COMPRESSIONS.items()}


def tar_header(name: str, size: int) -> bytes:
    """The GNU tar header that *follows* a section of ``size`` bytes."""
    header = bytearray(HEADER_SIZE)
    header[0 : len(name)] = name.encode("ascii")
    if size < 8 << 30:
        header[124:136] = b"%011o\0" % size
    else:
        header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[136:148] = b"%011o\0" % 0
    header[156] = ord("0")
    header[257:265] = b"ustar  \0"
    header[148:156] = b" " * 8
    header[148:156] = b"%07o\0" % sum(header)
    return bytes(header)


def parse_tar_header(header: bytes, where: str = "", offset: int = 0) -> tuple[str, int]:
    """Name and size of a section's tar header; FormatError if it is none."""
    if len(header) != HEADER_SIZE or header[257:262] != b"ustar":
        raise FormatError("no tar header", where=where, offset=offset)
    # Only the unsigned sum is written, but the old and new field formats differ in their blanks.
    recorded = header[148:156].strip(b" \0")
    found = sum(header) - sum(header[148:156]) + 8 * 32
    if not recorded.isdigit() or recorded.strip(b"01234567") or int(recorded, 8) != found:
        raise FormatError(
            "wrong checksum of a tar header", where=where, offset=offset, found=recorded, expected=oct(found)
        )
    raw = header[124:136]
    if raw[0] & 0x80:
        size = int.from_bytes(raw[1:], "big")
    else:
        digits = raw.strip(b" \0")
        if digits.strip(b"01234567"):
            raise FormatError("invalid size in a tar header", where=where, offset=offset + 124, found=raw)
        size = int(digits or b"0", 8)
    return header[:100].split(b"\0", 1)[0].decode("latin-1"), size


@dataclass(frozen=True, slots=True)
class TocEntry:
    """One section of a blob.

    ``digest`` is the sha256 of the uncompressed content; for ``image.blob`` it covers the stored data and
    their tar header. Sizes and ``offset`` are in bytes, ``offset`` counts from the start of the blob.
    """

    name: str
    compression: Compression
    digest: bytes
    offset: int
    compressed_size: int
    size: int


@dataclass(frozen=True, slots=True)
class Toc:
    """A table of contents; ``digest`` and ``size`` cover the entries and their tar header."""

    entries: tuple[TocEntry, ...]
    offset: int
    digest: bytes
    size: int

    def find(self, name: str) -> TocEntry | None:
        return next((entry for entry in self.entries if entry.name == name), None)

    def read(self, read: Read, name: str, where: str = "", limit: int = MAX_BOOTSTRAP) -> bytes | None:
        """The verified content of a section (not of ``image.blob``); None if there is no such section.

        Raises:
            FormatError: larger than ``limit``, outside of the blob, corrupt, or another digest.
        """
        entry = self.find(name)
        if entry is None:
            return None
        if entry.size > limit or entry.compressed_size > limit:
            raise FormatError(f"section {name} is too large", where=where, found=entry.size, expected=limit)
        if entry.offset + entry.compressed_size > self.offset:
            raise FormatError(
                f"section {name} reaches beyond the table of contents", where=where, offset=entry.offset
            )
        stored = read(entry.offset, entry.compressed_size)
        try:
            data = codec.decompress(entry.compression, stored, entry.size)
        except FormatError as error:
            raise FormatError(f"section {name}: {error.what}", where=where, offset=entry.offset) from None
        if hashlib.sha256(data).digest() != entry.digest:
            raise FormatError(
                f"section {name} does not have the digest that the table of contents names",
                where=where,
                offset=entry.offset,
                expected=entry.digest.hex(),
                found=hashlib.sha256(data).hexdigest(),
            )
        return data


def write_toc(entries: list[TocEntry]) -> bytes:
    """The entries and their tar header, as they end a blob."""
    table = np.zeros(len(entries), _ENTRY)
    for row, entry in zip(table, entries, strict=True):
        row["flags"] = _FLAGS[entry.compression]
        row["name"] = np.void(entry.name.encode("ascii").ljust(16, b"\0"))
        row["digest"] = np.void(entry.digest)
        row["offset"], row["compressed_size"], row["size"] = entry.offset, entry.compressed_size, entry.size
    data = table.tobytes()
    return data + tar_header(TOC, len(data))


def read_toc(read: Read, size: int, where: str = "") -> Toc | None:
    """Find and parse the table of contents of a blob of ``size`` bytes; None if it ends without one.

    The entries are untrusted until the caller has compared :attr:`Toc.digest` with a bootstrap's.
    """
    tail_size = min(TAIL_SIZE, size // _ENTRY.itemsize * _ENTRY.itemsize)
    if tail_size < HEADER_SIZE:
        return None
    tail = read(size - tail_size, tail_size)
    try:
        name, length = parse_tar_header(tail[-HEADER_SIZE:])
    except FormatError:
        return None
    if name != TOC:
        return None
    if length % _ENTRY.itemsize or length > tail_size - HEADER_SIZE:
        raise FormatError(
            "invalid size of the table of contents", where=where, offset=size - 512, found=length
        )
    start = tail_size - HEADER_SIZE - length
    offset = size - tail_size + start
    entries = []
    for index, row in enumerate(np.frombuffer(tail[start:-HEADER_SIZE], _ENTRY)):
        place = offset + index * _ENTRY.itemsize
        compression = _COMPRESSIONS.get(int(row["flags"]))
        if compression is None:
            raise FormatError(
                "unknown flags of a section",
                where=where,
                offset=place,
                found=int(row["flags"]),
                expected="1, 2 or 4",
            )
        entries.append(
            TocEntry(
                name=row["name"].tobytes().split(b"\0", 1)[0].decode("latin-1"),
                compression=compression,
                digest=row["digest"].tobytes(),
                offset=int(row["offset"]),
                compressed_size=int(row["compressed_size"]),
                size=int(row["size"]),
            )
        )
    covered = tail[start:]
    return Toc(tuple(entries), offset, hashlib.sha256(covered).digest(), len(covered))


def extract_bootstrap(read: Read, size: int, where: str = "") -> bytes:
    """The bootstrap inside a blob of ``size`` bytes, through its TOC or by the tar header that ends it.

    Raises:
        FormatError: there is none, or it is corrupt.
    """
    toc = read_toc(read, size, where)
    if toc is not None:
        data = toc.read(read, IMAGE_BOOT, where)
        if data is None:
            raise FormatError("the blob holds no bootstrap", where=where)
        return data
    if size < HEADER_SIZE:
        raise FormatError("the blob is too short to hold a bootstrap", where=where, found=size)
    name, length = parse_tar_header(read(size - HEADER_SIZE, HEADER_SIZE), where, size - HEADER_SIZE)
    if name != IMAGE_BOOT:
        raise FormatError("the blob holds no bootstrap", where=where, expected=IMAGE_BOOT, found=name)
    if length > min(size - HEADER_SIZE, MAX_BOOTSTRAP):
        raise FormatError(
            "invalid size of the bootstrap", where=where, offset=size - HEADER_SIZE, found=length
        )
    return read(size - HEADER_SIZE - length, length)
