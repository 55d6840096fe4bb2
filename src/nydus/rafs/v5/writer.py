"""A v5 bootstrap from a tree, with the bytes that the reference implementation would write."""

from __future__ import annotations

import stat
from typing import TypeVar

import numpy as np

from nydus.errors import FormatError
from nydus.rafs import checks, derived, order, ragged
from nydus.rafs.model import CHUNK, Array, Digester, NodeFlag, Tree, Xattrs
from nydus.rafs.v5 import layout


def write(tree: Tree) -> bytes:
    """Write a v5 bootstrap.

    Taken from the tree: as for :func:`nydus.rafs.v6.write`, but each name keeps attributes of its own, except
    for its size and chunks; ``rdev`` and TAR_LINK are stored as they are, for every type of file. The size of
    a directory is kept, as merges keep it; 0 stands for :func:`directory_sizes`.

    Made here, whatever the tree says: digests of inodes, nlink, inode numbers, block counts, unique inodes.

    Raises:
        FormatError: a tree that the format cannot hold.
    """
    return _Writer(tree).bootstrap()


def directory_sizes(tree: Tree) -> Array:
    """The size that the reference gives each directory when it is built, by row; 0 for other rows."""
    nodes = tree.nodes
    weights = nodes["name_length"][1:].astype(np.float64) + 8
    total = np.bincount(nodes["parent"][1:], weights=weights, minlength=len(nodes)).astype(np.int64)
    sizes = np.maximum(-(-total // 4096), 1) * 4096
    return np.where(nodes["mode"] >> 12 == stat.S_IFDIR >> 12, sizes, 0)


class _Writer:
    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.nodes = tree.nodes
        self.kinds = tree.nodes["mode"] >> 12
        self.xattrs = [_encode_xattrs(xattrs) for xattrs in tree.xattrs]

    def bootstrap(self) -> bytes:
        tree, nodes = self.tree, self.nodes
        prefetch_offset = layout.SUPER_SIZE + _align(4 * len(nodes))
        blob_offset = prefetch_offset + _align(4 * len(tree.prefetch))
        blobs = self.blob_table()
        extended = self.extended_table()
        extended_offset = blob_offset + len(blobs)
        start = extended_offset + extended.nbytes

        # Lengths of the parts of each record, by row.
        directories = self.kinds == stat.S_IFDIR >> 12
        name_lengths = nodes["name_length"].astype(np.int64)
        name_lengths[0] = 1
        regular = self.kinds == stat.S_IFREG >> 12
        is_link = self.kinds == stat.S_IFLNK >> 12
        targets = np.where(is_link, nodes["target_length"], 0).astype(np.int64)
        attributes, attribute_sizes = self.attribute_lengths()
        first = nodes["link"]
        counts = np.where(regular, nodes["chunk_count"][first], 0).astype(np.int64)
        sizes = layout.INODE.itemsize + _align(name_lengths) + _align(targets) + attributes
        sizes += counts * CHUNK.itemsize
        sequence = self.sequence(np.flatnonzero(directories))
        places = np.empty(len(nodes), np.int64)
        places[sequence] = start + ragged.starts_of(sizes[sequence]).astype(np.int64)
        total = start + int(sizes.sum())
        if total >> 3 > 0xFFFF_FFFF:
            raise FormatError("the tree is too large for the v5 format", found=total)

        out = np.zeros(total, np.uint8)
        self.write_head(out, prefetch_offset, blob_offset, len(blobs), extended_offset, len(extended))
        _put(out, layout.SUPER_SIZE, (places >> 3).astype("<u4"))
        prefetch = (nodes["link"][tree.prefetch] + 1).astype("<u4") if tree.prefetch else np.zeros(0, "<u4")
        _put(out, prefetch_offset, prefetch)
        _put(out, blob_offset, np.frombuffer(blobs, np.uint8))
        _put(out, extended_offset, extended)

        ragged.scatter(out, places, self.records(name_lengths, targets, attribute_sizes, counts))
        at = places + layout.INODE.itemsize
        # The root has no name in the model, and a slash here.
        out[at[0]] = ord("/")
        names = np.frombuffer(tree.names, np.uint8)
        ragged.copy(out, at[1:], names, nodes["name_offset"][1:], name_lengths[1:])
        at += _align(name_lengths)
        ragged.copy(out, at, np.frombuffer(tree.targets, np.uint8), nodes["target_offset"], targets)
        at += _align(targets)
        for row in np.flatnonzero(attributes).tolist():
            raw = self.xattrs[int(nodes["xattr"][row])]
            _put(out, int(at[row]), np.frombuffer(len(raw).to_bytes(8, "little") + raw, np.uint8))
        at += attributes
        position = ragged.indexes(np.zeros(len(nodes), np.int64), counts)
        chunks = tree.chunks[ragged.indexes(nodes["chunk"][first], counts)]
        ragged.scatter(out, np.repeat(at, counts) + position * CHUNK.itemsize, chunks)
        return out.tobytes()

    def sequence(self, directories: Array) -> Array:
        """Rows in the order of their records: depth first, directories and files alike in name order."""
        nodes = self.nodes
        position = {row: index for index, row in enumerate(directories.tolist())}
        parents = [position[row] for row in nodes["parent"][directories].tolist()]
        # Names below each directory, by adding up children before their parents.
        below = nodes["child_count"][directories].tolist()
        for index in range(len(below) - 1, 0, -1):
            below[parents[index]] += below[index]
        weights = np.ones(len(nodes), np.int64)
        weights[directories] += np.array(below, np.int64)
        before = np.cumsum(weights) - weights
        # The place of a name follows from its directory's and from the siblings before it.
        base = before[np.minimum(nodes["first_child"][directories], len(nodes) - 1)]
        ahead, start = before[directories].tolist(), base.tolist()
        places = [0] * len(directories)
        for index in range(1, len(directories)):
            parent = parents[index]
            places[index] = places[parent] + 1 + ahead[index] - start[parent]
        owner = np.searchsorted(directories, nodes["parent"][1:])
        place = np.zeros(len(nodes), np.int64)
        place[1:] = np.array(places)[owner] + 1 + before[1:] - base[owner]
        result = np.empty(len(nodes), np.int64)
        result[place] = np.arange(len(nodes))
        return result

    def records(self, names: Array, targets: Array, attributes: Array, counts: Array) -> Array:
        tree, nodes = self.tree, self.nodes
        directories = self.kinds == stat.S_IFDIR >> 12
        result = np.zeros(len(nodes), layout.INODE)
        digesters = checks.algorithms(tree.flags)[1]
        digests = derived.digests(tree, digesters[0] if digesters else Digester.BLAKE3)
        result["digest"] = digests.view("V32").reshape(-1)
        result["parent"][1:] = nodes["parent"][1:].astype(np.uint64) + 1
        result["ino"] = nodes["link"].astype(np.uint64) + 1
        for name in ("uid", "gid", "mode", "rdev", "mtime_ns"):
            result[name] = nodes[name]
        result["mtime"] = nodes["mtime"].astype(np.uint64)
        size = np.where(self.kinds == stat.S_IFREG >> 12, nodes["size"][nodes["link"]], nodes["size"])
        # All of them unsigned: numpy joins signed and unsigned integers to doubles.
        size = np.where(directories & (size == 0), directory_sizes(tree).astype(np.uint64), size)
        size = np.where(self.kinds == stat.S_IFLNK >> 12, targets.astype(np.uint64), size)
        result["size"] = size
        padded = _align(attributes).astype(np.uint64)
        result["blocks"] = (size + padded + np.uint64(511)) // np.uint64(512)
        flags = np.where(self.kinds == stat.S_IFLNK >> 12, layout.SYMLINK, 0)
        flags |= np.where(nodes["flags"] & NodeFlag.TAR_LINK, layout.HARDLINK, 0)
        flags |= np.where(nodes["xattr"] >= 0, layout.XATTR, 0)
        result["flags"] = flags
        result["nlink"] = derived.nlinks(tree)
        rows = np.flatnonzero(directories)
        parents = np.searchsorted(rows, nodes["parent"][rows])
        first = order.first_children(order.preorder(parents), nodes["child_count"][rows])
        result["child_index"][rows] = first + 1
        result["child_count"] = np.where(directories, nodes["child_count"], counts)
        result["name_length"] = names
        result["target_length"] = targets
        return result

    def attribute_lengths(self) -> tuple[Array, Array]:
        """Bytes of the attribute area of each row, and of the pairs in it without padding."""
        pairs = np.zeros(len(self.nodes), np.int64)
        has = self.nodes["xattr"] >= 0
        if self.xattrs:
            lengths = np.array([len(raw) for raw in self.xattrs], np.int64)
            pairs[has] = lengths[self.nodes["xattr"][has]]
        return np.where(has, 8 + _align(pairs), 0), pairs

    def write_head(
        self, out: Array, prefetch: int, blobs: int, blobs_size: int, extended: int, extended_entries: int
    ) -> None:
        tree, nodes = self.tree, self.nodes
        head = np.zeros(1, layout.SUPER)
        head["magic"], head["version"], head["size"] = layout.MAGIC, layout.VERSION, layout.SUPER_SIZE
        head["chunk_size"], head["flags"] = tree.chunk_size, int(tree.flags)
        head["inodes"] = len(np.unique(nodes["link"]))
        head["inode_table_offset"], head["inode_table_entries"] = layout.SUPER_SIZE, len(nodes)
        head["prefetch_offset"], head["prefetch_entries"] = prefetch, len(tree.prefetch)
        head["blob_table_offset"], head["blob_table_size"] = blobs, blobs_size
        head["extended_offset"], head["extended_entries"] = extended, extended_entries
        _put(out, 0, head)

    def blob_table(self) -> bytes:
        parts = [
            blob.readahead_offset.to_bytes(4, "little")
            + blob.readahead_size.to_bytes(4, "little")
            + blob.id.encode("ascii")
            for blob in self.tree.blobs
        ]
        table = b"\0".join(parts)
        return table + bytes(-len(table) % 8)

    def extended_table(self) -> Array:
        table = np.zeros(len(self.tree.blobs), layout.EXTENDED_BLOB)
        for row, blob in zip(table, self.tree.blobs, strict=True):
            row["chunk_count"], row["features"] = blob.chunk_count, int(blob.features)
            row["uncompressed_size"], row["compressed_size"] = blob.uncompressed_size, blob.compressed_size
        return table


def _encode_xattrs(xattrs: Xattrs) -> bytes:
    parts = []
    for name, value in xattrs:
        parts.append((len(name) + 1 + len(value)).to_bytes(4, "little") + name + b"\0" + value)
    return b"".join(parts)


Number = TypeVar("Number", int, Array)


def _align(value: Number) -> Number:
    return value + 7 & ~7


def _put(out: Array, offset: int, records: Array) -> None:
    out[offset : offset + records.nbytes] = records.view(np.uint8).reshape(-1)
