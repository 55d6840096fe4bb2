"""Images in containerd's content store, read as those of an archive, and written there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nydus.errors import BackendError, ConfigError
from nydus.oci.place import ArchivePlace, Source

if TYPE_CHECKING:
    from nydus.oci.layout import Layout

SCHEME = "containerd://"
DEFAULT_ADDRESS = "/run/containerd/containerd.sock"
#: Environment variables with containerd's socket: that of its own tools, and that of the reference.
ADDRESSES = ("CONTAINERD_ADDRESS", "CONTAINERD_ADDR")


@dataclass(frozen=True, slots=True)
class ContainerdPlace(ArchivePlace):
    """An image in the content store of a containerd on this machine, for reading.

    ``path`` is containerd's socket, ``name`` the name of the image there.
    """

    namespace: str = "default"

    def open(self) -> Source:
        from nydus.oci.layout import LayoutReader

        return LayoutReader(_Contents(self.path, self.namespace, self.name))

    def __str__(self) -> str:
        return self.name


def containerd_place(text: str, address: Path | None = None) -> ContainerdPlace:
    """The place that ``containerd://NAMESPACE/REFERENCE`` says.

    Args:
        address: the socket; by default what the environment says (:data:`ADDRESSES`).

    Raises:
        ConfigError: it is not of that form.
    """
    from nydus.oci.reference import parse

    namespace, slash, reference = text.removeprefix(SCHEME).partition("/")
    if not namespace or not slash:
        raise ConfigError(f"{text!r}: expected containerd://NAMESPACE/REFERENCE")
    found = next((value for name in ADDRESSES if (value := os.environ.get(name))), DEFAULT_ADDRESS)
    return ContainerdPlace(address or Path(found), name=str(parse(reference)), namespace=namespace)


class _Contents:
    """The files that the OCI layout of one image would have."""

    def __init__(self, address: Path, namespace: str, image: str) -> None:
        from nydus.containerd.contents import Contents
        from nydus.oci import model

        self.name = f"containerd {namespace}/{image}"
        self._client = Contents(address, namespace)
        target = self._client.target(image)
        if target is None:
            what = f"there is no image {image} in the namespace {namespace!r} of containerd"
            raise BackendError(what, permanent=True, status=404)
        index = model.Index(schema_version=2, media_type=model.OCI_INDEX, manifests=(target,))
        self._index = model.encode(index)

    def size(self, path: str) -> int:
        if path == "index.json":
            return len(self._index)
        size = self._client.size(_digest(path))
        if size is None:
            raise KeyError(path)
        return size

    def read(self, path: str, offset: int, size: int) -> bytes:
        if path == "index.json":
            return self._index[offset : offset + size]
        size = min(size, self.size(path) - offset)
        return self._client.read(_digest(path), offset, size) if size > 0 else b""


def _digest(path: str) -> str:
    """The digest of a blob by its path in a layout."""
    return ":".join(path.split("/")[-2:])


def write_image(layout: Layout, place: ContainerdPlace) -> None:
    """Stores the image that ``layout`` holds under the place's name, in place of what had that name.

    Nothing is unpacked: containerd does that when a container is made of it.

    Raises:
        ContainerdError: containerd refused; the text is its own.
    """
    from nydus.containerd.contents import Contents

    client = Contents(place.path, place.namespace)
    with client:
        client.put(place.name, layout)
