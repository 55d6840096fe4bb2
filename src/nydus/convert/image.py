"""The conversion of an OCI image into a Nydus image."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from nydus.convert.documents import bootstrap_layer, config_type, rewrite_config, rewrite_manifest
from nydus.convert.job import Converted, Job
from nydus.convert.options import ConvertOptions
from nydus.convert.progress import LayerProgress, Progress, Silent
from nydus.convert.select import Image, host_platform, reference_name, select
from nydus.convert.workers import Workers
from nydus.errors import ConfigError, FormatError
from nydus.oci import model
from nydus.oci.model import Descriptor, Index, Platform
from nydus.oci.place import Sink, SinkPlace, SourcePlace

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
        pull_seconds, convert_seconds, push_seconds: reading the documents; converting layers (which are
            downloaded and uploaded meanwhile); merging them and storing the documents.
        duplicates: chunks that were stored once instead of several times.
    """

    descriptor: Descriptor
    source_size: int = 0
    target_size: int = 0
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
) -> Result:
    """Converts an image.

    Layers are converted in processes of their own, each streaming from the source into the target; nothing is
    stored here. The target's tag is written last, so that a failure leaves no image there.

    Args:
        platforms: () is that of this machine, None is all; with more than one the target is an index.

    Raises:
        NydusError: one line that says what is wrong and where.
    """
    options, progress = options or ConvertOptions(), progress or Silent()
    if platforms is not None and not platforms:
        platforms = (host_platform(),)
    name = reference_name(target)
    with Workers(options.workers or os.cpu_count() or 1) as workers:
        started = time.monotonic()
        progress.note(f"pulling image {source}")
        reader = source.open()
        index, images = select(reader, source.target, str(source), platforms)
        for found in images:
            _check(found, f"{source}")
        writer = target.open_sink()
        pulled = time.monotonic()
        progress.note(f"pulled image {source} , elapse {pulled - started:.3f}s")

        progress.note(f"converting image {source}")
        layers, blobs = _convert_layers(images, source, target, options, workers, progress)
    converted = time.monotonic()
    progress.note(f"converted image {source} , elapse {converted - pulled:.3f}s")

    progress.note(f"pushing image {target}")
    single = index is None or len(images) == 1
    described: list[Descriptor] = []
    sizes = 0
    for found in images:
        manifest = _assemble(
            found, [blobs[layer.digest] for layer in found.manifest.layers], source, writer, options
        )
        data = model.encode(manifest)
        reference = name if single else model.digest(data)
        stored = writer.put_manifest(reference, data, manifest.media_type)
        described.append(msgspec.structs.replace(stored, platform=found.descriptor.platform))
        sizes += manifest.config.size + sum(layer.size for layer in manifest.layers)
    result = Result(described[0])
    if not single:
        assert index is not None
        result.descriptor = _put_index(index, described, name, writer, options)
    ended = time.monotonic()
    progress.note(f"pushed image {target} , elapse {ended - converted:.3f}s")
    result.source_size, result.target_size = sum(found.size for found in images), sizes
    result.pull_seconds, result.convert_seconds = pulled - started, converted - pulled
    result.push_seconds, result.layers = ended - converted, layers
    result.duplicates = sum(blob.duplicates for blob in blobs.values())
    return result


def _check(found: Image, where: str) -> None:
    if found.is_nydus:
        raise ConfigError(f"{where}: is a Nydus image already")
    if not found.manifest.layers:
        raise FormatError("the image has no layers", where=where)
    if len(found.manifest.layers) != len(found.config.rootfs.diff_ids):
        expected, count = len(found.config.rootfs.diff_ids), len(found.manifest.layers)
        raise FormatError("wrong number of layers", where=where, expected=f"{expected} diff ids", found=count)
    for number, layer in enumerate(found.manifest.layers, 1):
        kind = layer.media_type
        if not kind.startswith(_LAYER_TYPES) or kind.endswith("+encrypted"):
            raise ConfigError(f"{where}: layer {number} is of a type that cannot be converted: {kind!r}")


def _convert_layers(
    images: Sequence[Image],
    source: SourcePlace,
    target: SinkPlace,
    options: ConvertOptions,
    workers: Workers,
    progress: Progress,
) -> tuple[list[LayerProgress], dict[str, Converted]]:
    """Converts every distinct layer once."""
    distinct: dict[str, tuple[int, Descriptor]] = {}
    for found in images:
        for number, layer in enumerate(found.manifest.layers, 1):
            distinct.setdefault(layer.digest, (number, layer))
    jobs = [Job(number, layer, source, target, options) for number, layer in distinct.values()]
    states = [LayerProgress(job.number, job.layer.digest, job.layer.size) for job in jobs]
    blobs: dict[str, Converted] = {}
    progress.layers(states)

    def advance(position: int, read: int, built: int, sent: int) -> None:
        state = states[position]
        state.state, state.downloaded, state.built, state.uploaded = "converting", read, built, sent
        progress.changed(state)

    def finish(position: int, converted: Converted) -> None:
        state = states[position]
        state.state, state.downloaded = "done", state.size
        state.built = state.uploaded = converted.size
        blobs[state.digest] = converted
        progress.changed(state)

    workers.run(jobs, advance, finish)
    return states, blobs


def _assemble(
    found: Image, blobs: Sequence[Converted], source: SourcePlace, writer: Sink, options: ConvertOptions
) -> model.Manifest:
    """Merges the layers of one image and stores all of it but the manifest."""
    from nydus.build.layer import prefetch_rows, write_bootstrap
    from nydus.build.merge import merge

    tree = merge([blob.tree for blob in blobs])
    tree.prefetch = prefetch_rows(tree, options.prefetch)
    metas = {blob.digest.removeprefix("sha256:"): blob.meta for blob in blobs if blob.meta}
    packed, diff_id = bootstrap_layer(write_bootstrap(tree), metas)
    bootstrap = writer.put_blob(packed, model.OCI_LAYER_GZIP)
    where = f"{source}: config"
    raw_config = rewrite_config(found.raw_config, [*(blob.digest for blob in blobs), diff_id], where)
    config = writer.put_blob(raw_config, config_type(found.manifest, oci=options.oci))
    return rewrite_manifest(
        found.manifest,
        found.descriptor.digest,
        str(source),
        config,
        [
            Descriptor(
                media_type=model.NYDUS_BLOB,
                digest=blob.digest,
                size=blob.size,
                annotations={model.NYDUS_BLOB_ANNOTATION: "true"},
            )
            for blob in blobs
        ],
        bootstrap,
        fs_version=options.fs_version,
        oci=options.oci,
    )


def _put_index(
    index: Index, manifests: Sequence[Descriptor], name: str, writer: Sink, options: ConvertOptions
) -> Descriptor:
    docker = index.media_type == model.DOCKER_INDEX and not options.oci
    media_type = model.DOCKER_INDEX if docker else model.OCI_INDEX
    written = Index(
        schema_version=2, media_type=media_type, manifests=tuple(manifests), annotations=index.annotations
    )
    return writer.put_manifest(name, model.encode(written), media_type)
