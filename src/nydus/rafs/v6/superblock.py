"""The head of a v6 bootstrap: both super blocks, device slots, blob table and prefetch table."""

from __future__ import annotations

from typing import Any

from nydus.rafs import checks
from nydus.rafs.buffer import Buffer, Source
from nydus.rafs.model import (
    CHUNK,
    Array,
    BlobFeature,
    BlobInfo,
    Cipher,
    Compression,
    Digester,
    Super,
    SuperFlag,
)
from nydus.rafs.v6 import layout


def read_superblock(data: Source, where: str = "") -> Super:
    """Read everything of a v6 bootstrap but its tree; costs nothing however big the tree is.

    Raises:
        FormatError: not a v6 bootstrap, a feature that is not known, or a table outside of the file.
    """
    buffer = Buffer(data, where)
    head = buffer.array(layout.SUPER_OFFSET, 1, layout.SUPER, "EROFS super block")[0]
    ext = buffer.array(layout.EXT_OFFSET, 1, layout.EXT, "RAFS super block")[0]
    if head["magic"] != layout.MAGIC:
        raise buffer.error(
            "not a RAFS v6 bootstrap: wrong magic",
            layout.SUPER_OFFSET,
            found=hex(head["magic"]),
            expected=hex(layout.MAGIC),
        )
    if int(head["incompat"]) & ~layout.INCOMPAT:
        raise buffer.error(
            "unknown incompatible EROFS features", layout.SUPER_OFFSET + 80, found=hex(head["incompat"])
        )
    bits = int(head["block_bits"])
    if bits not in (9, 12):
        raise buffer.error(
            "invalid block size bits", layout.SUPER_OFFSET + 12, found=bits, expected="9 or 12"
        )
    flags = _flags(buffer, int(ext["flags"]))
    chunk_size = checks.chunk_size(int(ext["chunk_size"]), where, layout.EXT_OFFSET + 20)
    meta_offset = int(head["meta_block"]) << bits
    if meta_offset >= buffer.size:
        raise buffer.error(
            "the metadata area lies beyond the end", layout.SUPER_OFFSET + 40, found=meta_offset
        )
    prefetch = []
    if ext["prefetch_size"]:
        count = int(ext["prefetch_size"]) // 4
        prefetch = buffer.array(int(ext["prefetch_offset"]), count, "<u4", "prefetch table").tolist()
    table = int(ext["chunk_table_offset"]), int(ext["chunk_table_size"])
    if table[1]:
        if table[1] % CHUNK.itemsize:
            raise buffer.error(
                "the chunk table is no multiple of 80 bytes", layout.EXT_OFFSET + 32, found=table[1]
            )
        buffer.check(*table, "chunk table")
    result = Super(
        version=6,
        flags=flags,
        chunk_size=chunk_size,
        block_size=1 << bits,
        root=int(head["root_nid"]),
        inode_count=int(head["inodes"]),
        meta_offset=meta_offset,
        prefetch=prefetch,
        chunk_table=table,
    )
    _read_blobs(buffer, head, ext, result)
    return result


def read_chunk_table(data: Source, head: Super, where: str = "") -> Array:
    """The chunk table: :data:`~nydus.rafs.model.CHUNK` rows sorted by digest, as a view (rafs.md 2.10)."""
    offset, size = head.chunk_table
    return Buffer(data, where).array(offset, size // CHUNK.itemsize, CHUNK, "chunk table")


def _flags(buffer: Buffer, value: int) -> SuperFlag:
    where = layout.EXT_OFFSET
    if value & ~checks.KNOWN_FLAGS:
        raise buffer.error("unknown file system flags", where, found=hex(value))
    flags = SuperFlag(value)
    compressions, digesters = checks.algorithms(flags)
    if len(compressions) != 1 or len(digesters) != 1:
        raise buffer.error("the flags must name one compression and one digest", where, found=hex(value))
    return flags


def _read_blobs(buffer: Buffer, head: Any, ext: Any, result: Super) -> None:
    count = int(head["devices"])
    size = int(ext["blob_table_size"])
    if size != count * layout.BLOB.itemsize or count > layout.MAX_DEVICES:
        raise buffer.error(
            f"the blob table does not fit {count} devices",
            layout.EXT_OFFSET + 16,
            found=size,
            expected=count * layout.BLOB.itemsize,
        )
    if not count:
        return
    slot_offset = int(head["device_slot"]) * layout.DEVICE.itemsize
    slots = buffer.array(slot_offset, count, layout.DEVICE, "device table")
    offset = int(ext["blob_table_offset"])
    table = buffer.array(offset, count, layout.BLOB, "blob table")
    for position, (slot, entry) in enumerate(zip(slots, table, strict=True)):
        blob = _read_blob(buffer, entry, position, offset + position * layout.BLOB.itemsize, result)
        if slot["id"].tobytes() != entry["id"].tobytes():
            raise buffer.error(
                f"device slot {position} names another blob than the blob table",
                slot_offset + position * layout.DEVICE.itemsize,
                expected=blob.id,
                found=slot["id"].tobytes().rstrip(b"\0"),
            )
        result.blobs.append(blob)
        result.device_blocks.append(int(slot["blocks"]))
        result.mapped_blocks.append(int(slot["mapped"]))
    if len({blob.id for blob in result.blobs}) != count:
        raise buffer.error("two blobs have the same id", offset)


def _read_blob(buffer: Buffer, entry: Any, position: int, offset: int, head: Super) -> BlobInfo:
    where = buffer.where
    if entry["index"] != position:
        raise buffer.error("wrong blob index", offset + 64, found=entry["index"], expected=position)
    # 0 is found in blobs whose chunk size was not recorded.
    chunk_size = int(entry["chunk_size"]) or head.chunk_size
    external = int(entry["features"]) & BlobFeature.EXTERNAL
    limit = checks.MAX_UNIT if external else checks.MAX_CHUNK_SIZE
    blob = BlobInfo(
        id=checks.blob_id(entry["id"].tobytes().rstrip(b"\0"), where, offset),
        chunk_size=checks.chunk_size(chunk_size, where, offset + 68, limit),
        chunk_count=int(entry["chunk_count"]),
        compression=checks.enum(Compression, int(entry["compression"]), "compression", where, offset + 76),
        digester=checks.enum(Digester, int(entry["digester"]), "digest algorithm", where, offset + 80),
        features=checks.features(int(entry["features"]), where, offset + 84),
        compressed_size=int(entry["compressed_size"]),
        uncompressed_size=int(entry["uncompressed_size"]),
        toc_size=int(entry["toc_size"]),
        toc_digest=entry["toc_digest"].tobytes(),
        meta_compression=checks.enum(
            Compression, int(entry["meta_compression"]), "blob.meta compression", where, offset + 108
        ),
        meta_offset=int(entry["meta_offset"]),
        meta_compressed_size=int(entry["meta_compressed_size"]),
        meta_uncompressed_size=int(entry["meta_uncompressed_size"]),
        cipher=checks.enum(Cipher, int(entry["cipher"]), "cipher", where, offset + 216),
    )
    secret, vector = entry["secret"].tobytes(), entry["vector"].tobytes()
    if blob.cipher:
        blob.key, blob.iv = secret, vector
    else:
        blob.rafs_digest, blob.rafs_size = secret, int.from_bytes(vector[:8], "little")
    for name, value, limit, field in (
        ("chunk count", blob.chunk_count, checks.MAX_CHUNKS, 72),
        ("compressed size", blob.compressed_size, checks.MAX_COMPRESSED, 88),
        ("uncompressed size", blob.uncompressed_size, checks.MAX_UNCOMPRESSED, 96),
        ("blob.meta size", blob.meta_compressed_size, blob.meta_uncompressed_size, 120),
    ):
        if value > limit:
            raise buffer.error(f"{name} of a blob is too large", offset + field, found=value, expected=limit)
    tarfs = blob.features & BlobFeature.TARFS or head.flags & SuperFlag.TARFS
    if not blob.features & BlobFeature.ALIGNED and not tarfs and not blob.features & BlobFeature.EXTERNAL:
        raise buffer.error("the chunks of a v6 blob must be aligned", offset + 84, found=int(blob.features))
    return blob
