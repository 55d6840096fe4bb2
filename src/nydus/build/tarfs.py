"""A raw tar archive that serves as the blob: only a bootstrap is made; rafs.md 4.5."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np

from nydus.build.layer import BuildOptions, LayerResult, add_entry, prefetch_rows, super_flags
from nydus.build.layer import write_bootstrap as write
from nydus.build.stream import Source, Window, ahead, tap
from nydus.build.tar import TarReader
from nydus.build.tree import TreeBuilder
from nydus.errors import FormatError
from nydus.rafs.model import CHUNK, BlobFeature, BlobInfo, Compression, SuperFlag


def build_tarfs(
    source: Source, options: BuildOptions, prefetch: Iterable[bytes] = (), where: str = ""
) -> LayerResult:
    """Index a plain tar archive.

    Args:
        source: read to its end.
        options: compression must be none and the digester sha256, the version 6.

    Raises:
        FormatError: not a plain tar archive, or one with sparse files, whose holes are not in it.
    """
    digest = hashlib.sha256()
    size = 0

    def count(piece: bytes) -> None:
        nonlocal size
        digest.update(piece)
        size += len(piece)

    reader = TarReader(Window(ahead(tap(source, count)), where))
    builder = TreeBuilder(where=where)
    chunk_size = options.chunk_size
    offsets, sizes = array("Q"), array("I")
    for entry in reader:
        number = add_entry(builder, entry, options)
        if number is None or not entry.size:
            continue
        if entry.sparse is not None:
            raise FormatError(
                f"sparse file {entry.name!r}: its holes are not in the archive; convert the layer instead",
                where=where,
                offset=entry.offset,
            )
        first = len(offsets)
        offsets.extend(range(entry.offset, entry.offset + entry.size, chunk_size))
        sizes.extend(min(chunk_size, entry.size - start) for start in range(0, entry.size, chunk_size))
        builder.set_chunks(number, first, len(offsets) - first)
    table = np.zeros(len(offsets), CHUNK)
    table["coffset"] = table["uoffset"] = np.array(offsets)
    table["csize"] = table["usize"] = np.array(sizes)
    table["index"] = np.arange(len(table))
    info = BlobInfo(
        options.blob_id or digest.hexdigest(),
        chunk_size,
        chunk_count=len(table),
        compression=Compression.NONE,
        digester=options.digester,
        features=BlobFeature.TARFS | BlobFeature.CAP_TAR_TOC,
        compressed_size=size,
        uncompressed_size=size,
        meta_compression=Compression.LZ4_BLOCK,  # as the reference has it, though there is no table
    )
    flags = super_flags(options) | SuperFlag.TARFS
    references = np.arange(len(table))
    tree = builder.finish(6, chunk_size, flags, table, references, [info] if len(table) else [])
    if options.prefetch_table:
        tree.prefetch = prefetch_rows(tree, prefetch)
    result = LayerResult(tree, write(tree), info.id, digest.hexdigest())
    result.blob = info if len(table) else None
    return result
