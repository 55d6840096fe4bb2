"""The conversion of an OCI image into a Nydus image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from nydus.convert.backend import BackendPlace
from nydus.convert.cache import BuildCache
from nydus.convert.copy import copy_blobs, linkable_repository
from nydus.convert.documents import (
    bootstrap_layer,
    config_type,
    put_bootstrap,
    rewrite_config,
    rewrite_manifest,
)
from nydus.convert.finished import Finished, kept_layers
from nydus.convert.job import Converted
from nydus.convert.layers import convert_layers, readable, repository_of
from nydus.convert.merged import put_original
from nydus.convert.opened import Opened, open_nydus
from nydus.convert.options import ConvertOptions
from nydus.convert.progress import LayerProgress, Progress, Silent
from nydus.convert.reuse import known_of
from nydus.convert.select import Image, reference_name, select
from nydus.errors import ConfigError, FormatError
from nydus.oci import model
from nydus.oci.encryption import ENCRYPTED, recipients
from nydus.oci.model import Descriptor, Index, Manifest, Platform
from nydus.oci.place import Sink, SinkPlace, Source, SourcePlace

if TYPE_CHECKING:
    from jwcrypto.jwk import JWK

_LAYER_TYPES = (
    "application/vnd.oci.image.layer.",
    "application/vnd.docker.image.rootfs.",
)


@dataclass(slots=True)
class Result:
    """What came of a conversion.

    Attributes:
        descriptor: of what the target names now: a manifest, or an index of several.
        source_size, target_size: bytes of the configs and layers.
        start_size: of these, what must be there before a container starts: configs and bootstraps.
        pull_seconds, convert_seconds, push_seconds: reading the documents; converting layers (which are
            downloaded and uploaded meanwhile); merging them and storing the documents.
        duplicates: chunks that were stored once instead of several times.
    """

    descriptor: Descriptor
    source_size: int = 0
    target_size: int = 0
    start_size: int = 0
    pull_seconds: float = 0.0
    convert_seconds: float = 0.0
    push_seconds: float = 0.0
    duplicates: int = 0
    layers: list[LayerProgress] = field(default_factory=list)


def image(
    source: SourcePlace,
    target: SinkPlace,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    platforms: Sequence[Platform] | None = (),
    cache: BuildCache | None = None,
    backend: BackendPlace | None = None,
    dictionary: SourcePlace | None = None,
    *,
    fork: bool = False,
) -> Result:
    """Converts an image.

    Layers are converted in processes of their own, each streaming from the source into the target; nothing is
    stored here. The target's tag is written last, so that a failure leaves no image there.

    Args:
        platforms: () is that of this machine where there is a choice, None is all; with more than one the
            target is an index.
        cache: layers converted before, and where to add the new ones.
        dictionary: a Nydus image whose chunks are referred to instead of stored again; its blobs that are
            needed become layers too.
        backend: where blobs go instead of the target, which then holds the bootstrap alone.
        fork: see :class:`~nydus.convert.workers.Workers`.

    Raises:
        NydusError: one line that says what is wrong and where.
    """
    options, progress = options or ConvertOptions(), progress or Silent()
    if options.recipients:
        if cache or dictionary:
            raise ConfigError("encrypted images cannot be used with a build cache or a chunk dictionary")
        options = replace(options, oci=True, record=None)  # each has keys of its own
    readers = recipients(options.recipients)
    if options.oci_ref:
        if backend or dictionary:
            raise ConfigError("oci-ref cannot be used with a storage backend or a chunk dictionary")
        options = replace(options, oci=True)
    name = reference_name(target)
    started = time.monotonic()
    progress.note(f"pulling image {source}")
    reader = source.open()
    index, images = select(reader, source.target, str(source), platforms)
    for found in images:
        _check(found, reader, f"{source}", options)
    writer = target.open_sink()
    chunks = open_nydus(dictionary, images[0].platform, exact=False) if dictionary else None
    if chunks and chunks.elsewhere and backend is None:
        raise ConfigError(f"{dictionary}: its blobs are in a storage backend, the image's have to be, too")
    dictionary_digest = chunks.found.descriptor.digest if chunks else ""
    cached = cache.load(options, dictionary_digest) if cache else {}
    pulled = time.monotonic()
    progress.note(f"pulled image {source} , elapse {pulled - started:.3f}s")

    progress.note(f"converting image {source}")
    finished: Finished | None = None
    if options.record and repository_of(target) and not (cache or backend or dictionary):
        finished = Finished(options.record, options, str(source), repository_of(target))
    with readable(target) as stored:
        before = [finished.find(found, stored) if finished else None for found in images]
    pairs = list(zip(images, before, strict=True))
    layers, blobs = convert_layers(
        [found for found, manifest in pairs if manifest is None],
        [state for found, manifest in pairs if manifest for state in kept_layers(found, manifest)],
        source,
        backend or target,
        options,
        progress,
        cached,
        chunks.tree if chunks else None,
        cache.place.open() if cache else None,
        fork=fork,
    )
    converted = time.monotonic()
    progress.note(f"converted image {source} , elapse {converted - pulled:.3f}s")

    progress.note(f"pushing image {target}")
    link_from = linkable_repository(source, target)
    if options.oci_ref:  # the data stay in the source's layers, so these have to be where the image is
        copy_blobs(
            reader,
            writer,
            [layer for found in images for layer in found.manifest.layers],
            link_from,
            Silent(),
        )
    manifests = [
        manifest
        or _assemble(
            found,
            [blobs[layer.digest] for layer in found.manifest.layers],
            source,
            writer,
            options,
            backend=backend,
            dictionary=chunks,
            target=target,
            readers=readers,
        )
        for found, manifest in pairs
    ]
    if options.merge_platform:
        entries = [put_original(found, reader, writer, link_from) for found in images]
        entries += _put_manifests(manifests, images, writer)
        descriptor = _put_index(model.OCI_INDEX, None, entries, name, writer)
    elif index is None or len(images) == 1:
        descriptor = writer.put_manifest(name, model.encode(manifests[0]), manifests[0].media_type)
    else:
        media_type = model.OCI_INDEX if options.oci else index.media_type
        entries = _put_manifests(manifests, images, writer)
        descriptor = _put_index(media_type, index.annotations, entries, name, writer)
    if finished:
        for found, manifest in zip(images, manifests, strict=True):
            finished.add(found, manifest)
    if cache:
        known = {digest: known_of(blob, repository_of(target)) for digest, blob in blobs.items()}
        with readable(backend or target) as stored:
            where = repository_of(backend or target)
            cache.store(known, options, stored, where, dictionary_digest)
    ended = time.monotonic()
    progress.note(f"pushed image {target} , elapse {ended - converted:.3f}s")
    return Result(
        descriptor,
        source_size=sum(found.size for found in images),
        target_size=sum(m.config.size + sum(layer.size for layer in m.layers) for m in manifests),
        start_size=sum(m.config.size + m.layers[-1].size for m in manifests),
        pull_seconds=pulled - started,
        convert_seconds=converted - pulled,
        push_seconds=ended - converted,
        duplicates=sum(blob.duplicates for blob in blobs.values()),
        layers=layers,
    )


def _check(found: Image, reader: Source, where: str, options: ConvertOptions) -> None:
    if found.is_nydus:
        raise ConfigError(f"{where}: is a Nydus image already")
    if model.is_model(found.manifest):
        raise ConfigError(f"{where}: is a model artifact; use --source-backend-type model-artifact")
    if not found.manifest.layers:
        raise FormatError("the image has no layers", where=where)
    if len(found.manifest.layers) != len(found.config.rootfs.diff_ids):
        expected, count = len(found.config.rootfs.diff_ids), len(found.manifest.layers)
        raise FormatError("wrong number of layers", where=where, expected=f"{expected} diff ids", found=count)
    for number, layer in enumerate(found.manifest.layers, 1):
        kind = layer.media_type
        if kind.endswith(ENCRYPTED):
            raise ConfigError(
                f"{where}: layer {number} is encrypted; decrypt it first (skopeo copy --decryption-key)"
            )
        if not kind.startswith(_LAYER_TYPES):
            raise ConfigError(f"{where}: layer {number} is of a type that cannot be converted: {kind!r}")
        if options.oci_ref and "zstd" in kind:
            raise ConfigError(
                f"{where}: layer {number} is zstd; oci-ref needs gzip layers, convert it instead"
            )
        if options.oci_ref and layer.urls and not reader.has_blob(layer.digest):
            raise ConfigError(
                f"{where}: layer {number} is not in the registry, only its address is; "
                "oci-ref needs it there, convert it instead"
            )


def _assemble(
    found: Image,
    blobs: Sequence[Converted],
    source: SourcePlace,
    writer: Sink,
    options: ConvertOptions,
    *,
    backend: BackendPlace | None,
    dictionary: Opened | None,
    target: SinkPlace,
    readers: Sequence[JWK],
) -> Manifest:
    """Merges the layers of one image and stores all of it but the manifest.

    Args:
        backend: where the blobs are instead of the target, whose manifest then does not list them.
        readers: for whom the bootstrap is encrypted.
    """
    from nydus.build.layer import prefetch_rows, write_bootstrap
    from nydus.build.merge import merge

    tree = merge([blob.tree for blob in blobs], dictionary.tree if dictionary else None)
    tree.prefetch = prefetch_rows(tree, options.prefetch)
    metas = {blob.digest.removeprefix("sha256:"): blob.meta for blob in blobs if blob.meta}
    packed, diff_id = bootstrap_layer(write_bootstrap(tree), metas)
    bootstrap = put_bootstrap(writer, packed, readers)
    where = f"{source}: config"
    layers = [
        Descriptor(
            media_type=model.NYDUS_BLOB,
            digest=blob.digest,
            size=blob.size,
            annotations={
                model.NYDUS_BLOB_ANNOTATION: "true",
                **({model.NYDUS_REF: blob.reference} if blob.reference else {}),
                **({model.NYDUS_ENCRYPTED_BLOB: "true"} if readers else {}),
            },
        )
        for blob in blobs
    ]
    if dictionary is not None:
        own = {layer.digest for layer in layers}
        used = [f"sha256:{blob.id}" for blob in tree.blobs]
        blobs_sink = backend.open_sink() if backend else writer
        for digest in used:
            if digest not in own and not dictionary.layer_of(digest) and not blobs_sink.has_blob(digest):
                raise ConfigError(f"{dictionary.place}: its blob {digest} is not in {backend}")
        wanted = [layer.digest for layer in map(dictionary.layer_of, used) if layer]
        shared = [layer for layer in dictionary.blobs if layer.digest in wanted and layer.digest not in own]
        link_from = "" if backend else linkable_repository(dictionary.place, target)
        dictionary.copy_to(blobs_sink, link_from, Silent(), shared)
        layers += shared
    if backend:
        layers = []
    diff_ids = [*(layer.digest for layer in layers), diff_id]
    raw_config = rewrite_config(found.raw_config, diff_ids, where, keep_history=backend is None)
    kind = model.NYDUS_CONFIG if options.merge_platform else config_type(found.manifest, oci=options.oci)
    config = writer.put_blob(raw_config, kind)
    origin = found.descriptor
    subject = Descriptor(media_type=found.manifest.media_type, digest=origin.digest, size=origin.size)
    return rewrite_manifest(
        found.manifest,
        found.descriptor.digest,
        str(source),
        config,
        layers,
        bootstrap,
        fs_version=options.fs_version,
        oci=options.oci,
        subject=subject if options.with_referrer else None,
    )


def _put_manifests(manifests: Sequence[Manifest], images: Sequence[Image], writer: Sink) -> list[Descriptor]:
    """Stores manifests by digest; returns their entries for an index."""
    entries = []
    for manifest, found in zip(manifests, images, strict=True):
        data = model.encode(manifest)
        stored = writer.put_manifest(model.digest(data), data, manifest.media_type)
        nydus = manifest.config.media_type == model.NYDUS_CONFIG
        kind = model.NYDUS_MANIFEST if nydus else ""
        entries.append(msgspec.structs.replace(stored, platform=found.platform, artifact_type=kind))
    return entries


def _put_index(
    media_type: str,
    annotations: dict[str, str] | None,
    entries: Sequence[Descriptor],
    name: str,
    writer: Sink,
) -> Descriptor:
    index = Index(schema_version=2, media_type=media_type, manifests=tuple(entries), annotations=annotations)
    return writer.put_manifest(name, model.encode(index), media_type)
