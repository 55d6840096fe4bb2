"""Content of files of the reference vectors, decoded chunk by chunk in the plainest way."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nydus.rafs import blobmeta, codec
from nydus.rafs.blobmeta import ChunkMap
from nydus.rafs.model import BlobFeature, BlobInfo, ChunkFlag, Compression, Tree

#: Deflate blocks without output, by their length in bits modulo 8 (rafs.md 3.4).
_PREFIXES = {
    1: (105, 0x11F5BF820000000000881E004),
    2: (10, 0x2),
    3: (115, 0x4011F5BF820000000000881E004),
    4: (20, 0x802),
    5: (125, 0x1004011F5BF820000000000881E004),
    6: (30, 0x200802),
    7: (95, 0x1F5BF820000000000881E004),
}


class Blob:
    """One blob's bytes, and its chunk map."""

    def __init__(self, info: BlobInfo, data: bytes, chunks: ChunkMap) -> None:
        self.info, self.data, self.chunks = info, data, chunks

    def chunk(self, index: int) -> bytes:
        chunks, info = self.chunks, self.info
        flags, size = ChunkFlag(int(chunks.flags[index])), int(chunks.usize[index])
        start, stored = int(chunks.coffset[index]), int(chunks.csize[index])
        if flags & ChunkFlag.ZRAN:
            out = self._inflate(int(chunks.context[index]))
            at = int(chunks.context_offset[index])
            data = out[at : at + size]
        elif flags & ChunkFlag.BATCH:
            row = chunks.batch[chunks.context[index]]
            kind = info.compression if row["csize"] != row["usize"] else Compression.NONE
            raw = self._decrypt(flags, self.data[start : start + int(row["csize"])])
            at = int(chunks.context_offset[index])
            data = codec.decompress(kind, raw, int(row["usize"]))[at : at + size]
        else:
            kind = info.compression if flags & ChunkFlag.COMPRESSED else Compression.NONE
            data = codec.decompress(kind, self._decrypt(flags, self.data[start : start + stored]), size)
        assert len(data) == size
        if flags & ChunkFlag.HAS_CRC:
            assert codec.crc32c(data) == int(chunks.crc[index])
        if chunks.digests is not None and chunks.digests[index].any():
            assert codec.digest(info.digester, data) == chunks.digests[index].tobytes()
        return data

    def _decrypt(self, flags: ChunkFlag, data: bytes) -> bytes:
        return codec.xts_decrypt(self.info.key, self.info.iv, data) if flags & ChunkFlag.ENCRYPTED else data

    def _inflate(self, context: int) -> bytes:
        row = self.chunks.zran[context]
        start, size, pending = int(row["in_offset"]), int(row["in_size"]), int(row["pending_bits"])
        data = self.data[start : start + size]
        if pending:
            bits, value = _PREFIXES.get(8 - pending, (0, 0))
            value |= (int(row["previous"]) >> (8 - pending)) << bits
            data = value.to_bytes((bits + pending) // 8, "little") + data
        engine = zlib.decompressobj(-15, zdict=self.chunks.dictionary(context))
        out = engine.decompress(data, int(row["out_size"]))
        while len(out) < int(row["out_size"]):  # the next gzip member
            engine, data = zlib.decompressobj(31), engine.unused_data[8:]
            out += engine.decompress(data, int(row["out_size"]) - len(out))
        return out


def open_blobs(tree: Tree, folder: Path, inputs: Path) -> list[Blob]:
    """The blobs of a vector, with digests from the tree."""
    by_hash = {hashlib.sha256(p.read_bytes()).hexdigest(): p for p in inputs.iterdir() if p.is_file()}
    result = []
    for number, info in enumerate(tree.blobs):
        path = folder / info.id
        data = by_hash.get(info.id, path).read_bytes()
        if info.features & BlobFeature.TARFS or tree.version == 5:
            chunks = blobmeta.from_tree(tree, number)
        else:
            separate = info.features & BlobFeature.SEPARATE
            rafs = (folder / info.rafs_digest.hex()).read_bytes() if separate else data
            chunks = blobmeta.load(info, lambda o, n, rafs=rafs: rafs[o : o + n], size=len(rafs))  # type: ignore[misc]
            chunks.set_digests(tree.chunks, number)
        result.append(Blob(info, data, chunks))
    return result


def describe(tree: Tree, blobs: list[Blob] | None) -> Iterator[dict[str, Any]]:
    """The rows of ``expected.jsonl`` for a tree; without blobs no ``sha256``."""
    rows = dict(tree.walk())
    # expected.jsonl names the first path in its own (sorted) order.
    groups: dict[int, list[bytes]] = {}
    for row, path in rows.items():
        groups.setdefault(int(tree.nodes["link"][row]), []).append(path)
    cache: dict[tuple[int, int], bytes] = {}
    for row, path in rows.items():
        node = tree.nodes[row]
        kind = int(node["mode"]) >> 12
        item: dict[str, Any] = {
            "path": path.decode("utf-8", "surrogateescape"),
            "mode": int(node["mode"]),
            "uid": int(node["uid"]),
            "gid": int(node["gid"]),
            "mtime": int(node["mtime"]),
        }
        if kind != 4:
            item["nlink"], item["size"] = int(node["nlink"]), int(node["size"])
        if kind in (2, 6):
            rdev = int(node["rdev"])
            item["rdev"] = [rdev >> 8 & 0xFFF, (rdev & 0xFF) | (rdev >> 12 & 0xFFF00)]
        if kind == 10:
            item["target"] = tree.target(row).decode("utf-8", "surrogateescape")
        if tree.node_xattrs(row):
            item["xattrs"] = {name.decode(): value.hex() for name, value in tree.node_xattrs(row)}
        group = groups[int(node["link"])]
        if len(group) > 1:
            item["link_of"] = min(group).decode("utf-8", "surrogateescape")
        if kind == 8 and blobs is not None:
            content = hashlib.sha256()
            for chunk in tree.node_chunks(row):
                key = int(chunk["blob_index"]), int(chunk["index"])
                if key not in cache:
                    cache[key] = blobs[key[0]].chunk(key[1])
                content.update(cache[key])
                assert len(cache[key]) == int(chunk["usize"])
                assert int(blobs[key[0]].chunks.uoffset[key[1]]) == int(chunk["uoffset"])
            item["sha256"] = content.hexdigest()
        yield item


def expected(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["path"]: row for row in rows}


def same_arrays(left: Tree, right: Tree) -> bool:
    return bool(np.array_equal(left.nodes, right.nodes) and np.array_equal(left.chunks, right.chunks))
