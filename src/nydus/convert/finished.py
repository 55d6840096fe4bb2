"""Images that were converted before, found again by the layers of their source and the options.

Like the record of layers (:mod:`nydus.convert.reuse`), this one is believed only as far as the target
confirms it: every blob must be there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from nydus.convert.progress import LayerProgress
from nydus.convert.reuse import bring, note
from nydus.convert.select import Image
from nydus.errors import NydusError
from nydus.oci import model
from nydus.oci.model import Descriptor
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
        shared: blobs of a chunk dictionary that are referred to.
        bootstrap, diff_id: the bootstrap layer.
        repository: ``host/name`` where all this was stored last.
    """

    source: str
    blobs: tuple[Stored, ...]
    bootstrap: Stored
    diff_id: model.Digest
    repository: str
    shared: tuple[Descriptor, ...] = ()


def chain(layers: Iterable[Descriptor | Stored]) -> str:
    """A digest that stands for layers or blobs in their order."""
    return model.digest(" ".join(layer.digest for layer in layers).encode())


class FinishedImages:
    """The record in a folder, that of the record of layers; one that cannot be used is an empty record.

    Args:
        key: see :func:`~nydus.convert.reuse.options_key`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder / "images", key

    def find(self, image: Image) -> Finished | None:
        """What an image became."""
        path = self._folder / self._name(image)
        try:
            finished = msgspec.json.decode(path.read_bytes(), type=Finished)
            os.utime(path)  # the newest are kept
        except (OSError, msgspec.MsgspecError):
            return None
        same = finished.source == chain(image.manifest.layers) and len(finished.blobs) == len(
            image.manifest.layers
        )
        return finished if same else None

    def add(self, image: Image, finished: Finished) -> None:
        """Notes a converted image."""
        note(self._folder, self._name(image), msgspec.json.encode(finished))

    def _name(self, image: Image) -> str:
        return hashlib.sha256(f"{self._key} {chain(image.manifest.layers)}".encode()).hexdigest()


def bring_image(
    finished: Finished, sink: Sink, repository: str, cache: Source | None, backend: Sink | None = None
) -> bool:
    """Has all blobs of an image in the target, as :func:`~nydus.convert.reuse.bring` does it.

    Args:
        backend: where the blobs with file data have to be instead.
    """

    def brought(blob: Stored | Descriptor) -> bool:
        if backend and blob is not finished.bootstrap:
            return bring(blob.digest, blob.size, "", backend, "", cache)
        return bring(blob.digest, blob.size, finished.repository, sink, repository, cache)

    indexes = (blob.annotations.get(model.NYDUS_REF) for blob in finished.shared)
    data = [Stored(digest, 0) for digest in indexes if digest]
    try:
        with ThreadPoolExecutor(_AT_ONCE, "finished") as pool:
            return all(pool.map(brought, (finished.bootstrap, *finished.blobs, *finished.shared, *data)))
    except NydusError:
        return False


def kept_layers(image: Image, blobs: Sequence[Stored]) -> list[LayerProgress]:
    """What there is to tell of the layers of an image that was converted before."""
    return [
        LayerProgress(number, layer.digest, layer.size, "done", layer.size, blob.size, blob.size, reused=True)
        for number, (layer, blob) in enumerate(zip(image.manifest.layers, blobs, strict=True), 1)
    ]
