"""Directory blocks; rafs.md 2.8."""

from __future__ import annotations

import numpy as np

from nydus.rafs import ragged
from nydus.rafs.model import Array, Tree
from nydus.rafs.v6 import layout

_DOT = ord(".")
#: Blocks emitted at a time, so that columns of their entries stay small beside the bootstrap.
_BLOCKS = 128


class Dirents:
    """The entries of some directories, cut into blocks. Made before inodes have places, emitted after.

    Attributes:
        sizes: bytes of each directory.
        blocks: number of blocks of each directory.
    """

    def __init__(self, tree: Tree, directories: Array, block: int) -> None:
        nodes = tree.nodes
        self.block = block
        self.heap = np.concatenate([np.frombuffer(tree.names, np.uint8), np.array([_DOT, _DOT], np.uint8)])
        counts = nodes["child_count"][directories].astype(np.int64)
        self._list(nodes, directories, counts)
        self._cut(counts + 2)

    def _list(self, nodes: Array, directories: Array, counts: Array) -> None:
        """All entries of all directories, with ``.`` and ``..`` sorted among the names."""
        children = ragged.indexes(nodes["first_child"][directories], counts)
        owner = np.repeat(np.arange(len(directories)), counts)
        starts = nodes["name_offset"][children].astype(np.int64)
        lead, second = self.heap[starts], self.heap[starts + 1]
        before_dot = lead < _DOT
        before_dots = before_dot | ((lead == _DOT) & (second < _DOT))
        base = ragged.starts_of(counts + 2).astype(np.int64)
        position = ragged.indexes(base, counts) + ~before_dot + ~before_dots
        dot = base + np.bincount(owner[before_dot], minlength=len(directories))
        dots = base + np.bincount(owner[before_dots], minlength=len(directories)) + 1
        total = len(children) + 2 * len(directories)
        self.rows = np.empty(total, np.int64)
        self.starts = np.empty(total, np.int64)
        self.lengths = np.empty(total, np.int64)
        self.rows[position], self.rows[dot], self.rows[dots] = (
            children,
            directories,
            nodes["parent"][directories],
        )
        self.starts[position], self.starts[dot], self.starts[dots] = (
            starts,
            len(self.heap) - 2,
            len(self.heap) - 2,
        )
        self.lengths[position], self.lengths[dot], self.lengths[dots] = nodes["name_length"][children], 1, 2

    def _cut(self, totals: Array) -> None:
        """Fill blocks greedily."""
        ends = np.cumsum(self.lengths + layout.DIRENT.itemsize)
        first = ragged.starts_of(totals).astype(np.int64)
        before = np.concatenate([[0], ends])
        sizes = before[first + totals] - before[first]
        extra: list[int] = []
        for directory in np.flatnonzero(sizes > self.block).tolist():
            entry, stop = int(first[directory]), int(first[directory] + totals[directory])
            while True:
                entry = int(np.searchsorted(ends, before[entry] + self.block, side="right"))
                if entry >= stop:
                    break
                extra.append(entry)
        self.first = np.sort(np.concatenate([first, np.array(extra, np.int64)]))
        self.counts = np.diff(np.append(self.first, len(ends)))
        used = before[self.first + self.counts] - before[self.first]
        block_of = np.searchsorted(self.first, first)
        self.blocks = np.diff(np.append(block_of, len(self.first)))
        self.sizes = (self.blocks - 1) * self.block + used[block_of + self.blocks - 1]

    def emit(self, out: Array, places: Array, nids: Array, types: Array) -> None:
        """Write all blocks.

        Args:
            out: the bootstrap (u1), zeroed.
            places: byte offset of each block.
            nids, types: by row of the tree.
        """
        step = min(_BLOCKS, len(self.first) // 8 + 1)
        for start in range(0, len(self.first), step):
            self._emit(out, places, nids, types, slice(start, start + step))

    def _emit(self, out: Array, places: Array, nids: Array, types: Array, part: slice) -> None:
        first, counts = self.first[part], self.counts[part]
        entry = slice(int(first[0]), int(first[-1] + counts[-1]))
        owner = np.repeat(np.arange(len(first)), counts)
        first = first - entry.start
        rows, lengths = self.rows[entry], self.lengths[entry]
        number = np.arange(len(rows)) - first[owner]
        text = np.cumsum(lengths) - lengths
        offsets = layout.DIRENT.itemsize * counts[owner] + text - text[first][owner]
        entries = np.zeros(len(rows), layout.DIRENT)
        entries["nid"], entries["name_offset"], entries["type"] = nids[rows], offsets, types[rows]
        base = places[part][owner]
        ragged.scatter(out, base + number * layout.DIRENT.itemsize, entries)
        ragged.copy(out, base + offsets, self.heap, self.starts[entry], lengths)
