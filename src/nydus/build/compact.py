"""Fewer and fuller blobs: rewriting those that are hardly used any more, or small; rafs.md 4.8."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nydus.build.blob import HashingSink
from nydus.build.output import Output
from nydus.rafs import blobmeta
from nydus.rafs.blobmeta import BATCH, ChunkMap
from nydus.rafs.model import Array, BlobFeature, BlobInfo, ChunkFlag, SuperFlag, Tree

if TYPE_CHECKING:
    from nydus.image import Image

MIB = 1 << 20
#: Blobs that are, or refer to, somebody else's archive: their chunks cannot be moved.
_FIXED = BlobFeature.ZRAN | BlobFeature.SEPARATE | BlobFeature.TARFS | BlobFeature.EXTERNAL


@dataclass(frozen=True, slots=True)
class CompactOptions:
    """What is worth rewriting; sizes in bytes.

    Attributes:
        min_used_ratio: rewrite a blob of whose chunk data files use less than this percentage; 0 for never.
        small: blobs below this size are joined, smallest first ...
        largest: ... up to this size.
        fewest: do nothing for an image with fewer blobs.
        shared: ids of blobs to leave alone: those of a chunk dictionary.
    """

    min_used_ratio: int = 0
    small: int = 10 * MIB
    largest: int = 100 * MIB
    fewest: int = 0
    shared: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Usage:
    """What files use of one blob."""

    number: int
    info: BlobInfo
    rows: Array
    used: int  # stored bytes


@dataclass(slots=True)
class _Group:
    """Blobs that become one, and what was written of it so far."""

    members: list[_Usage]
    info: BlobInfo
    places: dict[tuple[int, int], int] = field(default_factory=dict)  # (blob, chunk) -> chunk of the new blob
    chunks: ChunkMap | None = None


def compact(image: Image, folder: str, options: CompactOptions) -> Tree | None:
    """Rewrite blobs of an image into new ones, which get the name of their sha256 in a directory.

    Chunks are verified and copied as they are stored, in the order of the old blobs; chunks that occur in
    several of the joined blobs are stored once. Blobs that nothing refers to leave the image. Old blobs stay
    where they are.

    Returns:
        The tree that refers to the new blobs; None if there is nothing to gain.

    Raises:
        FormatError, BackendError: a chunk is wrong, or cannot be had. No file is left then.
    """
    tree = image.tree
    if len(tree.blobs) < options.fewest:
        return None
    usages = [_usage(image, number) for number in range(len(tree.blobs))]
    groups = [_Group(members, _describe(tree, members)) for members in _plan(usages, options)]
    if not groups and all(len(usage.rows) for usage in usages):
        return None
    with ExitStack() as stack:
        outputs = []
        for group in groups:
            out = stack.enter_context(Output(folder, directory=True))
            _write(image, group, out)
            outputs.append(out)
        for out, group in zip(outputs, groups, strict=True):
            out.commit(group.info.id)
    return _rewritten(tree, usages, groups)


def _usage(image: Image, number: int) -> _Usage:
    tree = image.tree
    info = tree.blobs[number]
    rows = np.unique(tree.chunks["index"][tree.chunks["blob_index"] == number]).astype(np.int64)
    if info.features & _FIXED or not len(rows):
        return _Usage(number, info, rows, info.compressed_size)
    return _Usage(number, info, rows, image.reader.stored_size(number, rows))


def _plan(usages: list[_Usage], options: CompactOptions) -> list[list[_Usage]]:
    """Which blobs to write anew, together where there are several."""

    def wasteful(usage: _Usage) -> bool:
        return usage.used * 100 < options.min_used_ratio * usage.info.data_size

    movable = [
        usage
        for usage in usages
        if len(usage.rows) and not usage.info.features & _FIXED and usage.info.id not in options.shared
    ]
    result = [[usage] for usage in movable if wasteful(usage) and usage.used >= options.small]
    kinds: dict[object, list[_Usage]] = {}
    for usage in sorted(movable, key=lambda usage: usage.used):
        info = usage.info
        if usage.used < options.small and (wasteful(usage) or info.compressed_size < options.small):
            # Chunks are copied as they are: algorithms and keys must be the same.
            kind = (info.compression, info.digester, info.cipher, info.key, info.iv)
            kinds.setdefault(kind, []).append(usage)
    for candidates in kinds.values():
        group: list[_Usage] = []
        total = 0
        for usage in candidates:
            if group and total + usage.used > options.largest:
                result.append(group)
                group, total = [], 0
            group.append(usage)
            total += usage.used
        result.append(group)
    # A blob alone is only worth it for what it gets rid of.
    result = [group for group in result if len(group) > 1 or wasteful(group[0])]
    return [sorted(group, key=lambda usage: usage.number) for group in result]


def _describe(tree: Tree, members: list[_Usage]) -> BlobInfo:
    first = members[0].info
    features = BlobFeature.CAP_TAR_TOC
    if tree.version == 6:
        features |= BlobFeature.ALIGNED
    for usage in members:
        features |= usage.info.features & (
            BlobFeature.CHUNK_INFO_V2 | BlobFeature.BATCH | BlobFeature.ENCRYPTED
        )
    return BlobInfo(
        "", tree.chunk_size, compression=first.compression, digester=first.digester, features=features,
        cipher=first.cipher, key=first.key, iv=first.iv,
    )  # fmt: skip


def _write(image: Image, group: _Group, out: Output) -> None:
    """Copy the chunks of a group, and what follows them in a blob."""
    info, sink = group.info, HashingSink(out.write)
    parts: list[ChunkMap] = []
    batches: list[Array] = []
    known: dict[bytes, int] = {}
    count = 0
    for usage in group.members:
        source = image.reader.chunk_map(usage.number)
        wanted = np.zeros(len(source), bool)
        wanted[usage.rows] = True
        rows: list[int] = []
        offsets: list[int] = []
        contexts: list[int] = []
        for together, data in image.reader.stored(usage.number, usage.rows):
            batched = bool(int(source.flags[together[0]]) & ChunkFlag.BATCH)
            digest = b"" if batched or source.digests is None else source.digests[together[0]].tobytes()
            if any(digest) and (same := known.get(digest)) is not None:
                group.places[usage.number, together[0]] = same
                continue
            if batched:
                batches.append(source.batch[source.context[together[0]]])
            for row in together:
                if not wanted[row]:
                    continue
                group.places[usage.number, row] = count
                if any(digest):
                    known[digest] = count
                count += 1
                rows.append(row)
                offsets.append(sink.size)
                contexts.append(len(batches) - 1 if batched else 0)
            sink.write(bytes(data))
        parts.append(_taken(source, np.array(rows, np.int64), offsets, contexts))
    chunks = _joined(info, parts, batches)
    size = chunks.usize.astype(np.uint64)
    if image.tree.version == 6:
        size = (size + np.uint64(4095)) & ~np.uint64(4095)
    chunks.uoffset = np.cumsum(size, dtype=np.uint64) - size
    info.uncompressed_size = int(size.sum())
    info.chunk_count = count
    if image.tree.version == 6:
        sink.write(blobmeta.write(chunks, sink.size))
    info.compressed_size, info.id = sink.size, sink.digest.hexdigest()
    group.chunks = chunks


def _taken(source: ChunkMap, rows: Array, offsets: list[int], contexts: list[int]) -> ChunkMap:
    """Some chunks of a table, at their new places."""
    digests = source.digests[rows] if source.digests is not None else np.zeros((len(rows), 32), np.uint8)
    return ChunkMap(
        blob=source.blob,
        uoffset=source.uoffset[rows],
        usize=source.usize[rows],
        coffset=np.array(offsets, np.uint64),
        csize=source.csize[rows],
        flags=source.flags[rows],
        crc=source.crc[rows],
        context=np.array(contexts, np.uint32),
        context_offset=source.context_offset[rows],
        digests=digests,
    )


def _joined(info: BlobInfo, parts: list[ChunkMap], batches: list[Array]) -> ChunkMap:
    columns = ("uoffset", "usize", "coffset", "csize", "flags", "crc", "context", "context_offset", "digests")
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in columns
    }
    result = ChunkMap(blob=info, **joined)
    if batches:
        result.batch = np.array(batches, BATCH)
    # A record has room for a checksum or for a context, and one of version 1 for neither.
    no_room = (result.flags & ChunkFlag.BATCH) != 0
    if not info.features & BlobFeature.CHUNK_INFO_V2:
        no_room[:] = True
    result.flags[no_room] &= np.uint8(0xFF & ~ChunkFlag.HAS_CRC)
    return result


def _rewritten(tree: Tree, usages: list[_Usage], groups: list[_Group]) -> Tree:
    """The tree with its chunks in the new blobs, which take the place of the first that went into them."""
    moved = {usage.number: group for group in groups for usage in group.members}
    blobs: list[BlobInfo] = []
    numbers: dict[int, int] = {}
    for usage in usages:
        group = moved.get(usage.number)
        if group is not None:
            if not any(group.info is blob for blob in blobs):
                blobs.append(group.info)
            numbers[usage.number] = next(i for i, blob in enumerate(blobs) if blob is group.info)
        elif len(usage.rows):
            numbers[usage.number] = len(blobs)
            blobs.append(usage.info)
    chunks = tree.chunks.copy()
    for usage in usages:
        mine = np.flatnonzero(tree.chunks["blob_index"] == usage.number)
        group = moved.get(usage.number)
        if group is not None and group.chunks is not None:
            place = np.zeros(int(usage.rows.max()) + 1, np.int64)
            for row in usage.rows.tolist():
                place[row] = group.places[usage.number, row]
            move(chunks, mine, group.chunks, place[chunks["index"][mine].astype(np.int64)])
        if len(mine):
            chunks["blob_index"][mine] = numbers[usage.number]
    flags = tree.flags
    if not all(blob.features & BlobFeature.INLINED_CHUNK_DIGEST for blob in blobs):
        flags &= ~SuperFlag.INLINED_CHUNK_DIGEST
    return dataclasses.replace(tree, chunks=chunks, blobs=blobs, flags=flags)


def move(chunks: Array, positions: Array, table: ChunkMap, rows: Array) -> None:
    """Make chunk records refer to rows of another table; their place in the file stays.

    Batched chunks get the record that the builder writes (rafs.md 2.10).
    """
    batched = (table.flags[rows] & ChunkFlag.BATCH) != 0
    checked = chunks["flags"][positions] & ChunkFlag.HAS_CRC
    flags = table.flags[rows].astype(np.uint32) & (ChunkFlag.COMPRESSED | ChunkFlag.ENCRYPTED) | checked
    chunks["index"][positions] = rows
    chunks["uoffset"][positions] = table.uoffset[rows]
    chunks["coffset"][positions] = np.where(batched, 0, table.coffset[rows])
    chunks["csize"][positions] = np.where(batched, 0, table.csize[rows])
    chunks["flags"][positions] = np.where(batched, checked, flags)
    if table.digests is not None:
        chunks["digest"][positions] = np.ascontiguousarray(table.digests[rows]).view("V32").reshape(-1)
