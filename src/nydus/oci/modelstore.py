"""What ``modctl`` built and has not pushed: it keeps models in a folder as a registry (distribution) does."""

from __future__ import annotations

from nydus.errors import BackendError
from nydus.oci import model
from nydus.oci.layout import Directory, LayoutReader
from nydus.oci.model import Descriptor
from nydus.oci.reference import Reference

_ROOT = "content.v1/docker/registry/v2"


class StoredFiles(Directory):
    """The blobs of such a folder by the paths that they have in an OCI layout."""

    def size(self, path: str) -> int:
        return super().size(_stored(path))

    def read(self, path: str, offset: int, size: int) -> bytes:
        return super().read(_stored(path), offset, size)


def _stored(path: str) -> str:
    if not path.startswith("blobs/"):
        return f"{_ROOT}/repositories/{path}"
    _, algorithm, digits = path.split("/")
    return f"{_ROOT}/blobs/{algorithm}/{digits[:2]}/{digits}/data"


class ModelStore(LayoutReader):
    """One repository of the folder.

    Every method raises :class:`~nydus.errors.BackendError` if a file is missing or not what its digest says.
    """

    def __init__(self, files: StoredFiles, reference: Reference) -> None:
        super().__init__(files)
        self._repository = f"{reference.host}/{reference.repository}"

    def manifest(self, reference: str = "") -> tuple[Descriptor, bytes]:
        """A manifest by digest or tag."""
        if ":" not in reference:
            path = f"{self._repository}/_manifests/tags/{reference}/current/link"
            try:
                link = self.files.read(path, 0, 1 << 10)
            except KeyError:
                message = f"{self}: no model {self._repository}:{reference} (no file {_stored(path)})"
                raise BackendError(message, permanent=True, status=404) from None
            reference = link.decode(errors="replace").strip()
        data = self._document(reference, model.MAX_DOCUMENT)
        return Descriptor(media_type="", digest=reference, size=len(data)), data
