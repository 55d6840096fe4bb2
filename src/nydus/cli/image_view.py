"""A bootstrap opened to be looked at: what ``check``, ``inspect`` and ``stat`` share."""

from __future__ import annotations

import logging
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nydus.image import Image
    from nydus.rafs.model import Array, BlobFeature, Super, SuperFlag, Tree

log = logging.getLogger("nydus.image")

KINDS = {
    stat.S_IFDIR: "dir",
    stat.S_IFREG: "file",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}

#: Words for blob features, as the reference prints them.
_FEATURE_WORDS = {
    0x1: "aligned",
    0x2: "inlined-meta",
    0x4: "chunk-v2",
    0x8: "zran",
    0x10: "separate",
    0x20: "chunk-digest",
    0x40: "tarfs",
    0x80: "batch",
    0x100: "encrypted",
    0x200: "chunkdict",
    0x800: "external",
    0x1000_0000: "tar-header",
    0x2000_0000: "toc",
    0x4000_0000: "cap_toc",
}

_FLAG_NAMES = {
    "HASH_BLAKE3": 0x4,
    "HASH_SHA256": 0x8,
    "EXPLICIT_UID_GID": 0x10,
    "HAS_XATTR": 0x20,
    "COMPRESSION_NONE": 0x1,
    "COMPRESSION_LZ4_BLOCK": 0x2,
    "COMPRESSION_GZIP": 0x40,
    "COMPRESSION_ZSTD": 0x80,
    "INLINED_CHUNK_DIGEST": 0x100,
    "TARTFS_MODE": 0x200,
    "ENCRYPTION_NONE": 0x100_0000,
    "ENCRYPTION_AES_128_XTS": 0x200_0000,
}


@dataclass(slots=True)
class View:
    """A bootstrap, and the inode numbers that a mount of it shows.

    Attributes:
        numbers: by row of the tree: nids in v6, inode numbers in v5.
    """

    path: str
    data: bytes
    head: Super
    tree: Tree
    numbers: Array


def open_view(path: str) -> View:
    """Read a bootstrap, or the one in a blob. Raises NydusError."""
    from nydus.build import bootstrap

    data = bootstrap.read_bytes(path)
    return view_of(path, data)


def view_of(path: str, data: bytes) -> View:
    from nydus import rafs
    from nydus.build import bootstrap
    from nydus.rafs.buffer import Buffer
    from nydus.rafs.v6.reader import Reader

    head = rafs.superblock(data, path)
    log.info("RAFS features: %s", flag_names(head.flags))
    if head.version == 6:
        reader = Reader(Buffer(data, path), head)
        tree = reader.tree()
        numbers = reader.nids
    else:
        tree = rafs.read(data, path)
        numbers = tree.nodes["link"] + 1
    return View(path, data, head, bootstrap.name_blobs(tree, path), numbers)


def complete_chunks(image: Image) -> Array:
    """The chunks of a tree with what only the blobs know of them (stored places of batched chunks)."""
    from nydus.image import chunk_records

    chunks = image.tree.chunks.copy()
    for index in range(len(image.blobs)):
        mine = chunks["blob_index"] == index
        records = chunk_records(image, index)[chunks["index"][mine]]
        for column in ("coffset", "csize", "flags", "crc", "digest"):
            chunks[column][mine] = records[column]
    return chunks


def quoted(raw: bytes) -> str:
    """A name in double quotes, with what cannot be shown escaped."""
    text = raw.decode("utf-8", "surrogateescape")
    shown = "".join(
        c
        if c.isprintable() and c not in '"\\'
        else "\\" + c
        if c in '"\\'
        else c.encode("utf-8", "surrogateescape").decode("latin-1").encode("unicode_escape").decode()
        for c in text
    )
    return f'"{shown}"'


def feature_words(features: BlobFeature) -> str:
    return " ".join(sorted(word for bit, word in _FEATURE_WORDS.items() if features & bit))


def flag_names(flags: SuperFlag) -> str:
    return " | ".join(name for name, bit in _FLAG_NAMES.items() if flags & bit)


def blocks_of(view: View, row: int) -> int:
    """512-byte blocks, as ``st_blocks``."""
    return -(-int(view.tree.nodes["size"][row]) // 512)
