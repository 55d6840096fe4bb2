"""The head of a v5 bootstrap: super block, blob tables and prefetch table."""

from __future__ import annotations

from typing import Any

from nydus.rafs import checks
from nydus.rafs.buffer import Buffer, Source
from nydus.rafs.model import BlobFeature, BlobInfo, Compression, Digester, Super, SuperFlag
from nydus.rafs.v5 import layout

#: Features that mean nothing in v5 are dropped, as the reference does.
_FEATURES = int(~BlobFeature(0)) & 0x7000_0FFF


def read_superblock(data: Source, where: str = "") -> Super:
    """Read everything of a v5 bootstrap but its tree.

    Raises:
        FormatError: not a v5 bootstrap, an unknown flag, or a table outside of the file.
    """
    buffer = Buffer(data, where)
    head = buffer.array(0, 1, layout.SUPER, "RAFS super block")[0]
    for name, offset, expected in (("magic", 0, layout.MAGIC), ("version", 4, layout.VERSION)):
        if int(head[name]) != expected:
            raise buffer.error(
                f"not a RAFS v5 bootstrap: wrong {name}",
                offset,
                found=hex(head[name]),
                expected=hex(expected),
            )
    if int(head["size"]) != layout.SUPER_SIZE:
        raise buffer.error(
            "wrong size of the super block", 8, found=int(head["size"]), expected=layout.SUPER_SIZE
        )
    value = int(head["flags"])
    if value & ~checks.KNOWN_FLAGS:
        raise buffer.error("unknown file system flags", 16, found=hex(value))
    flags = SuperFlag(value)
    if flags & SuperFlag.ENCRYPTION_AES_128_XTS:
        raise buffer.error("an encrypted v5 image is not supported", 16, found=hex(value))
    compressions, digesters = checks.algorithms(flags)
    if len(compressions) > 1 or len(digesters) > 1:
        raise buffer.error("the flags name two algorithms for one purpose", 16, found=hex(value))
    entries, offset = int(head["inode_table_entries"]), int(head["inode_table_offset"])
    buffer.check(offset, entries * 4, "inode table")
    if not entries:
        raise buffer.error("the inode table is empty", 56)
    prefetch = []
    if head["prefetch_entries"]:
        count = int(head["prefetch_entries"])
        prefetch = buffer.array(int(head["prefetch_offset"]), count, "<u4", "prefetch table").tolist()
    chunk_size = checks.chunk_size(int(head["chunk_size"]), where, 12)
    result = Super(
        version=5,
        flags=flags,
        chunk_size=chunk_size,
        block_size=chunk_size,
        root=1,
        inode_count=entries,
        meta_offset=offset,
        prefetch=prefetch,
    )
    # Images of before 2.0 may name neither algorithm.
    compression = compressions[0] if compressions else Compression.LZ4_BLOCK
    digester = digesters[0] if digesters else Digester.BLAKE3
    _read_blobs(buffer, head, result, compression, digester)
    return result


def _read_blobs(
    buffer: Buffer, head: Any, result: Super, compression: Compression, digester: Digester
) -> None:
    offset, size = int(head["blob_table_offset"]), int(head["blob_table_size"])
    table = buffer.bytes(offset, size, "blob table") if size else b""
    at = 0
    while size - at > 8:
        end = table.find(b"\0", at + 8)
        end = size if end < 0 else end
        blob = BlobInfo(
            id=checks.blob_id(table[at + 8 : end], buffer.where, offset + at + 8),
            chunk_size=result.chunk_size,
            compression=compression,
            digester=digester,
            readahead_offset=int.from_bytes(table[at : at + 4], "little"),
            readahead_size=int.from_bytes(table[at + 4 : at + 8], "little"),
        )
        result.blobs.append(blob)
        at = end + 1
    if len({blob.id for blob in result.blobs}) != len(result.blobs):
        raise buffer.error("two blobs have the same id", offset)
    count, offset = int(head["extended_entries"]), int(head["extended_offset"])
    if not count or not offset:
        return
    if count != len(result.blobs):
        raise buffer.error(
            "the extended blob table does not fit the blob table", 68, found=count, expected=len(result.blobs)
        )
    extended = buffer.array(offset, count, layout.EXTENDED_BLOB, "extended blob table")
    for position, (blob, entry) in enumerate(zip(result.blobs, extended, strict=True)):
        place = offset + position * layout.EXTENDED_BLOB.itemsize
        blob.chunk_count = int(entry["chunk_count"])
        blob.features = BlobFeature(int(entry["features"]) & _FEATURES)
        blob.uncompressed_size = int(entry["uncompressed_size"])
        blob.compressed_size = int(entry["compressed_size"])
        for name, found, limit in (
            ("chunk count", blob.chunk_count, checks.MAX_CHUNKS),
            ("uncompressed size", blob.uncompressed_size, checks.MAX_UNCOMPRESSED),
            ("compressed size", blob.compressed_size, checks.MAX_COMPRESSED),
        ):
            if found > limit:
                raise buffer.error(f"{name} of a blob is too large", place, found=found, expected=limit)
