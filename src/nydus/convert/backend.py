"""Blobs outside of the registry: the image in the registry then is the bootstrap alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nydus.errors import BackendError, ConfigError
from nydus.oci import model
from nydus.oci.model import Descriptor
from nydus.oci.place import Sink, Writer

if TYPE_CHECKING:
    from nydus.oci.layout import FileUpload, LayoutReader
    from nydus.storage.backend import Backend
    from nydus.storage.backends.objectstore import ObjectStore

_TIMEOUT = 60


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
        return BlobSink(Folder(self.path), self.force)

    def open(self) -> Backend:
        from nydus.storage.backends.localfs import LocalFs

        return LocalFs(dir=str(self.path))

    @property
    def device(self) -> dict[str, Any]:
        """The ``device.backend`` of a daemon's configuration."""
        return {"type": "localfs", "config": {"dir": str(self.path)}}

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class BucketPlace:
    """A bucket of an object store with an object for each blob, named by a prefix and its sha256 (hex).

    Args:
        kind: ``s3`` or ``oss``.
        document: its configuration as JSON (cli.md 2.13).
        force: write blobs even if they are there.
    """

    kind: str
    document: str
    force: bool = False

    def open_sink(self) -> Sink:
        return BlobSink(self._store(), self.force)

    def open(self) -> Backend:
        return self._store()

    @property
    def device(self) -> dict[str, Any]:
        return {"type": self.kind, "config": json.loads(self.document)}

    def _store(self) -> ObjectStore:
        from nydus.storage import backends
        from nydus.storage.backends.objectstore import ObjectStore

        # A conversion sends large pieces, over whatever link there is.
        config = {"timeout": _TIMEOUT, **json.loads(self.document)}
        store = backends.create(self.kind, config)
        assert isinstance(store, ObjectStore)
        return store

    def __str__(self) -> str:
        return f"{self.kind} bucket {json.loads(self.document).get('bucket_name', '')}"


BackendPlace = FolderPlace | BucketPlace


def backend_place(kind: str, config: dict[str, Any], *, force: bool = False) -> BackendPlace:
    """The place that a backend's type and configuration say.

    Raises:
        ConfigError: an unknown type, or a wrong key.
    """
    if kind in ("oss", "s3"):
        place = BucketPlace(kind, json.dumps(config), force)
        place.open().close()  # says what is wrong with the configuration; does not connect
        return place
    if kind != "localfs":
        raise ConfigError(f"unknown backend type {kind!r}; there are localfs, oss and s3")
    try:
        checked = msgspec.convert(config, _LocalFs)
    except msgspec.ValidationError as error:
        raise ConfigError(f"configuration of the localfs backend: {error}") from error
    return FolderPlace(Path(checked.dir).absolute(), force)


class BlobSink:
    """Stores blobs, and no manifests. Thread-safe."""

    def __init__(self, store: ObjectStore | Folder, force: bool) -> None:
        self._store, self._force = store, force

    def has_blob(self, digest: str) -> bool:
        if self._force:
            return False
        try:
            self._store.size(digest.partition(":")[2])
        except BackendError as error:
            if error.status == 404:
                return False
            raise
        return True

    def mount_blob(self, digest: str, source: str) -> bool:
        return False

    def probe(self) -> None:
        """Asks for a blob that is not there; the store must be reachable and answer that."""
        self.has_blob(f"sha256:{bytes(32).hex()}")

    def upload(self) -> Writer:
        return self._store.upload(replace=self._force)

    def put_blob(self, data: bytes, media_type: str, **more: object) -> Descriptor:
        described = model.describe(data, media_type, **more)
        if not self.has_blob(described.digest):
            with self.upload() as upload:
                upload.write(data)
                upload.commit(described.digest)
        return described

    def put_manifest(self, reference: str, data: bytes, media_type: str) -> Descriptor:
        raise ConfigError("a storage backend holds no manifests")


class Folder:
    """Writes blobs into a folder. Process-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def size(self, blob_id: str) -> int:
        try:
            return (self._path / blob_id).stat().st_size
        except OSError as error:
            status = 404 if isinstance(error, FileNotFoundError) else None
            raise BackendError(
                f"{error.filename}: {error.strerror}", permanent=True, status=status
            ) from error

    def upload(self, *, replace: bool = True) -> FileUpload:
        from nydus.oci.layout import FileUpload

        return FileUpload(self._path, lambda digest: self._path / digest.partition(":")[2])


class _Blobs:
    """What a backend holds, as the files of a layout."""

    def __init__(self, backend: Backend, name: str) -> None:
        self._backend, self.name = backend, name
        self._sizes: dict[str, int] = {}

    def size(self, path: str) -> int:
        blob_id = path.rpartition("/")[2]
        if blob_id not in self._sizes:
            try:
                self._sizes[blob_id] = self._backend.size(blob_id)
            except BackendError as error:
                if error.permanent and error.status in (404, None):
                    raise KeyError(path) from error
                raise
        return self._sizes[blob_id]

    def read(self, path: str, offset: int, size: int) -> bytes:
        length = min(size, max(0, self.size(path) - offset))
        return self._backend.read(path.rpartition("/")[2], offset, length)


def blobs_of(place: BackendPlace, backend: Backend) -> LayoutReader:
    """The blobs of an open backend as those of a layout: streams check their digests."""
    from nydus.oci.layout import LayoutReader

    return LayoutReader(_Blobs(backend, str(place)))
