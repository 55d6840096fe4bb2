"""Blobs outside of the registry: the image in the registry then is the bootstrap alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nydus.errors import BackendError, ConfigError
from nydus.oci import model
from nydus.oci.layout import FileUpload
from nydus.oci.model import Descriptor
from nydus.oci.place import Sink


class _LocalFs(msgspec.Struct, forbid_unknown_fields=True):
    dir: str


@dataclass(frozen=True, slots=True)
class FolderPlace:
    """A folder with a file for each blob, named by its sha256 (hex); what nydusd's ``localfs`` reads.

    Args:
        force: write blobs even if they are there.
    """

    path: Path
    force: bool = False

    def open_sink(self) -> Sink:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BackendError(f"{self.path}: {error.strerror}", permanent=True) from error
        return Folder(self.path, self.force)

    def __str__(self) -> str:
        return str(self.path)


def backend_place(kind: str, config: dict[str, Any], *, force: bool = False) -> FolderPlace:
    """The place that a backend's type and configuration say.

    Raises:
        ConfigError: an unknown type, or a wrong key.
    """
    if kind in ("oss", "s3"):
        raise ConfigError(f"backend type {kind!r} is not supported yet; there is localfs")
    if kind != "localfs":
        raise ConfigError(f"unknown backend type {kind!r}; there is localfs")
    try:
        checked = msgspec.convert(config, _LocalFs)
    except msgspec.ValidationError as error:
        raise ConfigError(f"configuration of the localfs backend: {error}") from error
    return FolderPlace(Path(checked.dir).absolute(), force)


class Folder:
    """Stores blobs in a folder. Thread- and process-safe."""

    def __init__(self, path: Path, force: bool) -> None:
        self._path, self._force = path, force

    def has_blob(self, digest: str) -> bool:
        return not self._force and (self._path / digest.partition(":")[2]).exists()

    def has_manifest(self, reference: str) -> bool:
        return False

    def mount_blob(self, digest: str, source: str) -> bool:
        return False

    def upload(self) -> FileUpload:
        return FileUpload(self._path, lambda digest: self._path / digest.partition(":")[2])

    def put_blob(self, data: bytes, media_type: str, **more: object) -> Descriptor:
        described = model.describe(data, media_type, **more)
        if not self.has_blob(described.digest):
            with self.upload() as upload:
                upload.write(data)
                upload.commit(described.digest)
        return described

    def put_manifest(self, reference: str, data: bytes, media_type: str) -> Descriptor:
        raise ConfigError("a storage backend holds no manifests")
