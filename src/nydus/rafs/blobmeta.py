"""The chunk table of one blob: the ``blob.meta`` section and what stands in for it; rafs.md 3.2 to 3.4."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from nydus.errors import FormatError
from nydus.rafs import checks, codec, ragged, toc
from nydus.rafs.buffer import Buffer, Source
from nydus.rafs.model import Array, BlobFeature, BlobInfo, ChunkFlag, Compression, Tree

HEADER_SIZE = 4096
#: Of the devices that the kernel mounts.
BLOCK = 4096
MAGIC = 0xB10BB10B
#: Features with 24-byte records that may be followed by contexts.
_CONTEXTS = BlobFeature.BATCH | BlobFeature.ZRAN
_V2 = BlobFeature.CHUNK_INFO_V2
#: A raw deflate window.
MAX_DICTIONARY = 32768
#: Contexts and dictionaries of a blob; enough for a gzip layer of 32 GB.
MAX_CONTEXTS = 1 << 30

_HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("features", "<u4"),
        ("compression", "<u4"),
        ("entries", "<u4"),
        ("offset", "<u8"),
        ("compressed_size", "<u8"),
        ("size", "<u8"),
        ("context_offset", "<u8"),
        ("context_size", "<u8"),
        ("context_entries", "<u4"),
        ("padding", "V4032"),
        ("magic2", "<u4"),
    ]
)
assert _HEADER.itemsize == HEADER_SIZE

#: A batch: how many bytes are stored at its chunks' compressed offset, and how many they decompress to.
BATCH = np.dtype([("csize", "<u4"), ("usize", "<u4"), ("reserved", "V32")])
#: A gzip random-access context: inflate ``in_size`` bytes of the layer at ``in_offset``, after setting the
#: dictionary and priming with the top ``pending_bits`` bits of ``previous``; gives ``out_size`` bytes.
ZRAN = np.dtype(
    [
        ("in_offset", "<u8"),
        ("out_offset", "<u8"),
        ("dict_offset", "<u8"),
        ("in_size", "<u4"),
        ("out_size", "<u4"),
        ("dict_size", "<u4"),
        ("previous", "u1"),
        ("pending_bits", "u1"),
        ("reserved", "<u2"),
    ]
)
assert (BATCH.itemsize, ZRAN.itemsize) == (40, 40)

#: V2 record flags by the flags used everywhere else.
_V2_FLAGS = (
    (1, ChunkFlag.COMPRESSED),
    (2, ChunkFlag.ZRAN),
    (4, ChunkFlag.BATCH),
    (8, ChunkFlag.ENCRYPTED),
    (16, ChunkFlag.HAS_CRC),
)

_OFFSET_MASK = (1 << 40) - 1
#: Chunks of a blob of which a tree may use as few as it likes: 4 GiB in chunks of 4 KiB.
_SPARSE = 1 << 20


def _batch_table() -> Array:
    return np.zeros(0, BATCH)


def _zran_table() -> Array:
    return np.zeros(0, ZRAN)


@dataclass(slots=True)
class ChunkMap:
    """All chunks of a blob; row *i* of each column is the chunk with index *i*.

    Attributes:
        blob: the blob these chunks are of.
        uoffset, usize: (u8, u4) place of a chunk in the uncompressed image of the blob, in bytes. Rows
            are in ascending, non-overlapping order. A size of 0 is an index that nothing is known of
            (:func:`from_tree`).
        coffset, csize: (u8, u4) stored bytes in the blob. Informative for ZRAN; for a batched chunk the start
            of its batch, whose length stands in :attr:`batch`.
        flags: (u1) :class:`ChunkFlag` bits.
        crc: (u4) CRC-32C of the uncompressed bytes where HAS_CRC is set.
        context, context_offset: (u4, u4) row in :attr:`batch` or :attr:`zran`, and where the chunk starts in
            the bytes that gives; only for chunks with BATCH or ZRAN.
        digests: (n, 32) u1, or None; a row of zeros is a digest that is not known.
        batch, zran: context tables (:data:`BATCH`, :data:`ZRAN`), often empty.
        dictionaries: the area that the ``dict_offset`` of :attr:`zran` counts in.
    """

    blob: BlobInfo
    uoffset: Array
    usize: Array
    coffset: Array
    csize: Array
    flags: Array
    crc: Array
    context: Array
    context_offset: Array
    digests: Array | None = None
    batch: Array = field(default_factory=_batch_table)
    zran: Array = field(default_factory=_zran_table)
    dictionaries: bytes = b""

    def __len__(self) -> int:
        return len(self.uoffset)

    def find(self, offset: int, length: int) -> range:
        """The chunks that overlap ``length`` bytes at an uncompressed ``offset``."""
        if length <= 0 or not len(self):
            return range(0)
        first = int(np.searchsorted(self.uoffset, offset, side="right")) - 1
        if first < 0 or int(self.uoffset[first]) + int(self.usize[first]) <= offset:
            first += 1
        return range(first, max(first, int(np.searchsorted(self.uoffset, offset + length, side="left"))))

    def dictionary(self, context: int) -> bytes:
        """The window to set before inflating one ZRAN context."""
        row = self.zran[context]
        start = int(row["dict_offset"])
        return self.dictionaries[start : start + int(row["dict_size"])]

    def fingerprint(self) -> str:
        """A name (16 hex digits) for what lies where on the device: equal tables have equal devices."""
        digest = hashlib.sha256()
        for column in (self.uoffset, self.usize, self.digests):
            digest.update(b"" if column is None else np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]

    def set_digests(self, chunks: Array, blob_index: int) -> None:
        """Take digests and checksums from chunk records (a tree's or :func:`nydus.rafs.v6.read_chunk_table`).

        Raises:
            FormatError: a record has an index that the blob does not have, or says that the chunk lies
                elsewhere: its bytes would be right, but in the wrong place.
        """
        rows = chunks[chunks["blob_index"] == blob_index]
        index = rows["index"].astype(np.int64)
        if len(rows) and int(index.max()) >= len(self):
            raise FormatError(
                "a chunk record has an index beyond the blob's chunk table",
                where=self.blob.id,
                found=int(index.max()),
                expected=f"less than {len(self)}",
            )
        if self.digests is None:
            self.digests = np.zeros((len(self), 32), np.uint8)
        digests = np.ascontiguousarray(rows["digest"]).view(np.uint8).reshape(-1, 32)
        known = digests.any(axis=1)
        for column in ("uoffset", "usize"):
            wrong = known & (getattr(self, column)[index] != rows[column])
            if wrong.any():
                raise FormatError(
                    f"{column} of chunk {int(index[np.argmax(wrong)])} differs between bootstrap and blob",
                    where=self.blob.id,
                    found=int(getattr(self, column)[index][np.argmax(wrong)]),
                    expected=int(rows[column][np.argmax(wrong)]),
                )
        self.digests[index[known]] = digests[known]
        checked = (rows["flags"] & ChunkFlag.HAS_CRC) != 0
        self.crc[index[checked]] = rows["crc"][checked]
        self.flags[index[checked]] |= np.uint8(ChunkFlag.HAS_CRC)


def load(blob: BlobInfo, read: toc.Read, where: str = "", size: int | None = None) -> ChunkMap:
    """Read the chunk table of a v6 blob out of the blob itself.

    Args:
        blob: the entry of the bootstrap; every field of the section is compared with it.
        read: gives bytes of the *RAFS blob*: with SEPARATE the one that ``blob.rafs_digest`` names.
        size: length of the RAFS blob; only needed to find a table of contents when the bootstrap was inlined.

    Digests come from the blob's digest array where it has one. They are as trustworthy as the blob, unless
    ``blob.toc_size`` is set: then the table of contents, and through it all that is read here, is verified.

    Raises:
        FormatError: the section is corrupt, or does not fit the bootstrap.
    """
    where = where or blob.id
    if blob.chunk_count == 0:
        return _decode(blob, b"", np.zeros(1, _HEADER)[0], where)
    check_size(blob, where)
    contents = _contents(blob, read, where, size)
    stored = read(blob.meta_offset, blob.meta_compressed_size)
    raw_header = read(blob.meta_offset + blob.meta_compressed_size, HEADER_SIZE)
    if blob.cipher:
        stored = codec.xts_decrypt(blob.key, blob.iv, stored)
        raw_header = codec.xts_decrypt(blob.key, blob.iv, raw_header)
    header = np.frombuffer(raw_header, _HEADER)[0]
    _check_header(blob, header, where)
    # A section that would not shrink is stored as it is, whatever the algorithm says.
    kind = blob.meta_compression if len(stored) != blob.meta_uncompressed_size else Compression.NONE
    try:
        section = codec.decompress(kind, stored, blob.meta_uncompressed_size)
    except FormatError as error:
        raise FormatError(f"blob.meta: {error.what}", where=where, offset=blob.meta_offset) from None
    if contents is not None:
        _check_contents(contents, section, raw_header, where)
    result = _decode(blob, section, header, where)
    if blob.features & BlobFeature.INLINED_CHUNK_DIGEST:
        result.digests = _digests(blob, read, contents, where)
    return result


def from_cache_file(blob: BlobInfo, data: Source, where: str = "") -> ChunkMap:
    """Read a ``<id>.blob.meta`` file: the plain section, padded to 4096 bytes, and its header."""
    where = where or f"{blob.id}.blob.meta"
    if blob.chunk_count:
        check_size(blob, where)
    buffer = Buffer(data, where)
    padded = -(-blob.meta_uncompressed_size // HEADER_SIZE) * HEADER_SIZE
    if buffer.size != padded + HEADER_SIZE:
        raise buffer.error("wrong size of the file", found=buffer.size, expected=padded + HEADER_SIZE)
    header = buffer.array(padded, 1, _HEADER, "blob.meta header")[0]
    _check_header(blob, header, where)
    section = buffer.bytes(0, blob.meta_uncompressed_size, "blob.meta section")
    return _decode(blob, section, header, where)


def to_cache_file(chunks: ChunkMap) -> bytes:
    """The ``<id>.blob.meta`` file of a chunk table."""
    section, header = encode(chunks)
    return section + bytes(-len(section) % HEADER_SIZE) + header


def encode(chunks: ChunkMap) -> tuple[bytes, bytes]:
    """The plain section and its header, from the columns and the ``meta_*`` fields of ``chunks.blob``."""
    section = _section(chunks)
    return section, _header(chunks, len(section))


def _section(chunks: ChunkMap) -> bytes:
    features = chunks.blob.features
    parts = [(_encode_v2 if features & _V2 else _encode_v1)(chunks)]
    if features & BlobFeature.BATCH:
        parts.append(chunks.batch.tobytes())
    elif features & BlobFeature.ZRAN:
        parts += [chunks.zran.tobytes(), chunks.dictionaries]
    return b"".join(parts)


def _header(chunks: ChunkMap, size: int) -> bytes:
    """The header of a section of ``size`` bytes."""
    blob = chunks.blob
    header = np.zeros(1, _HEADER)
    header["magic"] = header["magic2"] = MAGIC
    header["features"] = int(blob.features)
    header["compression"] = int(blob.meta_compression)
    header["entries"] = len(chunks)
    header["offset"] = blob.meta_offset
    header["compressed_size"] = blob.meta_compressed_size
    header["size"] = size
    records = len(chunks) * (24 if blob.features & _V2 else 16)
    if size > records:
        header["context_offset"] = records
        header["context_size"] = size - records
        header["context_entries"] = len(chunks.batch if blob.features & BlobFeature.BATCH else chunks.zran)
    return header.tobytes()


class Section(NamedTuple):
    """A chunk table as it is in a blob: its plain bytes, its plain header, and both as they are stored."""

    plain: bytes
    header: bytes
    stored: bytes


def write(chunks: ChunkMap, offset: int) -> bytes:
    """The stored section and header of a blob; as :func:`store`."""
    return store(chunks, offset).stored


def store(chunks: ChunkMap, offset: int) -> Section:
    """The section and header of a blob, to be placed at ``offset``.

    Sets ``chunk_count``, ``meta_compression`` and the other ``meta_*`` fields of ``chunks.blob``; compresses
    with the blob's algorithm (zstd where chunks are read out of a gzip layer) and encrypts with its key.
    Nothing is stored for a blob without chunks.
    """
    blob = chunks.blob
    blob.chunk_count = len(chunks)
    reference = bool(blob.features & BlobFeature.SEPARATE)
    blob.meta_compression = Compression.ZSTD if reference else blob.compression
    blob.meta_offset = blob.meta_compressed_size = blob.meta_uncompressed_size = 0
    plain = _section(chunks)
    if not len(chunks):
        return Section(plain, _header(chunks, len(plain)), b"")
    stored = codec.compress(blob.meta_compression, plain)
    if len(stored) >= len(plain):
        stored, blob.meta_compression = plain, Compression.NONE
    if blob.cipher:
        stored = codec.xts_encrypt(blob.key, blob.iv, stored)
    blob.meta_offset = offset
    blob.meta_compressed_size, blob.meta_uncompressed_size = len(stored), len(plain)
    header = _header(chunks, len(plain))
    stored_header = codec.xts_encrypt(blob.key, blob.iv, header) if blob.cipher else header
    return Section(plain, header, stored + stored_header)


def from_tree(tree: Tree, blob_index: int) -> ChunkMap:
    """The chunk table of a blob that has none of its own (v5, TARFS, EXTERNAL), from the chunks of a tree.

    Indices that the tree does not refer to get a size of 0. Chunks of an EXTERNAL blob of a v5 tree lie in it
    in any order: they get places of our own, as :func:`own_places` says.

    Raises:
        FormatError: chunks overlap, or lie outside of the blob.
    """
    blob, chunks = tree.blobs[blob_index], tree.chunks
    if tree.version == 5 and blob.features & BlobFeature.EXTERNAL:
        chunks = chunks[chunks["blob_index"] == blob_index]
        chunks["uoffset"], size = own_places(chunks)
        blob = replace(blob, uncompressed_size=size)
    return from_records(blob, chunks, blob_index)


def own_places(chunks: Array) -> tuple[Array, int]:
    """Block-aligned places for the chunks of one blob in the order of their index.

    Returns:
        The new ``uoffset`` (u8) of each record, and the length of the device.
    """
    _, first, inverse = np.unique(chunks["index"], return_index=True, return_inverse=True)
    sizes = chunks["usize"][first].astype(np.uint64) + np.uint64(BLOCK - 1) & ~np.uint64(BLOCK - 1)
    places = ragged.starts_of(sizes)
    return places[inverse], int(sizes.sum(dtype=np.uint64))


def from_records(blob: BlobInfo, chunks: Array, blob_index: int) -> ChunkMap:
    """Like :func:`from_tree`, from chunk records (:func:`nydus.rafs.v6.read_chunk_table`)."""
    where = blob.id
    chunks = chunks[chunks["blob_index"] == blob_index]
    count = int(chunks["index"].max()) + 1 if len(chunks) else 0
    # A merged image may use few chunks of a blob, but a table must not be huge for the sake of one record.
    most = min(checks.MAX_CHUNKS, max(_SPARSE, 64 * len(chunks)))
    if count > most:
        raise FormatError(
            "the index of a chunk is too large", where=where, expected=f"less than {most}", found=count - 1
        )
    # Nobody vouches for a count that no chunk bears out, so it may not cost much memory.
    count = max(count, min(blob.chunk_count, 1 << 16))
    index = chunks["index"].astype(np.int64)

    def column(name: str, kind: type) -> Array:
        result: Array = np.zeros(count, kind)
        result[index] = chunks[name]
        return result

    uoffset, usize = column("uoffset", np.uint64), column("usize", np.uint32)
    # Rows that nothing is known of lie, empty, where the row before them ends.
    known = np.zeros(count, bool)
    known[index] = True
    uoffset = np.where(known, uoffset, np.maximum.accumulate(uoffset + usize)) if count else uoffset
    keep = ChunkFlag.COMPRESSED | ChunkFlag.ENCRYPTED | ChunkFlag.HAS_CRC
    digests = np.zeros((count, 32), np.uint8)
    digests[index] = np.ascontiguousarray(chunks["digest"]).view(np.uint8).reshape(-1, 32)
    result = ChunkMap(
        blob=blob,
        uoffset=uoffset,
        usize=usize,
        coffset=column("coffset", np.uint64),
        csize=column("csize", np.uint32),
        flags=(column("flags", np.uint32) & np.uint32(keep)).astype(np.uint8),
        crc=column("crc", np.uint32),
        context=np.zeros(count, np.uint32),
        context_offset=np.zeros(count, np.uint32),
        digests=digests if digests.any() else None,
    )
    _validate(result, where)
    return result


def check_size(blob: BlobInfo, where: str) -> None:
    """Require that the size of the section that the bootstrap names can hold the chunks it names."""
    v2 = bool(blob.features & _V2)
    expected = blob.chunk_count * (24 if v2 else 16)
    loose = blob.features & (_CONTEXTS | BlobFeature.ENCRYPTED)
    size = blob.meta_uncompressed_size
    contexts = min(blob.chunk_count * (40 + MAX_DICTIONARY), MAX_CONTEXTS)
    limit = expected + contexts if loose else expected
    if not expected <= size <= max(limit, expected):
        raise FormatError(
            f"blob.meta of {blob.chunk_count} chunks has the wrong size",
            where=where,
            found=size,
            expected=expected,
        )


def _check_header(blob: BlobInfo, header: Array, where: str) -> None:
    if int(header["magic"]) != MAGIC or int(header["magic2"]) != MAGIC:
        raise FormatError(
            "wrong magic of the blob.meta header",
            where=where,
            found=hex(header["magic"]),
            expected=hex(MAGIC),
        )
    # A merge clears one in the bootstrap only, a chunk dictionary sets the other there only.
    inlined = int(BlobFeature.INLINED_FS_META | BlobFeature.CHUNKDICT_GENERATED)
    for name, found, expected in (
        ("features", int(header["features"]) & ~inlined, int(blob.features) & ~inlined),
        ("compression", int(header["compression"]), int(blob.meta_compression)),
        ("entries", int(header["entries"]), blob.chunk_count),
        ("offset", int(header["offset"]), blob.meta_offset),
        ("compressed size", int(header["compressed_size"]), blob.meta_compressed_size),
        ("uncompressed size", int(header["size"]), blob.meta_uncompressed_size),
    ):
        if found != expected:
            raise FormatError(
                f"{name} in the blob.meta header differs from the bootstrap",
                where=where,
                found=found,
                expected=expected,
            )


def _contents(blob: BlobInfo, read: toc.Read, where: str, size: int | None) -> toc.Toc | None:
    if not blob.features & BlobFeature.HAS_TOC:
        return None
    if size is None and not blob.features & BlobFeature.INLINED_FS_META:
        size = blob.rafs_size if blob.features & BlobFeature.SEPARATE else blob.compressed_size
    if not size:
        return None
    contents = toc.read_toc(read, size, where)
    if not blob.toc_size:
        return contents
    if contents is None or (contents.digest, contents.size) != (blob.toc_digest, blob.toc_size):
        raise FormatError(
            "the table of contents is not the one that the bootstrap names",
            where=where,
            expected=blob.toc_digest.hex(),
            found="none" if contents is None else contents.digest.hex(),
        )
    return contents


def _check_contents(contents: toc.Toc, section: bytes, header: bytes, where: str) -> None:
    for name, data in ((toc.BLOB_META, section), (toc.BLOB_META_HEADER, header)):
        entry = contents.find(name)
        if entry is not None and hashlib.sha256(data).digest() != entry.digest:
            raise FormatError(f"{name} does not have the digest of the table of contents", where=where)


def _digests(blob: BlobInfo, read: toc.Read, contents: toc.Toc | None, where: str) -> Array | None:
    length = 32 * blob.chunk_count
    data = contents.read(read, toc.BLOB_DIGEST, where, limit=length) if contents is not None else None
    if data is None:
        # Without a table of contents the place follows from the order of the sections.
        start = blob.meta_offset + blob.meta_compressed_size + HEADER_SIZE + toc.HEADER_SIZE
        both = read(start, length + toc.HEADER_SIZE)
        data = both[:length]
        found = toc.parse_tar_header(both[length:], where, start + length)
        if found != (toc.BLOB_DIGEST, length):
            raise FormatError(
                "there is no digest array behind blob.meta", where=where, offset=start + length, found=found
            )
    if len(data) != length:
        raise FormatError("wrong size of the digest array", where=where, found=len(data), expected=length)
    return np.frombuffer(data, np.uint8).reshape(-1, 32).copy()


def _decode(blob: BlobInfo, section: bytes, header: Array, where: str) -> ChunkMap:
    v2 = bool(blob.features & _V2)
    count = blob.chunk_count
    buffer = Buffer(section, where)
    words = buffer.array(0, count * (3 if v2 else 2), "<u8", "chunk records").reshape(count, 3 if v2 else 2)
    result = (_decode_v2 if v2 else _decode_v1)(blob, words)
    if blob.features & _CONTEXTS and count:
        offset, entries = int(header["context_offset"]), int(header["context_entries"])
        size = int(header["context_size"])
        buffer.check(offset, size, "context area")
        # Where nothing had to be batched there is no area, and the header says 0 of it.
        if (entries or size) and (offset < count * 24 or entries * 40 > size):
            raise buffer.error("the context area overlaps", offset, found=entries)
        if blob.features & BlobFeature.BATCH:
            result.batch = buffer.array(offset, entries, BATCH, "batch table").copy()
        else:
            result.zran = buffer.array(offset, entries, ZRAN, "context table").copy()
            start = offset + entries * ZRAN.itemsize
            result.dictionaries = buffer.bytes(start, size - entries * ZRAN.itemsize, "dictionaries")
    _validate(result, where)
    return result


def _decode_v1(blob: BlobInfo, words: Array) -> ChunkMap:
    first, second = words[:, 0], words[:, 1]
    usize = ((first >> 44) | ((first >> 8 & 0xF) << 20)) + 1
    csize = ((second >> 44) | ((second >> 40 & 0xF) << 20)) + 1
    count = len(words)
    flags = np.where(usize != csize, np.uint8(ChunkFlag.COMPRESSED), np.uint8(0))
    if blob.features & BlobFeature.ENCRYPTED:
        flags |= np.uint8(ChunkFlag.ENCRYPTED)
    return ChunkMap(
        blob=blob,
        uoffset=first & np.uint64(0xFFFF_FFFF << 12),
        usize=usize.astype(np.uint32),
        coffset=second & np.uint64(_OFFSET_MASK),
        csize=csize.astype(np.uint32),
        flags=flags,
        crc=np.zeros(count, np.uint32),
        context=np.zeros(count, np.uint32),
        context_offset=np.zeros(count, np.uint32),
    )


def _decode_v2(blob: BlobInfo, words: Array) -> ChunkMap:
    first, second, third = words[:, 0], words[:, 1], words[:, 2]
    stored = first >> 56
    flags = np.zeros(len(words), np.uint8)
    for bit, flag in _V2_FLAGS:
        flags[(stored & bit) != 0] |= np.uint8(flag)
    in_context = (flags & (ChunkFlag.BATCH | ChunkFlag.ZRAN)) != 0
    return ChunkMap(
        blob=blob,
        uoffset=(first & 0xFFFF_FFFF) << 12,
        usize=((first >> 32 & 0xFF_FFFF) + 1).astype(np.uint32),
        coffset=second & np.uint64(_OFFSET_MASK),
        csize=(second >> 40).astype(np.uint32),
        flags=flags,
        crc=np.where((flags & ChunkFlag.HAS_CRC) != 0, third & 0xFFFF_FFFF, 0).astype(np.uint32),
        context=np.where(in_context, third >> 32, 0).astype(np.uint32),
        context_offset=np.where(in_context, third & 0xFFFF_FFFF, 0).astype(np.uint32),
    )


def _encode_v1(chunks: ChunkMap) -> bytes:
    usize, csize = chunks.usize.astype(np.uint64) - 1, chunks.csize.astype(np.uint64) - 1
    words = np.empty((len(chunks), 2), "<u8")
    words[:, 0] = (usize & 0xFFFFF) << 44 | chunks.uoffset | (usize >> 20) << 8
    words[:, 1] = (csize & 0xFFFFF) << 44 | (csize >> 20) << 40 | chunks.coffset
    return words.tobytes()


def _encode_v2(chunks: ChunkMap) -> bytes:
    flags = np.zeros(len(chunks), np.uint64)
    for bit, flag in _V2_FLAGS:
        flags[(chunks.flags & flag) != 0] |= np.uint64(bit)
    in_context = (chunks.flags & (ChunkFlag.BATCH | ChunkFlag.ZRAN)) != 0
    words = np.empty((len(chunks), 3), "<u8")
    words[:, 0] = chunks.uoffset >> 12 | (chunks.usize.astype(np.uint64) - 1) << 32 | flags << 56
    words[:, 1] = chunks.coffset | chunks.csize.astype(np.uint64) << 40
    words[:, 2] = np.where(
        in_context,
        chunks.context.astype(np.uint64) << 32 | chunks.context_offset,
        chunks.crc.astype(np.uint64),
    )
    return words.tobytes()


def _validate(chunks: ChunkMap, where: str) -> None:
    """Require what readers rely on: order, bounds, and contexts that exist and hold their chunks."""
    blob = chunks.blob
    if not len(chunks):
        return

    def refuse(bad: Array, what: str) -> None:
        if bad.any():
            raise FormatError(f"chunk {int(np.argmax(bad))}: {what}", where=where)

    end = chunks.uoffset + chunks.usize
    refuse(np.append(chunks.uoffset[1:] < end[:-1], False), "overlaps the next one, or is out of order")
    refuse(
        end > blob.uncompressed_size, f"reaches beyond the blob's {blob.uncompressed_size} uncompressed bytes"
    )
    refuse(chunks.usize > blob.chunk_size, f"is larger than the chunk size {blob.chunk_size}")
    batched = (chunks.flags & ChunkFlag.BATCH) != 0
    gzip = (chunks.flags & ChunkFlag.ZRAN) != 0
    limit = blob.data_size
    refuse(chunks.coffset + chunks.csize > limit, f"is stored beyond the {limit} bytes of data")
    plain = ((chunks.flags & ChunkFlag.COMPRESSED) == 0) & ~batched & ~gzip & (blob.cipher == 0)
    refuse(plain & (chunks.csize != chunks.usize), "is stored uncompressed, but in another size")
    last = chunks.context_offset.astype(np.uint64) + chunks.usize
    for member, table, name, out in (
        (batched, chunks.batch, "batch", "usize"),
        (gzip, chunks.zran, "context", "out_size"),
    ):
        if not member.any():
            continue
        refuse(member & (chunks.context >= len(table)), f"belongs to a {name} that does not exist")
        rows = np.where(member, chunks.context, 0)
        refuse(member & (last > table[out][rows]), f"reaches beyond its {name}")
    if batched.any():
        ends = chunks.coffset + chunks.batch["csize"][np.where(batched, chunks.context, 0)]
        refuse(batched & (ends > limit), f"is stored beyond the {limit} bytes of data")
    table = chunks.zran
    if len(table):
        area = len(chunks.dictionaries)
        beyond = _outside(table["dict_offset"], table["dict_size"], area)
        if (beyond | (table["dict_size"] > MAX_DICTIONARY) | (table["pending_bits"] > 7)).any():
            raise FormatError("a gzip context has an invalid dictionary or bit count", where=where)
        if _outside(table["in_offset"], table["in_size"], limit).any():
            raise FormatError("a gzip context reaches beyond the layer", where=where)


def _outside(offset: Array, size: Array, limit: int) -> Array:
    # Offsets are any u64, so their sum with a size may wrap around.
    return (offset > limit) | (size > limit - np.minimum(offset, limit))
