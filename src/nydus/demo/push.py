"""Push the image of an OCI layout to a registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nydus.oci import model
from nydus.oci.layout import Layout
from nydus.oci.registry import Repository


def push(
    layout: Path, repository: Repository, tag: str, progress: Callable[[int], None] = lambda done: None
) -> str:
    """Push the only manifest of ``layout`` as ``tag``; ``progress`` hears the bytes sent so far.

    Returns:
        The manifest's digest.
    """
    source = Layout(layout)
    described, data = source.manifest()
    manifest = model.decode(data, model.Manifest, str(layout))
    done = 0
    for blob in (*manifest.layers, manifest.config):
        with repository.upload() as upload, source.blob(blob.digest, blob.size) as stream:
            while piece := stream.read(1 << 20):
                upload.write(piece)
                done += len(piece)
                progress(done)
            upload.commit(blob.digest)
    return repository.put_manifest(tag, data, described.media_type).digest
