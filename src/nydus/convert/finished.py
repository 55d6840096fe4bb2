"""Images that were converted before, found again by the layers of their source and the options.

Like the record of layers (:mod:`nydus.convert.reuse`), this one is believed only as far as the target
confirms it: every blob must be there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from nydus.convert.options import ConvertOptions
from nydus.convert.progress import LayerProgress
from nydus.convert.reuse import bring, note, options_key
from nydus.convert.select import Image
from nydus.errors import NydusError
from nydus.oci import model
from nydus.oci.place import Sink, Source

_AT_ONCE = 8


class Stored(msgspec.Struct, frozen=True, omit_defaults=True):
    """A blob of a Nydus image.

    Attributes:
        reference: digest of the layer that holds its data (oci-ref), else "".
    """

    digest: model.Digest
    size: model.Size
    reference: str = ""


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """What the layers of an image became; config and manifest are made anew each time.

    Attributes:
        source: of which layers, see :func:`chain`.
        blobs: one for each of them, in order.
        bootstrap, diff_id: the bootstrap layer.
        repository: ``host/name`` where all this was stored last.
    """

    source: str
    blobs: tuple[Stored, ...]
    bootstrap: Stored
    diff_id: model.Digest
    repository: str


def chain(image: Image) -> str:
    """A digest that stands for the layers of an image."""
    return model.digest(" ".join(layer.digest for layer in image.manifest.layers).encode())


class FinishedImages:
    """The record in a folder, that of the record of layers; one that cannot be used is an empty record."""

    def __init__(self, folder: Path, options: ConvertOptions) -> None:
        self._folder, self._key = folder / "images", options_key(options)

    def find(self, image: Image) -> Finished | None:
        """What an image became."""
        path = self._folder / self._name(image)
        try:
            finished = msgspec.json.decode(path.read_bytes(), type=Finished)
            os.utime(path)  # the newest are kept
        except (OSError, msgspec.MsgspecError):
            return None
        return finished if finished.source == chain(image) else None

    def add(self, image: Image, finished: Finished) -> None:
        """Notes a converted image."""
        note(self._folder, self._name(image), msgspec.json.encode(finished))

    def _name(self, image: Image) -> str:
        return hashlib.sha256(f"{self._key} {chain(image)}".encode()).hexdigest()


def bring_image(finished: Finished, sink: Sink, repository: str, cache: Source | None) -> bool:
    """Has all blobs of an image in the target, as :func:`~nydus.convert.reuse.bring` does it."""

    def brought(blob: Stored) -> bool:
        return bring(blob.digest, blob.size, finished.repository, sink, repository, cache)

    try:
        with ThreadPoolExecutor(_AT_ONCE, "finished") as pool:
            return all(pool.map(brought, (finished.bootstrap, *finished.blobs)))
    except NydusError:
        return False


def kept_layers(image: Image, blobs: Sequence[Stored]) -> list[LayerProgress]:
    """What there is to tell of the layers of an image that was converted before."""
    return [
        LayerProgress(number, layer.digest, layer.size, "done", layer.size, blob.size, blob.size, reused=True)
        for number, (layer, blob) in enumerate(zip(image.manifest.layers, blobs, strict=True), 1)
    ]
