"""One model of a file system image, whatever format it came from.

A tree is a handful of numpy tables rather than an object for each inode, so that an image of a million
files is read, merged and written in bounded memory. Row *i* of :attr:`Tree.nodes` is the *name* with RAFS
index ``i + 1``, in the order the formats number them ("P-order"): the root, then all children of the root
in raw name order, then recursively the children of each child directory. The children of a directory are
therefore always one contiguous run of rows, ``first_child .. first_child + child_count``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Compression(IntEnum):
    NONE = 0
    LZ4_BLOCK = 1
    GZIP = 2
    ZSTD = 3


class Digester(IntEnum):
    BLAKE3 = 0
    SHA256 = 1


class Cipher(IntEnum):
    NONE = 0
    AES_128_XTS = 1


class SuperFlag(IntFlag):
    """Flags of a file system (u64 in both super blocks)."""

    COMPRESSION_NONE = 0x1
    COMPRESSION_LZ4 = 0x2
    HASH_BLAKE3 = 0x4
    HASH_SHA256 = 0x8
    EXPLICIT_UID_GID = 0x10
    HAS_XATTR = 0x20
    COMPRESSION_GZIP = 0x40
    COMPRESSION_ZSTD = 0x80
    INLINED_CHUNK_DIGEST = 0x100
    TARFS = 0x200
    ENCRYPTION_NONE = 0x100_0000
    ENCRYPTION_AES_128_XTS = 0x200_0000


class BlobFeature(IntFlag):
    """Feature flags of a data blob (u32)."""

    ALIGNED = 0x1
    INLINED_FS_META = 0x2
    CHUNK_INFO_V2 = 0x4
    ZRAN = 0x8
    SEPARATE = 0x10
    INLINED_CHUNK_DIGEST = 0x20
    TARFS = 0x40
    BATCH = 0x80
    ENCRYPTED = 0x100
    CHUNKDICT_GENERATED = 0x200
    SEPARATED_WITH_PREFETCH_FILES = 0x400
    EXTERNAL = 0x800
    HAS_TAR_HEADER = 0x1000_0000
    HAS_TOC = 0x2000_0000
    CAP_TAR_TOC = 0x4000_0000


_NO_FEATURES = BlobFeature(0)


class ChunkFlag(IntFlag):
    COMPRESSED = 0x1
    HOLE = 0x2
    ENCRYPTED = 0x4
    BATCH = 0x8
    HAS_CRC = 0x10
    ZRAN = 0x20  # at run time only: the bytes come out of a gzip random-access context


#: The 80-byte chunk record of v5 inodes and of the v6 chunk table, as it lies on disk (little endian).
CHUNK = np.dtype(
    [
        ("digest", "V32"),
        ("blob_index", "<u4"),
        ("flags", "<u4"),
        ("csize", "<u4"),
        ("usize", "<u4"),
        ("coffset", "<u8"),
        ("uoffset", "<u8"),
        ("file_offset", "<u8"),
        ("index", "<u4"),
        ("crc", "<u4"),
    ]
)
assert CHUNK.itemsize == 80

#: One row for each name of a tree. ``link`` is the row of the first name of the same inode (the row itself
#: where there is only one). ``name``/``target`` are (offset, length) pairs into the heaps, ``chunk`` and
#: ``chunk_count`` a run of :attr:`Tree.chunks` (the names of one inode share a run), ``xattr`` an index into
#: :attr:`Tree.xattrs` or -1. ``mtime`` is in seconds. ``first_child`` counts rows from 0.
NODE = np.dtype(
    [
        ("parent", "<u4"),
        ("first_child", "<u4"),
        ("child_count", "<u4"),
        ("link", "<u4"),
        ("mode", "<u4"),
        ("uid", "<u4"),
        ("gid", "<u4"),
        ("nlink", "<u4"),
        ("size", "<u8"),
        ("mtime", "<i8"),
        ("mtime_ns", "<u4"),
        ("rdev", "<u4"),
        ("name_offset", "<u8"),
        ("target_offset", "<u8"),
        ("chunk", "<u8"),
        ("chunk_count", "<u4"),
        ("xattr", "<i4"),
        ("name_length", "<u2"),
        ("target_length", "<u2"),
        ("flags", "<u2"),
    ]
)


class NodeFlag(IntFlag):
    """Facts of a name that only some formats store."""

    TAR_LINK = 0x1  # member of a hard-link group of a tar build: v5 sets its hard-link flag on all names
    IMPLIED = 0x2  # directory that a layer only implies: the one below keeps its attributes


Xattrs = tuple[tuple[bytes, bytes], ...]


@dataclass(slots=True)
class BlobInfo:
    """What a bootstrap knows of one data blob: the union of the v5 tables and the v6 blob table entry."""

    id: str
    chunk_size: int
    chunk_count: int = 0
    compression: Compression = Compression.NONE
    digester: Digester = Digester.BLAKE3
    features: BlobFeature = _NO_FEATURES
    compressed_size: int = 0
    uncompressed_size: int = 0
    toc_size: int = 0
    toc_digest: bytes = bytes(32)
    meta_compression: Compression = Compression.NONE
    meta_offset: int = 0
    meta_compressed_size: int = 0
    meta_uncompressed_size: int = 0
    rafs_digest: bytes = bytes(32)
    rafs_size: int = 0
    cipher: Cipher = Cipher.NONE
    key: bytes = b""
    iv: bytes = b""
    readahead_offset: int = 0
    readahead_size: int = 0

    @property
    def data_size(self) -> int:
        """Length of the chunk data at the start of the blob (of the layer, with SEPARATE); rafs.md 3.7."""
        features = self.features
        whole = features & (BlobFeature.SEPARATE | BlobFeature.EXTERNAL)
        if whole or not features & BlobFeature.CAP_TAR_TOC:
            return self.compressed_size
        end = self.meta_offset if self.meta_compressed_size else self.compressed_size
        return max(end - (512 if features & BlobFeature.HAS_TAR_HEADER else 0), 0)


@dataclass(slots=True)
class Super:
    """What the head of a bootstrap says, without its tree.

    Attributes:
        block_size: unit of ``device_blocks`` and ``mapped_blocks`` (v6); the chunk size in v5.
        root: nid of the root (v6) or its inode number, always 1 (v5).
        inode_count: names in the tree, each link counted.
        meta_offset: byte offset of the v6 metadata area, where nid 0 lies; of the inode table in v5.
        device_blocks, mapped_blocks: for each v6 device its length, and its block address in a flat image.
        prefetch: nids (v6) or inode numbers (v5) in pattern order.
        chunk_table: (offset, size in bytes) of the v6 chunk table.
    """

    version: int
    flags: SuperFlag
    chunk_size: int
    block_size: int
    root: int
    inode_count: int
    meta_offset: int
    blobs: list[BlobInfo] = field(default_factory=list)
    device_blocks: list[int] = field(default_factory=list)
    mapped_blocks: list[int] = field(default_factory=list)
    prefetch: list[int] = field(default_factory=list)
    chunk_table: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Tree:
    """A complete file system image.

    Attributes:
        nodes: :data:`NODE` rows in P-order; row 0 is the root.
        names, targets: heaps of raw name and symlink target bytes.
        chunks: :data:`CHUNK` rows, one run for each regular inode, in file order. All but the last of a run
            have ``chunk_size`` bytes, in EXTERNAL blobs another size that is the same for all.
        xattrs: distinct attribute sets.
        blobs: the data blobs that ``chunks["blob_index"]`` counts.
        prefetch: rows to prefetch first, in pattern order.
    """

    version: int
    chunk_size: int
    flags: SuperFlag
    nodes: Array
    names: bytes
    targets: bytes
    chunks: Array
    xattrs: list[Xattrs] = field(default_factory=list)
    blobs: list[BlobInfo] = field(default_factory=list)
    prefetch: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.nodes)

    def name(self, row: int) -> bytes:
        """The raw last component of a name; ``b"/"`` for the root."""
        if row == 0:
            return b"/"
        node = self.nodes[row]
        start = int(node["name_offset"])
        return self.names[start : start + int(node["name_length"])]

    def target(self, row: int) -> bytes:
        """The target of a symbolic link."""
        node = self.nodes[row]
        start = int(node["target_offset"])
        return self.targets[start : start + int(node["target_length"])]

    def path(self, row: int) -> bytes:
        """The absolute path of a name."""
        parts: list[bytes] = []
        while row:
            parts.append(self.name(row))
            row = int(self.nodes[row]["parent"])
        return b"/" + b"/".join(reversed(parts))

    def children(self, row: int) -> range:
        node = self.nodes[row]
        first = int(node["first_child"])
        return range(first, first + int(node["child_count"]))

    def node_xattrs(self, row: int) -> Xattrs:
        index = int(self.nodes[row]["xattr"])
        return self.xattrs[index] if index >= 0 else ()

    def node_chunks(self, row: int) -> Array:
        node = self.nodes[row]
        start = int(node["chunk"])
        return self.chunks[start : start + int(node["chunk_count"])]

    def find(self, path: bytes) -> int | None:
        """The row of an absolute path, by binary search in each directory; None if there is none."""
        row = 0
        for part in path.split(b"/"):
            if not part:
                continue
            low, high = self.children(row).start, self.children(row).stop
            end = high
            while low < high:
                middle = (low + high) // 2
                if self.name(middle) < part:
                    low = middle + 1
                else:
                    high = middle
            if low == end or self.name(low) != part:
                return None
            row = low
        return row

    def walk(self) -> Iterator[tuple[int, bytes]]:
        """Every row with its absolute path, depth first in name order."""
        stack = [(0, b"/")]
        while stack:
            row, path = stack.pop()
            yield row, path
            prefix = b"" if path == b"/" else path
            stack.extend((child, prefix + b"/" + self.name(child)) for child in reversed(self.children(row)))
