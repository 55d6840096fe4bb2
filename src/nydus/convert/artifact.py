"""Model artifacts (CNCF ModelPack, ``modctl``): the layers stay, a bootstrap says where their files lie.

oci-image.md 5.10. The layers are tar archives or single files, which are read by range. Archives that are
compressed get one more layer each: gzip an index, with which parts can be read (as ``oci-ref`` has it), zstd,
of which nothing can be read but all, a Nydus blob with the same files.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from nydus.convert.copy import copy_blobs, linkable_repository
from nydus.convert.documents import bootstrap_layer, provenance
from nydus.convert.image import Result
from nydus.convert.options import ConvertOptions
from nydus.convert.progress import Progress, Silent
from nydus.convert.select import reference_name
from nydus.convert.sizes import measure
from nydus.convert.target import require_target
from nydus.errors import ConfigError, FormatError
from nydus.oci import model
from nydus.oci.model import Descriptor, Manifest
from nydus.oci.place import Sink, SinkPlace, Source, SourcePlace, Stream

if TYPE_CHECKING:
    from nydus.build.layer import LayerResult
    from nydus.build.tree import TreeBuilder
    from nydus.rafs.model import Tree

ARTIFACT_TYPE = "containerd.io/snapshot/nydus-artifact-type"
BACKEND = "image/backend.json"
_FILE_PATH = ("org.cnai.model.filepath", "org.cncf.model.filepath")
_LAYER = re.compile(r"application/vnd\.(?:cnai|cncf)\.model\.([a-z.]+)\.v1\.(tar|raw)(\+[a-z]+)?")
_LARGE, _SMALL, _LEAST = 64 << 20, 4 << 20, 4 << 10
_KINDS_LARGE = ("weight", "dataset")
_COMPRESSED = ("+gzip", "+zstd")
_INFLATED = 1 << 20
_PIECE = 1 << 20


@dataclass(slots=True)
class _Chunks:
    """Columns of the chunk table under construction."""

    blob: array[int] = field(default_factory=lambda: array("I"))
    offset: array[int] = field(default_factory=lambda: array("Q"))
    size: array[int] = field(default_factory=lambda: array("I"))
    crc: array[int] = field(default_factory=lambda: array("I"))


def convert_artifact(
    source: SourcePlace,
    target: SinkPlace,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    chunk_size: int = 0,
) -> Result:
    """Makes an image of a model artifact that can be mounted; its layers are linked or copied.

    Every layer is read once, for its digest and the CRCs of its chunks.

    Args:
        chunk_size: of weights and datasets, a power of two from 4 KiB to 64 MiB; 0 is 64 MiB.

    Raises:
        ConfigError: no model artifact, or one with a compressed layer that is no archive.
        NydusError: what is wrong, and in which layer.
    """
    options, progress = options or ConvertOptions(), progress or Silent()
    if chunk_size and (chunk_size & (chunk_size - 1) or not _LEAST <= chunk_size <= _LARGE):
        raise ConfigError(
            f"chunk-size must be a power of two from {_LEAST:#x} to {_LARGE:#x}, not {chunk_size:#x}"
        )
    name, started = reference_name(target), time.monotonic()
    progress.note(f"pulling image {source}")
    reader = source.open()
    descriptor, raw = reader.manifest(source.target)
    manifest = model.decode_image(raw, descriptor.media_type, str(source))
    if not isinstance(manifest, Manifest) or not model.is_model(manifest):
        raise ConfigError(f"{source}: is no model artifact")
    if not manifest.layers or model.NYDUS_BOOTSTRAP in manifest.layers[-1].annotations:
        raise ConfigError(f"{source}: has no layers, or a bootstrap already")
    numbered = enumerate(manifest.layers, 1)
    sizes = [_chunk_size(layer, number, source, chunk_size) for number, layer in numbered]
    pulled = time.monotonic()
    progress.note(f"pulled image {source} , elapse {pulled - started:.3f}s")

    progress.note(f"converting image {source}")
    writer = target.open_sink()
    require_target(writer, target)
    packed, added = _bootstrap(manifest.layers, sizes, reader, writer, str(source), options)
    blobs = list({blob.digest: blob for blob in (*manifest.layers, manifest.config)}.values())
    copy_blobs(reader, writer, blobs, linkable_repository(source, target), progress)
    converted = time.monotonic()
    progress.note(f"converted image {source} , elapse {converted - pulled:.3f}s")

    progress.note(f"pushing image {target}")
    marks = {model.NYDUS_BOOTSTRAP: "true", model.NYDUS_FS_VERSION: "6"}
    marks[ARTIFACT_TYPE] = manifest.artifact_type
    bootstrap = writer.put_blob(packed, model.OCI_LAYER_GZIP, annotations=marks)
    made = msgspec.structs.replace(
        manifest,
        media_type=model.OCI_MANIFEST,
        layers=(*manifest.layers, *added, bootstrap),
        subject=Descriptor(media_type=model.OCI_MANIFEST, digest=model.digest(raw), size=len(raw)),
        annotations={**(manifest.annotations or {}), **provenance(model.digest(raw), str(source), 6)},
    )
    stored = writer.put_manifest(name, model.encode(made), model.OCI_MANIFEST)
    ended = time.monotonic()
    progress.note(f"pushed image {target} , elapse {ended - converted:.3f}s")
    return Result(
        stored,
        measure([manifest], [made], [()]),
        pull_seconds=pulled - started,
        convert_seconds=converted - pulled,
        push_seconds=ended - converted,
    )


def _chunk_size(layer: Descriptor, number: int, source: SourcePlace, large: int) -> int:
    match = _LAYER.fullmatch(layer.media_type)
    if not match:
        raise ConfigError(f"{source}: layer {number} is of an unknown type: {layer.media_type!r}")
    if match[3] and (match[2] != "tar" or match[3] not in _COMPRESSED):
        raise ConfigError(
            f"{source}: layer {number} cannot be used: {layer.media_type!r}; build the artifact with layers "
            "that are tar (plain, +gzip or +zstd) or plain raw"
        )
    return (large or _LARGE) if match[1] in _KINDS_LARGE else _SMALL


def _compressed(layer: Descriptor) -> str:
    return next((suffix for suffix in _COMPRESSED if layer.media_type.endswith(suffix)), "")


def _bootstrap(
    layers: tuple[Descriptor, ...],
    sizes: list[int],
    reader: Source,
    writer: Sink,
    where: str,
    options: ConvertOptions,
) -> tuple[bytes, list[Descriptor]]:
    """The bootstrap layer, and the layers that are needed besides those of the model."""
    from nydus.build.layer import prefetch_rows, write_bootstrap
    from nydus.build.merge import Whiteout, merge
    from nydus.rafs.model import BlobFeature

    numbered = list(enumerate(zip(layers, sizes, strict=True), 1))
    plain = [size for _, (layer, size) in numbered if not _compressed(layer)]
    # That of the image is the unit in which the kernel looks chunks up, and what is inflated at once.
    unit = min(_SMALL if len(plain) == len(layers) else _INFLATED, *plain, _SMALL)
    trees: list[Tree] = []
    added: list[Descriptor] = []
    metas: dict[str, bytes] = {}
    for compressed, group in itertools.groupby(numbered, key=lambda item: _compressed(item[1][0])):
        if not compressed:
            trees.append(_plain_tree(list(group), unit, reader, where))
            continue
        for position, (layer, _) in group:
            built, stored = _compressed_tree(layer, unit, reader, writer, f"{where}: layer {position}")
            trees.append(built.tree)
            metas[built.blob_digest] = built.blob_meta
            added.append(stored)
    if added:
        _require_apart(trees, where)
        tree = merge(trees, whiteout=Whiteout.NONE)  # the layers of a model hide nothing of each other
    else:
        tree = trees[0]
    tree.prefetch = prefetch_rows(tree, options.prefetch)
    known = {f"sha256:{blob.id}" for blob in tree.blobs if blob.features & BlobFeature.EXTERNAL}
    described = [
        {
            "backend": 0,
            "config": {
                "media_type": layer.media_type,
                "digest": layer.digest,
                "size": str(layer.size),
                "chunk_size": f"{size >> 20}MiB" if size >= 1 << 20 else str(size),
            },
        }
        for layer, size in zip(layers, sizes, strict=True)
        if layer.digest in known
    ]
    backend = {"version": "v1", "backends": [{"type": "registry"}], "blobs": described}
    others = {BACKEND: json.dumps(backend).encode()}
    packed, _ = bootstrap_layer(write_bootstrap(tree), {k: v for k, v in metas.items() if v}, others)
    return packed, added


def _compressed_tree(
    layer: Descriptor, unit: int, reader: Source, writer: Sink, where: str
) -> tuple[LayerResult, Descriptor]:
    """The files of a compressed archive, and the layer through which they are read; that is stored."""
    from nydus.build.layer import BuildOptions, build_layer
    from nydus.build.merge import Whiteout
    from nydus.build.zran import build_reference
    from nydus.rafs.model import Compression, Digester

    indexed = _compressed(layer) == "+gzip"
    options = BuildOptions(
        compression=Compression.GZIP if indexed else Compression.ZSTD,
        digester=Digester.SHA256,
        chunk_size=unit,
        inline_meta=True,
        toc=True,
        aligned=True,
        whiteout=Whiteout.NONE,
    )
    build = build_reference if indexed else build_layer
    stream = reader.blob(layer.digest, layer.size)
    try:
        with writer.upload() as upload:
            try:
                built = build(stream, upload.write, options, where=where)
            except FormatError:
                _drain(stream)  # a wrong digest explains why it cannot be understood
                raise
            _drain(stream)
            digest = f"sha256:{built.blob_digest}"
            upload.commit(digest)
    finally:
        stream.close()
    marks = {model.NYDUS_BLOB_ANNOTATION: "true"}
    if indexed:
        marks[model.NYDUS_REF] = layer.digest
        if built.blob is not None:
            built.blob.rafs_digest = bytes.fromhex(built.blob_digest)
    stored = Descriptor(media_type=model.NYDUS_BLOB, digest=digest, size=built.blob_size, annotations=marks)
    return built, stored


def _drain(stream: Stream) -> None:
    """Reads to the end, where the digest is checked."""
    while stream.read(_PIECE):
        pass


def _require_apart(trees: list[Tree], where: str) -> None:
    """That only directories are in several layers: a model is the sum of them."""
    known: dict[bytes, bool] = {}  # path -> whether it is a directory
    chunked: dict[str, int] = {}
    for tree in trees:
        found = {path: stat.S_ISDIR(int(tree.nodes["mode"][row])) for row, path in tree.walk()}
        for path, directory in found.items():
            if not (directory and known.get(path, True)) and path in known:
                raise FormatError("several layers have this file", where=where, found=os.fsdecode(path))
        known.update(found)
        for blob in tree.blobs:
            if chunked.setdefault(blob.id, blob.chunk_size) != blob.chunk_size:
                raise FormatError("layers of different types have the same data", where=where, found=blob.id)


def _plain_tree(
    layers: list[tuple[int, tuple[Descriptor, int]]], unit: int, reader: Source, where: str
) -> Tree:
    """The files of layers that are not compressed: (number, (layer, chunk size)) of each."""
    from nydus.build.layer import BuildOptions, super_flags
    from nydus.build.tree import TreeBuilder
    from nydus.rafs import blobmeta
    from nydus.rafs.model import CHUNK, BlobFeature, BlobInfo, ChunkFlag, Compression, Digester

    builder, chunks, seen = TreeBuilder(where=where), _Chunks(), set[bytes]()
    first: dict[str, int] = {}  # raw layers of equal files are one blob
    for row, (position, (layer, size)) in enumerate(layers):
        number = first.setdefault(layer.digest, row)
        stream = reader.blob(layer.digest, layer.size)
        try:
            _add_layer(builder, chunks, seen, number, layer, size, stream, f"{where}: layer {position}")
        finally:
            stream.close()
    table = np.zeros(len(chunks.blob), CHUNK)
    table["blob_index"], table["coffset"], table["crc"] = chunks.blob, chunks.offset, chunks.crc
    table["csize"] = table["usize"] = np.array(chunks.size, np.uint32)
    table["flags"] = int(ChunkFlag.HAS_CRC)
    blobs = []
    given = table["blob_index"].copy()
    for index, number in enumerate(np.unique(given).tolist()):  # an image has no blob without chunks
        rows = np.flatnonzero(given == number)
        table["blob_index"][rows], table["index"][rows] = index, np.arange(len(rows))
        blob = BlobInfo(
            layers[number][1][0].digest.partition(":")[2],
            layers[number][1][1],
            chunk_count=len(rows),
            compression=Compression.NONE,
            features=BlobFeature.EXTERNAL | BlobFeature.CAP_TAR_TOC | BlobFeature.ALIGNED,
            compressed_size=layers[number][1][0].size,
        )
        table["uoffset"][rows], blob.uncompressed_size = blobmeta.own_places(table[rows])
        blobs.append(blob)
    options = BuildOptions(compression=Compression.NONE, digester=Digester.SHA256, chunk_size=unit)
    flags = super_flags(options)
    tree = builder.finish(6, unit, flags, table, np.arange(len(table)), blobs)
    for start, count in np.unique(tree.nodes[["chunk", "chunk_count"]]).tolist():
        sizes_of = tree.chunks["usize"][start : start + count].astype(np.uint64)
        tree.chunks["file_offset"][start : start + count] = np.cumsum(sizes_of) - sizes_of
    return tree


def _add_layer(
    builder: TreeBuilder,
    chunks: _Chunks,
    seen: set[bytes],
    number: int,
    layer: Descriptor,
    chunk_size: int,
    stream: Stream,
    where: str,
) -> None:
    """Adds the files of one layer; reads all of it, which checks its digest."""
    from nydus.build.layer import BuildOptions, add_entry
    from nydus.build.stream import Window
    from nydus.build.tar import TarReader
    from nydus.rafs import codec

    options = BuildOptions(chunk_size=_SMALL)
    named = next((layer.annotations[key] for key in _FILE_PATH if key in layer.annotations), "")
    window = Window(iter(lambda: stream.read(_PIECE), b""), where)

    def add_data(inode: int, start: int, size: int) -> None:
        first = len(chunks.blob)
        for offset in range(0, size, chunk_size):
            length, crc = min(chunk_size, size - offset), 0
            for done in range(0, length, _PIECE):
                crc = codec.crc32c(window.take(min(_PIECE, length - done)), crc)
            chunks.blob.append(number)
            chunks.offset.append(start + offset)
            chunks.size.append(length)
            chunks.crc.append(crc)
        builder.set_chunks(inode, first, len(chunks.blob) - first)

    if ".raw" in layer.media_type:
        if not named:
            raise FormatError("a raw layer without the name of its file", where=where, expected=_FILE_PATH[0])
        path = _path(named.encode(), seen, where)
        add_data(builder.add(path, stat.S_IFREG | 0o644, size=layer.size), 0, layer.size)
        window.drain()
        return
    for entry in TarReader(window):
        if entry.sparse is not None or entry.hard_link:
            what = "sparse files and hard links cannot be used"
            raise FormatError(what, where=where, found=repr(entry.name))
        if stat.S_ISREG(entry.mode):
            _path(entry.name, seen, where)
        inode = add_entry(builder, entry, options)
        if inode is not None and entry.size:
            add_data(inode, entry.offset, entry.size)


def _path(name: bytes, seen: set[bytes], where: str) -> bytes:
    path = b"/" + b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))
    if b".." in path.split(b"/") or path == b"/" or b"\0" in path:
        raise FormatError("not the path of a file", where=where, found=repr(name))
    if path in seen:
        raise FormatError("another layer has this file, too", where=where, found=repr(name))
    seen.add(path)
    return path


def tar_layers(manifest: Manifest) -> Iterator[tuple[Descriptor, str]]:
    """The layers of a model artifact that hold its files, and the path of the file where it is one alone."""
    for layer in manifest.layers:
        if not {model.NYDUS_BOOTSTRAP, model.NYDUS_BLOB_ANNOTATION} & layer.annotations.keys():
            named = next((layer.annotations[key] for key in _FILE_PATH if key in layer.annotations), "")
            yield layer, named if ".raw" in layer.media_type else ""
