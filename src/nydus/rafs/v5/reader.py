"""The tree of a v5 bootstrap, all inodes at once."""

from __future__ import annotations

import stat

import numpy as np

from nydus.rafs import checks, order, ragged
from nydus.rafs.buffer import Buffer, Source
from nydus.rafs.model import CHUNK, NODE, Array, BlobFeature, NodeFlag, Super, Tree, Xattrs
from nydus.rafs.v5 import layout
from nydus.rafs.v5.superblock import read_superblock

MAX_NAME = 255


def read(data: Source, where: str = "") -> Tree:
    """Read a v5 bootstrap. Inode digests are not verified here: ``nydus-image check`` does.

    Where very old images lack the extended blob table, the sizes of blobs are taken from their chunks.

    Raises:
        FormatError: any structure that is out of bounds, out of order, overlapping itself, or not known.
    """
    return Reader(Buffer(data, where), read_superblock(data, where)).tree()


class Reader:
    """Reads one bootstrap.

    Attributes:
        inodes, places, ends: after :meth:`tree`, by row: the record, where it starts, and where it ends.
    """

    inodes: Array
    places: Array
    ends: Array

    def __init__(self, buffer: Buffer, head: Super) -> None:
        self.buffer, self.head = buffer, head

    def records(self) -> tuple[Array, Array]:
        table = self.buffer.array(self.head.meta_offset, self.head.inode_count, "<u4", "inode table")
        offsets = table.astype(np.int64) << 3
        if (offsets < layout.SUPER_SIZE).any():
            bad = int(np.argmax(offsets < layout.SUPER_SIZE))
            raise self.buffer.error(
                "an inode lies inside of the super block",
                self.head.meta_offset + 4 * bad,
                found=int(offsets[bad]),
            )
        return self.buffer.gather(offsets, layout.INODE, "inode"), offsets

    def tree(self) -> Tree:
        buffer = self.buffer
        records, offsets = self.records()
        root = records[0]
        if int(root["mode"]) >> 12 != stat.S_IFDIR >> 12:
            if int.from_bytes(root["padding"].tobytes(), "little") == 0 and int(root["gid"]) >> 12 == 4:
                raise buffer.error("images of before RAFS 1.0 are not supported", int(offsets[0]))
            raise buffer.error("the root is not a directory", int(offsets[0]) + 60, found=hex(root["mode"]))
        kinds = records["mode"] >> 12
        if not np.isin(kinds, [1, 2, 4, 6, 8, 10, 12]).all():
            bad = int(np.argmin(np.isin(kinds, [1, 2, 4, 6, 8, 10, 12])))
            raise buffer.error("unknown file type", int(offsets[bad]) + 60, found=hex(records["mode"][bad]))
        nodes = np.zeros(len(records), NODE)
        for name in (
            "mode",
            "uid",
            "gid",
            "nlink",
            "size",
            "mtime_ns",
            "rdev",
            "name_length",
            "target_length",
        ):
            nodes[name] = records[name]
        nodes["mtime"] = records["mtime"].astype(np.int64)
        nodes["flags"] = np.where(records["flags"] & layout.HARDLINK, NodeFlag.TAR_LINK, 0)
        self.children(nodes, records, offsets)
        self.links(nodes, records, offsets)
        starts = offsets + layout.INODE.itemsize
        lengths = records["name_length"].astype(np.int64)
        self.check_names(nodes, starts, lengths)
        names = ragged.join(buffer.data, starts, lengths)
        nodes["name_offset"] = ragged.starts_of(lengths)
        starts += lengths + 7 & ~7
        is_link = kinds == stat.S_IFLNK >> 12
        nodes["target_length"][~is_link] = 0
        lengths = records["target_length"].astype(np.int64)
        self.check(starts, lengths, "target of a symbolic link")
        targets = ragged.join(buffer.data, starts[is_link], lengths[is_link])
        nodes["target_offset"][is_link] = ragged.starts_of(lengths[is_link])
        starts += lengths + 7 & ~7
        xattrs = self.xattrs(nodes, records, starts)
        chunks = self.chunks(nodes, records, starts)
        lists = np.where(kinds == stat.S_IFREG >> 12, records["child_count"], 0).astype(np.int64)
        ends = starts + lists * CHUNK.itemsize
        tree = Tree(
            version=5,
            chunk_size=self.head.chunk_size,
            flags=self.head.flags,
            nodes=nodes,
            names=names.tobytes(),
            targets=targets.tobytes(),
            chunks=chunks,
            xattrs=xattrs,
            blobs=self.head.blobs,
            prefetch=self.prefetch(records),
        )
        rows = _renumber(tree)
        self.inodes, self.places, self.ends = records[rows], offsets[rows], ends[rows]
        return tree

    def check(self, starts: Array, lengths: Array, what: str) -> None:
        """Runs must lie in the file, and cannot be larger than it together, as they do not overlap."""
        outside = starts + lengths > self.buffer.size
        if outside.any():
            raise self.buffer.error(f"{what} reaches beyond the end", int(starts[np.argmax(outside)]))
        if int(lengths.sum()) > self.buffer.size:
            raise self.buffer.error(f"{what}: the records overlap")

    def children(self, nodes: Array, records: Array, offsets: Array) -> None:
        """Parents from the child runs of directories, which must cover every other name once."""
        directories = np.flatnonzero(records["mode"] >> 12 == stat.S_IFDIR >> 12)
        counts = records["child_count"][directories].astype(np.int64)
        first = records["child_index"][directories].astype(np.int64) - 1
        wrong = (counts > 0) & ((first <= directories) | (first + counts > len(nodes)))
        if wrong.any():
            bad = int(directories[np.argmax(wrong)])
            raise self.buffer.error("the children of a directory are out of range", int(offsets[bad]) + 92)
        nodes["first_child"][directories] = np.maximum(first, 0)
        nodes["child_count"][directories] = counts
        if int(counts.sum()) == len(nodes) - 1:
            rows = ragged.indexes(first, counts)
            covered = np.zeros(len(nodes), bool)
            covered[rows] = True
            nodes["parent"][rows] = np.repeat(directories, counts)
            if covered[1:].all():
                return
        raise self.buffer.error(
            "directories do not list every inode once",
            self.head.meta_offset,
            found=int(counts.sum()),
            expected=len(nodes) - 1,
        )

    def links(self, nodes: Array, records: Array, offsets: Array) -> None:
        _, first, inverse = np.unique(records["ino"], return_index=True, return_inverse=True)
        nodes["link"] = first[inverse]
        if (records["ino"] == 0).any():
            raise self.buffer.error("an inode has the number 0", int(offsets[np.argmin(records["ino"])]) + 40)
        linked = nodes["link"] != np.arange(len(nodes))
        owner = records[nodes["link"]]
        bad = linked & (
            (records["mode"] >> 12 == stat.S_IFDIR >> 12)
            | (owner["mode"] >> 12 != records["mode"] >> 12)
            | (owner["size"] != records["size"])
        )
        if bad.any():
            raise self.buffer.error(
                "two different inodes have the same number", int(offsets[np.argmax(bad)]) + 40
            )

    def check_names(self, nodes: Array, starts: Array, lengths: Array) -> None:
        self.check(starts, lengths, "name")
        if (lengths[1:] > MAX_NAME).any() or (lengths == 0).any():
            bad = int(np.argmax((lengths > MAX_NAME) | (lengths == 0)))
            raise self.buffer.error("invalid length of a name", int(starts[bad]), found=int(lengths[bad]))
        starts, lengths = starts[1:], lengths[1:]
        if not len(starts):
            return
        heap = ragged.join(self.buffer.data, starts, lengths)
        places = ragged.starts_of(lengths).astype(np.int64)
        wrong = (heap == 0) | (heap == ord("/"))
        if wrong.any():
            bad = int(np.searchsorted(places, np.argmax(wrong), side="right")) - 1
            raise self.buffer.error("a name holds a slash or a zero byte", int(starts[bad]))
        second = heap[np.minimum(places + 1, len(heap) - 1)] == ord(".")
        dots = (heap[places] == ord(".")) & ((lengths == 1) | ((lengths == 2) & second))
        if dots.any():
            raise self.buffer.error("a name is . or ..", int(starts[np.argmax(dots)]))
        compared = ragged.compare_next(heap, places, lengths)
        unsorted = (compared >= 0) & (nodes["parent"][2:] == nodes["parent"][1:-1])
        if unsorted.any():
            raise self.buffer.error(
                "names of a directory are not sorted", int(starts[np.argmax(unsorted) + 1])
            )

    def xattrs(self, nodes: Array, records: Array, starts: Array) -> list[Xattrs]:
        """Attribute sets; moves ``starts`` behind them."""
        nodes["xattr"] = -1
        rows = np.flatnonzero(records["flags"] & layout.XATTR)
        self.check(starts[rows], np.full(len(rows), 8), "size of extended attributes")
        sizes = self.buffer.gather(starts[rows], "<u8", "size of extended attributes")
        sizes = np.minimum(sizes, self.buffer.size).astype(np.int64)
        self.check(starts[rows] + 8, sizes, "extended attributes")
        known: dict[bytes, int] = {}
        result: list[Xattrs] = []
        for row, start, size in zip(rows.tolist(), (starts[rows] + 8).tolist(), sizes.tolist(), strict=True):
            raw = self.buffer.bytes(start, size, "extended attributes")
            index = known.get(raw)
            if index is None:
                index = known[raw] = len(result)
                result.append(self.parse_xattrs(raw, start))
            nodes["xattr"][row] = index
        starts[rows] += 8 + (sizes + 7 & ~7)
        return result

    def parse_xattrs(self, raw: bytes, offset: int) -> Xattrs:
        result = []
        at = 0
        while at < len(raw):
            end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
            name, zero, value = raw[at + 4 : end].partition(b"\0")
            if not zero or not name or end > len(raw):
                raise self.buffer.error("invalid extended attribute", offset + at)
            result.append((name, value))
            at = end
        return tuple(result)

    def chunks(self, nodes: Array, records: Array, starts: Array) -> Array:
        buffer = self.buffer
        owners = np.flatnonzero(
            (records["mode"] >> 12 == stat.S_IFREG >> 12) & (nodes["link"] == np.arange(len(nodes)))
        )
        counts = records["child_count"][owners].astype(np.int64)
        sizes = records["size"][owners]
        units = self.chunk_sizes(starts[owners], counts)
        # Sizes are any u64: compare without rounding up.
        short = (sizes > counts * units) | (sizes <= (counts - 1) * units) & (counts > 0)
        if short.any():
            bad = int(np.argmax(short))
            raise buffer.error(
                "the number of chunks does not fit the size of a file",
                int(starts[owners[bad]]),
                found=int(counts[bad]),
                expected=-(-int(sizes[bad]) // max(int(units[bad]), 1)),
            )
        self.check(starts[owners], counts * CHUNK.itemsize, "chunk list")
        position = ragged.indexes(np.zeros(len(owners), np.int64), counts)
        places = np.repeat(starts[owners], counts) + position * CHUNK.itemsize
        chunks = buffer.gather(places, CHUNK, "chunk list")
        units = np.repeat(units, counts)
        expected = np.minimum(np.repeat(sizes.astype(np.int64), counts) - position * units, units)
        wrong = chunks["file_offset"] != position * units
        if wrong.any():
            bad = int(np.argmax(wrong))
            raise buffer.error(
                "a chunk is not where its file has it",
                int(places[bad]) + 64,
                found=int(chunks["file_offset"][bad]),
                expected=int((position * units)[bad]),
            )
        nodes["chunk"][owners] = ragged.starts_of(counts)
        nodes["chunk_count"][owners] = counts
        self.check_chunks(chunks, places, expected)
        links = np.flatnonzero(nodes["link"] != np.arange(len(nodes)))
        for name in ("chunk", "chunk_count"):
            nodes[name][links] = nodes[name][nodes["link"][links]]
        return chunks

    def chunk_sizes(self, starts: Array, counts: Array) -> Array:
        """Bytes of all chunks but the last of each file: the first one's, where the blob is external."""
        result = np.full(len(starts), self.head.chunk_size, np.int64)
        external = np.array([bool(blob.features & BlobFeature.EXTERNAL) for blob in self.head.blobs])
        if external.any():
            filled = np.flatnonzero(counts > 0)
            first = self.buffer.gather(starts[filled], CHUNK, "chunk list")
            known = first["blob_index"] < len(external)
            mine = known & external[np.where(known, first["blob_index"], 0)]
            if (first["usize"][mine] > checks.MAX_UNIT).any():
                raise self.buffer.error(
                    "a chunk of an external file is too large",
                    int(starts[filled[mine]][np.argmax(first["usize"][mine])]),
                    found=int(first["usize"][mine].max()),
                    expected=f"at most {checks.MAX_UNIT}",
                )
            result[filled[mine]] = first["usize"][mine]
        return result

    def check_chunks(self, chunks: Array, places: Array, sizes: Array) -> None:
        blobs = self.head.blobs
        if not len(chunks):
            return

        def refuse(bad: Array, what: str) -> None:
            if bad.any():
                raise self.buffer.error(what, int(places[np.argmax(bad)]))

        blob = chunks["blob_index"]
        refuse(blob >= len(blobs), "a chunk of a blob that does not exist")
        refuse(chunks["usize"] != sizes, "a chunk does not have the size that its file gives it")
        for name in ("coffset", "uoffset"):
            refuse(chunks[name] >= np.uint64(1 << 44), "impossible offset of a chunk")
        for index, info in enumerate(blobs):
            mine = chunks[blob == index]
            if not len(mine):
                continue
            if info.features & BlobFeature.EXTERNAL:
                # Not stored in this version.
                info.chunk_size = 1 << max(int(mine["usize"].max()) - 1, 0xFFF).bit_length()
            if not info.compressed_size:
                info.compressed_size = int((mine["coffset"] + mine["csize"]).max())
                info.uncompressed_size = int((mine["uoffset"] + mine["usize"]).max())
        compressed = np.array([b.compressed_size for b in blobs], np.uint64)[blob]
        uncompressed = np.array([b.uncompressed_size for b in blobs], np.uint64)[blob]
        count = np.array([b.chunk_count or 1 << 24 for b in blobs], np.uint64)[blob]
        outside = chunks["coffset"] + chunks["csize"] > compressed
        outside |= chunks["uoffset"] + chunks["usize"] > uncompressed
        refuse(outside | (chunks["index"] >= count), "a chunk lies outside of its blob")

    def prefetch(self, records: Array) -> list[int]:
        wanted = np.array(self.head.prefetch, np.uint64)
        numbers, first = np.unique(records["ino"], return_index=True)
        place = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
        if (numbers[place] != wanted).any():
            raise self.buffer.error("the prefetch table names an inode that does not exist")
        return [int(row) for row in first[place]]


def _renumber(tree: Tree) -> Array:
    """Bring rows into P-order, and say where each was; only images of old builders have another order."""
    nodes = tree.nodes
    directories = np.flatnonzero(nodes["mode"] >> 12 == stat.S_IFDIR >> 12)
    sequence = order.preorder(np.searchsorted(directories, nodes["parent"][directories]))
    first = order.first_children(sequence, nodes["child_count"][directories])
    rows = np.arange(len(nodes))
    children = ragged.indexes(nodes["first_child"][directories], nodes["child_count"][directories])
    rows[children] = ragged.indexes(first, nodes["child_count"][directories])
    nodes["first_child"][directories] = first
    if (rows == np.arange(len(rows))).all():
        return rows
    moved = np.empty_like(nodes)
    moved[rows] = nodes
    moved["parent"] = rows[moved["parent"]]
    # The first name of an inode is the one with the lowest row.
    lowest = np.full(len(rows), len(rows))
    np.minimum.at(lowest, nodes["link"], rows)
    moved["link"][rows] = lowest[nodes["link"]]
    tree.nodes = moved
    tree.prefetch = [int(rows[row]) for row in tree.prefetch]
    before = np.empty_like(rows)
    before[rows] = np.arange(len(rows))
    return before
