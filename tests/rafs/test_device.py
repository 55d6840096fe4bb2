"""Trees of the old format get block-aligned places, and are otherwise the same."""

from __future__ import annotations

from nydus import rafs
from nydus.rafs import blobmeta, device, v6
from rafs.test_tree import KITCHEN
from rafs.trees import listing, make


def test_unaligned_chunks_get_aligned_places() -> None:
    tree = make(KITCHEN, 5)
    ends = tree.chunks["index"].astype("u8") * 4096
    tree.chunks["uoffset"] = ends + tree.chunks["index"] * 3
    tree.blobs[0].uncompressed_size += 3 * len(tree.chunks)
    tree = rafs.read(rafs.write(tree))
    view = device.as_erofs(tree)
    mounted = v6.read(v6.write(view))
    assert listing(mounted) == listing(tree)
    chunks = blobmeta.from_tree(view, 0)
    assert not (chunks.uoffset % 4096).any()
    assert (chunks.uoffset[1:] >= chunks.uoffset[:-1] + chunks.usize[:-1]).all()
    assert int((chunks.uoffset + chunks.usize).max()) <= view.blobs[0].uncompressed_size
    assert mounted.blobs[0].uncompressed_size % 4096 == 0


def test_new_trees_stay_as_they_are() -> None:
    tree = make(KITCHEN, 6)
    assert device.as_erofs(tree) is tree
