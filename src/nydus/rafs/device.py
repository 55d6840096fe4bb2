"""Any tree as EROFS metadata, so that the kernel can mount what is no v6 image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nydus.rafs import checks
from nydus.rafs.model import BlobFeature, Compression, Digester, SuperFlag, Tree

_BLOCK = 4096
_ALGORITHMS = SuperFlag(0xCF)


def as_erofs(tree: Tree) -> Tree:
    """A v6 tree with the same files, whose chunks have block-aligned places on the devices of its blobs.

    ``v6.write`` of the result is what EROFS mounts, and :func:`nydus.rafs.blobmeta.from_tree` of it the chunk
    table that fills its devices: where v5 chunks are not aligned, they get places in the order of their
    index. Blobs keep id, algorithms and stored places; ``uncompressed_size`` becomes the length of the
    device. A v6 tree is returned as it is. Nothing of the argument is changed.
    """
    if tree.version == 6:
        return tree
    compressions, digesters = checks.algorithms(tree.flags)
    compression = compressions[0] if compressions else Compression.LZ4_BLOCK
    digester = digesters[0] if digesters else Digester.BLAKE3
    flags = tree.flags & ~_ALGORITHMS | checks.super_flags(compression, digester)
    chunks = tree.chunks.copy()
    blobs = []
    for number, blob in enumerate(tree.blobs):
        rows = np.flatnonzero(chunks["blob_index"] == number)
        mine = chunks[rows]
        size = -(-blob.uncompressed_size // _BLOCK) * _BLOCK
        if (mine["uoffset"] % _BLOCK).any():
            _, first, inverse = np.unique(mine["index"], return_index=True, return_inverse=True)
            blocks = (mine["usize"][first].astype(np.uint64) + np.uint64(_BLOCK - 1)) // np.uint64(_BLOCK)
            ends = np.cumsum(blocks) * np.uint64(_BLOCK)
            chunks["uoffset"][rows] = (ends - blocks * np.uint64(_BLOCK))[inverse]
            size = int(ends[-1])
        features = (blob.features | BlobFeature.ALIGNED) & ~BlobFeature.INLINED_FS_META
        blobs.append(replace(blob, features=features, uncompressed_size=size))
    return replace(tree, version=6, flags=flags, chunks=chunks, blobs=blobs)
