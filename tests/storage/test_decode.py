"""Decoding of units, above all of gzip contexts, against streams made here."""

from __future__ import annotations

import gzip
import random
import zlib

import numpy as np
import pytest
from storage_blobs import make_blob

from nydus.errors import FormatError
from nydus.rafs import blobmeta, codec
from nydus.rafs.blobmeta import ChunkMap
from nydus.rafs.model import BlobFeature, BlobInfo, ChunkFlag, Compression, Digester
from nydus.storage.decode import Decoder, inflate


def text(size: int, seed: int = 1) -> bytes:
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(2, 9)).hex().encode() for _ in range(500)]
    out = b""
    while len(out) < size:
        out += b" ".join(rng.choices(words, k=200)) + rng.randbytes(20)
    return out[:size]


@pytest.mark.parametrize("pending", range(8))
def test_every_number_of_pending_bits(pending: int) -> None:
    """A block that begins ``8 - pending`` bits into a byte, behind a dictionary."""
    dictionary, wanted = text(32768), text(50000, 1)[1000:41000]
    engine = zlib.compressobj(6, zlib.DEFLATED, -15, zdict=dictionary)
    block = engine.compress(wanted) + engine.flush()
    bits = np.unpackbits(np.frombuffer(block, np.uint8), bitorder="little")
    skip = (8 - pending) % 8
    shifted = np.packbits(np.concatenate([np.ones(skip, np.uint8), bits]), bitorder="little").tobytes()
    previous, stored = (shifted[0], shifted[1:]) if pending else (0, shifted)
    zran = np.zeros(1, blobmeta.ZRAN)
    zran["in_size"], zran["out_size"] = len(stored), len(wanted)
    zran["dict_size"], zran["previous"], zran["pending_bits"] = len(dictionary), previous, pending
    chunks = gzip_chunks(zran, dictionary, [(0, 0, wanted[:100]), (0, 100, wanted[100:])])
    decoder = Decoder(chunks)
    assert [bytes(data) for _, data in decoder.decode(0, memoryview(stored))] == [wanted[:100], wanted[100:]]
    with pytest.raises(FormatError):
        decoder.decode(0, memoryview(stored[: len(stored) // 2]))
    with pytest.raises(FormatError):
        decoder.decode(0, memoryview(bytes(x ^ 0x55 for x in stored)))


def gzip_chunks(zran: np.ndarray, dictionaries: bytes, parts: list[tuple[int, int, bytes]]) -> ChunkMap:
    count = len(parts)
    info = BlobInfo(
        "z" * 64,
        1 << 20,
        count,
        Compression.GZIP,
        Digester.SHA256,
        features=BlobFeature.ZRAN | BlobFeature.SEPARATE,
    )
    sizes = np.array([len(data) for *_, data in parts], np.uint32)
    digests = [np.frombuffer(codec.digest(Digester.SHA256, data), np.uint8) for *_, data in parts]
    return ChunkMap(
        blob=info,
        uoffset=np.arange(count, dtype=np.uint64) << 20,
        usize=sizes,
        coffset=np.zeros(count, np.uint64),
        csize=np.zeros(count, np.uint32),
        flags=np.full(count, ChunkFlag.COMPRESSED | ChunkFlag.ZRAN, np.uint8),
        crc=np.zeros(count, np.uint32),
        context=np.array([context for context, *_ in parts], np.uint32),
        context_offset=np.array([offset for _, offset, _ in parts], np.uint32),
        digests=np.array(digests),
        zran=zran,
        dictionaries=dictionaries,
    )


@pytest.mark.parametrize("name", [b"", b"layer.tar"])
def test_over_the_ends_of_members(name: bytes) -> None:
    parts = [text(70000, seed) for seed in range(3)]
    members = [gzip.compress(part, mtime=0) for part in parts]
    if name:
        members = [member[:3] + b"\x08" + member[4:10] + name + b"\0" + member[10:] for member in members]
    stream = b"".join(members)[10 + (len(name) + 1 if name else 0) :]
    assert inflate(b"", b"", stream, 210000) == b"".join(parts)
    assert inflate(b"", b"", stream, 150000) == b"".join(parts)[:150000]
    with pytest.raises(zlib.error):
        inflate(b"", b"", stream, 210001)
    with pytest.raises(zlib.error):
        inflate(b"", b"", stream[:-20000], 210000)


def test_units_of_contexts() -> None:
    """Chunks of one context are one unit, wherever they lie; units are numbered by their first chunk."""
    zran = np.zeros(3, blobmeta.ZRAN)
    zran["in_offset"], zran["in_size"], zran["out_size"] = [100, 50, 10], [9, 8, 7], 1000
    chunks = gzip_chunks(zran, b"", [(2, 0, b"a"), (0, 0, b"b"), (2, 5, b"c"), (1, 0, b"d")])
    decoder = Decoder(chunks)
    assert decoder.unit_of.tolist() == [0, 1, 0, 2]
    assert [decoder.rows(unit) for unit in range(3)] == [[0, 2], [1], [3]]
    assert decoder.offset.tolist() == [10, 100, 50]
    assert decoder.size.tolist() == [7, 9, 8]
    assert decoder.memory.tolist() == [1000] * 3


def test_unreasonable_sizes_are_refused() -> None:
    zran = np.zeros(1, blobmeta.ZRAN)
    zran["in_size"], zran["out_size"] = 10, 0xFFFF_FFFF
    with pytest.raises(FormatError, match="unreasonable"):
        Decoder(gzip_chunks(zran, b"", [(0, 0, b"a")]))


def test_a_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(bytes(50 << 20), 9)[2:-4]
    assert inflate(b"", b"", bomb, 1000) == bytes(1000)


@pytest.mark.parametrize(
    "kind", [Compression.ZSTD, Compression.LZ4_BLOCK, Compression.GZIP, Compression.NONE]
)
def test_damage_is_found(kind: Compression) -> None:
    blob = make_blob([50000] * 3, kind=kind)
    decoder = Decoder(blob.chunks)
    start, size = int(blob.chunks.coffset[1]), int(blob.chunks.csize[1])
    good = blob.stored[start : start + size]
    ((row, data),) = decoder.decode(1, memoryview(good))
    assert (row, bytes(data)) == (1, blob.image[53248:103248])
    rng = random.Random(5)
    for _ in range(50):
        bad = bytearray(good)
        bad[rng.randrange(size)] ^= 1 << rng.randrange(8)
        try:
            found = decoder.decode(1, memoryview(bytes(bad)))
        except FormatError:
            continue
        assert bytes(found[0][1]) == bytes(data)  # a bit that does not matter
    for cut in (0, 1, size // 2):
        with pytest.raises(FormatError):
            decoder.decode(1, memoryview(good[:cut]))
