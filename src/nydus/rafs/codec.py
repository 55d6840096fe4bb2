"""Compression, digests, checksums and encryption of chunks: thin, bounded calls into C libraries.

All functions are thread-safe; the codecs release the GIL while they work.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import blake3
import google_crc32c
import lz4.block
import numpy as np
import zstandard
from isal import isal_zlib

from nydus.errors import FormatError
from nydus.rafs.model import Compression, Digester

Buffer = bytes | bytearray | memoryview

#: Level of the reference builder; rafs.md 3.1.
ZSTD_LEVEL = 3

_contexts = threading.local()
# The stubs of isal call its error an instance, hence Any.
_ERRORS: Any = (zstandard.ZstdError, lz4.block.LZ4BlockError, isal_zlib.error, ValueError, OverflowError)


def digest(kind: Digester, data: Buffer) -> bytes:
    """The 32-byte digest of some bytes."""
    return blake3.blake3(data).digest() if kind == Digester.BLAKE3 else hashlib.sha256(data).digest()


def crc32c(data: Buffer, before: int = 0) -> int:
    """CRC-32C (Castagnoli) of some bytes; ``before`` is that of what is in front of them."""
    # The C extension takes bytes and numpy arrays, but no other buffers.
    whole = data if isinstance(data, bytes) else np.frombuffer(data, np.uint8)
    return int(google_crc32c.extend(before, whole))


def compress(kind: Compression, data: Buffer) -> bytes:
    """Compress one chunk: a raw lz4 block, one zstd frame with its content size, or one gzip member.

    The result may be longer than the input; storing such chunks raw is up to the caller (rafs.md 3.1).
    """
    if kind == Compression.ZSTD:
        compressor = getattr(_contexts, "compressor", None)
        if compressor is None:
            compressor = _contexts.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        return bytes(compressor.compress(data))
    if kind == Compression.LZ4_BLOCK:
        return bytes(lz4.block.compress(data, store_size=False))
    if kind == Compression.GZIP:
        member = isal_zlib.compressobj(2, isal_zlib.DEFLATED, 31)
        return bytes(member.compress(data) + member.flush())
    return bytes(data)


def decompress(kind: Compression, data: Buffer, size: int) -> bytes:
    """Decompress one chunk that must give exactly ``size`` bytes; memory is bounded by ``size``.

    What follows the wanted bytes of gzip data is ignored: members of eStargz go on with padding and the
    headers of other files, and their stored lengths are only upper bounds.

    Raises:
        FormatError: the data are corrupt, or give another number of bytes.
    """
    if kind == Compression.NONE:
        if len(data) != size:
            raise FormatError("a stored chunk has the wrong length", expected=size, found=len(data))
        return bytes(data)
    try:
        if kind == Compression.ZSTD:
            out = _zstd(data, size)
        elif kind == Compression.LZ4_BLOCK:
            out = lz4.block.decompress(data, uncompressed_size=size)
        else:
            out = _gzip(data, size)
    except _ERRORS as error:
        raise FormatError(f"{kind.name.lower()} data cannot be decompressed: {error}") from None
    if len(out) != size:
        raise FormatError("decompressed data have the wrong length", expected=size, found=len(out))
    return bytes(out)


def _zstd(data: Buffer, size: int) -> bytes:
    # A frame's own content size would override the limit, so it is compared before anything is allocated.
    declared = zstandard.frame_content_size(data)
    if declared not in (-1, size):
        raise FormatError("a zstd frame declares the wrong content size", expected=size, found=declared)
    if size == 0:
        return b""
    decompressor = getattr(_contexts, "decompressor", None)
    if decompressor is None:
        decompressor = _contexts.decompressor = zstandard.ZstdDecompressor()
    return bytes(decompressor.decompress(data, max_output_size=size, allow_extra_data=False))


def _gzip(data: Buffer, size: int) -> bytes:
    parts: list[bytes] = []
    rest: Buffer = data
    missing = size
    while missing:  # a limit of 0 would be none
        member = isal_zlib.decompressobj(31)
        part = member.decompress(rest, missing)
        parts.append(part)
        missing -= len(part)
        rest = member.unused_data
        if not member.eof or rest[:2] != b"\x1f\x8b":
            break
    return b"".join(parts)


def xts_encrypt(key: bytes, iv: bytes, data: Buffer) -> bytes:
    """AES-XTS of one unit; fewer than 16 bytes are padded to 18 as in rafs.md 3.9."""
    if len(data) < 16:
        data = bytes(data) + bytes([16 - len(data)]) * (16 - len(data)) + b"\x78\x90"
    context = _xts(key, iv).encryptor()
    return bytes(context.update(data) + context.finalize())


def xts_decrypt(key: bytes, iv: bytes, data: Buffer) -> bytes:
    """The inverse of :func:`xts_encrypt`.

    Raises:
        FormatError: fewer than 16 bytes, or a key that XTS does not accept.
    """
    if len(data) < 16:
        raise FormatError("encrypted data are shorter than one cipher block", found=len(data))
    context = _xts(key, iv).decryptor()
    plain = bytes(context.update(data) + context.finalize())
    if len(plain) == 18 and plain[16:] == b"\x78\x90" and 1 <= plain[15] <= 16:
        return plain[: 16 - plain[15]]
    return plain


def _xts(key: bytes, iv: bytes) -> Any:
    # cryptography takes longer to import than the rest of this package, and few images are encrypted.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    try:
        return Cipher(algorithms.AES(key), modes.XTS(iv))
    except ValueError as error:
        raise FormatError(f"the encryption key cannot be used: {error}") from None
