"""Everything about a bootstrap that readers do not need to know, but that a sound one has right.

Reading a tree already refuses what is out of bounds, unsorted or dangling (:func:`nydus.rafs.read`). Here
come the facts that are stored twice, the places that must not overlap, and the digests.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable

import numpy as np

from nydus.errors import FormatError
from nydus.rafs import blobmeta, checks, derived, detect, order, ragged, v6
from nydus.rafs.buffer import Buffer, Source
from nydus.rafs.model import CHUNK, Array, BlobFeature, BlobInfo, Digester, Super, SuperFlag, Tree
from nydus.rafs.v5 import layout as layout5
from nydus.rafs.v5.reader import Reader as Reader5
from nydus.rafs.v5.superblock import read_superblock as read_superblock5
from nydus.rafs.v6 import layout as layout6
from nydus.rafs.v6.dirents import Dirents
from nydus.rafs.v6.reader import Reader as Reader6

#: Problems of one kind that are reported one by one.
_EACH = 20
_ENCRYPTION = SuperFlag.ENCRYPTION_NONE | SuperFlag.ENCRYPTION_AES_128_XTS


def verify(data: Source, where: str = "") -> tuple[Tree | None, list[FormatError]]:
    """Check all of a bootstrap.

    Returns:
        The tree (None if it cannot be read at all), and what is wrong: each problem says what and where, with
        what was found and what was expected. Many problems of one kind end in one that counts the rest.
    """
    try:
        if detect(data, where) == 5:
            return _Version5(Buffer(data, where)).run()
        return _Version6(Buffer(data, where)).run()
    except FormatError as error:
        return None, [error]


class _Verifier:
    def __init__(self, buffer: Buffer, head: Super) -> None:
        self.buffer, self.head = buffer, head
        self.problems: list[FormatError] = []
        # Old builders got derived fields wrong (rafs.md 2.14). Current ones mark their v5 blobs, and say
        # in v6 whether an image is encrypted.
        self.current = bool(head.flags & _ENCRYPTION) or (
            head.version == 5
            and bool(head.blobs)
            and all(blob.features & BlobFeature.CAP_TAR_TOC for blob in head.blobs)
        )

    def report(
        self, what: str, offset: int | None = None, *, found: object = None, expected: object = None
    ) -> None:
        self.problems.append(self.buffer.error(what, offset, found=found, expected=expected))

    def compare(self, what: str, offset: int | None, found: object, expected: object) -> None:
        if found != expected:
            self.report(what, offset, found=found, expected=expected)

    def compare_all(self, what: str, offsets: Array, found: Array, expected: Array | int) -> None:
        """Report each row in which two columns differ."""
        wanted = np.broadcast_to(expected, found.shape)
        wrong = np.flatnonzero(found != wanted)
        for row in wrong[:_EACH].tolist():
            self.report(what, int(offsets[row]), found=int(found[row]), expected=int(wanted[row]))
        if len(wrong) > _EACH:
            self.report(f"{what}: {len(wrong) - _EACH} more")

    def refuse_all(self, what: str, offsets: Array, wrong: Array) -> None:
        """Report each row that is wrong."""
        rows = np.flatnonzero(wrong)
        for row in rows[:_EACH].tolist():
            self.report(what, int(offsets[row]))
        if len(rows) > _EACH:
            self.report(f"{what}: {len(rows) - _EACH} more")

    def overlaps(self, regions: Iterable[tuple[str, Array, Array]]) -> None:
        """Report regions (name, starts, ends) that share bytes, or reach beyond the end."""
        names, starts, ends, kinds = [], [], [], []
        for kind, (name, start, end) in enumerate(regions):
            used = end > start
            names.append(name)
            starts.append(start[used])
            ends.append(end[used])
            kinds.append(np.full(int(used.sum()), kind))
        start, end, kind_of = np.concatenate(starts), np.concatenate(ends), np.concatenate(kinds)
        sequence = np.lexsort((end, start))
        start, end, kind_of = start[sequence], end[sequence], kind_of[sequence]
        for row in np.flatnonzero(end > self.buffer.size)[:_EACH].tolist():
            self.report(f"{names[kind_of[row]]} reaches beyond the end", int(start[row]), found=int(end[row]))
        wrong = np.flatnonzero(start[1:] < np.maximum.accumulate(end)[:-1]) + 1
        for row in wrong[:_EACH].tolist():
            self.report(f"{names[kind_of[row]]} overlaps {names[kind_of[row - 1]]}", int(start[row]))
        if len(wrong) > _EACH:
            self.report(f"{len(wrong) - _EACH} more regions overlap")

    def check_blobs(self, tree: Tree) -> None:
        """Fields of the blob table that must fit each other."""
        for index, blob in enumerate(tree.blobs):
            for what in _blob_problems(blob, tree):
                self.report(f"blob {index} ({blob.id}): {what}")

    def check_chunks(self, tree: Tree) -> None:
        """Chunks with one index must be one chunk, and different ones must not overlap."""
        chunks = tree.chunks
        if not len(chunks):
            return
        keys = chunks["blob_index"].astype(np.uint64) << np.uint64(32) | chunks["index"]
        sequence = np.argsort(keys, kind="stable")
        keys = keys[sequence]
        same = keys[1:] == keys[:-1]
        del keys
        differ = np.zeros(len(same), bool)
        for part in ragged.slices(len(same)):
            here, following = sequence[part], sequence[part.start + 1 : part.stop + 1]
            for name in ("uoffset", "usize", "coffset", "csize", "digest"):
                differ[part] |= chunks[name][here] != chunks[name][following]
        for row in np.flatnonzero(same & differ)[:_EACH].tolist():
            chunk = chunks[sequence[row]]
            self.report(f"files disagree about chunk {chunk['index']} of blob {chunk['blob_index']}")
        del differ
        # Copies of few columns: chunks are what there may be most of.
        sequence = sequence[np.append(True, ~same)]
        first = {name: chunks[name][sequence] for name in ("blob_index", "index", "uoffset", "usize")}
        del sequence, same
        in_blob = first["blob_index"][1:] == first["blob_index"][:-1]
        if tree.version == 5:
            # Files lie in external blobs in any order.
            external = [bool(blob.features & BlobFeature.EXTERNAL) for blob in tree.blobs]
            in_blob &= ~np.array(external)[first["blob_index"][1:]]
        overlap = in_blob & (first["uoffset"][1:] < first["uoffset"][:-1] + first["usize"][:-1])
        for row in np.flatnonzero(overlap)[:_EACH].tolist():
            self.report(
                f"chunks {int(first['index'][row])} and {int(first['index'][row + 1])} of blob "
                f"{first['blob_index'][row]} overlap, or are out of order"
            )


def _blob_problems(blob: BlobInfo, tree: Tree) -> list[str]:
    features = blob.features
    problems = []
    v2 = bool(features & BlobFeature.CHUNK_INFO_V2)
    for feature in (BlobFeature.BATCH, BlobFeature.ZRAN, BlobFeature.SEPARATE):
        if features & feature and not v2 and not features & BlobFeature.EXTERNAL:
            problems.append(f"feature {feature.name} needs CHUNK_INFO_V2")
    if features & BlobFeature.ZRAN and not features & BlobFeature.SEPARATE:
        problems.append("feature ZRAN needs SEPARATE")
    if bool(blob.cipher) != bool(features & BlobFeature.ENCRYPTED):
        problems.append("cipher and feature ENCRYPTED disagree")
    if blob.chunk_size != tree.chunk_size and not features & BlobFeature.EXTERNAL:
        problems.append(f"chunk size {blob.chunk_size:#x} is not the file system's {tree.chunk_size:#x}")
    used = tree.version == 6 and not features & (BlobFeature.TARFS | BlobFeature.EXTERNAL)
    if used and blob.chunk_count and not features & BlobFeature.CHUNKDICT_GENERATED:
        try:
            blobmeta.check_size(blob, "")
        except FormatError as error:
            problems.append(str(error))
        size = blob.rafs_size if features & BlobFeature.SEPARATE else blob.compressed_size
        end = blob.meta_offset + blob.meta_compressed_size + blobmeta.HEADER_SIZE
        # Before blobs had headers the size was that of the data alone.
        if size and end > size and features & BlobFeature.CAP_TAR_TOC:
            problems.append(f"blob.meta ends at {end}, beyond the blob's {size} bytes")
    return problems


class _Version6(_Verifier):
    def __init__(self, buffer: Buffer) -> None:
        super().__init__(buffer, v6.read_superblock(buffer.data.data, buffer.where))
        self.reader = Reader6(buffer, self.head)

    def run(self) -> tuple[Tree, list[FormatError]]:
        tree = self.reader.tree()
        self.owners = np.flatnonzero(tree.nodes["link"] == np.arange(len(tree)))
        self.check_head(tree)
        self.check_blobs(tree)
        if self.current:
            self.check_chunks(tree)
        self.check_inodes(tree)
        self.check_directories(tree)
        self.check_chunk_table(tree)
        self.check_places(tree)
        return tree, self.problems

    def check_head(self, tree: Tree) -> None:
        head, block = self.head, self.head.block_size
        tarfs = bool(head.flags & SuperFlag.TARFS)
        self.compare("block size", layout6.SUPER_OFFSET + 12, block, 512 if tarfs else 4096)
        self.compare("inode count", layout6.SUPER_OFFSET + 16, head.inode_count, len(tree))
        free = self.buffer.size
        for index, blob in enumerate(head.blobs):
            slot = layout6.DEVICE_OFFSET + index * layout6.DEVICE.itemsize
            blocks = blob.uncompressed_size // block
            self.compare(f"blocks of device {index}", slot + 64, head.device_blocks[index], blocks)
            mapped = -(-free // layout6.FLAT_ALIGN) * layout6.FLAT_ALIGN // block
            if self.current:
                self.compare(
                    f"mapped address of device {index}", slot + 68, head.mapped_blocks[index], mapped
                )
            free = (mapped + blocks) * block
        if not self.current:
            return
        sb = self.buffer.array(layout6.SUPER_OFFSET, 1, layout6.SUPER, "EROFS super block")[0]
        for name, expected in (
            ("incompat", layout6.INCOMPAT),
            ("compat", layout6.COMPAT_RAFS),
            ("ext_slots", 0),
            ("blocks", sum(head.device_blocks) & 0xFFFF_FFFF),
            ("xattr_block", 0),
        ):
            field = layout6.SUPER_OFFSET + layout6.SUPER.fields[name][1]  # type: ignore[index]
            self.compare(f"{name} of the super block", field, int(sb[name]), expected)
        flags = layout6.EXT_OFFSET
        if tree.xattrs and not head.flags & SuperFlag.HAS_XATTR:
            self.report("there are extended attributes, but no flag says so", flags, found=hex(head.flags))
        inlined = all(blob.features & BlobFeature.INLINED_CHUNK_DIGEST for blob in head.blobs)
        if inlined != bool(head.flags & SuperFlag.INLINED_CHUNK_DIGEST):
            self.report("flag INLINED_CHUNK_DIGEST does not fit the blobs", flags, found=hex(head.flags))

    def check_inodes(self, tree: Tree) -> None:
        inodes, places = self.reader.inodes, self.reader.places
        kinds = inodes["mode"] >> 12
        if self.current:
            # Old merges counted links that upper layers hide.
            self.compare_all("link count", places + 44, inodes["nlink"], derived.nlinks(tree)[self.owners])
            self.compare_all("inode number", places + 20, inodes["ino"], self.owners + 1)
            regular = kinds == stat.S_IFREG >> 12
            files = tree.nodes[self.owners[regular]]
            entries, counts = v6.chunk_lists(tree, files["chunk_count"], tree.chunks)
            formats = v6.chunk_formats(tree, files["size"], counts, entries)
            self.compare_all("chunk format", places[regular] + 16, inodes["u"][regular], formats)
        self.refuse_all(
            "more nanoseconds than a second has", places + 40, inodes["mtime_ns"] >= 1_000_000_000
        )
        inline = inodes["format"] >> 1 == layout6.FLAT_INLINE
        tail = places + self.reader.sizes
        block = self.head.block_size
        end = tail + inodes["size"].astype(np.int64) % block
        crossing = inline & (end > tail) & (tail // block != (end - 1) // block)
        self.refuse_all("data behind an inode cross a block", tail, crossing)

    def check_directories(self, tree: Tree) -> None:
        """Compare all directory blocks with those that the tree gives."""
        inodes, places = self.reader.inodes, self.reader.places
        rows = inodes["mode"] >> 12 == stat.S_IFDIR >> 12
        block = self.head.block_size
        entries = Dirents(tree, self.owners[rows], block)
        sizes = inodes["size"][rows].astype(np.int64)
        self.compare_all("size of a directory", places[rows] + 8, sizes, entries.sizes)
        if (sizes != entries.sizes).any():
            return
        owner = np.repeat(np.flatnonzero(rows), entries.blocks)
        number = ragged.indexes(np.zeros(len(entries.blocks), np.int64), entries.blocks)
        where = inodes["u"].astype(np.int64)[owner] * block + number * block
        last = np.cumsum(entries.blocks) - 1
        inlined = (inodes["format"][rows] >> 1 == layout6.FLAT_INLINE) & (sizes % block != 0)
        where[last[inlined]] = (places + self.reader.sizes)[rows][inlined]
        expected = np.zeros(self.buffer.size, np.uint8)
        kinds = layout6.FILE_TYPES[tree.nodes["mode"] >> 12]
        entries.emit(expected, where, self.reader.nids, kinds)
        lengths = np.full(len(where), block)
        lengths[last] = sizes - (entries.blocks - 1) * block
        found = ragged.join(self.buffer.data, where, lengths)
        wrong = np.flatnonzero(found != ragged.join(expected, where, lengths))
        begins = ragged.starts_of(lengths).astype(np.int64)
        for at in np.unique(np.searchsorted(begins, wrong, side="right") - 1)[:_EACH].tolist():
            first = int(wrong[np.searchsorted(wrong, begins[at])] - begins[at])
            self.report("a directory block is not what its entries need", int(where[at]) + first)

    def check_chunk_table(self, tree: Tree) -> None:
        offset, size = self.head.chunk_table
        table = v6.read_chunk_table(self.buffer.data.data, self.head, self.buffer.where)
        if not self.current or self.head.flags & SuperFlag.TARFS:
            return
        places = offset + np.arange(len(table)) * CHUNK.itemsize
        dangling = table["blob_index"] >= len(tree.blobs)
        self.refuse_all("a chunk record of a blob that does not exist", places, dangling)
        if dangling.any():
            return
        self.refuse_all(
            "unknown flags of a chunk record", places + 36, (table["flags"] & ~np.uint32(0x1D)) != 0
        )
        expected = v6.chunk_table(derived.owned_chunks(tree), tree.blobs)
        if len(table) != len(expected):
            self.report("size of the chunk table", offset, found=size, expected=expected.nbytes)
            return
        for name in CHUNK.names or ():
            if name == "digest":
                wrong = table[name] != expected[name]
                self.refuse_all("the chunk table is not sorted, or lacks a chunk", places, wrong)
            else:
                field = places + CHUNK.fields[name][1]  # type: ignore[index]
                self.compare_all(f"{name} of a chunk record", field, table[name], expected[name])

    def check_places(self, tree: Tree) -> None:
        inodes, places, sizes = self.reader.inodes, self.reader.places, self.reader.sizes
        head, block = self.head, self.head.block_size
        kinds = inodes["mode"] >> 12
        behind = places + sizes
        length = inodes["size"].astype(np.int64)
        tailed = (kinds == stat.S_IFDIR >> 12) | (kinds == stat.S_IFLNK >> 12)
        inline = inodes["format"] >> 1 == layout6.FLAT_INLINE
        tail = np.where(tailed & inline, length % block, 0)
        body = np.where(tailed, length, 0) - tail
        blocks = inodes["u"].astype(np.int64) * block
        _, counts = v6.chunk_lists(tree, tree.nodes["chunk_count"][self.owners], tree.chunks)
        lists = behind + -behind % layout6.CHUNK_INDEX.itemsize
        ends = lists + np.where(kinds == stat.S_IFREG >> 12, counts * layout6.CHUNK_INDEX.itemsize, 0)
        count = len(head.blobs)
        ext = self.buffer.array(layout6.EXT_OFFSET, 1, layout6.EXT, "RAFS super block")[0]

        def table(offset: int, size: int) -> tuple[Array, Array]:
            return np.array([offset]), np.array([offset + size])

        prefetch = int(ext["prefetch_offset"]), int(ext["prefetch_size"])
        self.overlaps(
            [
                ("the super block", *table(0, layout6.DEVICE_OFFSET + count * layout6.DEVICE.itemsize)),
                ("the blob table", *table(int(ext["blob_table_offset"]), count * layout6.BLOB.itemsize)),
                ("the prefetch table", *table(*prefetch)),
                ("the chunk table", *table(*head.chunk_table)),
                ("an inode", places, behind),
                ("data behind an inode", behind, behind + tail),
                ("data of an inode", blocks, blocks + body),
                ("a chunk list", lists, ends),
            ]
        )


class _Version5(_Verifier):
    def __init__(self, buffer: Buffer) -> None:
        super().__init__(buffer, read_superblock5(buffer.data.data, buffer.where))
        self.reader = Reader5(buffer, self.head)

    def run(self) -> tuple[Tree, list[FormatError]]:
        tree = self.reader.tree()
        self.check_blobs(tree)
        if self.current:
            self.check_chunks(tree)
        self.check_inodes(tree)
        self.check_places()
        return tree, self.problems

    def check_inodes(self, tree: Tree) -> None:
        inodes, places, nodes = self.reader.inodes, self.reader.places, tree.nodes
        kinds = nodes["mode"] >> 12
        # An old image may number inodes in another order; names then refer to numbers of their own.
        numbers = inodes["ino"]
        self.compare_all("parent", places[1:] + 32, inodes["parent"][1:], numbers[nodes["parent"][1:]])
        self.compare("parent of the root", int(places[0]) + 32, int(inodes["parent"][0]), 0)
        is_link = (inodes["flags"] & layout5.SYMLINK) != 0
        self.refuse_all("flag of a symbolic link", places + 80, is_link != (kinds == stat.S_IFLNK >> 12))
        self.refuse_all(
            "more nanoseconds than a second has", places + 108, nodes["mtime_ns"] >= 1_000_000_000
        )
        if self.current:
            self.compare_all("inode number", places + 40, numbers, nodes["link"] + 1)
            self.compare_all("link count", places + 88, inodes["nlink"], derived.nlinks(tree))
            self.compare_all("project id", places + 56, inodes["projid"], 0)
            self.refuse_all("unknown flags of an inode", places + 80, inodes["flags"] > np.uint64(0xF))
            stored = inodes["size"] + self.xattr_sizes(tree)
            blocks = (stored + np.uint64(511)) // np.uint64(512)
            self.compare_all("block count", places + 72, inodes["blocks"], blocks)
            self.compare_all("child index", places + 92, inodes["child_index"], self.child_indexes(tree))
            unique = int(self.buffer.array(24, 1, "<u8", "super block")[0])
            self.compare("number of unique inodes", 24, unique, len(np.unique(nodes["link"])))
        digesters = checks.algorithms(tree.flags)[1]
        expected = derived.digests(tree, digesters[0] if digesters else Digester.BLAKE3)
        found = np.ascontiguousarray(inodes["digest"]).view(np.uint8).reshape(-1, 32)
        wrong = np.flatnonzero((found != expected).any(axis=1))
        for row in wrong[:_EACH].tolist():
            what = f"digest of {tree.path(row)!r}"
            self.report(
                what,
                int(places[row]),
                found=found[row].tobytes().hex(),
                expected=expected[row].tobytes().hex(),
            )
        if len(wrong) > _EACH:
            self.report(f"digests of {len(wrong) - _EACH} more inodes are wrong")

    def xattr_sizes(self, tree: Tree) -> Array:
        """Bytes of the attributes of each row, padded (rafs.md 1.3)."""
        lengths = [sum(5 + len(name) + len(value) for name, value in xattrs) for xattrs in tree.xattrs]
        sizes = np.array([*(length + 7 & ~7 for length in lengths), 0], np.uint64)
        return np.asarray(sizes[tree.nodes["xattr"]])  # -1 is the last one

    def child_indexes(self, tree: Tree) -> Array:
        nodes = tree.nodes
        rows = np.flatnonzero(nodes["mode"] >> 12 == stat.S_IFDIR >> 12)
        sequence = order.preorder(np.searchsorted(rows, nodes["parent"][rows]))
        result = np.zeros(len(nodes), np.int64)
        result[rows] = order.first_children(sequence, nodes["child_count"][rows]) + 1
        return result

    def check_places(self) -> None:
        head = self.buffer.array(0, 1, layout5.SUPER, "super block")[0]

        def table(offset: object, size: int) -> tuple[Array, Array]:
            start = int(offset)  # type: ignore[call-overload]
            return np.array([start]), np.array([start + size])

        self.overlaps(
            [
                ("the super block", *table(0, layout5.SUPER_SIZE)),
                ("the inode table", *table(head["inode_table_offset"], 4 * int(head["inode_table_entries"]))),
                ("the prefetch table", *table(head["prefetch_offset"], 4 * int(head["prefetch_entries"]))),
                ("the blob table", *table(head["blob_table_offset"], int(head["blob_table_size"]))),
                (
                    "the extended blob table",
                    *table(head["extended_offset"], 64 * int(head["extended_entries"])),
                ),
                ("an inode", self.reader.places, self.reader.ends),
            ]
        )
