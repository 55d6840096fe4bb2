"""A Nydus image back into an ordinary OCI image (``convert --reverse``)."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from nydus.convert.copy import copy_blob, linkable_repository
from nydus.convert.documents import BOOTSTRAP, read_bootstrap_layer
from nydus.convert.image import Result
from nydus.convert.layers import repository_of
from nydus.convert.opened import PREFETCH_BLOB, SourceBackend
from nydus.convert.options import ConvertOptions
from nydus.convert.progress import LayerProgress, Progress, Silent
from nydus.convert.reuse import Reversed, ReversedLayers, bring
from nydus.convert.select import Image, reference_name, select
from nydus.convert.sizes import Sizes, blobs_of, listed, total, unlisted
from nydus.convert.target import require_target
from nydus.errors import BackendError, ConfigError, NydusError
from nydus.oci import model
from nydus.oci.model import Descriptor, Index, Manifest, Platform
from nydus.oci.place import Sink, SinkPlace, Source, SourcePlace
from nydus.oci.retry import wait_to_retry

if TYPE_CHECKING:
    from nydus.oci.encryption import PrivateKey
    from nydus.rafs.model import Array, Tree
    from nydus.storage.backend import Backend

_PIECE = 1 << 20
_BOOTSTRAP_COMMENT = "Nydus Bootstrap Layer"
#: Of igzip: 0 is fastest, 3 smallest.
_GZIP_LEVEL = 2


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one image becomes.

    Attributes:
        tree: its file system.
        layers: blobs that become layers; None stands for one layer with the whole file system.
    """

    found: Image
    tree: Tree
    layers: list[Descriptor | None]


@dataclass(frozen=True, slots=True)
class _Work:
    """What all layers need."""

    reader: Source
    writer: Sink
    blobs: Backend
    link_from: str
    options: ConvertOptions
    progress: Progress
    folder: Path | None
    record: ReversedLayers | None
    repository: str


def reverse(
    source: SourcePlace,
    target: SinkPlace,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    platforms: Sequence[Platform] | None = (),
    backend: Backend | None = None,
    keys: Sequence[PrivateKey] = (),
    *,
    work_dir: Path | None = None,
) -> Result:
    """Converts a Nydus image to an OCI image: every blob becomes a gzip layer again.

    Layer digests are not those of the first source, the contents are. An ``oci-ref`` image still has its
    layers; they are used as they are. Where blobs are not layers (in a storage backend nobody knows their
    order, and in an encrypted image the blobs do not tell what is in them), the whole file system becomes one
    layer.

    Args:
        keys: private keys, for an encrypted image.
        work_dir: existing folder for blobs while they are verified; TMPDIR by default.
        backend: where blobs are that the image does not list. Stays the caller's to close.

    Raises:
        ConfigError: the image is no Nydus image.
        NydusError: what is wrong, and in which layer.
    """
    options, progress = options or ConvertOptions(), progress or Silent()
    name, started = reference_name(target), time.monotonic()
    progress.note(f"pulling image {source}")
    reader = source.open()
    index, images = select(reader, source.target, str(source), platforms, nydus=True)
    halves = [found for found in images if found.is_nydus]
    if not halves:
        raise ConfigError(f"{source}: is not a Nydus image")
    plans = [_plan(found, reader, str(source), backend, keys) for found in halves]
    link_from = linkable_repository(source, target)
    blobs = backend or SourceBackend(reader)
    record = ReversedLayers(options.record) if options.record else None
    work = _Work(
        reader,
        target.open_sink(),
        blobs,
        link_from,
        options,
        progress,
        work_dir,
        record,
        repository_of(target),
    )
    require_target(work.writer, target)
    pulled = time.monotonic()
    progress.note(f"pulled image {source} , elapse {pulled - started:.3f}s")
    progress.note(f"converting image {source}")
    jobs = [
        (plan, layer, LayerProgress(number, layer.digest if layer else "", layer.size if layer else 0))
        for plan in plans
        for number, layer in enumerate(plan.layers, 1)
    ]
    progress.layers([state for *_, state in jobs])
    with ThreadPoolExecutor(options.workers or os.cpu_count() or 1, "reverse") as pool:
        made = list(pool.map(lambda job: _layer(work, *job), jobs))
    converted = time.monotonic()
    progress.note(f"converted image {source} , elapse {converted - pulled:.3f}s")
    progress.note(f"pushing image {target}")
    entries, manifests = [], []
    single = index is None or len(halves) == 1
    writer = work.writer
    for plan in plans:
        count = len(plan.layers)
        manifest = _manifest(plan.found, made[:count], writer, whole=None in plan.layers)
        del made[:count]
        data = model.encode(manifest)
        stored = writer.put_manifest(name if single else model.digest(data), data, manifest.media_type)
        entries.append(msgspec.structs.replace(stored, platform=plan.found.platform))
        manifests.append(manifest)
    descriptor = entries[0]
    if not single:
        several = Index(schema_version=2, media_type=model.OCI_INDEX, manifests=tuple(entries))
        descriptor = writer.put_manifest(name, model.encode(several), model.OCI_INDEX)
    ended = time.monotonic()
    progress.note(f"pushed image {target} , elapse {ended - converted:.3f}s")
    return Result(
        descriptor,
        Sizes(
            source=total(*(blobs_of(plan.found.manifest) for plan in plans))
            + unlisted(*((plan.found.manifest, plan.tree) for plan in plans)),
            target=total(*map(blobs_of, manifests)),
            source_listed=listed(found.manifest for found in halves),
            target_listed=listed(manifests),
        ),
        pull_seconds=pulled - started,
        convert_seconds=converted - pulled,
        push_seconds=ended - converted,
        layers=[state for *_, state in jobs],
    )


def _plan(
    found: Image, reader: Source, where: str, backend: Backend | None, keys: Sequence[PrivateKey]
) -> _Plan:
    from nydus import rafs
    from nydus.build.merge import overlay

    *blobs, last = found.manifest.layers
    files, _ = read_bootstrap_layer(reader, last, f"{where}: bootstrap layer", keys)
    tree = rafs.read(files[BOOTSTRAP], f"{where}: {BOOTSTRAP}")
    if tree.blobs and not blobs and backend is None:
        raise ConfigError(f"{where}: its blobs are in a storage backend; say which with --backend-type")
    if any(model.NYDUS_REF in layer.annotations for layer in blobs):
        return _Plan(found, tree, list(blobs))
    if any(model.NYDUS_ENCRYPTED_BLOB in layer.annotations for layer in blobs):
        return _Plan(found, tree, [None])  # the blobs do not tell what is in them
    copies = last.annotations.get(PREFETCH_BLOB, "")
    layers = [layer for layer in blobs if layer.digest.partition(":")[2] != copies]
    trees = [
        _layer_tree(layer.digest, layer.size, partial(reader.read_range, layer.digest)) for layer in layers
    ]
    # Blobs of a chunk dictionary come last, and are layers of other images.
    history = [entry for entry in found.config.history or () if not entry.empty_layer]
    named = sum(entry.comment != _BOOTSTRAP_COMMENT for entry in history)
    wanted = _files(tree)
    for count in (named, len(layers)):
        if 0 < count <= len(layers) and _files(overlay(trees[:count])) == wanted:
            return _Plan(found, tree, list(layers[:count]))
    return _Plan(found, tree, [None])


def _files(tree: Tree) -> dict[bytes, tuple[object, ...]]:
    """All names, with what tells files apart."""
    found: dict[bytes, tuple[object, ...]] = {}
    for row, path in tree.walk():
        node = tree.nodes[row]
        if node["mode"] & 0o170000 == 0o040000:  # its attributes may depend on what was only implied
            found[path] = ()
        else:
            content = tree.node_chunks(row)["digest"].tobytes()
            found[path] = (
                int(node["mode"]),
                int(node["size"]),
                int(node["mtime"]),
                tree.target(row),
                content,
            )
    return found


def _layer_tree(digest: str, size: int, read: Callable[[int, int], bytes]) -> Tree:
    """The file system of a layer, from the end of its blob."""
    from nydus import rafs
    from nydus.build.layer import UNKNOWN_ID
    from nydus.rafs import toc

    where, name = f"blob {digest}", digest.partition(":")[2]
    tree = rafs.read(toc.extract_bootstrap(read, size, where), where)
    tree.blobs = [replace(blob, id=name) if blob.id == UNKNOWN_ID else blob for blob in tree.blobs]
    return tree


def _layer(
    work: _Work, plan: _Plan, layer: Descriptor | None, state: LayerProgress
) -> tuple[Descriptor, str]:
    """One layer in the target: its descriptor and diff id."""
    docker = plan.found.manifest.media_type == model.DOCKER_MANIFEST
    media_type = model.DOCKER_LAYER_GZIP if docker else model.OCI_LAYER_GZIP
    source = " ".join((plan.found.manifest.layers[-1].digest, layer.digest if layer else ""))
    try:
        if known := _made_before(work, source):
            made = Descriptor(media_type=media_type, digest=known.digest, size=known.size), known.diff_id
            state.reused = True
        elif layer and (digest := layer.annotations.get(model.NYDUS_REF)):
            size = work.reader.blob_size(digest)
            copy_blob(work.reader, work.writer, LayerProgress(0, digest, size), work.link_from)
            diff_id = _diff_id(work.reader, digest, size)
            made = Descriptor(media_type=media_type, digest=digest, size=size), diff_id
        else:
            for attempt in range(1, work.options.attempts + 1):
                try:
                    made = _rebuild(work, plan, layer, state, media_type)
                    break
                except BackendError as error:
                    if not wait_to_retry(error, attempt, work.options.attempts, work.options.retry_delay):
                        raise
    except NydusError as error:
        raise NydusError(f"layer {state.number}: {error}") from error
    digest, size = made[0].digest, made[0].size
    if work.record:
        home = work.repository or (known.repository if known else "")
        work.record.add(Reversed(source=source, digest=digest, size=size, diff_id=made[1], repository=home))
    state.state, state.downloaded, state.built, state.uploaded = "done", state.size, size, size
    work.progress.changed(state)
    return made


def _made_before(work: _Work, source: str) -> Reversed | None:
    """A layer that an earlier run made, if the target has it or can link it."""
    known = work.record.find(source) if work.record else None
    with suppress(NydusError):
        if known and bring(known.digest, known.size, known.repository, work.writer, work.repository):
            return known
    return None


def _rebuild(
    work: _Work, plan: _Plan, layer: Descriptor | None, state: LayerProgress, media_type: str
) -> tuple[Descriptor, str]:
    from isal import isal_zlib

    from nydus import image
    from nydus.build.archive import write_tar

    plain, packed, size = hashlib.sha256(), hashlib.sha256(), 0
    packer = isal_zlib.compressobj(_GZIP_LEVEL, isal_zlib.DEFLATED, 31)
    with ExitStack() as stack:
        tree, blobs, omit = plan.tree, work.blobs, frozenset[int]()
        if layer is not None:
            # Tables at the end of a blob are not covered by the digests of chunks: the whole blob has to be
            # checked first.
            file = stack.enter_context(tempfile.TemporaryFile(dir=work.folder))
            spool = _Spool(layer, work, file, state)
            tree, blobs = _layer_tree(layer.digest, layer.size, spool.range), spool
            omit = _implied(tree, plan.tree)
        upload = stack.enter_context(work.writer.upload())

        def put(data: bytes) -> None:
            nonlocal size
            if data:
                packed.update(data)
                upload.write(data)
                size += len(data)

        def pack(data: bytes) -> None:
            plain.update(data)
            put(packer.compress(data))
            state.state, state.built, state.uploaded = "working", size, upload.sent
            work.progress.changed(state)

        write_tar(image.open(tree, blobs), pack, omit=omit, root=not _says_nothing(tree.nodes[:1])[0])
        put(packer.flush())
        digest = f"sha256:{packed.hexdigest()}"
        upload.commit(digest)
    made = Descriptor(media_type=media_type, digest=digest, size=size)
    return made, f"sha256:{plain.hexdigest()}"


def _implied(layer: Tree, image: Tree) -> frozenset[int]:
    """Rows of directories that the layer's archive did not have, as far as that matters.

    A layer does not say which of its directories were only implied by the names in them. One that looks so,
    but has other attributes in the image, got these below or above.
    """
    nodes = layer.nodes
    omit = set()
    for row in _says_nothing(nodes).nonzero()[0].tolist():
        other = image.find(layer.path(row)) if len(layer.children(row)) else None
        if other is None:
            continue
        node = image.nodes[other]
        same = all(node[key] == nodes[row][key] for key in ("mode", "uid", "gid", "mtime", "mtime_ns"))
        if node["mode"] & 0o170000 == 0o040000 and not (same and node["xattr"] < 0):
            omit.add(row)
    return frozenset(omit)


def _says_nothing(nodes: Array) -> Array:
    """Which of some rows are directories as they are where no archive describes them."""
    plain: Array = (nodes["mode"] == 0o040755) & (nodes["mtime"] == 0) & (nodes["xattr"] < 0)
    plain &= (nodes["uid"] == 0) & (nodes["gid"] == 0) & (nodes["mtime_ns"] == 0)
    return plain


class _Spool(SourceBackend):
    """A blob that was downloaded and checked, in an unnamed file; other blobs come from the source."""

    def __init__(self, layer: Descriptor, work: _Work, file: IO[bytes], state: LayerProgress) -> None:
        super().__init__(work.reader)
        self._id, self._file, self._length = layer.digest.partition(":")[2], file, layer.size
        stream = work.reader.blob(layer.digest, layer.size)
        try:
            while piece := stream.read(_PIECE):
                file.write(piece)
                state.downloaded += len(piece)
                work.progress.changed(state)
            file.flush()
        except OSError as error:
            where = work.folder or tempfile.gettempdir()
            raise NydusError(f"temporary file in {where}: {error.strerror}") from error
        finally:
            stream.close()

    def range(self, offset: int, size: int) -> bytes:
        """Bytes of the blob."""
        return os.pread(self._file.fileno(), size, offset)

    def _read(self, blob_id: str, offset: int, size: int) -> bytes:
        return self.range(offset, size) if blob_id == self._id else super()._read(blob_id, offset, size)

    def size(self, blob_id: str) -> int:
        return self._length if blob_id == self._id else super().size(blob_id)


def _added(entry: dict[str, Any]) -> bool:
    """Whether a history entry tells of the conversion to Nydus."""
    by = str(entry.get("created_by", ""))
    return entry.get("comment") == _BOOTSTRAP_COMMENT or by.startswith("nydusify optimize")


def _diff_id(reader: Source, digest: str, size: int) -> str:
    from nydus.build.stream import blocks

    plain = hashlib.sha256()
    stream = reader.blob(digest, size)
    try:
        for block in blocks(stream, digest):
            plain.update(block)
    finally:
        stream.close()
    return f"sha256:{plain.hexdigest()}"


def _manifest(
    found: Image, layers: Sequence[tuple[Descriptor, str]], writer: Sink, *, whole: bool
) -> Manifest:
    config: dict[str, Any] = json.loads(found.raw_config)
    config["rootfs"] = {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]}
    history = config.get("history") or []
    kept = [entry for entry in history if not _added(entry)]
    if whole:
        kept = [{**entry, "empty_layer": True} for entry in kept]
        kept.append({"created_by": "nydusify convert --reverse"})
    config["history"] = kept
    docker = found.manifest.media_type == model.DOCKER_MANIFEST
    kind = found.manifest.config.media_type
    if kind in ("", model.NYDUS_CONFIG):
        kind = model.DOCKER_CONFIG if docker else model.OCI_CONFIG
    return msgspec.structs.replace(
        found.manifest,
        artifact_type="",
        subject=None,
        config=writer.put_blob(model.encode(config), kind),
        layers=tuple(layer for layer, _ in layers),
    )
