"""An image whose blobs are in a storage backend, brought together in one place."""

from __future__ import annotations

from contextlib import closing

from nydus.convert.backend import BackendPlace, blobs_of
from nydus.convert.copy import Copied, copy_blobs
from nydus.convert.opened import open_nydus, put_variant
from nydus.convert.progress import Progress, Silent
from nydus.convert.select import reference_name
from nydus.errors import ConfigError
from nydus.oci import model
from nydus.oci.model import Descriptor, Platform
from nydus.oci.place import SinkPlace, SourcePlace


def gather(
    source: SourcePlace,
    backend: BackendPlace,
    target: SinkPlace,
    platform: Platform | None,
    progress: Progress | None = None,
) -> Copied:
    """Copies an image with its blobs, which the new manifest lists as layers before the bootstrap.

    Raises:
        ConfigError: the image has its blobs already.
        NydusError: what is wrong and where; the target's tag is written last, so it is not there then.
    """
    progress = progress or Silent()
    name = reference_name(target)
    progress.note(f"pulling image {source}")
    opened = open_nydus(source, platform)
    if opened.blobs:
        raise ConfigError(f"{source}: lists its blobs itself; leave out the storage backend")
    progress.note(f"copying image {source}")
    writer = target.open_sink()
    with closing(backend.open()) as blobs:
        reader = blobs_of(backend, blobs)
        digests = [f"sha256:{blob.id}" for blob in opened.tree.blobs]
        layers = [
            Descriptor(
                media_type=model.NYDUS_BLOB,
                digest=digest,
                size=reader.blob_size(digest),
                annotations={model.NYDUS_BLOB_ANNOTATION: "true"},
            )
            for digest in digests
        ]
        sent = copy_blobs(reader, writer, layers, "", progress)
    history = [f"copy: blob {layer.digest}" for layer in layers]
    descriptor = put_variant(
        opened, writer, name, opened.tree, layers, metas=opened.metas, annotations={}, history=history
    )
    progress.note(f"copied image {target}")
    return Copied(descriptor, len(layers), sent, sum(layer.size for layer in layers) - sent)
