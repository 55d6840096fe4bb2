"""A Nydus image back into an ordinary OCI image (``convert --reverse``)."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import msgspec

from nydus.convert.copy import copy_blob, linkable_repository
from nydus.convert.image import Result
from nydus.convert.opened import SourceBackend
from nydus.convert.options import ConvertOptions
from nydus.convert.progress import LayerProgress, Progress, Silent
from nydus.convert.select import Image, host_platform, reference_name, select
from nydus.errors import BackendError, ConfigError, NydusError
from nydus.oci import model
from nydus.oci.model import Descriptor, Index, Manifest, Platform
from nydus.oci.place import Sink, SinkPlace, Source, SourcePlace

#: Of igzip: 0 is fastest, 3 smallest.
_GZIP_LEVEL = 2


def reverse(
    source: SourcePlace,
    target: SinkPlace,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    platforms: Sequence[Platform] | None = (),
) -> Result:
    """Converts a Nydus image to an OCI image: every blob becomes a gzip layer again.

    Layer digests are not those of the first source, the contents are. An ``oci-ref`` image still has its
    layers; they are used as they are.

    Raises:
        ConfigError: the image is no Nydus image.
        NydusError: what is wrong, and in which layer.
    """
    options, progress = options or ConvertOptions(), progress or Silent()
    if platforms is not None and not platforms:
        platforms = (host_platform(),)
    name, started = reference_name(target), time.monotonic()
    progress.note(f"pulling image {source}")
    reader = source.open()
    index, images = select(reader, source.target, str(source), platforms, nydus=True)
    halves = [found for found in images if found.is_nydus]
    if not halves:
        raise ConfigError(f"{source}: is not a Nydus image")
    writer, link_from = target.open_sink(), linkable_repository(source, target)
    pulled = time.monotonic()
    progress.note(f"pulled image {source} , elapse {pulled - started:.3f}s")
    progress.note(f"converting image {source}")
    states = [LayerProgress(n, d.digest, d.size) for found in halves for n, d in _blobs(found)]
    progress.layers(states)
    waiting = iter(states)
    jobs = [(found, layer, next(waiting)) for found in halves for _, layer in _blobs(found)]
    with ThreadPoolExecutor(options.workers or os.cpu_count() or 1, "reverse") as pool:
        made = list(
            pool.map(
                lambda job: _layer(job[0], job[1], job[2], reader, writer, link_from, options, progress), jobs
            )
        )
    converted = time.monotonic()
    progress.note(f"converted image {source} , elapse {converted - pulled:.3f}s")
    progress.note(f"pushing image {target}")
    entries, sizes = [], 0
    single = index is None or len(halves) == 1
    for found in halves:
        count = len(found.manifest.layers) - 1
        manifest = _manifest(found, made[:count], writer, str(source))
        del made[:count]
        data = model.encode(manifest)
        stored = writer.put_manifest(name if single else model.digest(data), data, manifest.media_type)
        entries.append(msgspec.structs.replace(stored, platform=found.platform))
        sizes += manifest.config.size + sum(layer.size for layer in manifest.layers)
    descriptor = entries[0]
    if not single:
        listed = Index(schema_version=2, media_type=model.OCI_INDEX, manifests=tuple(entries))
        descriptor = writer.put_manifest(name, model.encode(listed), model.OCI_INDEX)
    ended = time.monotonic()
    progress.note(f"pushed image {target} , elapse {ended - converted:.3f}s")
    return Result(
        descriptor,
        source_size=sum(found.size for found in halves),
        target_size=sizes,
        pull_seconds=pulled - started,
        convert_seconds=converted - pulled,
        push_seconds=ended - converted,
        layers=states,
    )


def _blobs(found: Image) -> list[tuple[int, Descriptor]]:
    return list(enumerate(found.manifest.layers[:-1], 1))


def _layer(
    found: Image,
    layer: Descriptor,
    state: LayerProgress,
    reader: Source,
    writer: Sink,
    link_from: str,
    options: ConvertOptions,
    progress: Progress,
) -> tuple[Descriptor, str]:
    """One layer in the target: its descriptor and diff id."""
    docker = found.manifest.media_type == model.DOCKER_MANIFEST
    media_type = model.DOCKER_LAYER_GZIP if docker else model.OCI_LAYER_GZIP
    try:
        if digest := layer.annotations.get(model.NYDUS_REF):
            size = reader.blob_size(digest)
            copy_blob(reader, writer, LayerProgress(0, digest, size), link_from)
            made = Descriptor(media_type=media_type, digest=digest, size=size), _diff_id(reader, digest, size)
        else:
            for attempt in range(1, options.attempts + 1):
                try:
                    made = _rebuild(layer, state, reader, writer, media_type, progress)
                    break
                except BackendError as error:
                    if error.permanent or attempt == options.attempts:
                        raise
                    time.sleep(options.retry_delay)
    except NydusError as error:
        raise NydusError(f"layer {state.number}: {error}") from error
    state.state, state.downloaded, state.built, state.uploaded = (
        "done",
        state.size,
        made[0].size,
        made[0].size,
    )
    progress.changed(state)
    return made


def _rebuild(
    layer: Descriptor, state: LayerProgress, reader: Source, writer: Sink, media_type: str, progress: Progress
) -> tuple[Descriptor, str]:
    from isal import isal_zlib

    from nydus import image, rafs
    from nydus.build.archive import write_tar
    from nydus.build.layer import UNKNOWN_ID
    from nydus.rafs import toc

    where, name = f"blob {layer.digest}", layer.digest.partition(":")[2]
    bootstrap = toc.extract_bootstrap(lambda o, n: reader.read_range(layer.digest, o, n), layer.size, where)
    tree = rafs.read(bootstrap, where)
    tree.blobs = [replace(blob, id=name) if blob.id == UNKNOWN_ID else blob for blob in tree.blobs]
    plain, packed, size = hashlib.sha256(), hashlib.sha256(), 0
    packer = isal_zlib.compressobj(_GZIP_LEVEL, isal_zlib.DEFLATED, 31)
    with writer.upload() as upload:

        def put(data: bytes) -> None:
            nonlocal size
            if data:
                packed.update(data)
                upload.write(data)
                size += len(data)

        def pack(data: bytes) -> None:
            plain.update(data)
            put(packer.compress(data))
            state.state, state.built, state.uploaded = "converting", size, upload.sent
            progress.changed(state)

        with image.open(tree, SourceBackend(reader)) as opened:
            write_tar(opened, pack)
        put(packer.flush())
        digest = f"sha256:{packed.hexdigest()}"
        upload.commit(digest)
    made = Descriptor(media_type=media_type, digest=digest, size=size)
    return made, f"sha256:{plain.hexdigest()}"


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


def _manifest(found: Image, layers: Sequence[tuple[Descriptor, str]], writer: Sink, where: str) -> Manifest:
    config: dict[str, Any] = json.loads(found.raw_config)
    config["rootfs"] = {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]}
    history = config.get("history") or []
    config["history"] = [entry for entry in history if entry.get("comment") != "Nydus Bootstrap Layer"]
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
