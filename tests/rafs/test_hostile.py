"""Damaged images give one clear error, whatever was damaged; nothing else, and soon."""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest

from nydus import rafs
from nydus.errors import FormatError
from nydus.rafs import blobmeta, toc
from nydus.rafs.model import BlobFeature, BlobInfo, Compression
from nydus.rafs.v6 import layout
from rafs.test_tree import KITCHEN
from rafs.trees import Item, make

SMALL = dict(list(KITCHEN.items())[-16:])


def mutate(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return data[: rng.randrange(len(data))]
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        # Most bytes are padding: look for one that means something.
        at = next((p for p in (rng.randrange(len(out)) for _ in range(20)) if out[p]), 0)
        width = rng.choice([1, 2, 4, 8])
        fill = rng.choice(
            [b"\0" * width, b"\xff" * width, rng.randbytes(width), out[at - 64 : at - 64 + width]]
        )
        out[at : at + len(fill)] = fill
    return bytes(out)


@pytest.mark.parametrize("version", [5, 6])
def test_damaged_bootstraps(version: int) -> None:
    data = rafs.write(make(SMALL, version))
    rng = random.Random(version)
    refused = 0
    for _ in range(600):
        damaged = mutate(data, rng)
        start = time.monotonic()
        try:
            tree = rafs.read(damaged, "damaged")
            rafs.write(tree)
            for index in range(len(tree.blobs)):
                blobmeta.from_tree(tree, index)
        except FormatError as error:
            assert str(error)
            refused += 1
        assert time.monotonic() - start < 2
    assert refused > 100


def test_one_chunk_does_not_make_a_table_of_millions() -> None:
    tree = make(SMALL, 5)
    tree.blobs[0].chunk_count = 1 << 23
    last = tree.chunks[-1:]
    last["index"] = (1 << 20) - 1
    assert len(blobmeta.from_tree(tree, 0)) == 1 << 20
    last["index"] = 1 << 20
    with pytest.raises(FormatError, match="the index of a chunk is too large"):
        blobmeta.from_tree(tree, 0)


@pytest.mark.vectors
def test_damaged_vectors(vectors: object) -> None:
    from pathlib import Path

    assert isinstance(vectors, Path)
    rng = random.Random(1)
    seeds = [path.read_bytes() for path in sorted(vectors.glob("merge-v?/layers/*"))]
    seeds += [
        (vectors / name / "bootstrap").read_bytes() for name in ("v6-dir-batch", "v5-dir-zstd", "v6-tarfs")
    ]
    for _ in range(300):
        try:
            rafs.write(rafs.read(mutate(rng.choice(seeds), rng), "damaged"))
        except FormatError:
            continue


def test_directory_that_contains_itself() -> None:
    data = bytearray(rafs.write(make({b"/a/b": Item(content=b"x"), b"/c/d/e": Item()})))
    head = rafs.superblock(bytes(data))
    # Let the entry of /c/d lead to the root.
    at = data.index(b"...d") - layout.DIRENT.itemsize
    data[at : at + 8] = head.root.to_bytes(8, "little")
    with pytest.raises(FormatError, match="contains itself"):
        rafs.read(bytes(data), "loop")


def test_directory_that_contains_itself_in_disguise() -> None:
    data = bytearray(rafs.write(make({b"/a/b": Item(content=b"x"), b"/c/d/e": Item()})))
    head = rafs.superblock(bytes(data))
    # The entry of the regular file /c/d/e leads to the root, and goes on being that of a regular file.
    at = data.index(b"...e") - layout.DIRENT.itemsize
    data[at : at + 8] = head.root.to_bytes(8, "little")
    with pytest.raises(FormatError, match="type of a directory entry is not the inode's"):
        rafs.read(bytes(data), "loop")


def test_overlapping_directories_are_bounded() -> None:
    """Many directories that share one block of entries would otherwise multiply."""
    count = 3000
    tree = make({**{b"/d%04d" % i: Item(0o40755) for i in range(count)}, b"/z/f": Item()})
    data = bytearray(rafs.write(tree))
    head = rafs.superblock(bytes(data))
    root = head.meta_offset + 32 * head.root
    # Every small directory becomes a copy of the root's inode: same size, same data.
    inode = bytes(data[root : root + 64])
    for at in range(root + 64, len(data) - 64, 32):
        if data[at : at + 2] in (b"\x05\x00", b"\x01\x00") and data[at + 5] >> 4 == 4:
            data[at : at + 20] = inode[:20]
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(FormatError):
        rafs.read(bytes(data), "bomb")
    assert time.monotonic() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    tracemalloc.stop()


@pytest.mark.parametrize("features", [0, 4, 4 | 0x80, 4 | 0x18])
def test_damaged_blob_meta(features: int) -> None:
    import numpy as np

    count = 50
    kind = BlobFeature.ALIGNED | BlobFeature.CAP_TAR_TOC | BlobFeature(features)
    blob = BlobInfo("cd" * 32, 0x10000, features=kind, compression=Compression.ZSTD)
    blob.uncompressed_size, blob.compressed_size = count * 0x10000, count * 0x10000
    flags = {0: 1, 4: 1, 4 | 0x80: 9, 4 | 0x18: 0x21}[features]
    chunks = blobmeta.ChunkMap(
        blob=blob,
        uoffset=np.arange(count, dtype=np.uint64) * 0x10000,
        usize=np.full(count, 0x8000, np.uint32),
        coffset=np.arange(count, dtype=np.uint64) * 0x100,
        csize=np.full(count, 0 if features & 0x80 else 0x100, np.uint32),
        flags=np.full(count, flags, np.uint8),
        crc=np.zeros(count, np.uint32),
        context=np.zeros(count, np.uint32),
        context_offset=np.zeros(count, np.uint32),
    )
    if features & 0x80:
        chunks.batch = np.zeros(1, blobmeta.BATCH)
        chunks.batch["usize"], chunks.batch["csize"] = 0x10000, 100
    if features & 8:
        chunks.zran = np.zeros(1, blobmeta.ZRAN)
        chunks.zran["out_size"], chunks.zran["in_size"], chunks.zran["dict_size"] = 0x10000, 100, 7
        chunks.dictionaries = b"1234567"
    stored = blobmeta.write(chunks, 0x4000)
    file = bytes(0x4000) + stored

    def load(data: bytes) -> blobmeta.ChunkMap:
        return blobmeta.load(blob, lambda offset, size: data[offset : offset + size].ljust(size, b"\0"))

    again = load(file)
    assert blobmeta.encode(again) == blobmeta.encode(chunks)
    assert again.find(0x10000, 1) == range(1, 2)
    assert again.find(0x8000, 0x8000) == range(1, 1)
    assert again.find(0x7FFF, 0x8002) == range(2)
    rng = random.Random(features)
    cache = blobmeta.to_cache_file(chunks)
    for _ in range(200):
        for read, good in ((load, file), (lambda data: blobmeta.from_cache_file(blob, data), cache)):
            try:
                read(mutate(good, rng))
            except FormatError:
                continue


def test_damaged_toc() -> None:
    entry = toc.TocEntry(toc.IMAGE_BOOT, Compression.ZSTD, bytes(32), 0, 100, 1 << 30)
    blob = bytes(5000) + toc.write_toc([entry, entry])
    rng = random.Random(7)
    with pytest.raises(FormatError, match=r"declares the wrong content size|cannot be decompressed"):
        toc.extract_bootstrap(lambda offset, size: blob[offset : offset + size], len(blob))
    for _ in range(300):
        data = mutate(blob, rng)
        with pytest.raises(FormatError):
            toc.extract_bootstrap(lambda offset, size, data=data: data[offset : offset + size], len(data))  # type: ignore[misc]


def test_a_chunk_table_that_would_fill_the_memory_is_refused() -> None:
    blob = BlobInfo("a" * 64, 1 << 20, chunk_count=1_000_000, features=BlobFeature.BATCH)
    blob.meta_uncompressed_size = 30 << 30  # which zstd makes of a few MB
    with pytest.raises(FormatError, match="wrong size"):
        blobmeta.check_size(blob, "")
