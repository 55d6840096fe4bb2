"""From stored bytes to chunks: what is fetched for a chunk, how it is decoded, and whether it is right.

A *unit* is the smallest piece of a blob that can be decoded alone: one chunk, one batch of small chunks, or
one context of a gzip stream. Units are numbered in the order of their first chunk.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from nydus.errors import FormatError
from nydus.rafs import codec
from nydus.rafs.blobmeta import ChunkMap
from nydus.rafs.checks import MAX_UNIT
from nydus.rafs.model import ChunkFlag, Cipher, Compression

# Plain integers: operators of flag enumerations cost more than the work between them.
_COMPRESSED, _ENCRYPTED = int(ChunkFlag.COMPRESSED), int(ChunkFlag.ENCRYPTED)
_BATCH, _ZRAN = int(ChunkFlag.BATCH), int(ChunkFlag.ZRAN)
#: How a chunk is verified.
_NOTHING, _CRC, _DIGEST = 0, 1, 2

# Output-free deflate blocks of 8 - n bits (modulo 8), for n pending bits: (bits, value), rafs.md 3.4.
_PADDING = {
    7: (105, 0x11F5BF820000000000881E004),
    6: (10, 0x2),
    5: (115, 0x4011F5BF820000000000881E004),
    4: (20, 0x802),
    3: (125, 0x1004011F5BF820000000000881E004),
    2: (30, 0x200802),
    1: (95, 0x1F5BF820000000000881E004),
}


class Decoder:
    """Plans and decodes the units of one blob. Thread-safe.

    Args:
        chunks: chunk table of the blob.
        where: name of the blob for messages.

    Attributes:
        offset, size: stored position of each unit.
        memory: decoded size of each unit.
        unit_of: unit of each chunk.
        verifiable: whether each chunk has a digest or a checksum.
    """

    def __init__(self, chunks: ChunkMap, where: str = "") -> None:
        self._chunks = chunks
        self._where = where or chunks.blob.id
        self._kind = chunks.blob.compression
        self._digester = chunks.blob.digester
        self._digests: npt.NDArray[np.uint8] | None = chunks.digests
        self._make_units()
        proof = np.where(chunks.flags & int(ChunkFlag.HAS_CRC), _CRC, _NOTHING)
        if self._digests is not None:
            proof[self._digests.any(axis=1)] = _DIGEST
        self._proof = bytearray(proof.astype(np.uint8).tobytes())
        self.verifiable: npt.NDArray[np.bool_] = proof != _NOTHING

    def _make_units(self) -> None:
        chunks = self._chunks
        count = len(chunks)
        rows = np.arange(count, dtype=np.int64)
        batched = (chunks.flags & _BATCH) != 0
        gzip = (chunks.flags & _ZRAN) != 0
        self._grouped: npt.NDArray[np.bool_] = batched | gzip
        self._mixed = bool(self._grouped.any())
        if not self._mixed:
            self.unit_of = rows
            self._set_sizes(rows)
            return
        # All chunks of one context are one unit, under the number of its first chunk.
        context = chunks.context.astype(np.int64)
        key = np.select([batched, gzip], [context, context + (1 << 32)], rows + (1 << 33))
        _, heads, inverse = np.unique(key, return_index=True, return_inverse=True)
        order = np.argsort(heads)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        self.unit_of = rank[inverse]
        self._rows = np.argsort(self.unit_of, kind="stable")
        self._first = np.searchsorted(self.unit_of[self._rows], np.arange(len(order) + 1))
        self._set_sizes(heads[order])

    def _set_sizes(self, heads: npt.NDArray[np.int64]) -> None:
        chunks = self._chunks
        self.offset = chunks.coffset[heads].astype(np.int64)
        self.size = chunks.csize[heads].astype(np.int64)
        self.memory = chunks.usize[heads].astype(np.int64)
        batched = (chunks.flags[heads] & _BATCH) != 0
        gzip = (chunks.flags[heads] & _ZRAN) != 0
        contexts = chunks.context[heads]
        if batched.any():
            entries = chunks.batch[contexts[batched]]
            self.size[batched], self.memory[batched] = entries["csize"], entries["usize"]
        if gzip.any():
            entries = chunks.zran[contexts[gzip]]
            self.offset[gzip] = entries["in_offset"]
            self.size[gzip], self.memory[gzip] = entries["in_size"], entries["out_size"]
        for what, values in (("stored", self.size), ("decoded", self.memory)):
            if (values > MAX_UNIT).any():
                raise FormatError(
                    f"unreasonable {what} size of a chunk", where=self._where, found=values.max()
                )

    def add_digests(self, digests: npt.NDArray[np.uint8], rows: npt.NDArray[np.bool_]) -> None:
        """Verify these chunks, too, from now on."""
        if self._digests is None:
            self._digests = self._chunks.digests = np.zeros_like(digests)
        self._digests[rows] = digests[rows]
        np.frombuffer(self._proof, np.uint8)[rows] = _DIGEST
        self.verifiable |= rows

    def rows(self, unit: int) -> list[int]:
        """The chunks of a unit."""
        if not self._mixed:
            return [unit]
        rows: list[int] = self._rows[self._first[unit] : self._first[unit + 1]].tolist()
        return rows

    def decode(self, unit: int, stored: memoryview) -> list[tuple[int, bytes | memoryview]]:
        """The verified chunks of a unit, as (chunk, bytes).

        Raises:
            FormatError: the stored bytes cannot be decoded, or a chunk has not the digest it should have.
        """
        rows = self.rows(unit)
        head = rows[0]
        if not self._mixed or not self._grouped[head]:
            data = self._plain(head, stored)
            self.check(head, data)
            return [(head, data)]
        context = int(self._chunks.context[head])
        gzip = int(self._chunks.flags[head]) & _ZRAN
        buffer = memoryview(
            self._inflate(context, stored) if gzip else self._batch(head, context, stored),
        )
        result: list[tuple[int, bytes | memoryview]] = []
        for row in rows:
            start, size = int(self._chunks.context_offset[row]), int(self._chunks.usize[row])
            if start + size > len(buffer):
                raise FormatError(f"chunk {row} reaches beyond its context", where=self._where)
            chunk = buffer[start : start + size]
            self.check(row, chunk)
            result.append((row, chunk))
        return result

    def _plain(self, row: int, stored: memoryview) -> bytes:
        flags = int(self._chunks.flags[row])
        kind = self._kind if flags & _COMPRESSED else Compression.NONE
        return codec.decompress(kind, self._decrypted(flags, stored), int(self._chunks.usize[row]))

    def _batch(self, row: int, context: int, stored: memoryview) -> bytes:
        entry = self._chunks.batch[context]
        data = self._decrypted(int(self._chunks.flags[row]), stored)
        size = int(entry["usize"])
        # A batch that did not shrink is stored raw (rafs.md 3.3); of a gzip member only a bound is known.
        raw = len(data) == size and self._kind != Compression.GZIP
        return codec.decompress(Compression.NONE if raw else self._kind, data, size)

    def _decrypted(self, flags: int, stored: memoryview) -> bytes | memoryview:
        if flags & _ENCRYPTED and self._chunks.blob.cipher != Cipher.NONE:
            return codec.xts_decrypt(self._chunks.blob.key, self._chunks.blob.iv, stored)
        return stored

    def _inflate(self, context: int, stored: memoryview) -> bytes:
        entry = self._chunks.zran[context]
        pending = int(entry["pending_bits"])
        prefix = b""
        if pending:
            bits, value = _PADDING[pending]
            value |= (int(entry["previous"]) >> (8 - pending)) << bits
            prefix = value.to_bytes((bits + pending) // 8, "little")
        size = int(entry["out_size"])
        try:
            return inflate(self._chunks.dictionary(context), prefix, stored, size)
        except zlib.error as error:
            raise FormatError(
                f"gzip data cannot be inflated: {error}", where=self._where, offset=int(entry["in_offset"])
            ) from None

    def check(self, row: int, data: bytes | memoryview) -> None:
        """Require that these are the bytes of a chunk; always true for one that is not verifiable."""
        if len(data) != int(self._chunks.usize[row]):
            raise FormatError(f"chunk {row} has the wrong length", where=self._where, found=len(data))
        proof = self._proof[row]
        if proof == _DIGEST:
            assert self._digests is not None
            if codec.digest(self._digester, data) != self._digests[row].tobytes():
                raise FormatError(f"chunk {row} has the wrong digest", where=self._where)
        elif proof == _CRC and codec.crc32c(data) != int(self._chunks.crc[row]):
            raise FormatError(f"chunk {row} has the wrong checksum", where=self._where)


def inflate(dictionary: bytes, prefix: bytes, stored: bytes | memoryview, size: int) -> bytes:
    """``size`` bytes of a gzip stream that is entered in the middle of a member.

    Args:
        dictionary: the output before the entry point, up to 32 KiB.
        prefix: deflate blocks without output that bring the bits of the first byte into place.
        stored: the stream from the entry point on; it may continue over the ends of members.

    Raises:
        zlib.error: the stream is corrupt or too short.
    """
    member = zlib.decompressobj(-15, zdict=dictionary) if dictionary else zlib.decompressobj(-15)
    parts = [member.decompress(prefix)] if prefix else []
    parts.append(member.decompress(stored, size))
    missing = size - len(parts[-1])
    rest = member.unused_data[8:] if member.eof else b""  # behind checksum and length of the member
    while missing > 0:
        if not rest:
            raise zlib.error("the stream ends too early")
        member = zlib.decompressobj(31)
        parts.append(member.decompress(rest, missing))
        missing -= len(parts[-1])
        rest = member.unused_data
    return b"".join(parts)
