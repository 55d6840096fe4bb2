"""Chunks straight from a backend: verified, in any order, with nothing kept on disk.

For tools that read an image once (unpack, export, the Python API). The daemon reads through
:class:`~nydus.storage.cache.BlobCache` instead.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from nydus.errors import BackendError, FormatError
from nydus.rafs import blobmeta
from nydus.rafs.blobmeta import ChunkMap
from nydus.rafs.model import Array, BlobFeature, BlobInfo, Tree
from nydus.storage.backend import Backend
from nydus.storage.decode import Decoder
from nydus.storage.fetch import Patience

Buffer = bytes | memoryview

#: Decoded bytes, and chunks, that one thread gets at a time.
_WINDOW = 4 << 20
_WINDOW_CHUNKS = 4096
#: Stored bytes of one request at most (one chunk may be larger), and unwanted ones that it may include.
_REQUEST = 4 << 20
_GAP = 64 << 10
#: Decoded batches and gzip contexts to keep: their chunks tend to be wanted one after the other.
_KEPT_UNITS = 8


@dataclass(frozen=True, slots=True)
class _Blob:
    info: BlobInfo
    chunks: ChunkMap
    decoder: Decoder


class ChunkReader:
    """Reads the chunks of an image. Thread-safe.

    Every chunk is checked against its digest (or checksum) before it is handed out, where the image has one.

    Args:
        tree: the image; says which blobs there are, and which digests their chunks have.
        backend: where the blobs are. Not closed here.
        meta_id: name of the blob with the chunk table of a layer that stays a gzip archive, where the image
            does not say it (rafs.md 2.12).
        threads: how many decode at the same time; 0 for what the machine has, at most 4.
        attempts: how often a read of the backend is tried.

    Errors of all methods: BackendError when bytes cannot be had, FormatError when they are wrong.
    """

    def __init__(
        self, tree: Tree, backend: Backend, *, meta_id: str = "", threads: int = 0, attempts: int = 3
    ) -> None:
        self._tree = tree
        self._backend = backend
        self._meta_id = meta_id
        self._threads = threads or min(4, os.cpu_count() or 1)
        self._patience = Patience(attempts, 60.0, threading.Event())
        self._lock = threading.Lock()
        self._blobs: dict[int, _Blob] = {}
        self._units: OrderedDict[tuple[int, int], list[tuple[int, Buffer]]] = OrderedDict()

    def chunk_map(self, blob: int) -> ChunkMap:
        """The chunk table of a blob, with all digests that are known; read on first use."""
        return self._open(blob).chunks

    def stream(self, blobs: Array, rows: Array) -> Iterator[Buffer]:
        """The bytes of many chunks, in the order given; chunks may repeat.

        Neighbours are fetched in large requests, ahead of the caller, by several threads; memory is bounded
        by a few windows of 4 MiB (or by the largest units of the image).

        Args:
            blobs: index of the blob of each chunk.
            rows: index of each chunk in its blob.
        """
        sizes = np.zeros(len(rows), np.int64)
        units = np.zeros(len(rows), np.int64)
        for number in np.unique(blobs).tolist():
            blob, mine = self._open(number), blobs == number
            if int(rows[mine].max()) >= len(blob.chunks):
                raise FormatError(
                    "a chunk is not in the chunk table",
                    where=blob.info.id,
                    found=int(rows[mine].max()),
                    expected=f"less than {len(blob.chunks)}",
                )
            sizes[mine] = blob.chunks.usize[rows[mine]]
            units[mine] = blob.decoder.unit_of[rows[mine]]
        parts = _windows(sizes)
        first = next(parts, None)
        if first is None:
            return
        if first.stop == len(rows):
            yield from self._load(blobs, rows, units)
            return
        pool = ThreadPoolExecutor(self._threads, "chunk-reader")
        try:
            ahead: deque[Future[list[Buffer]]] = deque()

            def submit(part: slice) -> None:
                ahead.append(pool.submit(self._load, blobs[part], rows[part], units[part]))

            submit(first)
            for part in parts:
                submit(part)
                if len(ahead) > self._threads:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def stored(self, blob: int, rows: Array) -> Iterator[tuple[Sequence[int], memoryview]]:
        """Stored bytes as they are, in the order of the blob, for copying into another blob.

        Args:
            rows: the chunks wanted; all of a batch or gzip context come with any of it.

        Returns:
            Chunks that were stored together, ascending, and their stored bytes, all verified.
        """
        opened = self._open(blob)
        decoder = opened.decoder
        units = np.unique(decoder.unit_of[rows])
        units = units[np.argsort(decoder.offset[units], kind="stable")]

        def load(run: list[int]) -> list[tuple[Sequence[int], memoryview]]:
            result: list[tuple[Sequence[int], memoryview]] = []
            for unit, data in self._fetch(opened, run):
                decoder.decode(unit, data)
                result.append((decoder.rows(unit), data))
            return result

        with ThreadPoolExecutor(self._threads, "chunk-reader") as pool:
            ahead: deque[Future[list[tuple[Sequence[int], memoryview]]]] = deque()
            for run in _runs(decoder, units.tolist()):
                ahead.append(pool.submit(load, run))
                if len(ahead) > self._threads:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()

    def stored_size(self, blob: int, rows: Array) -> int:
        """Bytes that chunks take in their blob, each batch or gzip context counted once."""
        decoder = self._open(blob).decoder
        return int(decoder.size[np.unique(decoder.unit_of[rows])].sum())

    def raw(self, blob: int, size: int) -> Iterator[bytes]:
        """The first ``size`` stored bytes of a blob, as they are."""
        name = self._tree.blobs[blob].id
        for offset in range(0, size, _REQUEST):
            yield self._read(name, offset, min(_REQUEST, size - offset))

    def _open(self, number: int) -> _Blob:
        with self._lock:
            blob = self._blobs.get(number)
            if blob is None:
                chunks = self._chunk_map(number)
                blob = self._blobs[number] = _Blob(chunks.blob, chunks, Decoder(chunks))
            return blob

    def _chunk_map(self, number: int) -> ChunkMap:
        tree, info = self._tree, self._tree.blobs[number]
        if tree.version == 5 or info.features & BlobFeature.TARFS or not info.meta_uncompressed_size:
            return blobmeta.from_tree(tree, number)
        name = info.id
        if info.features & BlobFeature.SEPARATE:
            name = info.rafs_digest.hex() if any(info.rafs_digest) else self._meta_id or info.id
        inlined = BlobFeature.HAS_TOC | BlobFeature.INLINED_FS_META
        size = self._backend.size(name) if info.features & inlined == inlined else None
        chunks = blobmeta.load(info, lambda offset, length: self._read(name, offset, length), size=size)
        chunks.set_digests(tree.chunks, number)
        used = tree.chunks[tree.chunks["blob_index"] == number]
        index = used["index"].astype(np.int64)
        for column in ("uoffset", "usize"):
            wrong = getattr(chunks, column)[index] != used[column]
            if wrong.any():
                raise FormatError(
                    f"{column} of chunk {int(index[np.argmax(wrong)])} differs between bootstrap and blob",
                    where=info.id,
                )
        return chunks

    def _load(self, blobs: Array, rows: Array, units: Array) -> list[Buffer]:
        """All chunks of a window."""
        got: dict[tuple[int, int], Buffer] = {}
        for number in np.unique(blobs).tolist():
            mine = blobs == number
            for row, data in self._load_units(number, np.unique(units[mine]), set(rows[mine].tolist())):
                got[number, row] = data
        return [got[place] for place in zip(blobs.tolist(), rows.tolist(), strict=True)]

    def _load_units(self, number: int, units: Array, wanted: set[int]) -> Iterator[tuple[int, Buffer]]:
        blob = self._open(number)
        decoder = blob.decoder
        missing = []
        for unit in units[np.argsort(decoder.offset[units], kind="stable")].tolist():
            with self._lock:
                kept = self._units.get((number, unit))
            if kept is None:
                missing.append(unit)
            else:
                yield from kept
        for run in _runs(decoder, missing):
            for unit, stored in self._fetch(blob, run):
                decoded = decoder.decode(unit, stored)
                if len(decoded) > 1:
                    with self._lock:
                        self._units[number, unit] = decoded
                        while len(self._units) > _KEPT_UNITS:
                            self._units.popitem(last=False)
                yield from ((row, data) for row, data in decoded if row in wanted)

    def _fetch(self, blob: _Blob, run: list[int]) -> Iterator[tuple[int, memoryview]]:
        """The stored bytes of units that lie near each other, in one request."""
        offset, size = blob.decoder.offset, blob.decoder.size
        start = int(offset[run[0]])
        end = max(int(offset[unit]) + int(size[unit]) for unit in run)
        data = memoryview(self._read(blob.info.id, start, end - start))
        for unit in run:
            at = int(offset[unit]) - start
            yield unit, data[at : at + int(size[unit])]

    def _read(self, name: str, offset: int, size: int) -> bytes:
        started, attempt = time.monotonic(), 1
        while True:
            try:
                return self._backend.read(name, offset, size)
            except BackendError as error:
                if error.permanent or not self._patience.again(attempt, started):
                    raise
            attempt += 1


def _windows(sizes: Array) -> Iterator[slice]:
    """Cut a list of chunk sizes into parts of about one window."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(ends):
        base = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, base + _WINDOW, side="right"))
        stop = min(max(stop, start + 1), start + _WINDOW_CHUNKS)
        yield slice(start, stop)
        start = stop


def _runs(decoder: Decoder, units: list[int]) -> Iterator[list[int]]:
    """Cut units in stored order into those that one request gets."""
    run: list[int] = []
    start = end = 0
    for unit in units:
        offset = int(decoder.offset[unit])
        stop = offset + int(decoder.size[unit])
        if run and (offset > end + _GAP or stop - start > _REQUEST):
            yield run
            run = []
        if not run:
            start = end = offset
        run.append(unit)
        end = max(end, stop)
    if run:
        yield run
