"""Codecs give back what they were given, and refuse everything else."""

from __future__ import annotations

import gzip
import hashlib
import os

import blake3
import pytest

from nydus.errors import FormatError
from nydus.rafs import codec, toc
from nydus.rafs.model import Compression, Digester

SIZES = [0, 1, 15, 16, 17, 4096, 100_000]


@pytest.mark.parametrize("kind", list(Compression))
@pytest.mark.parametrize("size", SIZES)
def test_compress(kind: Compression, size: int) -> None:
    for data in (bytes(size), os.urandom(size)):
        stored = codec.compress(kind, memoryview(data))
        assert codec.decompress(kind, memoryview(stored), size) == data
        for wrong in (size + 1, size - 1):
            if wrong >= 0 and not (kind == Compression.GZIP and wrong < size):
                with pytest.raises(FormatError):
                    codec.decompress(kind, stored, wrong)


def test_gzip_may_go_on() -> None:
    """Members of eStargz hold more than a chunk; what is wanted is at their start."""
    stored = codec.compress(Compression.GZIP, b"chunk" + bytes(1000)) + codec.compress(
        Compression.GZIP, b"next"
    )
    assert codec.decompress(Compression.GZIP, stored, 5) == b"chunk"
    assert codec.decompress(Compression.GZIP, stored, 1009)[-4:] == b"next"
    assert codec.decompress(Compression.GZIP, stored, 0) == b""
    with pytest.raises(FormatError, match="wrong length"):
        codec.decompress(Compression.GZIP, stored, 1010)


@pytest.mark.parametrize("kind", [Compression.LZ4_BLOCK, Compression.GZIP, Compression.ZSTD])
def test_damaged(kind: Compression) -> None:
    stored = codec.compress(kind, b"some text, some text, some text")
    for data in (b"", b"\0", stored[:-9], b"x" + stored):
        with pytest.raises(FormatError):
            codec.decompress(kind, data, 31)


def test_zstd_bomb_is_refused_before_it_is_inflated() -> None:
    with pytest.raises(FormatError, match="content size"):
        codec.decompress(Compression.ZSTD, codec.compress(Compression.ZSTD, bytes(1 << 24)), 4096)


def test_gzip_ignores_what_follows_and_joins_members() -> None:
    data = gzip.compress(b"one") + gzip.compress(b"two")
    assert codec.decompress(Compression.GZIP, data + b"tail", 6) == b"onetwo"


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 18, 31, 5000])
def test_encryption(size: int) -> None:
    key, iv, data = os.urandom(32), os.urandom(16), os.urandom(size)
    stored = codec.xts_encrypt(key, iv, data)
    assert len(stored) == (size if size >= 16 else 18)
    assert codec.xts_decrypt(key, iv, stored) == data


def test_encryption_refuses() -> None:
    with pytest.raises(FormatError):
        codec.xts_decrypt(bytes(32), bytes(16), b"short")
    with pytest.raises(FormatError, match="key"):
        codec.xts_decrypt(bytes(31), bytes(16), bytes(16))


def test_digests() -> None:
    assert codec.crc32c(memoryview(b"123456789")) == 0xE3069283
    assert codec.digest(Digester.SHA256, b"ab") == hashlib.sha256(b"ab").digest()
    assert codec.digest(Digester.BLAKE3, b"ab") == blake3.blake3(b"ab").digest()


@pytest.mark.parametrize("size", [0, 511, 8 << 30, (8 << 30) - 1, 1 << 40])
def test_tar_header(size: int) -> None:
    header = toc.tar_header(toc.IMAGE_BLOB, size)
    assert len(header) == 512
    assert toc.parse_tar_header(header) == (toc.IMAGE_BLOB, size)
    with pytest.raises(FormatError, match="checksum"):
        toc.parse_tar_header(b"x" + header[1:])
