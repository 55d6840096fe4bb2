"""Columns that follow from the rest of a tree; writers make them rather than trust them."""

from __future__ import annotations

import stat

import numpy as np

from nydus.rafs import codec, ragged
from nydus.rafs.model import Array, Digester, Tree

_DIRECTORY = stat.S_IFDIR >> 12
_LINK = stat.S_IFLNK >> 12
_REGULAR = stat.S_IFREG >> 12


def nlinks(tree: Tree) -> Array:
    """Link counts by row: the names of an inode, or 2 + child directories."""
    nodes = tree.nodes
    names = np.bincount(nodes["link"], minlength=len(nodes))
    is_directory = nodes["mode"] >> 12 == _DIRECTORY
    parents = nodes["parent"][1:][is_directory[1:]]
    return np.where(is_directory, 2 + np.bincount(parents, minlength=len(nodes)), names[nodes["link"]])


def owned_chunks(tree: Tree) -> Array:
    """The chunks of all inodes, each inode once, in P-order; not to be changed: often they are the tree's."""
    nodes = tree.nodes
    rows = np.flatnonzero((nodes["link"] == np.arange(len(nodes))) & (nodes["chunk_count"] > 0))
    starts, counts = nodes["chunk"][rows], nodes["chunk_count"][rows]
    if int(counts.sum()) == len(tree.chunks) and (starts == ragged.starts_of(counts)).all():
        return tree.chunks
    return np.asarray(tree.chunks[ragged.indexes(starts, counts)])


def digests(tree: Tree, digester: Digester) -> Array:
    """The digest of each row ((n, 32) u1) as v5 stores it; rafs.md 1.4."""
    nodes = tree.nodes
    result = np.empty((len(nodes), 32), np.uint8)
    result[:] = np.frombuffer(codec.digest(digester, b""), np.uint8)
    kinds = nodes["mode"] >> 12
    of_chunks = memoryview(np.ascontiguousarray(tree.chunks["digest"]).tobytes())
    rows = np.flatnonzero((kinds == _REGULAR) & (nodes["chunk_count"] > 0))
    runs = zip(rows.tolist(), nodes["chunk"][rows].tolist(), nodes["chunk_count"][rows].tolist(), strict=True)
    found = [codec.digest(digester, of_chunks[32 * start : 32 * (start + count)]) for _, start, count in runs]
    result[rows] = np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32)
    for row in np.flatnonzero(kinds == _LINK).tolist():
        result[row] = np.frombuffer(codec.digest(digester, tree.target(row)), np.uint8)
    # Children have higher rows than their directory.
    rows = np.flatnonzero(kinds == _DIRECTORY)[::-1]
    starts, counts = nodes["first_child"][rows].tolist(), nodes["child_count"][rows].tolist()
    for row, start, count in zip(rows.tolist(), starts, counts, strict=True):
        if count:
            joined = result[start : start + count].tobytes()
            result[row] = np.frombuffer(codec.digest(digester, joined), np.uint8)
    return result
