"""The tree of a v6 bootstrap: directories level by level, then all inodes at once."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nydus.rafs import checks, order, ragged
from nydus.rafs.buffer import Buffer, Source
from nydus.rafs.model import CHUNK, NODE, Array, BlobFeature, Super, SuperFlag, Tree, Xattrs
from nydus.rafs.v6 import layout
from nydus.rafs.v6.superblock import read_chunk_table, read_superblock

MAX_NAME = 255
MAX_TARGET = 0xFFFF


def read(data: Source, where: str = "") -> Tree:
    """Read a v6 bootstrap.

    Chunks carry what the bootstrap knows: place in the file and in the blob's uncompressed image, and, where
    the chunk table has a record of the same chunk, digest, flags, checksum and stored place. The rest
    (batched chunks, no chunk table) stays zero: a :class:`~nydus.rafs.blobmeta.ChunkMap` has it.

    Raises:
        FormatError: any structure that is out of bounds, out of order, overlapping itself, or not known.
    """
    head = read_superblock(data, where)
    return Reader(Buffer(data, where), head).tree()


@dataclass(slots=True)
class _Entries:
    """Names in breadth-first order: the root, then the children of each directory in turn."""

    parent: Array  # position of the directory in the list of directories
    nid: Array
    kind: Array
    start: Array
    length: Array


class Reader:
    """Reads one bootstrap.

    Attributes:
        nids: after :meth:`tree`, the nid of each row.
        inodes, places, sizes: after :meth:`tree`, for each distinct inode in the order of their first rows:
            the record in its extended form, its byte offset, and its bytes with the attributes that follow.
    """

    nids: Array
    inodes: Array
    places: Array
    sizes: Array

    def __init__(self, buffer: Buffer, head: Super) -> None:
        self.buffer, self.head = buffer, head
        self.block = head.block_size
        # What legitimate tables never exceed together, because they do not overlap.
        self.budget = buffer.size

    def spend(self, sizes: Array, what: str) -> None:
        """Refuse tables that could only be that large by overlapping each other."""
        total = int(sizes.astype(np.float64).sum())
        self.budget -= total
        if self.budget < 0:
            raise self.buffer.error(f"{what} overlap: they are larger than the file")

    def tree(self) -> Tree:
        entries, counts = self.walk()
        nodes = np.zeros(len(entries.nid), NODE)
        rows = self.number(entries, counts, nodes)
        nids = np.empty(len(rows), np.uint64)
        nids[rows] = entries.nid
        kinds = np.empty(len(rows), np.uint8)
        kinds[rows] = entries.kind
        starts = np.empty(len(rows), np.int64)
        starts[rows] = entries.start
        nodes["name_length"][rows] = entries.length
        del entries, rows
        names = ragged.join(self.buffer.data, starts, nodes["name_length"])
        nodes["name_offset"] = ragged.starts_of(nodes["name_length"])
        # One inode for each distinct nid, in the order of their first names.
        unique, first, inverse = np.unique(nids, return_index=True, return_inverse=True)
        nodes["link"] = first[inverse]
        owners = np.flatnonzero(nodes["link"] == np.arange(len(nodes)))
        inodes, places, sizes = self.load(nids[owners])
        self.nids, self.inodes, self.places, self.sizes = nids, inodes, places, sizes
        # Of all names: a directory could have a second one in disguise, and contain itself.
        other = layout.FILE_TYPES[inodes["mode"] >> 12][np.searchsorted(owners, nodes["link"])] != kinds
        if other.any():
            bad = self.offset_of(nids[np.argmax(other)])
            raise self.buffer.error("the type of a directory entry is not the inode's", bad)
        for name in ("mode", "uid", "gid", "nlink", "size", "mtime_ns"):
            nodes[name][owners] = inodes[name]
        nodes["mtime"][owners] = inodes["mtime"].astype(np.int64)
        nodes["xattr"] = -1
        xattrs = self.xattrs(nodes, owners, inodes, places, sizes)
        targets = self.symlinks(nodes, owners, inodes, places, sizes)
        chunks = self.chunks(nodes, owners, inodes, places, sizes)
        special = np.isin(inodes["mode"] >> 12, [stat.S_IFCHR >> 12, stat.S_IFBLK >> 12])
        nodes["rdev"][owners[special]] = inodes["u"][special]
        self.share(nodes)
        return Tree(
            version=6,
            chunk_size=self.head.chunk_size,
            flags=self.head.flags,
            nodes=nodes,
            names=names.tobytes(),
            targets=targets,
            chunks=chunks,
            xattrs=xattrs,
            blobs=self.head.blobs,
            prefetch=self.prefetch(unique, first),
        )

    # -- directories ---------------------------------------------------------------------------------------

    def walk(self) -> tuple[_Entries, Array]:
        """All names, breadth first, and the number of children of each directory in the same order."""
        buffer, head = self.buffer, self.head
        seen = np.zeros(max(buffer.size - head.meta_offset, 0) // layout.NID_SIZE + 1, bool)
        level = np.array([head.root], np.uint64)
        parts: list[_Entries] = [
            _Entries(
                np.zeros(1, np.int64),
                level,
                np.full(1, 2, np.uint8),
                np.zeros(1, np.int64),
                np.zeros(1, np.int64),
            )
        ]
        counts: list[Array] = []
        base = 0
        while len(level):
            self.check_nids(level)
            if seen[level].any() or len(np.unique(level)) != len(level):
                raise buffer.error("a directory has two names, or contains itself", self.offset_of(level[0]))
            seen[level] = True
            part, count = self.read_directories(level, base)
            counts.append(count)
            parts.append(part)
            base += len(level)
            level = part.nid[part.kind == 2]
        merged = [np.concatenate([getattr(p, name) for p in parts]) for name in _Entries.__slots__]
        return _Entries(*merged), np.concatenate(counts)

    def number(self, entries: _Entries, counts: Array, nodes: Array) -> Array:
        """Fill the structural columns of ``nodes``; gives the row of each breadth-first position."""
        directories = np.flatnonzero(entries.kind == 2)
        sequence = order.preorder(entries.parent[directories])
        first = order.first_children(sequence, counts)
        # Children of one directory are consecutive: the position within is the distance from the first.
        begins = 1 + np.cumsum(counts) - counts
        rows = np.zeros(len(entries.nid), np.int64)
        rows[1:] = first[entries.parent[1:]] + np.arange(1, len(rows)) - begins[entries.parent[1:]]
        nodes["parent"][rows] = rows[directories[entries.parent]]
        nodes["first_child"][rows[directories]] = first
        nodes["child_count"][rows[directories]] = counts
        return rows

    def offset_of(self, nid: Any) -> int:
        return self.head.meta_offset + int(nid) * layout.NID_SIZE

    def check_nids(self, nids: Array) -> None:
        limit = (self.buffer.size - self.head.meta_offset) // layout.NID_SIZE
        if len(nids) and int(nids.max()) >= limit:
            raise self.buffer.error(
                "an inode lies beyond the end", found=int(nids.max()), expected=f"a nid below {limit}"
            )

    def load(self, nids: Array) -> tuple[Array, Array, Array]:
        """Inodes in the extended form, their byte offsets, and their sizes with their attributes (i8)."""
        self.check_nids(nids)
        offsets = (self.head.meta_offset + nids.astype(np.int64) * layout.NID_SIZE).astype(np.int64)
        formats = self.buffer.gather(offsets, "<u2", "inode")
        bad = ~np.isin(formats >> 1, [layout.FLAT_PLAIN, layout.FLAT_INLINE, layout.CHUNK_BASED])
        if bad.any():
            where = int(np.argmax(bad))
            raise self.buffer.error("unknown inode format", int(offsets[where]), found=int(formats[where]))
        extended = (formats & layout.EXTENDED) != 0
        result = np.zeros(len(nids), layout.INODE)
        result[extended] = self.buffer.gather(offsets[extended], layout.INODE, "inode")
        if not extended.all():
            compact = self.buffer.gather(offsets[~extended], layout.COMPACT, "inode")
            wide = np.zeros(len(compact), layout.INODE)
            for name in ("format", "xattr_count", "mode", "nlink", "size", "u", "ino", "uid", "gid"):
                wide[name] = compact[name]
            result[~extended] = wide
        large = result["size"] >= np.uint64(1 << 62)
        if large.any():
            raise self.buffer.error("impossible size of an inode", int(offsets[np.argmax(large)]))
        counts = result["xattr_count"].astype(np.int64)
        sizes = np.where(extended, layout.INODE.itemsize, layout.COMPACT.itemsize)
        return result, offsets, sizes + np.where(counts > 0, layout.XATTR_HEADER + 4 * (counts - 1), 0)

    def read_directories(self, nids: Array, base: int) -> tuple[_Entries, Array]:
        """The children of some directories, and how many each has; ``base`` numbers the first directory."""
        buffer, block = self.buffer, self.block
        inodes, places, sizes = self.load(nids)
        bad = inodes["mode"] >> 12 != stat.S_IFDIR >> 12
        if bad.any():
            raise buffer.error(
                "an entry of type directory leads to another inode", int(places[np.argmax(bad)])
            )
        self.spend(inodes["size"], "directories")
        size = inodes["size"].astype(np.int64)
        blocks = -(-size // block)
        owner = np.repeat(np.arange(len(nids)), blocks)
        index = ragged.indexes(np.zeros(len(nids), np.int64), blocks)
        length = np.minimum(size[owner] - index * block, block)
        inline = inodes["format"] >> 1 == layout.FLAT_INLINE
        data = np.where(
            inline[owner] & (index == blocks[owner] - 1),
            (places + sizes)[owner],
            inodes["u"].astype(np.int64)[owner] * block + index * block,
        )
        if (inodes["format"] >> 1 == layout.CHUNK_BASED).any():
            raise buffer.error("a directory is stored in chunks", int(places[0]))
        short = (data + length > buffer.size) | (length < layout.DIRENT.itemsize)
        if short.any():
            raise buffer.error("a directory block is incomplete", int(data[np.argmax(short)]))
        lead = buffer.gather(data + 8, "<u2", "directory block").astype(np.int64)
        number = lead // layout.DIRENT.itemsize
        odd = (number < 1) | (lead % layout.DIRENT.itemsize != 0) | (lead > length)
        if odd.any():
            place = int(np.argmax(odd))
            raise buffer.error(
                "invalid name offset in a directory", int(data[place]) + 8, found=int(lead[place])
            )
        return self.read_entries(data, length, number, owner, len(nids), base)

    def read_entries(
        self, data: Array, length: Array, number: Array, owner: Array, directories: int, base: int
    ) -> tuple[_Entries, Array]:
        """Entries of directory blocks: offset, bytes, entries and directory of each block."""
        buffer = self.buffer
        block = np.repeat(np.arange(len(data)), number)
        places = ragged.indexes(np.zeros(len(data), np.int64), number) * layout.DIRENT.itemsize + data[block]
        entries = buffer.gather(places, layout.DIRENT, "directory entry")
        begin = entries["name_offset"].astype(np.int64)
        last = np.zeros(len(block), bool)
        last[np.cumsum(number) - 1] = True
        end = np.where(last, length[block], np.append(begin[1:], 0))
        size = end - begin
        if (size <= 0).any() or (end > length[block]).any():
            raise buffer.error("names of a directory are out of order", int(places[np.argmax(size <= 0)]))
        start = data[block] + begin
        # Only the last name of a block may be followed by zeros.
        for row in np.flatnonzero(last & (buffer.data[start + size - 1] == 0)).tolist():
            at = int(start[row])
            size[row] = buffer.data[at : at + int(size[row])].tobytes().index(0)
        if (size > MAX_NAME).any() or (size == 0).any():
            bad = int(np.argmax((size > MAX_NAME) | (size == 0)))
            raise buffer.error("invalid length of a name", int(start[bad]), found=int(size[bad]))
        self.check_names(start, size, owner[block])
        dots = (buffer.data[start] == ord(".")) & (
            (size == 1) | ((size == 2) & (buffer.data[np.minimum(start + 1, buffer.size - 1)] == ord(".")))
        )
        keep = ~dots
        kinds = entries["type"][keep]
        if ((kinds == 0) | (kinds > 7)).any():
            raise buffer.error("unknown type of a directory entry", int(places[keep][np.argmax(kinds > 7)]))
        holder = owner[block][keep]
        result = _Entries(holder + base, entries["nid"][keep], kinds, start[keep], size[keep])
        return result, np.bincount(holder, minlength=directories).astype(np.int64)

    def check_names(self, start: Array, size: Array, owner: Array) -> None:
        """Names must be ascending, so that they are unique and can be searched, and be one path component."""
        heap = ragged.join(self.buffer.data, start, size)
        bad = (heap == 0) | (heap == ord("/"))
        if bad.any():
            raise self.buffer.error("a name holds a slash or a zero byte", int(start[0]))
        compared = ragged.compare_next(heap, ragged.starts_of(size), size)
        wrong = (compared >= 0) & (owner[1:] == owner[:-1])
        if wrong.any():
            row = int(np.argmax(wrong))
            raise self.buffer.error("names of a directory are not sorted", int(start[row + 1]))

    # -- the contents of inodes ----------------------------------------------------------------------------

    def xattrs(self, nodes: Array, owners: Array, inodes: Array, places: Array, sizes: Array) -> list[Xattrs]:
        rows = np.flatnonzero(inodes["xattr_count"])
        extended = (inodes["format"][rows] & layout.EXTENDED) != 0
        starts = places[rows] + np.where(extended, layout.INODE.itemsize, layout.COMPACT.itemsize)
        ends = places[rows] + sizes[rows]
        self.spend(ends - starts, "extended attributes")
        known: dict[bytes, int] = {}
        result: list[Xattrs] = []
        indexes = np.empty(len(rows), np.int32)
        for position, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            raw = self.buffer.bytes(start, end - start, "extended attributes")
            index = known.get(raw)
            if index is None:
                index = known[raw] = len(result)
                result.append(self.parse_xattrs(raw, start))
            indexes[position] = index
        nodes["xattr"][owners[rows]] = indexes
        return result

    def parse_xattrs(self, raw: bytes, offset: int) -> Xattrs:
        if raw[4]:
            raise self.buffer.error("shared extended attributes are not supported", offset + 4, found=raw[4])
        result = []
        at = layout.XATTR_HEADER
        while at < len(raw):
            if at + 4 > len(raw):
                raise self.buffer.error("an extended attribute is incomplete", offset + at)
            suffix, index, size = raw[at], raw[at + 1], int.from_bytes(raw[at + 2 : at + 4], "little")
            prefix = layout.XATTR_PREFIXES.get(index)
            end = at + 4 + suffix + size
            if prefix is None or end > len(raw):
                raise self.buffer.error(
                    "invalid extended attribute", offset + at, found=raw[at : at + 4].hex()
                )
            name = prefix + raw[at + 4 : at + 4 + suffix]
            result.append((name, raw[at + 4 + suffix : end]))
            at = end + -end % 4
        return tuple(result)

    def symlinks(self, nodes: Array, owners: Array, inodes: Array, places: Array, sizes: Array) -> bytes:
        rows = np.flatnonzero(inodes["mode"] >> 12 == stat.S_IFLNK >> 12)
        size = inodes["size"][rows].astype(np.int64)
        if (size > MAX_TARGET).any():
            bad = int(rows[np.argmax(size > MAX_TARGET)])
            raise self.buffer.error("the target of a symbolic link is too long", int(places[bad]))
        self.spend(size, "symbolic links")
        kind = inodes["format"][rows] >> 1
        if (kind == layout.CHUNK_BASED).any():
            raise self.buffer.error("a symbolic link is stored in chunks", int(places[rows[0]]))
        # At most two pieces: whole blocks, and a tail behind the inode.
        tail = np.where(kind == layout.FLAT_INLINE, size % self.block, 0)
        starts = np.empty((len(rows), 2), np.int64)
        lengths = np.empty((len(rows), 2), np.int64)
        starts[:, 0] = inodes["u"][rows].astype(np.int64) * self.block
        lengths[:, 0] = size - tail
        starts[:, 1] = places[rows] + sizes[rows]
        lengths[:, 1] = tail
        # The address of an empty piece means nothing.
        starts[lengths == 0] = 0
        outside = starts + lengths > self.buffer.size
        if outside.any():
            bad = int(np.argmax(outside.any(axis=1)))
            raise self.buffer.error(
                "the target of a symbolic link lies beyond the end", int(places[rows[bad]])
            )
        nodes["target_length"][owners[rows]] = size
        nodes["target_offset"][owners[rows]] = ragged.starts_of(size)
        return ragged.join(self.buffer.data, starts.reshape(-1), lengths.reshape(-1)).tobytes()

    def chunks(self, nodes: Array, owners: Array, inodes: Array, places: Array, sizes: Array) -> Array:
        buffer, head = self.buffer, self.head
        rows = np.flatnonzero(inodes["mode"] >> 12 == stat.S_IFREG >> 12)
        size = inodes["size"][rows].astype(np.int64)
        chunked = inodes["format"][rows] >> 1 == layout.CHUNK_BASED
        formatted = (inodes["u"][rows] & layout.CHUNK_FORMAT_INDEXES) != 0
        bad = ~(chunked & formatted) & (size > 0)
        if bad.any():
            raise buffer.error("a regular file is not stored in chunks", int(places[rows[np.argmax(bad)]]))
        counts = -(-size // head.chunk_size)
        self.spend(counts * layout.CHUNK_INDEX.itemsize, "chunk lists")
        starts = places[rows] + sizes[rows]
        starts += -starts % layout.CHUNK_INDEX.itemsize
        ends = starts + counts * layout.CHUNK_INDEX.itemsize
        if (ends > buffer.size).any():
            bad_row = int(rows[np.argmax(ends > buffer.size)])
            raise buffer.error("the chunk list of a file is incomplete", int(places[bad_row]))
        nodes["chunk"][owners[rows]] = ragged.starts_of(counts)
        nodes["chunk_count"][owners[rows]] = counts
        # Lists are aligned to their entries. Chunks are what there may be most of: few columns at a time.
        unit = layout.CHUNK_INDEX.itemsize
        table = buffer.array(0, buffer.size // unit, layout.CHUNK_INDEX, "chunk list")
        total = np.cumsum(counts)
        result = np.zeros(int(total[-1]) if len(total) else 0, CHUNK)
        for part in ragged.slices(len(result)):
            number = np.arange(part.start, part.stop)
            file = np.searchsorted(total, number, side="right")
            number -= (total - counts)[file]
            index = table[starts[file] // unit + number]
            chunks = result[part]
            chunks["blob_index"] = index["device"].astype(np.uint32) - 1
            chunks["index"] = index["index_low"] | index["index_high"].astype(np.uint32) << 16
            chunks["uoffset"] = index["block"].astype(np.uint64) * self.block
            chunks["file_offset"] = number * head.chunk_size
            chunks["usize"] = np.minimum(size[file] - number * head.chunk_size, head.chunk_size)

        def place(chunk: int) -> int:
            file = int(np.searchsorted(total, chunk, side="right"))
            return int(starts[file]) + int(result["file_offset"][chunk]) // head.chunk_size * unit

        self.check_chunks(result, place)
        if any(blob.features & BlobFeature.EXTERNAL for blob in head.blobs):
            result = self.join_entries(nodes, owners[rows], counts, result)
        if head.flags & SuperFlag.TARFS:
            result["coffset"], result["csize"] = result["uoffset"], result["usize"]
        else:
            self.look_up(result)
        return result

    def join_entries(self, nodes: Array, files: Array, counts: Array, chunks: Array) -> Array:
        """Entries of one chunk each, where external files have chunks of several (:func:`v6.chunk_lists`)."""
        same = np.zeros(len(chunks), bool)
        before, after = chunks[:-1], chunks[1:]
        same[1:] = (after["blob_index"] == before["blob_index"]) & (after["index"] == before["index"])
        same[1:] &= after["uoffset"] == before["uoffset"] + np.uint64(self.head.chunk_size)
        same[(np.cumsum(counts) - counts)[counts > 0]] = False
        if not same.any():
            return chunks
        first = np.flatnonzero(~same)
        sizes = np.add.reduceat(chunks["usize"].astype(np.uint64), first)
        if (sizes > checks.MAX_UNIT).any():
            raise self.buffer.error(
                "a chunk is too large",
                found=int(sizes.max()),
                expected=f"at most {checks.MAX_UNIT}",
            )
        joined = chunks[first]
        joined["usize"] = sizes
        owner = np.repeat(np.arange(len(counts)), counts)[first]
        counts = np.bincount(owner, minlength=len(counts))
        nodes["chunk"][files], nodes["chunk_count"][files] = ragged.starts_of(counts), counts
        return joined

    def look_up(self, chunks: Array) -> None:
        """Complete chunks from the chunk table's records of the same blob and index."""
        table = read_chunk_table(self.buffer.data.data, self.head, self.buffer.where)
        if not len(table) or not len(chunks):
            return
        keys = table["blob_index"].astype(np.uint64) << 32 | table["index"]
        sequence = np.argsort(keys, kind="stable")
        keys = keys[sequence]
        generated = np.array([bool(b.features & BlobFeature.CHUNKDICT_GENERATED) for b in self.head.blobs])
        for part in ragged.slices(len(chunks)):
            mine = chunks[part]
            wanted = mine["blob_index"].astype(np.uint64) << 32 | mine["index"]
            place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            found = keys[place] == wanted
            match = sequence[place]
            for name in ("digest", "flags", "csize", "coffset", "crc"):
                mine[name][found] = table[name][match[found]]
            if generated.any():
                # The file of a chunk dictionary lists chunks of any size (rafs.md 4.8).
                odd = found & generated[mine["blob_index"]]
                mine["usize"][odd] = table["usize"][match[odd]]

    def check_chunks(self, chunks: Array, place: Callable[[int], int]) -> None:
        """Chunks must lie in their blobs; ``place`` says where a chunk was read from."""
        blobs = self.head.blobs
        count = np.array([blob.chunk_count for blob in blobs], np.uint32)
        sizes = np.array([blob.uncompressed_size for blob in blobs], np.uint64)
        for part in ragged.slices(len(chunks)):
            mine = chunks[part]
            blob = mine["blob_index"]

            def refuse(wrong: Array, what: str, start: int = part.start) -> None:
                if wrong.any():
                    at = start + int(np.argmax(wrong))
                    raise self.buffer.error(what, place(at), found=int(chunks["index"][at]))

            refuse(blob >= len(blobs), "a chunk of a blob that does not exist")
            refuse(mine["index"] >= count[blob], "the index of a chunk is beyond its blob's")
            refuse(mine["uoffset"] + mine["usize"] > sizes[blob], "a chunk lies outside of its blob")

    def share(self, nodes: Array) -> None:
        """Give further names of an inode what its first name has."""
        links = np.flatnonzero(nodes["link"] != np.arange(len(nodes)))
        first = nodes["link"][links]
        shared = set(NODE.names or ()) - {"parent", "link", "name_offset", "name_length"}
        for name in shared:
            nodes[name][links] = nodes[name][first]

    def prefetch(self, unique: Array, first: Array) -> list[int]:
        wanted = np.array(self.head.prefetch, np.uint64)
        place = np.minimum(np.searchsorted(unique, wanted), len(unique) - 1)
        if (unique[place] != wanted).any():
            raise self.buffer.error("the prefetch table names an inode that does not exist")
        return [int(row) for row in first[place]]
