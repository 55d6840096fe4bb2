"""Push the image of an OCI layout to a registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from nydus.oci import model
from nydus.oci.registry import Repository


def push(
    layout: Path, repository: Repository, tag: str, progress: Callable[[int], None] = lambda done: None
) -> str:
    """Push the only manifest of ``layout`` as ``tag``; ``progress`` hears the bytes sent so far.

    Returns:
        The manifest's digest.
    """
    blobs = layout / "blobs" / "sha256"
    named = json.loads((layout / "index.json").read_bytes())["manifests"][0]
    data = (blobs / named["digest"].removeprefix("sha256:")).read_bytes()
    manifest = model.decode(data, model.Manifest, str(layout))
    done = 0
    for blob in (*manifest.layers, manifest.config):
        with repository.upload() as upload, open(blobs / blob.digest.removeprefix("sha256:"), "rb") as file:
            while piece := file.read(1 << 20):
                upload.write(piece)
                done += len(piece)
                progress(done)
            upload.commit(blob.digest)
    return repository.put_manifest(tag, data, named["mediaType"]).digest
