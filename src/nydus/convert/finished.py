"""Images that were converted before, found again by source manifest, options and target repository.

Like the record of layers (:mod:`nydus.convert.reuse`), this one is believed only as far as the target
confirms it: the manifest and every blob that it names must be there.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nydus.convert.options import ConvertOptions
from nydus.convert.progress import LayerProgress
from nydus.convert.reuse import note, options_key
from nydus.convert.select import Image
from nydus.errors import NydusError
from nydus.oci import model
from nydus.oci.model import Manifest
from nydus.oci.place import Source

_AT_ONCE = 8


def kept_layers(image: Image, manifest: Manifest) -> list[LayerProgress]:
    """What there is to tell of the layers of an image that was converted before."""
    pairs = zip(image.manifest.layers, manifest.layers, strict=False)
    return [
        LayerProgress(number, layer.digest, layer.size, "done", layer.size, blob.size, blob.size, reused=True)
        for number, (layer, blob) in enumerate(pairs, 1)
    ]


class Finished:
    """The record of converted images in a folder; a folder that cannot be used is an empty record.

    Args:
        folder: that of the record of layers.
        source: name of the source image, which the target's manifest repeats.
        repository: ``host/name`` of the target.
    """

    def __init__(self, folder: Path, options: ConvertOptions, source: str, repository: str) -> None:
        self._folder = folder / "images"
        shape = (options.oci, options.merge_platform, options.with_referrer)
        self._key = (options_key(options), shape, source, repository)

    def find(self, image: Image, target: Source) -> Manifest | None:
        """What an image became, if all of it is in the target."""
        try:
            name, _, digest = (self._folder / self._name(image)).read_text("ascii").partition(" ")
            if name != self._name(image):
                return None
            _, data = target.manifest(digest)
            manifest = model.decode(data, Manifest, digest)
            if model.digest(model.encode(manifest)) != digest:
                return None
            blobs = [manifest.config.digest, *(layer.digest for layer in manifest.layers)]
            with ThreadPoolExecutor(_AT_ONCE, "finished") as pool:
                return manifest if all(pool.map(target.has_blob, blobs)) else None
        except (OSError, UnicodeDecodeError, NydusError):
            return None

    def add(self, image: Image, manifest: Manifest) -> None:
        """Notes a converted image."""
        name = self._name(image)
        note(self._folder, name, f"{name} {model.digest(model.encode(manifest))}".encode())

    def _name(self, image: Image) -> str:
        return hashlib.sha256(repr((*self._key, image.descriptor.digest)).encode()).hexdigest()
