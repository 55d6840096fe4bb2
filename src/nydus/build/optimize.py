"""What a container reads first in a blob of its own, to be fetched in one go; rafs.md 4.8."""

from __future__ import annotations

import dataclasses
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from nydus.build.blob import BlobWriter, HashingSink
from nydus.build.layer import random_key
from nydus.build.merge import MAX_BLOBS
from nydus.build.output import Output
from nydus.errors import ConfigError, NydusError
from nydus.rafs import blobmeta, toc
from nydus.rafs.model import Array, BlobFeature, BlobInfo, Cipher, Compression, SuperFlag, Tree

if TYPE_CHECKING:
    from nydus.image import Image

log = logging.getLogger("nydus.image")

_MAX_DOCUMENT = 64 << 20


class PrefetchFile(msgspec.Struct):
    """A file to have at hand: all of it, or ``ranges`` of (offset, size) in bytes."""

    path: str
    ranges: list[tuple[int, int]] | None = None


class _Document(msgspec.Struct):
    version: str
    files: list[PrefetchFile] = []


@dataclass(frozen=True, slots=True)
class Optimized:
    """The new tree, and its new blob (None where there was nothing to put into it)."""

    tree: Tree
    blob: BlobInfo | None


def parse_prefetch_files(text: bytes, where: str = "prefetch files") -> list[PrefetchFile]:
    """The files of a ``{"version": "v1", "files": […]}`` document (cli.md 1.12); none for empty text.

    Paths that are not absolute are left out with a warning.

    Raises:
        ConfigError: not such a document, or of another version.
    """
    if len(text) > _MAX_DOCUMENT:
        raise ConfigError(f"{where}: larger than {_MAX_DOCUMENT} bytes")
    if not text.strip():
        return []
    try:
        document = msgspec.json.decode(text, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if document.version != "v1":
        raise ConfigError(f"{where}: version is {document.version!r}, not 'v1'")
    files = []
    for file in document.files:
        if not file.path.startswith("/"):
            log.warning("%s: %r is not an absolute path: skipped", where, file.path)
            continue
        for offset, size in file.ranges or ():
            if offset < 0 or size < 0:
                raise ConfigError(f"{where}: range [{offset}, {size}] of {file.path} is negative")
        files.append(file)
    return files


def optimize(image: Image, files: Sequence[PrefetchFile], folder: str) -> Optimized:
    """Copy the chunks of some files into one more blob, and let all files refer to them there.

    Chunks are verified, and compressed anew: they may come out of batches or gzip layers. Where the image is
    encrypted, so is the new blob.

    Args:
        files: in the order in which they are wanted. Those that the image does not have are left out with a
            warning.
        folder: existing directory in which the blob gets the name of its sha256.

    Raises:
        NydusError: the image is a tar archive with an index, or has too many blobs.
        FormatError, BackendError: a chunk is wrong, or cannot be had. No file is left then.
    """
    tree = image.tree
    if tree.flags & SuperFlag.TARFS:
        raise NydusError("an image whose blobs are tar archives cannot be optimized")
    selected = _select(tree, files)
    if not len(selected):
        return Optimized(tree, None)
    if len(tree.blobs) >= MAX_BLOBS:
        raise NydusError(f"the image has {len(tree.blobs)} blobs already; at most {MAX_BLOBS} are possible")
    info = _describe(tree, selected)
    chunks = tree.chunks[selected]
    with Output(folder, directory=True) as out:
        sink = HashingSink(out.write)
        with BlobWriter(info, sink, aligned=tree.version == 6) as writer:
            # Never alone: a batch would have to be read for one small file.
            writer.add(image.reader.stream(chunks["blob_index"], chunks["index"]))
            writer.finish()
            table = writer.table()[writer.references]
            if tree.version == 6:
                sink.write(toc.tar_header(toc.IMAGE_BLOB, sink.size))
                section = blobmeta.write(writer.chunk_map(), sink.size)
                sink.write(section)
                sink.write(toc.tar_header(toc.BLOB_META, len(section)))
        info.id, info.compressed_size = sink.digest.hexdigest(), sink.size
        out.commit(info.id)
    return Optimized(_repointed(tree, chunks, table, info), info)


def _select(tree: Tree, files: Sequence[PrefetchFile]) -> Array:
    """Rows of ``tree.chunks`` to copy, in order, each chunk once."""
    parts = []
    for file in files:
        row = tree.find(os.fsencode(file.path))
        if row is None or not stat.S_ISREG(int(tree.nodes["mode"][row])):
            log.warning("prefetch file %s is no regular file of the image: skipped", file.path)
            continue
        node = tree.nodes[row]
        rows = np.arange(int(node["chunk"]), int(node["chunk"]) + int(node["chunk_count"]))
        if file.ranges is not None:
            starts = tree.chunks["file_offset"][rows].astype(np.int64)
            ends = starts + tree.chunks["usize"][rows]
            wanted = np.zeros(len(rows), bool)
            for offset, size in file.ranges:
                wanted |= (starts < min(offset + size, 1 << 62)) & (ends > min(offset, 1 << 62)) & (size > 0)
            rows = rows[wanted]
        parts.append(rows)
    if not parts:
        return np.zeros(0, np.int64)
    rows = np.concatenate(parts)
    _, first = np.unique(_keys(tree.chunks[rows]), return_index=True)
    return np.asarray(rows[np.sort(first)])


def _keys(chunks: Array) -> Array:
    """One number for each distinct chunk."""
    return np.asarray(chunks["blob_index"].astype(np.uint64) << np.uint64(32) | chunks["index"])


def _describe(tree: Tree, selected: Array) -> BlobInfo:
    sources = [tree.blobs[number] for number in np.unique(tree.chunks["blob_index"][selected])]
    features = BlobFeature.CAP_TAR_TOC
    if tree.version == 6:
        features |= BlobFeature.ALIGNED | BlobFeature.HAS_TAR_HEADER
    compression = sources[0].compression
    info = BlobInfo(
        "",
        tree.chunk_size,
        compression=Compression.ZSTD if compression == Compression.GZIP else compression,
        digester=sources[0].digester,
        features=features,
    )
    if any(source.cipher for source in sources):
        info.features |= BlobFeature.ENCRYPTED | BlobFeature.CHUNK_INFO_V2
        info.cipher, info.key, info.iv = Cipher.AES_128_XTS, random_key(), os.urandom(16)
    return info


def _repointed(tree: Tree, moved: Array, table: Array, info: BlobInfo) -> Tree:
    """The tree with every use of the ``moved`` chunks replaced by rows of ``table``."""
    keys = _keys(moved)
    order = np.argsort(keys)
    wanted = _keys(tree.chunks)
    place = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    found = keys[order][place] == wanted
    chunks = tree.chunks.copy()
    source = table[order[place[found]]]
    for name in ("digest", "flags", "csize", "usize", "coffset", "uoffset", "index", "crc"):
        chunks[name][found] = source[name]
    chunks["blob_index"][found] = len(tree.blobs)
    flags = tree.flags & ~SuperFlag.INLINED_CHUNK_DIGEST
    return dataclasses.replace(tree, chunks=chunks, blobs=[*tree.blobs, info], flags=flags)
