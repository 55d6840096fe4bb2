"""eStargz layers by their table of contents: a bootstrap without a look at the layer; rafs.md 5."""

from __future__ import annotations

import datetime
import stat
from array import array
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from nydus.build.blob import MAX_CHUNKS, HashingSink, Sink
from nydus.build.layer import BuildOptions, LayerResult, device, stargz_special
from nydus.build.stream import BLOCK, Source
from nydus.build.tree import NO_DEVICE, TreeBuilder
from nydus.build.zran import reference_features, seal_reference
from nydus.errors import ConfigError, FormatError
from nydus.rafs.blobmeta import BATCH, ChunkMap
from nydus.rafs.checks import MAX_UNIT
from nydus.rafs.model import Array, BlobFeature, BlobInfo, ChunkFlag

#: No table of contents is larger.
MAX_TOC = 512 << 20
_TYPES = {
    "dir": stat.S_IFDIR,
    "reg": stat.S_IFREG,
    "symlink": stat.S_IFLNK,
    "hardlink": stat.S_IFREG,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
}


class _Entry(msgspec.Struct, rename="camel"):
    """One entry of ``stargz.index.json``, with the names it has there."""

    name: str
    type: str
    size: int = 0
    modtime: str = ""
    link_name: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    dev_major: int = 0
    dev_minor: int = 0
    xattrs: dict[str, bytes] = {}
    digest: str = ""
    chunk_digest: str = ""
    offset: int = 0
    chunk_offset: int = 0
    chunk_size: int = 0
    inner_offset: int = 0


class _Contents(msgspec.Struct):
    version: int
    entries: list[_Entry]


class _File(msgspec.Struct):
    """A regular file whose chunks are being collected."""

    name: str
    inode: int
    size: int
    done: int
    first: int


def build_stargz(
    source: Source,
    sink: Sink,
    options: BuildOptions,
    layer_size: int,
    prefetch: Iterable[bytes] = (),
    where: str = "",
) -> LayerResult:
    """Build from a ``stargz.index.json``; chunks are read out of the gzip members of the layer.

    Args:
        sink: gets the chunk table.
        options: ``blob_id`` is the sha256 (hex) of the layer; its chunk size must be that of the layer's
            files of several chunks.
        layer_size: of the layer, in bytes; 0 if not known.

    Raises:
        FormatError: not such a table, or one with chunks that RAFS cannot refer to.
    """
    if not options.blob_id:
        raise ConfigError("the id of the eStargz layer is not given")
    text = bytearray()
    while piece := source.read(BLOCK):
        text += piece
        if len(text) > MAX_TOC:
            raise FormatError("the table of contents is too large", where=where, expected=MAX_TOC)
    try:
        contents = msgspec.json.decode(text, type=_Contents)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise FormatError(f"not a table of contents of eStargz: {error}", where=where) from None
    if contents.version != 1:
        raise FormatError("unknown version of the table of contents", where=where, found=contents.version)
    builder = TreeBuilder(where=where)
    chunks = _Chunks(options, where)
    current: _File | None = None
    for entry in contents.entries:
        if entry.type == "chunk":
            if current is None or entry.name != current.name:
                raise FormatError(f"a chunk of {entry.name!r} does not follow its file", where=where)
            chunks.add(entry, current)
            continue
        if current is not None:
            chunks.end(current, builder)
            current = None
        number = _add(builder, entry, options, where)
        if number is not None and entry.type == "reg" and entry.size:
            current = _File(entry.name, number, entry.size, 0, len(chunks))
            chunks.add(entry, current)
    if current is not None:
        chunks.end(current, builder)
    info = BlobInfo(
        options.blob_id,
        options.chunk_size,
        compression=options.compression,
        digester=options.digester,
        features=reference_features(options),
        compressed_size=layer_size or chunks.end_offset,
    )
    table = chunks.chunk_map(info, layer_size)
    return seal_reference(builder, info, table, chunks.references, HashingSink(sink), options, prefetch)


def _add(builder: TreeBuilder, entry: _Entry, options: BuildOptions, where: str) -> int | None:
    kind = _TYPES.get(entry.type)
    if kind is None:
        raise FormatError(f"{entry.name!r} has an unknown type", where=where, found=entry.type)
    name, link = entry.name.encode(errors="surrogateescape"), entry.link_name.encode()
    if b"\0" in name or b"\0" in link or not 0 <= entry.size < 1 << 62:
        raise FormatError(f"{entry.name!r} cannot be the name of a file of {entry.size} bytes", where=where)
    if not (0 <= entry.uid < 1 << 32 and 0 <= entry.gid < 1 << 32):
        raise FormatError(
            f"{entry.name!r} has an impossible owner", where=where, found=(entry.uid, entry.gid)
        )
    if stargz_special(name):
        return None
    uid, gid = (entry.uid, entry.gid) if options.owners else (0, 0)
    mode = entry.mode & 0o7777 | kind
    mtime = _seconds(entry.modtime, where)
    if entry.type == "hardlink":
        builder.link(name, link)
        return None
    xattrs = tuple(sorted((key.encode(), value) for key, value in entry.xattrs.items()))
    rdev = NO_DEVICE
    if kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO):
        rdev = device(entry.dev_major, entry.dev_minor)
    size = entry.size if kind == stat.S_IFREG else 0
    return builder.add(
        name, mode, uid, gid, mtime, size=size, rdev=rdev,
        target=link if kind == stat.S_IFLNK else b"", xattrs=xattrs,
    )  # fmt: skip


def _seconds(text: str, where: str) -> int:
    if not text:
        return 0
    try:
        return int(datetime.datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError):
        raise FormatError("a time is not in the form of RFC 3339", where=where, found=text) from None


class _Chunks:
    """The chunks in the order of the table, duplicates once."""

    def __init__(self, options: BuildOptions, where: str) -> None:
        self._chunk_size = options.chunk_size
        self._where = where
        self._usize, self._coffset, self._inner = array("I"), array("Q"), array("Q")
        self._digests = bytearray()
        self._known: dict[bytes, int] = {}
        self._references = array("q")
        #: Every member start, used chunk or not.
        self._starts = array("Q")

    def __len__(self) -> int:
        return len(self._references)

    @property
    def references(self) -> Array:
        return np.array(self._references, np.int64)

    @property
    def end_offset(self) -> int:
        """An offset that no member starts behind."""
        return max(self._starts, default=0) + int(_bound(self._chunk_size))

    def add(self, entry: _Entry, file: _File) -> None:
        size = entry.chunk_size or file.size - entry.chunk_offset
        problem = ""
        if entry.chunk_offset != file.done or not 0 < size <= file.size - file.done:
            problem = "is not where the chunk before it ends"
        elif size > self._chunk_size or (file.done + size < file.size and size != self._chunk_size):
            power = 0x1000 <= size <= 0x100_0000 and size & (size - 1) == 0
            problem = f"has {size:#x} bytes" + (f"; build with --chunk-size {size:#x}" if power else "")
        elif not 0 <= entry.offset < 1 << 40:
            problem = f"has the impossible offset {entry.offset}"
        elif not 0 <= entry.inner_offset <= MAX_UNIT - size:
            problem = f"starts {entry.inner_offset} bytes inside a gzip member, which is too far"
        digest = _sha256(entry.chunk_digest or (entry.digest if size == file.size else ""))
        if digest is None:
            problem = problem or "has no sha256 digest"
        if problem or digest is None:
            raise FormatError(f"chunk {entry.chunk_offset:#x} of {entry.name!r} {problem}", where=self._where)
        file.done += size
        self._starts.append(entry.offset)
        number = self._known.get(digest)
        if number is None:
            number = self._known[digest] = len(self._usize)
            if number >= MAX_CHUNKS:
                raise FormatError("a blob cannot have more chunks", expected=MAX_CHUNKS)
            self._usize.append(size)
            self._coffset.append(entry.offset)
            self._inner.append(entry.inner_offset)
            self._digests += digest
        self._references.append(number)

    def end(self, file: _File, builder: TreeBuilder) -> None:
        if file.done != file.size:
            raise FormatError(
                f"chunks of {file.name!r} are missing", where=self._where, expected=file.size, found=file.done
            )
        builder.set_chunks(file.inode, file.first, len(self) - file.first)

    def chunk_map(self, info: BlobInfo, layer_size: int) -> ChunkMap | None:
        """The table of the blob; stored sizes are bounds, as only starts are known.

        The chunks of a member with several are a batch.
        """
        if not self._usize:
            return None
        usize = np.array(self._usize, np.uint64)
        coffset = np.array(self._coffset, np.uint64)
        inner = np.array(self._inner, np.uint64)
        aligned = (usize + np.uint64(4095)) & ~np.uint64(4095)
        ends = np.cumsum(aligned, dtype=np.uint64)
        starts = np.unique(np.array(self._starts, np.uint64))
        starts = np.append(starts, np.uint64(info.compressed_size))
        following = starts[np.searchsorted(starts[:-1], coffset, side="right")]
        if (following <= coffset).any():
            raise FormatError("a chunk starts beyond the layer", where=self._where, expected=layer_size)
        info.chunk_count = len(usize)
        info.uncompressed_size = int(ends[-1])
        zeros = np.zeros(len(usize), np.uint32)
        table = ChunkMap(
            blob=info,
            uoffset=ends - aligned,
            usize=usize.astype(np.uint32),
            coffset=coffset,
            csize=np.minimum(following - coffset, _bound(usize)).astype(np.uint32),
            flags=np.full(len(usize), int(ChunkFlag.COMPRESSED), np.uint8),
            crc=zeros,
            context=zeros,
            context_offset=inner.astype(np.uint32),
            digests=np.frombuffer(bytes(self._digests), np.uint8).reshape(-1, 32),
        )
        members, first = np.unique(coffset[inner > 0], return_index=True)
        if len(members):
            info.features |= BlobFeature.BATCH
            batched = np.isin(coffset, members)
            table.context = np.where(batched, np.searchsorted(members, coffset), 0).astype(np.uint32)
            table.batch = np.zeros(len(members), BATCH)
            np.maximum.at(table.batch["usize"], table.context[batched], (inner + usize)[batched])
            room = following[inner > 0][first] - members
            table.batch["csize"] = np.minimum(room, _bound(table.batch["usize"].astype(np.uint64)))
            table.csize[batched] = 0
            table.flags[batched] |= np.uint8(ChunkFlag.BATCH)
        return table


def _bound(size: Any) -> Any:
    """The most that a gzip member of ``size`` plain bytes can take (rafs.md 4.5)."""
    return size + 10 + 8 + 5 + 5 * (size // 16384) + 128


def _sha256(text: str) -> bytes | None:
    kind, _, digits = text.partition(":")
    try:
        value = bytes.fromhex(digits)
    except ValueError:
        return None
    return value if kind == "sha256" and len(value) == 32 else None
