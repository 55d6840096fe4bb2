"""A v6 bootstrap from a tree, with the bytes that the reference implementation would write."""

from __future__ import annotations

import stat

import numpy as np

from nydus.errors import FormatError
from nydus.rafs import derived, order, ragged
from nydus.rafs.model import CHUNK, Array, BlobFeature, BlobInfo, SuperFlag, Tree, Xattrs
from nydus.rafs.v6 import layout
from nydus.rafs.v6.dirents import Dirents
from nydus.rafs.v6.placement import CHUNKS, NOTHING, TAIL, place


def write(tree: Tree) -> bytes:
    """Write a v6 bootstrap.

    Taken from the tree: ``nodes`` in P-order, names sorted in each directory (``parent``, ``first_child``,
    ``child_count``, ``link``, mode, owner, times, ``rdev``, size of regular files, chunk runs, attributes),
    ``chunks`` (blob index, index, ``uoffset``, which must be a multiple of the block size, and all that the
    chunk table repeats), ``prefetch``, ``flags``, ``chunk_size``, and all of ``blobs``.

    Made here, whatever the tree says: directory and symbolic link sizes, nlink, inode numbers, nids, chunk
    units, the chunk table, device slots, mapped addresses, inode and block counts, and the flags HAS_XATTR
    (only ever added) and INLINED_CHUNK_DIGEST. Names of one inode share what its first name (``link``) says.

    Raises:
        FormatError: a tree that the format cannot hold.
    """
    return _Writer(tree).bootstrap()


class _Writer:
    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.nodes = tree.nodes
        self.block = block_size(tree)
        self.kinds = (self.nodes["mode"] >> 12).astype(np.uint8)
        self.owners = np.flatnonzero(self.nodes["link"] == np.arange(len(self.nodes)))
        self.xattrs = [encode_xattrs(xattrs, tree) for xattrs in tree.xattrs]

    def bootstrap(self) -> bytes:
        tree, nodes, block = self.tree, self.nodes, self.block
        if len(tree.blobs) > layout.MAX_DEVICES:
            raise FormatError(
                "too many blobs", found=len(tree.blobs), expected=f"at most {layout.MAX_DEVICES}"
            )
        is_directory = self.kinds == stat.S_IFDIR >> 12
        directories = np.flatnonzero(is_directory)
        dirents = Dirents(tree, directories, block)

        lengths = np.zeros(len(nodes), np.int64)
        lengths[directories] = dirents.sizes
        links = self.kinds == stat.S_IFLNK >> 12
        lengths[links] = nodes["target_length"][links]
        regular = self.kinds == stat.S_IFREG >> 12
        chunks = derived.owned_chunks(tree)
        entries, counts = chunk_lists(tree, nodes["chunk_count"][self.owners], chunks)
        files = regular[self.owners]
        lengths[self.owners[files]] = counts[files] * layout.CHUNK_INDEX.itemsize
        sizes = self.inode_sizes()
        kinds = np.where(regular, CHUNKS, np.where(is_directory | links, TAIL, NOTHING))

        sequence = self.sequence(directories)
        placed = place(kinds[sequence], sizes[sequence], lengths[sequence], block)
        blob_table, base = self.head_layout()
        # By row, including the base; further names of an inode have their first name's.
        inode = np.zeros(len(nodes), np.int64)
        inode[sequence] = placed.inode + base
        inode = inode[nodes["link"]]
        data = np.zeros(len(nodes), np.int64)
        data[sequence] = placed.data + base
        inline = np.zeros(len(nodes), bool)
        inline[sequence] = placed.inline
        nids = ((inode - base) // layout.NID_SIZE).astype(np.uint64)

        records = chunk_table(chunks, tree.blobs)
        table_offset = _align(base + placed.end, layout.PAGE)
        size = _align(table_offset + records.nbytes, layout.PAGE)
        out = np.zeros(size, np.uint8)
        out[table_offset : table_offset + records.nbytes] = records.view(np.uint8).reshape(-1)
        self.write_head(out, blob_table, base, int(nids[0]), table_offset, records.nbytes, nids)
        self.write_inodes(out, inode, sizes, lengths, data, inline)
        self.write_files(out, inode, sizes, counts[files], entries)
        self.write_targets(out, np.flatnonzero(links), inode + sizes, data, inline)
        places = self.block_places(dirents, directories, inode + sizes, data, inline)
        dirents.emit(out, places, nids, layout.FILE_TYPES[self.kinds])
        return out.tobytes()

    def sequence(self, directories: Array) -> Array:
        """Rows of inodes in the order of placement: each directory, then its other children."""
        nodes = self.nodes
        position = np.zeros(len(nodes), np.int64)
        parents = np.searchsorted(directories, nodes["parent"][directories])
        position[directories[order.preorder(parents)]] = np.arange(len(directories))
        other = self.kinds != stat.S_IFDIR >> 12
        owner = np.where(other, position[nodes["parent"]], position)
        result = np.lexsort((np.arange(len(nodes)), other, owner))
        return np.asarray(result[nodes["link"][result] == result])

    def inode_sizes(self) -> Array:
        """Bytes of each row's inode and attributes."""
        result = np.full(len(self.nodes), layout.INODE.itemsize, np.int64)
        if self.xattrs:
            index = self.nodes["xattr"]
            extra = np.array([len(raw) for raw in self.xattrs], np.int64)
            result[index >= 0] += extra[index[index >= 0]]
        return result

    # -- tables --------------------------------------------------------------------------------------------

    def head_layout(self) -> tuple[int, int]:
        """Offsets of the blob table and of the metadata area."""
        count = len(self.tree.blobs)
        blob_table = _align(layout.DEVICE_OFFSET + count * layout.DEVICE.itemsize, layout.PAGE)
        if not count:
            return blob_table, 0
        end = blob_table + count * layout.BLOB.itemsize + 4 * len(self.tree.prefetch)
        return blob_table, _align(end, layout.PAGE)

    def write_head(
        self, out: Array, blob_table: int, base: int, root: int, table: int, table_size: int, nids: Array
    ) -> None:
        tree, blobs = self.tree, self.tree.blobs
        head = np.zeros(1, layout.SUPER)
        head["magic"], head["compat"], head["incompat"] = layout.MAGIC, layout.COMPAT_RAFS, layout.INCOMPAT
        head["block_bits"] = self.block.bit_length() - 1
        head["root_nid"] = root
        head["inodes"] = len(tree.nodes)
        head["meta_block"] = base // self.block
        head["devices"], head["device_slot"] = len(blobs), layout.DEVICE_OFFSET // layout.DEVICE.itemsize
        devices = np.zeros(len(blobs), layout.DEVICE)
        entries = np.zeros(len(blobs), layout.BLOB)
        free = len(out)
        for index, blob in enumerate(blobs):
            blocks = blob.uncompressed_size // self.block
            mapped = _align(free, layout.FLAT_ALIGN) // self.block
            free = (mapped + blocks) * self.block
            devices[index] = (_padded(blob.id, 64), blocks, mapped, bytes(56))
            entries[index] = _blob_entry(blob, index)
        head["blocks"] = devices["blocks"].sum(dtype=np.uint64) & 0xFFFF_FFFF
        flags = tree.flags
        if tree.xattrs:
            flags |= SuperFlag.HAS_XATTR
        flags &= ~SuperFlag.INLINED_CHUNK_DIGEST
        if all(blob.features & BlobFeature.INLINED_CHUNK_DIGEST for blob in blobs):
            flags |= SuperFlag.INLINED_CHUNK_DIGEST
        ext = np.zeros(1, layout.EXT)
        ext["flags"], ext["chunk_size"] = int(flags), tree.chunk_size
        ext["blob_table_offset"], ext["blob_table_size"] = blob_table, entries.nbytes
        ext["chunk_table_offset"], ext["chunk_table_size"] = table, table_size
        prefetch = nids[tree.prefetch].astype("<u4") if blobs and tree.prefetch else np.zeros(0, "<u4")
        if len(prefetch):
            ext["prefetch_offset"] = blob_table + entries.nbytes
            ext["prefetch_size"] = prefetch.nbytes
        for offset, records in (
            (layout.SUPER_OFFSET, head),
            (layout.EXT_OFFSET, ext),
            (layout.DEVICE_OFFSET, devices),
            (blob_table, entries),
            (blob_table + entries.nbytes, prefetch),
        ):
            out[offset : offset + records.nbytes] = records.view(np.uint8).reshape(-1)

    # -- inodes and what follows them ----------------------------------------------------------------------

    def write_inodes(
        self,
        out: Array,
        inode: Array,
        sizes: Array,
        lengths: Array,
        data: Array,
        inline: Array,
    ) -> None:
        nodes, owners = self.nodes[self.owners], self.owners
        kinds = self.kinds[owners]
        regular = kinds == stat.S_IFREG >> 12
        special = (kinds == stat.S_IFCHR >> 12) | (kinds == stat.S_IFBLK >> 12)
        tailed = (kinds == stat.S_IFDIR >> 12) | (kinds == stat.S_IFLNK >> 12)
        result = np.zeros(len(owners), layout.INODE)
        kind = np.where(regular, layout.CHUNK_BASED, np.where(inline[owners], layout.FLAT_INLINE, 0))
        result["format"] = layout.EXTENDED | kind << 1
        places = inode[owners]
        extra = sizes[owners] - layout.INODE.itemsize
        result["xattr_count"] = np.where(extra > 0, 1 + (extra - layout.XATTR_HEADER) // 4, 0)
        result["size"] = np.where(regular, nodes["size"], np.where(tailed, lengths[owners], 0))
        result["ino"] = owners + 1
        for name in ("mode", "uid", "gid", "mtime_ns"):
            result[name] = nodes[name]
        result["mtime"] = nodes["mtime"].astype(np.uint64)
        result["nlink"] = derived.nlinks(self.tree)[owners]
        result["u"][tailed] = data[owners[tailed]] // self.block
        result["u"][special] = nodes["rdev"][special]
        ragged.scatter(out, places, result)
        for index, raw in enumerate(self.xattrs):
            rows = places[nodes["xattr"] == index] if len(self.xattrs) < 64 else None
            if rows is not None:
                ragged.scatter(out, rows + layout.INODE.itemsize, _repeat(raw, len(rows)))
        if len(self.xattrs) >= 64:
            for place, index in zip(
                places[extra > 0].tolist(), nodes["xattr"][extra > 0].tolist(), strict=True
            ):
                raw = self.xattrs[index]
                start = place + layout.INODE.itemsize
                out[start : start + len(raw)] = np.frombuffer(raw, np.uint8)

    def write_files(self, out: Array, inode: Array, sizes: Array, counts: Array, chunks: Array) -> None:
        """The chunk lists of regular files, and in their inodes how to read them."""
        rows = self.owners[self.kinds[self.owners] == stat.S_IFREG >> 12]
        if (chunks["uoffset"] % self.block).any():
            raise FormatError("a chunk is not aligned to blocks, as the v6 format requires")
        formats = chunk_formats(self.tree, self.nodes["size"][rows], counts, chunks).astype("<u4")
        ragged.scatter(out, inode[rows] + layout.INODE.fields["u"][1], formats)  # type: ignore[index]
        index = np.zeros(len(chunks), layout.CHUNK_INDEX)
        index["index_low"] = chunks["index"] & 0xFFFF
        index["index_high"] = chunks["index"] >> 16
        index["device"] = chunks["blob_index"] + 1
        index["block"] = chunks["uoffset"] // self.block
        size = layout.CHUNK_INDEX.itemsize
        starts = ((inode + sizes)[rows] + 7 & ~7) // size
        ragged.scatter(out, ragged.indexes(starts, counts) * size, index)

    def write_targets(self, out: Array, links: Array, tails: Array, data: Array, inline: Array) -> None:
        links = links[self.nodes["link"][links] == links]
        nodes = self.nodes[links]
        starts, lengths = nodes["target_offset"].astype(np.int64), nodes["target_length"].astype(np.int64)
        tail = np.where(inline[links], lengths % self.block, 0)
        source = np.frombuffer(self.tree.targets, np.uint8)
        ragged.copy(out, data[links], source, starts, lengths - tail)
        ragged.copy(out, tails[links], source, starts + lengths - tail, tail)

    def block_places(
        self, entries: Dirents, directories: Array, tails: Array, data: Array, inline: Array
    ) -> Array:
        """Where each directory block goes: one after the other, the last one perhaps behind the inode."""
        blocks = entries.blocks
        number = ragged.indexes(np.zeros(len(blocks), np.int64), blocks)
        owner = np.repeat(directories, blocks)
        result = data[owner] + number * self.block
        last = np.cumsum(blocks) - 1
        inlined = inline[directories]
        result[last[inlined]] = tails[directories[inlined]]
        return np.asarray(result)


def block_size(tree: Tree) -> int:
    """Bytes of a block: the sectors of the tar archive in TARFS, else pages."""
    return 512 if tree.flags & SuperFlag.TARFS else layout.PAGE


def chunk_lists(tree: Tree, counts: Array, chunks: Array) -> tuple[Array, Array]:
    """The entries of chunk lists, which are of one size: a large chunk of an external file has several.

    Args:
        counts: chunks of each inode.
        chunks: of all of them, one after the other.

    Returns:
        For each entry the record of its chunk with the entry's ``uoffset`` and ``usize``, and how many
        entries each inode has.
    """
    counts = counts.astype(np.int64)
    pieces = np.maximum(-(-chunks["usize"].astype(np.int64) // tree.chunk_size), 1)
    if (pieces == 1).all():
        return chunks, counts
    inside = ragged.indexes(np.zeros(len(pieces), np.int64), pieces) * tree.chunk_size
    entries = np.repeat(chunks, pieces)
    entries["uoffset"] += inside.astype(np.uint64)
    entries["usize"] = np.minimum(entries["usize"] - inside, tree.chunk_size)
    owner = np.repeat(np.arange(len(counts)), counts)
    return entries, np.bincount(owner, pieces, len(counts)).astype(np.int64)


def chunk_formats(tree: Tree, sizes: Array, counts: Array, chunks: Array) -> Array:
    """The ``u`` field of files: extents are as large as a file where its chunks are one run of one blob.

    Args:
        sizes, counts: bytes and list entries of each regular file.
        chunks: their entries, from :func:`chunk_lists`.
    """
    block = block_size(tree)
    broken = np.zeros(len(chunks) + 1, np.int64)
    if len(chunks) > 1:
        follows = chunks["uoffset"][1:] == chunks["uoffset"][:-1] + np.uint64(tree.chunk_size)
        broken[1:-1] = ~(follows & (chunks["blob_index"][1:] == chunks["blob_index"][:-1]))
    breaks = np.cumsum(broken)
    first = ragged.starts_of(counts).astype(np.int64)
    last = np.maximum(first + counts - 1, first)
    whole = (counts > 1) & (breaks[last] == breaks[np.minimum(first, len(breaks) - 1)])
    chunk_bits = tree.chunk_size.bit_length() - 1
    sizes = np.maximum(sizes.astype(np.int64), 2) - 1
    # The exponent of a double is exact here: sizes are far below 2**53.
    bits = np.where(whole, np.frexp(sizes.astype(np.float64))[1], chunk_bits)
    return layout.CHUNK_FORMAT_INDEXES | (bits - (block.bit_length() - 1))


def chunk_table(chunks: Array, blobs: list[BlobInfo]) -> Array:
    """The records of rafs.md 2.10: the last of each (digest, blob), sorted by digest."""
    if not len(chunks):
        return np.zeros(0, CHUNK)
    # Most images refer to many chunks more than once: the last of each, and only then by digest.
    keys = chunks["blob_index"].astype(np.uint64) << np.uint64(32) | chunks["index"]
    _, last = np.unique(keys[::-1], return_index=True)
    del keys
    chunks = chunks[np.sort(len(chunks) - 1 - last)]
    words = np.ascontiguousarray(chunks["digest"]).view(">u8").reshape(-1, 4)
    external = np.array([bool(blob.features & BlobFeature.EXTERNAL) for blob in blobs])
    index = np.where(external[chunks["blob_index"]], chunks["index"], 0)
    columns = (words[:, 0], words[:, 1], words[:, 2], words[:, 3], chunks["blob_index"], index)
    sequence = np.lexsort(columns[::-1])  # stable: equal keys stay in P-order
    final = np.zeros(len(sequence), bool)
    final[-1] = True
    for column in columns:
        ordered = column[sequence]
        final[:-1] |= ordered[1:] != ordered[:-1]
    return np.asarray(chunks[sequence[final]])


def encode_xattrs(xattrs: Xattrs, tree: Tree) -> bytes:
    """Inline attributes of an inode (rafs.md 2.6); empty without any."""
    if not xattrs:
        return b""
    out = bytearray(layout.XATTR_HEADER)
    for name, value in xattrs:
        for index, prefix in layout.XATTR_PREFIXES.items():
            exact = index in (2, 3)
            if name == prefix if exact else name.startswith(prefix):
                break
        else:
            raise FormatError("the name of an extended attribute has no known prefix", found=name)
        suffix = name[len(prefix) :]
        if len(suffix) > 0xFF or len(value) > 0xFFFF:
            raise FormatError("an extended attribute is too long", found=name)
        out += bytes([len(suffix), index]) + len(value).to_bytes(2, "little") + suffix + value
        out += bytes(-len(out) % 4)
    if len(out) > layout.XATTR_HEADER + 4 * 0xFFFE:
        raise FormatError("the extended attributes of an inode are too long", found=len(out))
    return bytes(out)


def _blob_entry(blob: BlobInfo, index: int) -> tuple[object, ...]:
    secret, vector = blob.rafs_digest, blob.rafs_size.to_bytes(16, "little")
    if blob.cipher:
        secret, vector = blob.key, blob.iv
    return (
        _padded(blob.id, 64),
        index,
        blob.chunk_size,
        blob.chunk_count,
        int(blob.compression),
        int(blob.digester),
        int(blob.features),
        blob.compressed_size,
        blob.uncompressed_size,
        blob.toc_size,
        int(blob.meta_compression),
        blob.meta_offset,
        blob.meta_compressed_size,
        blob.meta_uncompressed_size,
        blob.toc_digest,
        secret,
        vector,
        int(blob.cipher),
        bytes(36),
    )


def _padded(text: str, size: int) -> bytes:
    raw = text.encode("ascii")
    if len(raw) > size:
        raise FormatError("a blob id is too long", found=text, expected=f"at most {size} bytes")
    return raw.ljust(size, b"\0")


def _repeat(raw: bytes, count: int) -> Array:
    return (
        np.broadcast_to(np.frombuffer(raw, np.uint8), (count, len(raw)))
        .copy()
        .view(f"V{len(raw)}")
        .reshape(-1)
    )


def _align(value: int, unit: int) -> int:
    return -(-value // unit) * unit
