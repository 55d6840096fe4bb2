"""An index that holds an image twice: as it was, and as a Nydus image (``--merge-platform``).

A client that does not know Nydus takes the first; one that does finds the second by its ``artifactType``.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from nydus.convert.copy import copy_blobs
from nydus.convert.progress import Progress
from nydus.convert.select import Image
from nydus.oci import model
from nydus.oci.model import Descriptor, Manifest
from nydus.oci.place import Sink, Source

#: An empty tar file, compressed with the same bytes as everybody does it.
EMPTY_LAYER = bytes.fromhex("1f8b08000000000000ff621805a360148c5800080000ffff2eafb5ef00040000")
EMPTY_DIFF_ID = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"


def put_original(
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
