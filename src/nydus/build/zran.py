"""Layers that stay as they are: tables say where in a tar or tar.gz archive its chunks lie; rafs.md 3.4."""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from nydus.build.blob import BATCH_COUNT, BATCH_SIZE, MAX_CHUNKS, HashingSink, Piece, Sink
from nydus.build.inflate import GzipWindow
from nydus.build.layer import (
    BuildOptions,
    LayerResult,
    add_entry,
    prefetch_rows,
    super_flags,
    write_bootstrap,
)
from nydus.build.sections import SectionWriter
from nydus.build.stream import Source, Window, ahead, tap
from nydus.build.tar import TarReader
from nydus.build.tree import TreeBuilder
from nydus.errors import FormatError
from nydus.rafs import codec
from nydus.rafs.blobmeta import ZRAN, ChunkMap
from nydus.rafs.model import (
    CHUNK,
    Array,
    BlobFeature,
    BlobInfo,
    ChunkFlag,
    Compression,
    Digester,
    SuperFlag,
)

#: A context is not worth its 32 KiB of dictionary below this much stored data …
_CONTEXT_IN = 512 << 10
#: … unless so much would have to be inflated to get at a chunk.
_CONTEXT_OUT = 2 << 20
_GZIP = b"\x1f\x8b"


def build_reference(
    source: Source,
    sink: Sink,
    options: BuildOptions,
    prefetch: Iterable[bytes] = (),
    where: str = "",
    layer_id: str = "",
) -> LayerResult:
    """Index a tar or tar.gz layer: the blob holds tables only, its chunks are read out of the layer itself.

    Args:
        source: read to its end.
        sink: gets the bytes of the blob: chunk table, digests, bootstrap and contents as the options say.
        options: compression must be gzip and the digester sha256, the version 6.
        layer_id: sha256 (hex) of the layer, if ``source`` checks that it is that; "" computes it.

    The blob in the tree has the sha256 of the layer as its id.

    Raises:
        FormatError: the layer is damaged, or has sparse files, whose holes are not in it.
    """
    digest = hashlib.sha256()
    size = 0

    def count(piece: bytes) -> None:
        nonlocal size
        if not layer_id:
            digest.update(piece)
        size += len(piece)

    pieces = tap(source, count)
    first = next(pieces, b"")
    zipped = first.startswith(_GZIP)
    pieces = ahead(_before(first, pieces))
    window: GzipWindow | Window = GzipWindow(pieces, where) if zipped else Window(pieces, where)
    builder = TreeBuilder(where=where)
    with _Index(window, options) as index:
        reader = TarReader(window)
        for entry in reader:
            number = add_entry(builder, entry, options)
            if number is None or not entry.size:
                continue
            if entry.sparse is not None:
                raise FormatError(
                    f"sparse file {entry.name!r}: its holes are not in the layer; convert the layer instead",
                    where=where,
                    offset=entry.offset,
                )
            builder.set_chunks(number, *index.add_file(entry.size))
        index.finish()
    info = index.info
    info.id, info.compressed_size = layer_id or digest.hexdigest(), size
    chunks = index.chunk_map() if info.chunk_count else None
    result = seal_reference(builder, info, chunks, index.references, HashingSink(sink), options, prefetch)
    result.duplicates = index.duplicates
    return result


def _before(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


class _Index:
    """Chunks and contexts of a layer, in the order of the archive."""

    def __init__(self, window: GzipWindow | Window, options: BuildOptions) -> None:
        self._window = window
        self._chunk_size = options.chunk_size
        self._zran = isinstance(window, GzipWindow)
        features = reference_features(options)
        if self._zran:
            features |= BlobFeature.ZRAN
        self.info = BlobInfo(
            "",
            options.chunk_size,
            compression=options.compression,
            digester=options.digester,
            features=features,
        )
        self._pool = ThreadPoolExecutor(1, "digester")
        self._pieces: list[Piece] = []
        self._bytes = 0
        self._digesting: deque[tuple[int, Future[list[tuple[bytes, int]]]]] = deque()
        # A row for each piece.
        self._usize, self._coffset, self._csize = array("I"), array("Q"), array("I")
        self._context, self._inside = array("I"), array("I")
        # A row for each distinct chunk: its first piece.
        self._rows = array("q")
        self._digests = bytearray()
        self._crcs = array("I")
        self._known: dict[bytes, int] = {}
        self._references = array("q")
        self._contexts: list[list[int]] = []
        self._dictionaries: list[bytes] = []
        self._dictionary_bytes = 0
        self._member = -1

    def __enter__(self) -> _Index:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add_file(self, size: int) -> tuple[int, int]:
        """Read a file of ``size`` bytes; returns its chunk references."""
        first = len(self._usize)
        window = self._window
        zipped = window if isinstance(window, GzipWindow) else None
        for start in range(0, size, self._chunk_size):
            length = min(self._chunk_size, size - start)
            position = window.position
            if zipped is not None:
                zipped.settle()
                before = zipped.consumed
                self._enter(zipped, before, position)
                piece: Piece = zipped.take(length)
                used = zipped.consumed - before
                context = self._contexts[-1]
                context[3] = zipped.consumed - context[0]
                context[4] = zipped.position - context[1]
                self._context.append(len(self._contexts) - 1)
                self._inside.append(position - context[1])
            else:
                before, used = position, length
                piece = window.take(length)
                self._context.append(0)
                self._inside.append(0)
            if used > 0xFF_FFFF:
                raise FormatError(
                    "a chunk takes up 16 MiB of the layer; use a smaller chunk size",
                    where=window.where,
                    offset=position,
                )
            self._usize.append(length)
            self._coffset.append(before)
            self._csize.append(used)
            self._pieces.append(piece)
            self._bytes += length
            if self._bytes >= BATCH_SIZE or len(self._pieces) >= BATCH_COUNT:
                self._digest()
        return first, len(self._usize) - first

    def _enter(self, window: GzipWindow, consumed: int, position: int) -> None:
        """Start a new context if the next chunk is too far into the current one."""
        boundary = window.boundary
        if self._contexts and boundary.member == self._member:
            start_in, start_out = self._contexts[-1][:2]
            if boundary.out_offset <= start_out or (
                consumed - start_in < _CONTEXT_IN and position - start_out + self._chunk_size < _CONTEXT_OUT
            ):
                return
        dictionary = window.dictionary()
        self._contexts.append(
            [
                boundary.in_offset,
                boundary.out_offset,
                self._dictionary_bytes,
                0,
                0,
                len(dictionary),
                boundary.previous,
                boundary.bits,
            ]
        )
        self._dictionaries.append(dictionary)
        self._dictionary_bytes += len(dictionary)
        self._member = boundary.member

    def _digest(self) -> None:
        if self._pieces:
            pieces, self._pieces, self._bytes = self._pieces, [], 0
            future = self._pool.submit(_digest, self.info.digester, pieces)
            self._digesting.append((len(self._usize) - len(pieces), future))
        while len(self._digesting) > 3:
            self._look_up()

    def _look_up(self) -> None:
        first, future = self._digesting.popleft()
        for piece, (digest, crc) in enumerate(future.result(), first):
            number = self._known.get(digest)
            if number is None:
                number = self._known[digest] = len(self._rows)
                if number >= MAX_CHUNKS:
                    raise FormatError("a blob cannot have more chunks", expected=MAX_CHUNKS)
                self._rows.append(piece)
                self._digests += digest
                self._crcs.append(crc)
            self._references.append(number)

    def finish(self) -> None:
        """Wait for the digests."""
        self._digest()
        while self._digesting:
            self._look_up()
        info = self.info
        info.chunk_count = len(self._rows)
        if self._rows:
            info.uncompressed_size = int((_align(self._column(self._usize))).sum())

    @property
    def references(self) -> Array:
        """For each piece, the index of its chunk."""
        return np.array(self._references, np.int64)

    @property
    def duplicates(self) -> int:
        return len(self._references) - len(self._rows)

    def _column(self, values: array[int]) -> Array:
        return np.array(values)[np.array(self._rows, np.int64)]

    def chunk_map(self) -> ChunkMap:
        """The chunk table of the blob."""
        usize = self._column(self._usize)
        flag = ChunkFlag.COMPRESSED | ChunkFlag.ZRAN if self._zran else ChunkFlag.HAS_CRC
        contexts = np.zeros(len(self._contexts), ZRAN)
        names = ("in_offset", "out_offset", "dict_offset", "in_size", "out_size", "dict_size", "previous")
        for i, name in enumerate((*names, "pending_bits")):
            contexts[name] = [context[i] for context in self._contexts]
        ends = np.cumsum(_align(usize))
        return ChunkMap(
            blob=self.info,
            uoffset=(ends - _align(usize)).astype(np.uint64),
            usize=usize.astype(np.uint32),
            coffset=self._column(self._coffset).astype(np.uint64),
            csize=self._column(self._csize).astype(np.uint32),
            flags=np.full(len(usize), int(flag), np.uint8),
            crc=np.array(self._crcs, np.uint32),
            context=self._column(self._context).astype(np.uint32),
            context_offset=self._column(self._inside).astype(np.uint32),
            digests=np.frombuffer(bytes(self._digests), np.uint8).reshape(-1, 32),
            zran=contexts,
            dictionaries=b"".join(self._dictionaries),
        )


def _align(sizes: Array) -> Array:
    return (sizes.astype(np.uint64) + np.uint64(4095)) & ~np.uint64(4095)


def _digest(kind: Digester, pieces: list[Piece]) -> list[tuple[bytes, int]]:
    return [(codec.digest(kind, piece), codec.crc32c(piece)) for piece in pieces]


def _table(chunks: ChunkMap | None) -> Array:
    """CHUNK rows of the chunks, by index."""
    if chunks is None:
        return np.zeros(0, CHUNK)
    table = np.zeros(len(chunks), CHUNK)
    assert chunks.digests is not None
    table["digest"] = np.ascontiguousarray(chunks.digests).view("V32").reshape(-1)
    # The reference has checksums here even where the chunk table has contexts instead.
    checked = np.uint32(ChunkFlag.HAS_CRC) if chunks.crc.any() else np.uint32(0)
    table["flags"] = chunks.flags.astype(np.uint32) & ChunkFlag.COMPRESSED | checked
    for name in ("csize", "usize", "coffset", "uoffset", "crc"):
        table[name] = getattr(chunks, name)
    table["index"] = np.arange(len(chunks))
    return table


def seal_reference(
    builder: TreeBuilder,
    info: BlobInfo,
    chunks: ChunkMap | None,
    references: Array,
    out: HashingSink,
    options: BuildOptions,
    prefetch: Iterable[bytes],
) -> LayerResult:
    """Write the tables of a layer that stays as it is, and its bootstrap.

    Args:
        info: the blob, with everything filled in that does not follow from the tables.
        references: for each chunk reference of ``builder``, a row of ``chunks``.
    """
    sections = SectionWriter(out, options.inline_meta or options.toc)
    if chunks is not None:
        sections.meta(chunks)
        if options.toc:
            sections.digests(chunks)
    flags = super_flags(options)
    if options.toc:
        flags |= SuperFlag.INLINED_CHUNK_DIGEST
    blobs = [info] if chunks is not None else []
    tree = builder.finish(6, options.chunk_size, flags, _table(chunks), references, blobs)
    if options.prefetch_table:
        tree.prefetch = prefetch_rows(tree, prefetch)
    result = LayerResult(tree, chunks=chunks, blob=info if blobs else None)
    if options.inline_meta:
        result.bootstrap = write_bootstrap(tree)
        sections.bootstrap(result.bootstrap, Compression.ZSTD if options.toc else Compression.NONE)
    if options.toc and out.size:
        result.toc_digest, result.toc_size = sections.contents()
    result.seal(out)
    info.rafs_size = out.size
    if options.inline_meta:
        # What the reference's converter says of the blob when it merges (rafs.md 4.3).
        info.rafs_digest, info.toc_digest = out.digest.digest(), sections.entries_digest()
    else:
        # The name of the file, which leaves out the digest array (rafs.md 3.7).
        info.rafs_digest = out.name.digest()
        info.toc_digest, info.toc_size = result.toc_digest, result.toc_size
        result.bootstrap = write_bootstrap(tree)
    return result


def reference_features(options: BuildOptions) -> BlobFeature:
    """The features of a blob whose chunks lie in another file."""
    features = (
        BlobFeature.ALIGNED | BlobFeature.CHUNK_INFO_V2 | BlobFeature.SEPARATE | BlobFeature.CAP_TAR_TOC
    )
    if options.inline_meta:
        features |= BlobFeature.INLINED_FS_META | BlobFeature.HAS_TAR_HEADER
    if options.toc:
        features |= BlobFeature.HAS_TOC | BlobFeature.HAS_TAR_HEADER | BlobFeature.INLINED_CHUNK_DIGEST
    return features
