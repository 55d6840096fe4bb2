"""What is known of an open blob: its chunk table, its files, and the state of each chunk."""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nydus.errors import FormatError
from nydus.rafs.blobmeta import ChunkMap
from nydus.storage.decode import Decoder
from nydus.storage.fetch import Buffer
from nydus.storage.store import MISSING, PLACE, READY, SUSPECT, OtherBlob, Store

log = logging.getLogger(__name__)

#: Lists of more buffers than this are joined: the kernel takes 1024 in one call.
_MAX_BUFFERS = 256


class OpenBlob:
    """The tables of a blob. The cache changes them, under its lock; single states may be read without.

    Args:
        work_dir: cache directory.
        chunks: chunk table with all digests that are known.
        length: device length in bytes.
        name: start of the names of the files.
        validate: chunks stay suspect after they were checked.
        from_files: the chunk table was found in the cache directory.

    Attributes:
        states: MISSING, SUSPECT or READY, one byte for each chunk. Indices without a chunk are READY.
        placed: state of each chunk after it was placed.
        wanted: chunks that a file may use. In a merged image a blob has chunks that no file uses any more:
            their digests are not known, and they are only read when they are asked for.
        starts: uncompressed offset of each chunk.

    Raises:
        FormatError: the chunk table does not fit the blob.
        CacheError: the cache directory cannot be used.
    """

    __slots__ = ("chunks", "decoder", "from_files", "placed", "starts", "states", "store", "wanted")

    def __init__(
        self, work_dir: Path, chunks: ChunkMap, length: int, *, name: str, validate: bool, from_files: bool
    ) -> None:
        blob, count = chunks.blob, len(chunks)
        end = int(chunks.uoffset[-1]) + int(chunks.usize[-1]) if count else 0
        if end > length:
            raise FormatError("a chunk lies beyond the end of the blob", where=blob.id, found=end)
        self.chunks = chunks
        self.from_files = from_files
        self.decoder = Decoder(chunks)
        self.starts = array("q", chunks.uoffset.astype("<i8").tobytes())
        known = chunks.usize > 0
        verifiable = self.decoder.verifiable & known
        some = bool(verifiable.any())
        if known.any() and not some:
            log.warning("blob %s has no chunk digests: its chunks are only checked for length", blob.id)
        self.wanted: npt.NDArray[np.bool_] = verifiable if some else known
        places, size = _places(chunks), max(end, blob.uncompressed_size)
        try:
            self.store = Store(work_dir, f"{name}.blob", places, size, some)
        except OtherBlob as error:
            log.warning("%s; this one gets files of its own", error)
            self.store = Store(work_dir, f"{blob.id}.{chunks.fingerprint()}.blob", places, size, some)
        states = np.frombuffer(self.store.initial, np.uint8)
        states = np.where(~verifiable & (states == SUSPECT), MISSING, states)
        if validate:
            states = np.where(verifiable & (states == READY), SUSPECT, states)
        self.states = bytearray(np.where(known, states, READY).astype(np.uint8).tobytes())
        self.placed = np.where(verifiable & validate, SUSPECT, READY).astype(np.uint8)

    def rows(self, offset: int, end: int) -> tuple[int, int]:
        """The run of chunks that overlap a range."""
        first = bisect_right(self.starts, offset) - 1
        if first < 0 or self.starts[first] + int(self.chunks.usize[first]) <= offset:
            first += 1
        return first, bisect_left(self.starts, end, lo=first)

    def missing(self) -> int:
        """How many chunks are not in the cache."""
        states = np.frombuffer(self.states, np.uint8)
        return int(((states == MISSING) & self.wanted).sum())

    def verified(self) -> bool:
        """Whether all chunks are in the cache and have been checked."""
        states = np.frombuffer(self.states, np.uint8)
        return bool(((states == READY) & self.decoder.verifiable)[self.wanted].all())

    def good(self) -> npt.NDArray[np.int64]:
        """The chunks that need no check any more."""
        return np.flatnonzero((np.frombuffer(self.states, np.uint8) == READY) & self.wanted)

    def add_digests(self, digests: Callable[[ChunkMap], None], flying: Callable[[int], bool]) -> None:
        """Verify more chunks, from now on; see :meth:`nydus.storage.cache.BlobCache.add_digests`.

        Args:
            flying: whether a chunk is being fetched.

        Raises:
            FormatError, CacheError: the image cannot share these files.
        """
        chunks = self.chunks
        theirs = replace(chunks, digests=None, crc=chunks.crc.copy(), flags=chunks.flags.copy())
        digests(theirs)
        if theirs.digests is None:
            return
        new = np.asarray(theirs.digests.any(axis=1))
        if chunks.digests is not None:
            known = np.asarray(chunks.digests.any(axis=1))
            if (new & known & (theirs.digests != chunks.digests).any(axis=1)).any():
                raise FormatError("two images have different digests for a chunk", where=chunks.blob.id)
            new[known] = False
        if not new.any():
            return
        theirs.digests[~new] = 0
        self.store.agree(_places(theirs))
        self.decoder.add_digests(theirs.digests, new)
        # What was placed, or is just being placed, without these digests has to be looked at again.
        for row in np.flatnonzero(new).tolist():
            if flying(row):
                self.placed[row] = SUSPECT
            if self.states[row] == READY:
                self.states[row] = SUSPECT
        self.wanted[:] = self.decoder.verifiable & (chunks.usize > 0)

    def assemble(self, got: dict[int, Buffer], offset: int, end: int, first: int, last: int) -> list[Buffer]:
        """The bytes of a range out of the chunks at hand and the data file."""
        parts: list[Buffer] = []
        at = offset
        row = first
        while at < end:
            data = got.get(row) if row < last else None
            if data is not None:
                start = self.starts[row]
                if start > at:
                    parts.append(b"\0" * (start - at))  # not bytes(n), which touches no memory
                    at = start
                part = memoryview(data)[at - start : end - start]
                parts.append(part)
                at += len(part)
                row += 1
                continue
            while row < last and row not in got:
                row += 1
            stop = max(at, self.starts[row]) if row < last else end
            if stop > at:
                parts.append(self.store.read(at, stop - at))
                at = stop
        return parts if len(parts) <= _MAX_BUFFERS else [b"".join(parts)]


def _places(chunks: ChunkMap) -> npt.NDArray[np.void]:
    rows: npt.NDArray[np.void] = np.zeros(len(chunks), PLACE)
    rows["start"], rows["size"] = chunks.uoffset, chunks.usize
    if chunks.digests is not None:
        rows["digest"] = np.ascontiguousarray(chunks.digests).view("V32")[:, 0]
    return rows
