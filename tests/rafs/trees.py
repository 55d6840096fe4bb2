"""Small trees made by hand, without the builder."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nydus.rafs import codec
from nydus.rafs.model import (
    CHUNK,
    NODE,
    BlobFeature,
    BlobInfo,
    ChunkFlag,
    Compression,
    Digester,
    SuperFlag,
    Tree,
    Xattrs,
)

CHUNK_SIZE = 0x1000
FLAGS = SuperFlag.COMPRESSION_NONE | SuperFlag.HASH_BLAKE3 | SuperFlag.EXPLICIT_UID_GID


@dataclass(frozen=True)
class Item:
    mode: int = stat.S_IFREG | 0o644
    content: bytes = b""  # target of a symbolic link
    xattrs: Xattrs = ()
    link: bytes = b""  # path of the first name
    rdev: int = 0
    mtime: int = 1_700_000_000
    uid: int = 0


DIR = Item(stat.S_IFDIR | 0o755)


def make(items: Mapping[bytes, Item], version: int = 6) -> Tree:
    """A tree of absolute paths; missing parents are made. The data of all files form one blob."""
    full: dict[bytes, Item] = {b"/": DIR}
    for path, item in items.items():
        parts = path.split(b"/")[1:]
        for depth in range(1, len(parts)):
            full.setdefault(b"/" + b"/".join(parts[:depth]), DIR)
        full[path] = item
    children: dict[bytes, list[bytes]] = {}
    for path in full:
        if path != b"/":
            children.setdefault(path.rpartition(b"/")[0] or b"/", []).append(path)
    rows = {b"/": 0}
    firsts: dict[bytes, int] = {}
    stack = [b"/"]
    while stack:
        path = stack.pop()
        firsts[path] = len(rows)
        below = sorted(children.get(path, []))
        rows.update({child: len(rows) + index for index, child in enumerate(below)})
        stack.extend(reversed([child for child in below if stat.S_ISDIR(full[child].mode)]))
    nodes = np.zeros(len(rows), NODE)
    names, targets = bytearray(), bytearray()
    chunks: list[tuple[object, ...]] = []
    known: dict[bytes, tuple[object, ...]] = {}
    xattrs: list[Xattrs] = []
    offset = 0
    for path, row in rows.items():
        item, node = full[path], nodes[row]
        parent = path.rpartition(b"/")[0] or b"/"
        name = path.rpartition(b"/")[2]
        owner = full[item.link] if item.link else item
        node["parent"], node["mode"], node["uid"] = rows[parent], owner.mode, owner.uid
        node["name_offset"], node["name_length"] = len(names), len(name)
        node["link"] = min(
            [rows[item.link or path]] + [rows[p] for p, i in full.items() if i.link == (item.link or path)]
        )
        node["mtime"], node["rdev"] = owner.mtime, owner.rdev
        names += name
        node["xattr"] = -1
        if owner.xattrs:
            if owner.xattrs not in xattrs:
                xattrs.append(owner.xattrs)
            node["xattr"] = xattrs.index(owner.xattrs)
        if stat.S_ISDIR(item.mode):
            node["first_child"], node["child_count"] = firsts[path], len(children.get(path, []))
        elif stat.S_ISLNK(item.mode):
            node["target_offset"], node["target_length"] = len(targets), len(item.content)
            node["size"] = len(item.content)
            targets += item.content
        elif stat.S_ISREG(item.mode) and node["link"] == row:
            node["size"], node["chunk"] = len(owner.content), len(chunks)
            for start in range(0, len(owner.content), CHUNK_SIZE):
                piece = owner.content[start : start + CHUNK_SIZE]
                # As in every real blob, no chunk is stored twice.
                if piece not in known:
                    digest = np.void(codec.digest(Digester.BLAKE3, piece))
                    place = (len(piece), len(piece), offset, offset)
                    known[piece] = (digest, 0, ChunkFlag.HAS_CRC, *place, len(known), codec.crc32c(piece))
                    offset += -(-len(piece) // 4096) * 4096
                chunks.append((*known[piece][:7], start, *known[piece][7:]))
            node["chunk_count"] = len(chunks) - int(node["chunk"])
    links = nodes["link"]
    for name in ("size", "chunk", "chunk_count"):
        nodes[name] = nodes[name][links]
    blob = BlobInfo(
        id="ab" * 32,
        chunk_size=CHUNK_SIZE,
        chunk_count=len(known),
        compression=Compression.NONE,
        features=BlobFeature.ALIGNED | BlobFeature.CAP_TAR_TOC,
        compressed_size=offset + 8192,
        uncompressed_size=offset,
        meta_offset=offset,
        meta_compressed_size=16 * len(known),
        meta_uncompressed_size=16 * len(known),
    )
    return Tree(
        version=version,
        chunk_size=CHUNK_SIZE,
        flags=FLAGS,
        nodes=nodes,
        names=bytes(names),
        targets=bytes(targets),
        chunks=np.array(chunks, CHUNK),
        xattrs=xattrs,
        blobs=[blob] if chunks else [],
    )


def listing(tree: Tree) -> dict[bytes, tuple[object, ...]]:
    """What a user sees of a tree, by path."""
    result: dict[bytes, tuple[object, ...]] = {}
    paths = dict(tree.walk())
    for row, path in paths.items():
        node = tree.nodes[row]
        kind = stat.S_IFMT(int(node["mode"]))
        result[path] = (
            int(node["mode"]),
            int(node["uid"]),
            int(node["mtime"]),
            int(node["nlink"]),
            int(node["rdev"]) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
            int(node["size"]) if kind == stat.S_IFREG else 0,
            tree.target(row) if kind == stat.S_IFLNK else b"",
            tree.node_xattrs(row),
            paths[int(node["link"])],
            [(int(c["index"]), bytes(c["digest"])) for c in tree.node_chunks(row)],
        )
    return result
