"""Writing the data of one blob: pieces of files in, deduplicated and compressed chunks out, in order.

Work goes through two stages in batches of about 1 MiB, so that a small file costs microseconds: worker
threads digest a batch, its chunks are looked up in order, then worker threads compress what is new, and the
result is written in order. Memory is bounded by the batches in flight, not by the data.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from nydus.errors import FormatError
from nydus.rafs import codec
from nydus.rafs.blobmeta import BATCH, ChunkMap
from nydus.rafs.model import CHUNK, Array, BlobFeature, BlobInfo, ChunkFlag, Compression, Digester, Tree

Piece = bytes | bytearray | memoryview
Sink = Callable[[bytes], object]
#: Gets some pieces of a file when a worker wants them.
Load = Callable[[], list[Piece]]

#: Bytes digested, or compressed, in one go by a worker thread.
BATCH_SIZE = 1 << 20
#: Small files are cheap in bytes but not in Python: no more of them in one go.
BATCH_COUNT = 512
#: The 24-bit chunk index of v6 (rafs.md 0).
MAX_CHUNKS = 0xFF_FFFF
#: The stored size of a chunk in 24-byte records (rafs.md 3.2).
MAX_STORED_V2 = 0xFF_FFFF


class HashingSink:
    """Counts and hashes what passes on to ``write``.

    Attributes:
        size: bytes so far.
        digest: running sha256 of all of them.
        name: running sha256 of all but what was written with ``named=False``: names a blob in the reference.
    """

    def __init__(self, write: Sink) -> None:
        self._write = write
        self.size = 0
        self.digest = hashlib.sha256()
        self._name: hashlib._Hash | None = None

    @property
    def name(self) -> hashlib._Hash:
        return self._name or self.digest

    def write(self, data: bytes, *, named: bool = True) -> None:
        if not named and self._name is None:
            self._name = self.digest.copy()
        self.digest.update(data)
        if self._name is not None and named:
            self._name.update(data)
        self.size += len(data)
        self._write(data)


class Dictionary:
    """Chunks that exist already, by digest: of a chunk dictionary, then of a parent image."""

    def __init__(self, trees: Iterable[Tree] = ()) -> None:
        self._trees = list(trees)
        self._rows: dict[bytes, tuple[int, int]] = {}
        for number, tree in reversed(list(enumerate(self._trees))):
            packed = np.ascontiguousarray(tree.chunks["digest"]).tobytes()
            for row in range(len(tree.chunks)):
                self._rows[packed[32 * row : 32 * row + 32]] = (number, row)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def find(self, digest: bytes, size: int) -> tuple[BlobInfo, Array] | None:
        """The blob and CHUNK row of a chunk with this content."""
        place = self._rows.get(digest)
        if place is None:
            return None
        tree = self._trees[place[0]]
        row = tree.chunks[place[1]]
        if int(row["usize"]) != size:
            return None
        return tree.blobs[int(row["blob_index"])], row


@dataclass(slots=True)
class _Unit:
    """What is compressed as one: a chunk, or a batch of small ones."""

    pieces: list[Piece]
    batched: bool = False


class BlobWriter:
    """Stores the pieces of files as the chunks of one blob.

    Use it as a context manager: leaving it ends its threads. After :meth:`finish`, :attr:`references` and
    :meth:`table` say where each piece is, and :meth:`chunk_map` is the blob's own table.

    Args:
        info: describes the blob; says compression, digester, cipher, chunk size and features, and gets its
            sizes and count from :meth:`finish`.
        sink: gets the stored bytes.
        batch_size: combine the only chunks of files below half this size up to this size (rafs.md 3.3);
            0 for never.
        aligned: place chunks at multiples of 4096 in the uncompressed image.
        dictionary: chunks to refer to instead of storing them again.
        workers: threads that digest and compress.
        image: also gets the uncompressed image of the blob: every chunk, padded to 4096 bytes.
    """

    def __init__(
        self,
        info: BlobInfo,
        sink: HashingSink,
        *,
        batch_size: int = 0,
        aligned: bool = True,
        dictionary: Dictionary | None = None,
        workers: int = 0,
        image: Sink | None = None,
    ) -> None:
        self.info = info
        self._image = image
        #: Blobs in the order of first use, this one included.
        self.blobs: list[BlobInfo] = []
        self._sink = sink
        self._batch_size = batch_size
        self._aligned = aligned
        self._dictionary = dictionary or Dictionary()
        threads = workers or min(4, os.cpu_count() or 1)
        self._depth = threads + 1
        self._pool = ThreadPoolExecutor(threads, "blob-writer")
        # Pieces not yet handed to a worker, and whether each is all of its file.
        self._pieces: list[Piece | Load] = []
        self._alone: list[bool] = []
        self._size = 0
        self._last: Piece | Load = b""
        self._digesting: deque[tuple[list[bool], Future[_Digested]]] = deque()
        self._compressing: deque[tuple[list[_Unit], Future[_Stored]]] = deque()
        self._batch = _Unit([], True)
        self._batch_bytes = 0
        # For each piece, the number of its chunk; chunks of others are -1, -2, …
        self._references = array("q")
        self._count = 0
        self._own: dict[bytes, int] = {}
        self._foreign: dict[bytes, int] = {}
        self._foreign_rows: list[Array] = []
        # Columns of the own chunks.
        self._digests = bytearray()
        self._usize, self._csize, self._crc = array("I"), array("I"), array("I")
        self._coffset, self._flags = array("Q"), array("B")
        self._context, self._context_offset = array("I"), array("I")
        self._batches: list[tuple[int, int]] = []
        self.duplicates = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, pieces: Iterable[Piece], alone: bool = False) -> tuple[int, int]:
        """Store the pieces of one file, each at most a chunk long.

        Args:
            alone: the file has exactly one piece.

        Returns:
            The first chunk reference and how many there are.
        """
        first = self._count
        for piece in pieces:
            self._add(piece, 1, len(piece), alone)
        return first, self._count - first

    def add_later(self, load: Load, count: int, size: int, alone: bool = False) -> None:
        """Store ``count`` pieces, ``size`` bytes in all, that a worker thread will get from ``load``."""
        self._add(load, count, size, alone)

    @property
    def count(self) -> int:
        """Chunk references given out so far."""
        return self._count

    def _add(self, piece: Piece | Load, count: int, size: int, alone: bool) -> None:
        # The pieces of a hole are one object: they cost neither memory nor time.
        if piece is not self._last:
            self._last = piece
            self._size += size
        self._pieces.append(piece)
        self._alone += [alone] * count
        self._count += count
        if self._size >= BATCH_SIZE or len(self._alone) >= BATCH_COUNT:
            self._digest_batch()

    def flush(self) -> None:
        """Wait until everything is stored."""
        self._digest_batch()
        while self._digesting:
            self._look_up(*self._digesting.popleft())
        units: list[_Unit] = []
        self._flush_batch(units)
        self._compress(units)
        while self._compressing:
            self._store(*self._compressing.popleft())

    def finish(self) -> None:
        """Wait until everything is stored, and fill in what :attr:`info` says of the blob."""
        self.flush()
        self._own.clear()
        self._foreign.clear()
        info = self.info
        info.chunk_count = len(self._usize)
        info.compressed_size = self._sink.size
        if self._usize:
            last = len(self._usize) - 1
            end = int(self._uoffsets()[last]) + self._usize[last]
            info.uncompressed_size = end + (-end % 4096 if self._aligned else 0)

    @property
    def references(self) -> Array:
        """For each piece, its row in :meth:`table`."""
        numbers: Array = (
            np.frombuffer(self._references, np.int64) if self._references else np.zeros(0, np.int64)
        )
        return np.where(numbers < 0, len(self._usize) - 1 - numbers, numbers)

    def table(self) -> Array:
        """CHUNK rows of all chunks in use: the own ones by index, then those of other blobs."""
        own = np.zeros(len(self._usize), CHUNK)
        if len(own):
            own["digest"] = np.frombuffer(bytes(self._digests), "V32")
            own["blob_index"] = self.blobs.index(self.info)
            own["flags"], own["crc"] = _column(self._flags), _column(self._crc)
            own["csize"], own["usize"] = _column(self._csize), _column(self._usize)
            own["coffset"], own["uoffset"] = _column(self._coffset), self._uoffsets()
            own["index"] = np.arange(len(own))
            batched = (own["flags"] & ChunkFlag.BATCH) != 0
            own["flags"][batched] = ChunkFlag.HAS_CRC
            own["coffset"][batched] = 0
        if not self._foreign_rows:
            return own
        return np.concatenate([own, np.array(self._foreign_rows, CHUNK)])

    def chunk_map(self) -> ChunkMap:
        """The own chunks, for ``blob.meta``. V1 tables carry no checksums."""
        v2 = bool(self.info.features & BlobFeature.CHUNK_INFO_V2)
        flags = _column(self._flags).astype(np.uint8)
        if not v2:
            flags &= ~np.uint8(ChunkFlag.HAS_CRC)
        else:
            flags[(flags & ChunkFlag.BATCH) != 0] &= ~np.uint8(ChunkFlag.HAS_CRC)
        batches = np.zeros(len(self._batches), BATCH)
        if self._batches:
            batches["csize"], batches["usize"] = np.array(self._batches).T
        return ChunkMap(
            blob=self.info,
            uoffset=self._uoffsets(),
            usize=_column(self._usize),
            coffset=_column(self._coffset),
            csize=_column(self._csize),
            flags=flags,
            crc=_column(self._crc) if v2 else np.zeros(len(flags), np.uint32),
            context=_column(self._context),
            context_offset=_column(self._context_offset),
            digests=np.frombuffer(bytes(self._digests), np.uint8).reshape(-1, 32),
            batch=batches,
        )

    def _uoffsets(self) -> Array:
        sizes = _column(self._usize).astype(np.uint64)
        if self._aligned:
            sizes = (sizes + np.uint64(4095)) & ~np.uint64(4095)
        return np.cumsum(sizes, dtype=np.uint64) - sizes

    def _digest_batch(self) -> None:
        if not self._pieces:
            return
        future = self._pool.submit(_digest, self.info.digester, self._pieces)
        self._digesting.append((self._alone, future))
        self._pieces, self._alone, self._size = [], [], 0
        while len(self._digesting) > self._depth or self._digesting[0][1].done():
            self._look_up(*self._digesting.popleft())
            if not self._digesting:
                break

    def _look_up(self, alone: list[bool], future: Future[_Digested]) -> None:
        units: list[_Unit] = []
        own, references = self._own, self._references
        for (piece, digest), single in zip(future.result(), alone, strict=True):
            number = own.get(digest)
            if number is None:
                if self._dictionary and (foreign := self._find_foreign(digest, len(piece))) is not None:
                    references.append(foreign)
                    self.duplicates += 1
                    continue
                number = own[digest] = len(self._usize)
                if not number:
                    self.blobs.append(self.info)
                elif number >= MAX_CHUNKS:
                    raise FormatError("a blob cannot have more chunks", expected=MAX_CHUNKS)
                self._digests += digest
                self._usize.append(len(piece))
                if 2 * len(piece) < self._batch_size and single:
                    if self._batch_bytes + len(piece) >= self._batch_size:
                        self._flush_batch(units)
                    self._batch.pieces.append(piece)
                    self._batch_bytes += len(piece)
                else:
                    self._flush_batch(units)
                    units.append(_Unit([piece]))
            else:
                self.duplicates += 1
            references.append(number)
        self._compress(units)

    def _find_foreign(self, digest: bytes, size: int) -> int | None:
        number = self._foreign.get(digest)
        if number is not None:
            return number
        found = self._dictionary.find(digest, size)
        if found is None:
            return None
        blob, row = found
        index = next((i for i, known in enumerate(self.blobs) if known.id == blob.id), None)
        if index is None:
            index = len(self.blobs)
            self.blobs.append(blob)
        row = row.copy()
        row["blob_index"] = index
        self._foreign_rows.append(row)
        number = self._foreign[digest] = -len(self._foreign_rows)
        return number

    def _flush_batch(self, units: list[_Unit]) -> None:
        if self._batch.pieces:
            units.append(self._batch)
            self._batch, self._batch_bytes = _Unit([], True), 0

    def _compress(self, units: list[_Unit]) -> None:
        if not units:
            return
        self._compressing.append((units, self._pool.submit(_compress, self.info, units)))
        while len(self._compressing) > self._depth or self._compressing[0][1].done():
            self._store(*self._compressing.popleft())
            if not self._compressing:
                break

    def _store(self, units: list[_Unit], future: Future[_Stored]) -> None:
        stored, flags, crcs = future.result()
        offset = self._sink.size
        check = iter(crcs)
        for unit, data, flag in zip(units, stored, flags, strict=True):
            if unit.batched:
                inside = 0
                for piece in unit.pieces:
                    self._context.append(len(self._batches))
                    self._context_offset.append(inside)
                    self._crc.append(next(check))
                    self._flags.append(
                        ChunkFlag.BATCH
                        | ChunkFlag.COMPRESSED
                        | ChunkFlag.HAS_CRC
                        | flag & ChunkFlag.ENCRYPTED
                    )
                    self._coffset.append(offset)
                    self._csize.append(0)
                    inside += len(piece)
                self._batches.append((len(data), inside))
            else:
                self._context.append(0)
                self._context_offset.append(0)
                self._crc.append(next(check))
                self._flags.append(flag)
                self._coffset.append(offset)
                self._csize.append(len(data))
                if len(data) > MAX_STORED_V2 and self.info.features & BlobFeature.CHUNK_INFO_V2:
                    raise FormatError(
                        "a chunk that does not shrink is too large for batched or encrypted blobs; "
                        "use a chunk size of 0x800000 or less",
                        found=len(data),
                        expected=f"at most {MAX_STORED_V2}",
                    )
            offset += len(data)
        self._sink.write(b"".join(stored))
        if self._image is not None:
            for unit in units:
                for piece in unit.pieces:
                    self._image(bytes(piece) + bytes(-len(piece) % 4096))


_Digested = list[tuple[Piece, bytes]]
_Stored = tuple[list[Piece], list[int], list[int]]


def _digest(kind: Digester, pieces: list[Piece | Load]) -> _Digested:
    result: _Digested = []
    for piece in pieces:
        if callable(piece):
            result += [(loaded, codec.digest(kind, loaded)) for loaded in piece()]
        elif result and piece is result[-1][0]:
            result.append(result[-1])
        else:
            result.append((piece, codec.digest(kind, piece)))
    return result


def _compress(info: BlobInfo, units: list[_Unit]) -> _Stored:
    """Stored bytes and flags of each unit, and the checksum of each chunk."""
    stored: list[Piece] = []
    flags: list[int] = []
    crcs: list[int] = []
    kind = info.compression
    for unit in units:
        plain = unit.pieces[0] if len(unit.pieces) == 1 else b"".join(unit.pieces)
        crcs += [codec.crc32c(piece) for piece in unit.pieces]
        data: Piece = plain
        flag = ChunkFlag.HAS_CRC
        if kind != Compression.NONE:
            data = codec.compress(kind, plain)
            if len(data) < len(plain):
                flag |= ChunkFlag.COMPRESSED
            else:
                data = plain
        if info.cipher:
            data = codec.xts_encrypt(info.key, info.iv, data)
            flag |= ChunkFlag.ENCRYPTED
        stored.append(data)
        flags.append(int(flag))
    return stored, flags, crcs


def _column(values: array[int]) -> Array:
    kind = {"B": np.uint8, "I": np.uint32, "Q": np.uint64}[values.typecode]
    return np.array(values, kind)
