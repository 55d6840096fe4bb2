"""What a target's tag names in the end: the manifest of an image, or an index of several.

With ``--merge-platform`` the index holds each image twice: as it was, and as a Nydus image. A client that
does not know Nydus takes the first; one that does finds the second by its ``artifactType``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from nydus.convert.copy import copy_blobs
from nydus.convert.progress import Progress
from nydus.convert.select import Image
from nydus.oci import model
from nydus.oci.model import Descriptor, Index, Manifest
from nydus.oci.place import Sink, Source

#: An empty tar file, compressed with the same bytes as everybody does it.
EMPTY_LAYER = bytes.fromhex("1f8b08000000000000ff621805a360148c5800080000ffff2eafb5ef00040000")
EMPTY_DIFF_ID = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"


def put_image(
    name: str,
    images: Sequence[Image],
    manifests: Sequence[Manifest],
    index: Index | None,
    writer: Sink,
    *,
    oci: bool,
) -> Descriptor:
    """Stores the manifests of Nydus images and gives them their name.

    Args:
        images: of which these are made.
        index: that of the source, None if it has none.
    """
    if index is None or len(images) == 1:
        return writer.put_manifest(name, model.encode(manifests[0]), manifests[0].media_type)
    media_type = model.OCI_INDEX if oci else index.media_type
    return _put_index(name, media_type, _entries(images, manifests, writer), writer, index.annotations)


def put_merged(
    name: str,
    images: Sequence[Image],
    manifests: Sequence[Manifest],
    reader: Source,
    writer: Sink,
    repository: str,
    progress: Progress,
) -> tuple[Descriptor, list[Manifest]]:
    """Stores ordinary images beside the Nydus images made of them, and gives the index of all a name.

    Args:
        repository: where the blobs of the former can be linked from, "" for nowhere.

    Returns:
        The index, and the manifests of the ordinary images.
    """
    halves = [_put_original(found, reader, writer, repository, progress) for found in images]
    entries = [entry for entry, _ in halves] + _entries(images, manifests, writer)
    return _put_index(name, model.OCI_INDEX, entries, writer), [manifest for _, manifest in halves]


def _entries(images: Sequence[Image], manifests: Sequence[Manifest], writer: Sink) -> list[Descriptor]:
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
    name: str,
    media_type: str,
    entries: Sequence[Descriptor],
    writer: Sink,
    annotations: dict[str, str] | None = None,
) -> Descriptor:
    index = Index(schema_version=2, media_type=media_type, manifests=tuple(entries), annotations=annotations)
    return writer.put_manifest(name, model.encode(index), media_type)


def _put_original(
    found: Image, reader: Source, writer: Sink, repository: str, progress: Progress
) -> tuple[Descriptor, Manifest]:
    """Stores the image as it was, but for an empty layer in front of the others.

    Without that its chain of layers would be that of the stock image, and a client would share snapshots
    between the two.

    Args:
        repository: where its blobs can be linked from, "" for nowhere.

    Returns:
        Its entry in the index, and its manifest.
    """
    manifest = found.manifest
    distinct = {layer.digest: layer for layer in manifest.layers}.values()
    there = [layer for layer in distinct if not layer.urls or reader.has_blob(layer.digest)]
    copy_blobs(reader, writer, there, repository, progress)
    docker = manifest.media_type == model.DOCKER_MANIFEST
    layer_type = model.DOCKER_LAYER_GZIP if docker else model.OCI_LAYER_GZIP
    empty = writer.put_blob(EMPTY_LAYER, layer_type, annotations={model.NYDUS_EMPTY_LAYER: "true"})
    config: dict[str, Any] = json.loads(found.raw_config)
    config["rootfs"]["diff_ids"].insert(0, EMPTY_DIFF_ID)
    entry = {"created_by": "Nydus Converter", "comment": "Nydus Empty Layer"}
    config["history"] = [entry, *(config.get("history") or [])]
    config_type = manifest.config.media_type or (model.DOCKER_CONFIG if docker else model.OCI_CONFIG)
    origin = {model.NYDUS_SOURCE_DIGEST: found.descriptor.digest}
    changed = msgspec.structs.replace(
        manifest,
        config=writer.put_blob(model.encode(config), config_type),
        layers=(empty, *manifest.layers),
        annotations={**(manifest.annotations or {}), **origin},
    )
    data = model.encode(changed)
    stored = writer.put_manifest(model.digest(data), data, changed.media_type)
    return msgspec.structs.replace(stored, platform=found.platform, annotations=origin), changed
