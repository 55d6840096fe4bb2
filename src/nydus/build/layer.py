"""Building one layer: a stream or directory in, a data blob and a bootstrap out, in one pass."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from nydus.build.blob import BlobWriter, Dictionary, HashingSink, Sink
from nydus.build.merge import Whiteout, overlay
from nydus.build.sections import SectionWriter
from nydus.build.stream import Source, Window, ahead, blocks
from nydus.build.tar import Entry, TarReader
from nydus.build.tree import NO_DEVICE, TreeBuilder
from nydus.errors import ConfigError
from nydus.rafs import blobmeta
from nydus.rafs.blobmeta import ChunkMap
from nydus.rafs.model import (
    BlobFeature,
    BlobInfo,
    Cipher,
    Compression,
    Digester,
    SuperFlag,
    Tree,
)

#: The id that a bootstrap inside its own blob has for it (rafs.md 3.7).
UNKNOWN_ID = "x" * 64
MIN_CHUNK, MAX_CHUNK = 0x1000, 0x100_0000
#: Files of eStargz layers that are not part of the image.
_STARGZ_FILES = frozenset((b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"))
_COMPRESSION_FLAGS = {
    Compression.NONE: SuperFlag.COMPRESSION_NONE,
    Compression.LZ4_BLOCK: SuperFlag.COMPRESSION_LZ4,
    Compression.GZIP: SuperFlag.COMPRESSION_GZIP,
    Compression.ZSTD: SuperFlag.COMPRESSION_ZSTD,
}


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build a layer. The defaults are those of the reference builder.

    Attributes:
        version: 5 or 6.
        chunk_size: a power of two, 4 KiB to 16 MiB.
        batch_size: 0, or a power of two up to the chunk size: combine small files (v6).
        inline_meta: put the bootstrap into the blob.
        toc: end the blob with a table of contents (v6).
        aligned: align chunks in the uncompressed image (v5; always so in v6).
        owners: record uid and gid.
        prefetch_table: write a prefetch table (policy ``fs``); ``prefetch_blob`` is policy ``blob``.
        blob_id: instead of the sha256 of the blob.
        dictionary: an image whose chunks are referred to rather than stored again.
        parent: an image below this layer; the result is both.
        workers: threads; 0 for what the machine has, at most 4.
        image: gets the uncompressed image of the blob (v6), as a cache directory holds it.
    """

    version: int = 6
    compression: Compression = Compression.ZSTD
    digester: Digester = Digester.BLAKE3
    chunk_size: int = 0x10_0000
    batch_size: int = 0
    inline_meta: bool = False
    toc: bool = False
    aligned: bool = False
    encrypt: bool = False
    owners: bool = True
    whiteout: Whiteout = Whiteout.OCI
    prefetch_table: bool = False
    prefetch_blob: bool = False
    blob_id: str = ""
    dictionary: Tree | None = None
    parent: Tree | None = None
    workers: int = 0
    image: Sink | None = None

    def __post_init__(self) -> None:
        def power(value: int) -> bool:
            return MIN_CHUNK <= value <= MAX_CHUNK and value & (value - 1) == 0

        if self.version not in (5, 6):
            raise ConfigError(f"there is no RAFS version {self.version}; use 5 or 6")
        if not power(self.chunk_size):
            raise ConfigError(
                f"chunk size {self.chunk_size:#x} is not a power of two from {MIN_CHUNK:#x} to {MAX_CHUNK:#x}"
            )
        if self.batch_size and not (power(self.batch_size) and self.batch_size <= self.chunk_size):
            raise ConfigError(
                f"batch size {self.batch_size:#x} is not 0 or a power of two from {MIN_CHUNK:#x} "
                f"to the chunk size {self.chunk_size:#x}"
            )
        if self.version == 5:
            for name, value in (
                ("batch chunks", self.batch_size),
                ("table of contents", self.toc),
                ("encryption", self.encrypt),
            ):
                if value:
                    raise ConfigError(f"RAFS version 5 has no {name}; use version 6")
        for name in ("dictionary", "parent"):
            tree: Tree | None = getattr(self, name)
            if tree is None:
                continue
            if tree.version != self.version or tree.chunk_size != self.chunk_size:
                raise ConfigError(
                    f"the {name} has version {tree.version} and chunk size {tree.chunk_size:#x}, "
                    f"the layer version {self.version} and {self.chunk_size:#x}"
                )


@dataclass(slots=True)
class LayerResult:
    """What was built.

    Attributes:
        tree: the file system; its blob has the id that others will know it by.
        bootstrap: the bootstrap file (with ``inline_meta``: what is in the blob).
        blob_id: name of the blob: its sha256, in the reference's sense (rafs.md 3.7). "" if nothing was
            written.
        blob_digest, blob_size: sha256 (hex) and length of all that went to the sink.
        chunks: chunk table of the blob (v6), or None.
        toc_digest, toc_size: of the table of contents, 0 if there is none.
        duplicates: pieces that were not stored because they were there already.
        blob: the blob as the tree describes it; None if the layer has no data of its own.
    """

    tree: Tree
    bootstrap: bytes = b""
    blob_id: str = ""
    blob_digest: str = ""
    blob_size: int = 0
    chunks: ChunkMap | None = None
    toc_digest: bytes = bytes(32)
    toc_size: int = 0
    duplicates: int = 0
    blob: BlobInfo | None = None

    def seal(self, out: HashingSink, blob_id: str = "") -> None:
        """Take name, digest and size of all that was written."""
        self.blob_digest, self.blob_size = out.digest.hexdigest(), out.size
        self.blob_id = blob_id or (out.name.hexdigest() if out.size else "")

    @property
    def blob_meta(self) -> bytes:
        """The ``<id>.blob.meta`` file of a cache directory (b"" without chunks or in v5)."""
        return blobmeta.to_cache_file(self.chunks) if self.chunks is not None and len(self.chunks) else b""


def build_layer(
    source: Source,
    sink: Sink,
    options: BuildOptions | None = None,
    prefetch: Iterable[bytes] = (),
    where: str = "",
) -> LayerResult:
    """Build from a tar stream (plain, gzip or zstd) into a blob, in one pass and bounded memory.

    Args:
        source: read to its end.
        sink: gets the bytes of the blob in order.
        prefetch: absolute paths for the prefetch table, in order of importance.
        where: name of the source for error messages.

    Raises:
        FormatError: the source is damaged or holds what no file system can.
    """
    options = options or BuildOptions()
    layer = LayerBuilder(sink, options)
    builder = TreeBuilder(where=where)
    with layer.writer:
        read_tar(TarReader(Window(ahead(blocks(source, where)), where)), builder, layer.writer, options)
        return layer.finish(builder, prefetch)


def read_tar(reader: TarReader, builder: TreeBuilder, writer: BlobWriter, options: BuildOptions) -> None:
    """Put all members of an archive into a tree and a blob."""
    chunk_size = options.chunk_size
    for entry in reader:
        number = add_entry(builder, entry, options)
        if number is not None and entry.size:
            first, count = writer.add(reader.chunks(entry, chunk_size), entry.size <= chunk_size)
            builder.set_chunks(number, first, count)


def add_entry(builder: TreeBuilder, entry: Entry, options: BuildOptions) -> int | None:
    """Put the name of an archive member into a tree; the inode, or None if it has no data of its own."""
    mode, name = entry.mode, entry.name
    kind = mode & 0o170000
    if stargz_special(name):
        return None
    if b"/.wh." in name and builder.lies_in_file(name):
        return None  # umoci lists what was in a directory even where a file has taken its place
    uid, gid = (entry.uid, entry.gid) if options.owners else (0, 0)
    if entry.hard_link:
        builder.link(name, entry.link, (mode, uid, gid, entry.mtime))
        return None
    rdev = NO_DEVICE
    if kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO):
        rdev = device(entry.major, entry.minor)
    return builder.add(
        name,
        mode,
        uid,
        gid,
        entry.mtime,
        size=entry.size,
        rdev=rdev,
        target=entry.link if kind == stat.S_IFLNK else b"",
        xattrs=entry.xattrs,
    )


def stargz_special(name: bytes) -> bool:
    """Whether a name belongs to the eStargz format and not to the image."""
    return name.removeprefix(b"./").lstrip(b"/") in _STARGZ_FILES


def device(major: int, minor: int) -> int:
    """A device number in the 32-bit encoding of Linux."""
    return (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & 0xFFF00) << 12


class LayerBuilder:
    """What tar, directory and other builds share: the blob under construction, and how it ends.

    Args:
        sink: gets the bytes of the blob.
    """

    def __init__(self, sink: Sink, options: BuildOptions) -> None:
        self.options = options
        self.out = HashingSink(sink)
        features = BlobFeature.CAP_TAR_TOC
        if options.version == 6:
            features |= BlobFeature.ALIGNED
        if options.inline_meta:
            features |= BlobFeature.INLINED_FS_META | BlobFeature.HAS_TAR_HEADER
        if options.toc:
            features |= BlobFeature.HAS_TOC | BlobFeature.HAS_TAR_HEADER | BlobFeature.INLINED_CHUNK_DIGEST
        if options.batch_size:
            features |= BlobFeature.BATCH | BlobFeature.CHUNK_INFO_V2
        info = BlobInfo("", options.chunk_size, features=features)
        info.compression, info.digester = options.compression, options.digester
        if options.encrypt:
            info.features |= BlobFeature.ENCRYPTED | BlobFeature.CHUNK_INFO_V2
            info.cipher, info.key, info.iv = Cipher.AES_128_XTS, random_key(), os.urandom(16)
        self.info = info
        known = [tree for tree in (options.dictionary, options.parent) if tree is not None]
        self.writer = BlobWriter(
            info,
            self.out,
            batch_size=options.batch_size,
            aligned=options.version == 6 or options.aligned,
            dictionary=Dictionary(known),
            workers=options.workers,
            image=options.image,
        )

    def prefetch_end(self) -> None:
        """Say that all files to prefetch have been stored; policy ``blob`` of v5 notes where they end."""
        if self.options.prefetch_blob and self.options.version == 5:
            self.writer.flush()
            self.info.readahead_size = self.out.size

    def finish(self, builder: TreeBuilder, prefetch: Iterable[bytes] = ()) -> LayerResult:
        """Write what follows the data, and the bootstrap."""
        options, info, out, writer = self.options, self.info, self.out, self.writer
        writer.finish()
        sections = SectionWriter(out, options.inline_meta or options.toc)
        chunks = None
        if info.chunk_count:
            chunks = writer.chunk_map()
            sections.data(info)
            if options.version == 6:
                sections.meta(chunks)
            if options.toc:
                sections.digests(chunks)
            info.compressed_size = out.size
        tree = self._tree(builder, prefetch)
        result = LayerResult(tree, chunks=chunks, duplicates=writer.duplicates)
        if info.chunk_count:
            result.blob = info
        if options.inline_meta:
            info.id = UNKNOWN_ID
            result.bootstrap = write_bootstrap(tree)
            sections.bootstrap(result.bootstrap, Compression.ZSTD if options.toc else Compression.NONE)
        if options.toc and out.size:
            result.toc_digest, result.toc_size = sections.contents()
        result.seal(out, options.blob_id)
        if options.inline_meta:
            info.id = result.blob_digest
        else:
            info.id = result.blob_id
            info.compressed_size = out.size
            info.toc_digest, info.toc_size = result.toc_digest, result.toc_size
            result.bootstrap = write_bootstrap(tree)
        return result

    def _tree(self, builder: TreeBuilder, prefetch: Iterable[bytes]) -> Tree:
        options, writer = self.options, self.writer
        flags = super_flags(options)
        tree = builder.finish(
            options.version, options.chunk_size, flags, writer.table(), writer.references, writer.blobs
        )
        if options.parent is not None:
            tree = overlay(
                [options.parent, tree], options.whiteout, clean_base=False, keep=len(options.parent.blobs)
            )
            # The overlay copies the blob table, and this blob is not described completely yet.
            tree.blobs = [self.info if blob.id == self.info.id else blob for blob in tree.blobs]
        if tree.version == 6 and all(b.features & BlobFeature.INLINED_CHUNK_DIGEST for b in tree.blobs):
            tree.flags |= SuperFlag.INLINED_CHUNK_DIGEST
        if options.prefetch_table:
            tree.prefetch = prefetch_rows(tree, prefetch)
        return tree


def super_flags(options: BuildOptions) -> SuperFlag:
    """The flags of a file system that follow from the options."""
    flags = _COMPRESSION_FLAGS[options.compression]
    flags |= SuperFlag.HASH_BLAKE3 if options.digester == Digester.BLAKE3 else SuperFlag.HASH_SHA256
    if options.owners:
        flags |= SuperFlag.EXPLICIT_UID_GID
    if options.version == 6:
        flags |= SuperFlag.ENCRYPTION_AES_128_XTS if options.encrypt else SuperFlag.ENCRYPTION_NONE
    return flags


def prefetch_rows(tree: Tree, paths: Iterable[bytes]) -> list[int]:
    """The rows that prefetch paths name exactly, in their order, without repetitions."""
    rows = (tree.find(path) for path in paths)
    return list(dict.fromkeys(row for row in rows if row is not None))


def prefetch_paths(lines: Iterable[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Split a list of paths, one a line, into those to use and the relative ones (rafs.md 4.4).

    What equals or lies below an earlier path is dropped.
    """
    paths: list[bytes] = []
    relative: list[bytes] = []
    for line in lines:
        path = line.strip()
        if not path:
            continue
        if not path.startswith(b"/"):
            relative.append(path)
            continue
        path = b"/" + b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))
        if not any(path == known or path.startswith(known.rstrip(b"/") + b"/") for known in paths):
            paths.append(path)
    return paths, relative


def write_bootstrap(tree: Tree) -> bytes:
    """The bootstrap of a tree in its own version."""
    if tree.version == 5:
        from nydus.rafs import v5

        return v5.write(tree)
    from nydus.rafs import v6

    return v6.write(tree)


def random_key() -> bytes:
    """A key for AES-128-XTS, whose halves must differ."""
    while True:
        key = os.urandom(32)
        if key[:16] != key[16:]:
            return key
