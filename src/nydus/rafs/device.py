"""Any tree as EROFS metadata, so that the kernel can mount what is no v6 image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nydus.errors import FormatError
from nydus.rafs import checks
from nydus.rafs.blobmeta import BLOCK, own_places
from nydus.rafs.model import Array, BlobFeature, BlobInfo, Compression, Digester, SuperFlag, Tree

_ALGORITHMS = SuperFlag(0xCF)


def as_erofs(tree: Tree) -> Tree:
    """A v6 tree with the same files, whose chunks have block-aligned places on the devices of its blobs.

    ``v6.write`` of the result is what EROFS mounts, and :func:`nydus.rafs.blobmeta.from_tree` of it the chunk
    table that fills its devices: where v5 chunks are not aligned, or lie in an external blob, they get places
    in the order of their index. Blobs keep id, algorithms and stored places; ``uncompressed_size`` becomes
    the length of the device. A v6 tree is returned as it is. Nothing of the argument is changed.

    Raises:
        FormatError: an external file is cut into pieces that no EROFS image can have.
    """
    if tree.version == 6:
        return tree
    compressions, digesters = checks.algorithms(tree.flags)
    compression = compressions[0] if compressions else Compression.LZ4_BLOCK
    digester = digesters[0] if digesters else Digester.BLAKE3
    flags = tree.flags & ~_ALGORITHMS | checks.super_flags(compression, digester)
    chunks = tree.chunks.copy()
    blobs = []
    chunk_size = tree.chunk_size
    for number, blob in enumerate(tree.blobs):
        rows = np.flatnonzero(chunks["blob_index"] == number)
        mine = chunks[rows]
        size = -(-blob.uncompressed_size // BLOCK) * BLOCK
        external = blob.features & BlobFeature.EXTERNAL
        if external or (mine["uoffset"] % BLOCK).any():
            chunks["uoffset"][rows], size = own_places(mine)
        if external:
            chunk_size = min(chunk_size, _external_chunk_size(tree, blob, rows))
        features = (blob.features | BlobFeature.ALIGNED) & ~BlobFeature.INLINED_FS_META
        blobs.append(replace(blob, features=features, uncompressed_size=size))
    return replace(tree, version=6, flags=flags, chunks=chunks, chunk_size=chunk_size, blobs=blobs)


def _external_chunk_size(tree: Tree, blob: BlobInfo, rows: Array) -> int:
    """The smallest size of chunks of an external blob that are not the last ones of their files."""
    inner = np.ones(len(tree.chunks), bool)
    files = tree.nodes[tree.nodes["chunk_count"] > 0]
    inner[files["chunk"] + files["chunk_count"] - 1] = False
    sizes = np.unique(tree.chunks["usize"][rows[inner[rows]]]).tolist()
    for size in sizes:
        if size % BLOCK or size & (size - 1):
            raise FormatError(
                "a chunk size of external files is no power of two", where=blob.id, found=hex(size)
            )
    return min(sizes, default=tree.chunk_size)
