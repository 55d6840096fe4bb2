"""Chunk dictionaries: the chunks that several images share, for later builds to refer to; rafs.md 4.8."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nydus.build.merge import MAX_BLOBS
from nydus.build.tree import TreeBuilder
from nydus.errors import NydusError
from nydus.rafs.model import CHUNK, Array, BlobFeature, BlobInfo, SuperFlag, Tree

#: Flags that the dictionary has of its sources; the others say what its own files have.
_FLAGS = SuperFlag(0xDF) | SuperFlag.ENCRYPTION_NONE | SuperFlag.ENCRYPTION_AES_128_XTS
_SCHEMA = """
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY, image_reference TEXT, version TEXT,
    chunk_blob_id TEXT NOT NULL, chunk_digest TEXT,
    chunk_compressed_size INTEGER, chunk_uncompressed_size INTEGER,
    chunk_compressed_offset INTEGER, chunk_uncompressed_offset INTEGER);
CREATE TABLE blobs (
    id INTEGER PRIMARY KEY, blob_id TEXT NOT NULL UNIQUE, blob_compressed_size INTEGER,
    blob_uncompressed_size INTEGER, blob_compressor TEXT, blob_meta_compressed_size INTEGER,
    blob_meta_uncompressed_size INTEGER, blob_meta_offset INTEGER);
"""


@dataclass(frozen=True, slots=True)
class Source:
    """An image that a dictionary is made of."""

    name: str
    tag: str
    tree: Tree

    @classmethod
    def of_path(cls, path: str, tree: Tree) -> Source:
        """Name and tag are the last two parts of the name of the bootstrap's directory (cli.md 1.13)."""
        *rest, tag = Path(path).absolute().parent.name.split(":")
        return cls(rest[-1], tag, tree) if rest else cls(tag, "", tree)


def generate(sources: Sequence[Source]) -> Tree:
    """The chunks that at least two of the images have, each as the first of them has it.

    The result is an ordinary image, with the chunks as files below ``/chunkdict``: one for all chunks of full
    size, one for each smaller one. Its blobs are those of the images.

    Raises:
        NydusError: version, chunk size or digests of the images differ, or too many blobs.
    """
    if not sources:
        raise NydusError("no images to make a chunk dictionary of")
    first = sources[0].tree
    for source in sources[1:]:
        for what, ours, theirs, advice in (
            ("version", first.version, source.tree.version, "build both with the same --fs-version"),
            (
                "chunk size",
                f"{first.chunk_size:#x}",
                f"{source.tree.chunk_size:#x}",
                "build both with the same --chunk-size",
            ),
            (
                "digester",
                _digester(first),
                _digester(source.tree),
                "use either indexes over ordinary layers (oci-ref), which have sha256, or built images, "
                "which usually have blake3",
            ),
        ):
            if ours != theirs:
                name = f"{source.name}:{source.tag}"
                raise NydusError(f"{what} of {name} is {theirs}, of the first image {ours}; {advice}")
    chunks, blobs = _shared([source.tree for source in sources])
    full = chunks["usize"] == first.chunk_size
    builder = TreeBuilder()
    builder.add(b"/chunkdict", stat.S_IFDIR | 0o755)
    counts = [int(full.sum())] * bool(full.any()) + [1] * int((~full).sum())
    ordered = chunks[np.argsort(~full, kind="stable")]
    start = 0
    for number, count in enumerate(counts):
        size = int(ordered["usize"][start : start + count].sum(dtype=np.uint64))
        inode = builder.add(b"/chunkdict/%d" % number, stat.S_IFREG | 0o644, size=size)
        builder.set_chunks(inode, start, count)
        start += count
    flags = first.flags & _FLAGS
    if first.version == 6 and all(blob.features & BlobFeature.INLINED_CHUNK_DIGEST for blob in blobs):
        flags |= SuperFlag.INLINED_CHUNK_DIGEST
    return builder.finish(first.version, first.chunk_size, flags, ordered, np.arange(len(ordered)), blobs)


def _digester(tree: Tree) -> str:
    return "sha256" if tree.flags & SuperFlag.HASH_SHA256 else "blake3"


def _shared(trees: Sequence[Tree]) -> tuple[Array, list[BlobInfo]]:
    """Records of the chunks in several trees, and the blobs that their ``blob_index`` counts."""
    seen = []
    for tree in trees:
        # As byte strings digests can be sorted; the zeros at their end that numpy drops do not matter.
        digests, rows = np.unique(_digests(tree), return_index=True)
        known = digests != b""
        seen.append((digests[known], rows[known]))
    digests = np.concatenate([part for part, _ in seen])
    values, where, counts = np.unique(digests, return_index=True, return_counts=True)
    del values
    places = np.sort(where[counts > 1])
    limits = np.cumsum([len(part) for part, _ in seen])
    parts = []
    blobs: list[BlobInfo] = []
    for number, (tree, (part, rows)) in enumerate(zip(trees, seen, strict=True)):
        start = int(limits[number]) - len(part)
        mine = places[(places >= start) & (places < limits[number])] - start
        records = tree.chunks[np.sort(rows[mine])].copy()
        index = records["blob_index"].copy()
        for old in dict.fromkeys(index.tolist()):
            records["blob_index"][index == old] = _number(blobs, tree.blobs[old])
        parts.append(records)
    if len(blobs) > MAX_BLOBS:
        raise NydusError(f"the dictionary would have {len(blobs)} blobs; at most {MAX_BLOBS} are possible")
    return np.concatenate(parts) if parts else np.zeros(0, CHUNK), blobs


def _number(blobs: list[BlobInfo], blob: BlobInfo) -> int:
    for number, known in enumerate(blobs):
        if known.id == blob.id:
            return number
    # The bootstrap is not in the dictionary's reach, wherever it was.
    blobs.append(dataclasses.replace(blob, features=blob.features & ~BlobFeature.INLINED_FS_META))
    return len(blobs) - 1


def _digests(tree: Tree) -> Array:
    return np.ascontiguousarray(tree.chunks["digest"]).view("S32").reshape(-1)


def write_database(path: str, sources: Sequence[Source]) -> None:
    """Write all chunks and blobs of the images into an SQLite database, which replaces an older one.

    Raises:
        NydusError: it cannot be written.
    """
    aside = ""
    try:
        descriptor, aside = tempfile.mkstemp(".tmp", ".nydus-", os.path.dirname(path) or ".")
        os.close(descriptor)
        with contextlib.closing(sqlite3.connect(aside)) as database, database:
            database.executescript(_SCHEMA)
            for source in sources:
                _insert(database, source)
        os.rename(aside, path)  # noqa: PTH104
    except (OSError, sqlite3.Error) as error:
        if aside:
            os.unlink(aside)  # noqa: PTH108
        raise NydusError(f"{path}: cannot be written: {error}") from None


def _insert(database: sqlite3.Connection, source: Source) -> None:
    chunks = source.tree.chunks
    ids = [blob.id for blob in source.tree.blobs]
    columns = zip(
        np.ascontiguousarray(chunks["digest"]).tolist(),
        *(chunks[name].tolist() for name in ("blob_index", "csize", "usize", "coffset", "uoffset")),
        strict=True,
    )
    database.executemany(
        "INSERT INTO chunks VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            (source.name, source.tag, ids[blob], bytes(digest).hex(), csize, usize, coffset, uoffset)
            for digest, blob, csize, usize, coffset, uoffset in columns
        ),
    )
    database.executemany(
        "INSERT OR IGNORE INTO blobs VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)",
        (
            (
                blob.id,
                blob.compressed_size,
                blob.uncompressed_size,
                blob.compression.name.lower(),
                blob.meta_compressed_size,
                blob.meta_uncompressed_size,
                blob.meta_offset,
            )
            for blob in source.tree.blobs
        ),
    )
