"""Checks of single values that both formats share."""

from __future__ import annotations

from enum import IntEnum
from typing import TypeVar

from nydus.errors import FormatError
from nydus.rafs.model import BlobFeature, Compression, Digester, SuperFlag

Kind = TypeVar("Kind", bound=IntEnum)

MIN_CHUNK_SIZE = 0x1000
MAX_CHUNK_SIZE = 0x100_0000
#: Upper bound of the stored and of the decoded size of what can only be read as a whole: batches, gzip
#: members, chunks of EXTERNAL blobs. Real ones stay below 20 MiB.
MAX_UNIT = 64 << 20
MAX_COMPRESSED = 1 << 40
MAX_UNCOMPRESSED = 1 << 44
MAX_CHUNKS = 0xFF_FFFF

#: Bits that some format revision gives a meaning to; anything else is refused.
KNOWN_FLAGS = 0xFF00_03FF

_COMPRESSIONS = {
    SuperFlag.COMPRESSION_NONE: Compression.NONE,
    SuperFlag.COMPRESSION_LZ4: Compression.LZ4_BLOCK,
    SuperFlag.COMPRESSION_GZIP: Compression.GZIP,
    SuperFlag.COMPRESSION_ZSTD: Compression.ZSTD,
}
_DIGESTERS = {SuperFlag.HASH_BLAKE3: Digester.BLAKE3, SuperFlag.HASH_SHA256: Digester.SHA256}


def enum(kind: type[Kind], value: int, what: str, where: str, offset: int) -> Kind:
    """An enumeration member, or a FormatError that names the field."""
    try:
        return kind(value)
    except ValueError:
        raise FormatError(f"unknown {what}", where=where, offset=offset, found=value) from None


def chunk_size(value: int, where: str, offset: int, limit: int = MAX_CHUNK_SIZE) -> int:
    if not MIN_CHUNK_SIZE <= value <= limit or value & (value - 1):
        raise FormatError(
            "invalid chunk size",
            where=where,
            offset=offset,
            found=hex(value),
            expected=f"a power of two from {MIN_CHUNK_SIZE:#x} to {limit:#x}",
        )
    return value


def blob_id(raw: bytes, where: str, offset: int) -> str:
    """A blob id as text. It becomes a file name and a part of URLs, so only harmless characters pass."""
    try:
        text = raw.decode("ascii")
    except UnicodeDecodeError:
        text = ""
    if not text or text.startswith(".") or not all(c.isalnum() or c in "._-:" for c in text):
        raise FormatError("invalid blob id", where=where, offset=offset, found=raw[:64])
    return text


def algorithms(flags: SuperFlag) -> tuple[list[Compression], list[Digester]]:
    """The compressions and digesters that the flags of a file system name."""
    return (
        [value for flag, value in _COMPRESSIONS.items() if flags & flag],
        [value for flag, value in _DIGESTERS.items() if flags & flag],
    )


def super_flags(compression: Compression, digester: Digester) -> SuperFlag:
    """The two flags of a file system that name its algorithms."""
    result = SuperFlag(0)
    for flag, kind in _COMPRESSIONS.items():
        if kind == compression:
            result |= flag
    for mark, hash_kind in _DIGESTERS.items():
        if hash_kind == digester:
            result |= mark
    return result


def features(value: int, where: str, offset: int) -> BlobFeature:
    """Blob features; bits 12 to 15 and bit 31 are refused (rafs.md 0.2)."""
    if value & 0x8000_F000:
        raise FormatError("unknown blob features", where=where, offset=offset, found=hex(value))
    return BlobFeature(value)
