"""The codec versions that the reference vectors were made with (rafs.md 3.1), as this system has them.

The zstd of the Python wheel is newer and its lz4 binding takes another path, so both give other (equally
valid) bytes. Debian's shared libraries are swapped in by tests that compare compressed bytes.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from functools import cache

import pytest

from nydus.rafs import codec
from nydus.rafs.model import Compression


@cache
def _library(name: str) -> ctypes.CDLL:
    found = ctypes.util.find_library(name)
    if found is None:
        pytest.skip(f"lib{name} is not installed")
    return ctypes.CDLL(found)


@cache
def _zstd() -> Callable[[bytes], bytes]:
    library = _library("zstd")
    library.ZSTD_versionNumber.restype = ctypes.c_uint
    if not 10504 <= library.ZSTD_versionNumber() <= 10506:
        pytest.skip("libzstd is not 1.5.4 to 1.5.6")
    library.ZSTD_compressBound.restype = library.ZSTD_compress.restype = ctypes.c_size_t
    library.ZSTD_compressBound.argtypes = [ctypes.c_size_t]
    library.ZSTD_compress.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_int,
    ]

    def compress(data: bytes) -> bytes:
        bound = library.ZSTD_compressBound(len(data))
        out = ctypes.create_string_buffer(bound)
        size = library.ZSTD_compress(out, bound, data, len(data), 3)
        assert size <= bound
        return out.raw[:size]

    return compress


@cache
def _lz4() -> Callable[[bytes], bytes]:
    library = _library("lz4")
    library.LZ4_compressBound.restype = library.LZ4_compress_default.restype = ctypes.c_int
    library.LZ4_compress_default.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]

    def compress(data: bytes) -> bytes:
        bound = library.LZ4_compressBound(len(data))
        out = ctypes.create_string_buffer(bound)
        size = library.LZ4_compress_default(data, out, len(data), bound)
        assert 0 < size <= bound
        return out.raw[:size]

    return compress


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make :func:`nydus.rafs.codec.compress` give the reference's bytes."""
    ours = codec.compress

    def compress(kind: Compression, data: codec.Buffer) -> bytes:
        if kind == Compression.ZSTD:
            return _zstd()(bytes(data))
        if kind == Compression.LZ4_BLOCK:
            return _lz4()(bytes(data))
        return ours(kind, data)

    monkeypatch.setattr(codec, "compress", compress)
