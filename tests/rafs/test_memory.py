"""Bootstraps whose tables say much in few bytes take at most 20 times their size."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from nydus import rafs
from nydus.build.tree import TreeBuilder
from nydus.rafs.device import as_erofs
from nydus.rafs.model import CHUNK, BlobFeature, BlobInfo, SuperFlag, Tree
from nydus.rafs.verify import verify

COUNT = 15_000
FLAGS = SuperFlag.COMPRESSION_NONE | SuperFlag.HASH_BLAKE3 | SuperFlag.ENCRYPTION_NONE


def hard_links(builder: TreeBuilder) -> None:
    builder.add(b"first", 0o100644)
    for number in range(COUNT):
        builder.link(b"%x" % number, b"first")


def names(builder: TreeBuilder) -> None:
    for number in range(COUNT):
        builder.add(b"%d/%x" % (number % 7, number), 0o100644)


def directories(builder: TreeBuilder) -> None:
    for number in range(COUNT // 5):
        builder.add(b"%x" % number + b"/d" * (number % 10), 0o40755)


def symbolic_links(builder: TreeBuilder) -> None:
    for number in range(COUNT):
        builder.add(b"%x" % number, 0o120777, target=b"x")


def attributes(builder: TreeBuilder) -> None:
    for number in range(COUNT):
        builder.add(b"%x" % number, 0o100644, xattrs=((b"user.x", b"%d" % number),))


def one_chunk(builder: TreeBuilder) -> None:
    """A file of zeros: every entry of its list names the same chunk."""
    inode = builder.add(b"sparse", 0o100644, size=8 * COUNT * 4096)
    builder.set_chunks(inode, 0, 8 * COUNT)


def tree(fill: Callable[[TreeBuilder], None], version: int) -> Tree:
    builder = TreeBuilder()
    fill(builder)
    references = np.zeros(8 * COUNT, np.int64)
    chunks = np.zeros(1, CHUNK)
    chunks["csize"] = chunks["usize"] = 4096
    features = BlobFeature.ALIGNED | BlobFeature.CAP_TAR_TOC
    blob = BlobInfo(
        "a" * 64, 4096, 1, features=features, compressed_size=9000, uncompressed_size=4096,
        meta_compressed_size=16, meta_uncompressed_size=16, meta_offset=4096,
    )  # fmt: skip
    return builder.finish(version, 4096, FLAGS, chunks, references, [blob] if fill is one_chunk else [])


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("version", [5, 6])
@pytest.mark.parametrize(
    "fill",
    [hard_links, names, directories, symbolic_links, attributes, one_chunk],
    ids=lambda fill: fill.__name__,
)
def test_at_most_20_times_the_input(fill: Callable[[TreeBuilder], None], version: int) -> None:
    data = rafs.write(tree(fill, version))
    assert verify(data)[1] == []
    for work in (
        lambda: rafs.read(data),
        lambda: verify(data),
        lambda: rafs.write(rafs.read(data)),
        lambda: rafs.v6.write(as_erofs(rafs.read(data))),
    ):
        assert peak(work) < 20 * len(data)
