"""Images in an OCI layout directory, with the same methods as a repository of a registry."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from nydus.errors import BackendError
from nydus.oci import model
from nydus.oci.model import Descriptor
from nydus.oci.reference import DIGEST

REF_NAME = "org.opencontainers.image.ref.name"
IMAGE_NAME = "io.containerd.image.name"
_NAMES = (REF_NAME, IMAGE_NAME)
#: How many images of an archive an error names.
_TOLD = 20
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


class Files(Protocol):
    """Named read-only files: a directory or an archive.

    Raises:
        BackendError: a file that is there cannot be read.
    """

    name: str

    def size(self, path: str) -> int:
        """Bytes of a file; KeyError if there is none."""
        ...

    def read(self, path: str, offset: int, size: int) -> bytes:
        """At most ``size`` bytes; KeyError if there is no such file."""
        ...


class Directory:
    """The files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)

    def size(self, path: str) -> int:
        try:
            return (self.root / path).stat().st_size
        except OSError as error:
            raise _missing(error, self.root / path) from error

    def read(self, path: str, offset: int, size: int) -> bytes:
        try:
            with open(self.root / path, "rb") as file:
                return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise _missing(error, self.root / path) from error


class FileStream(io.RawIOBase):
    """A blob of a layout, read from start to end and checked against its digest there.

    Raises:
        BackendError: permanent if the bytes are not what the digest says.
    """

    def __init__(self, files: Files, digest: str, size: int) -> None:
        super().__init__()
        self._files, self._digest, self._size = files, digest, size
        self._hash = hashlib.new("sha512" if digest.startswith("sha512:") else "sha256")
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read(-1)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        try:
            data = self._files.read(blob_path(self._digest), self.position, size)
        except KeyError:  # removed since it was opened
            what = f"{self._files.name}: no blob {self._digest}"
            raise BackendError(what, permanent=True, status=404) from None
        self._hash.update(data)
        self.position += len(data)
        if not data and size:
            found = f"{self._digest.partition(':')[0]}:{self._hash.hexdigest()}"
            if found != self._digest:
                where = f"{self._files.name}: corrupted blob"
                raise BackendError(f"{where}: expected {self._digest}, found {found}", permanent=True)
        return data


class LayoutReader:
    """The images of an OCI layout.

    Every method raises :class:`~nydus.errors.BackendError` if a file is missing or not what its digest says.
    """

    def __init__(self, files: Files) -> None:
        self.files = files

    def __str__(self) -> str:
        return self.files.name

    def index(self) -> model.Index:
        """The images it holds."""
        try:
            size = self.files.size("index.json")
            data = self.files.read("index.json", 0, min(size, model.MAX_DOCUMENT))
        except KeyError:
            raise BackendError(f"{self}: no OCI layout: it has no index.json", permanent=True) from None
        return model.decode(data, model.Index, f"{self}: index.json")

    def manifest(self, reference: str = "") -> tuple[Descriptor, bytes]:
        """A manifest or index by digest or by name; by default the only one there is.

        A name is what ``org.opencontainers.image.ref.name`` or ``io.containerd.image.name`` says.
        """
        if ":" in reference and reference.startswith(("sha256:", "sha512:")):
            data = self._document(reference, model.MAX_DOCUMENT)
            return Descriptor(media_type="", digest=reference, size=len(data)), data
        entry = self._entry(reference)
        data = self._document(entry.digest, model.MAX_DOCUMENT)
        if len(data) != entry.size:
            message = f"{self}: {entry.digest}: expected {entry.size} bytes, found {len(data)}"
            raise BackendError(message, permanent=True)
        return Descriptor(media_type=entry.media_type, digest=entry.digest, size=len(data)), data

    def called(self, reference: str = "") -> str:
        """The name of the image that :meth:`manifest` gives: a whole reference where one is told, or ""."""
        annotations = self._entry(reference).annotations
        return annotations.get(IMAGE_NAME) or annotations.get(REF_NAME) or ""

    def _entry(self, reference: str) -> Descriptor:
        every = self.index().manifests
        entries = [e for e in every if not reference or reference in (e.annotations.get(n) for n in _NAMES)]
        if len({entry.digest for entry in entries}) != 1:
            names = [e.annotations.get(REF_NAME) or e.annotations.get(IMAGE_NAME) for e in every]
            called = sorted(name or "one without a name" for name in names)
            what = f"no image {reference!r}" if reference else "which image? (PATH:NAME)"
            there = f"it has {', '.join(called[:_TOLD])}" if called else "it has none"
            raise BackendError(f"{self}: {what}; {there}", permanent=True, status=404)
        return entries[0]

    def document(self, descriptor: Descriptor) -> bytes:
        """A small blob whole (an image config), at most 8 MiB."""
        return self._document(descriptor.digest, model.MAX_DOCUMENT)

    def _document(self, digest: str, limit: int) -> bytes:
        size = self.blob_size(digest)
        if size > limit:
            raise BackendError(f"{self}: {digest} is larger than {limit} bytes", permanent=True)
        return self.blob(digest, size).read(-1)

    def blob_size(self, digest: str) -> int:
        try:
            return self.files.size(blob_path(digest))
        except KeyError:
            raise BackendError(f"{self}: no blob {digest}", permanent=True, status=404) from None

    def has_blob(self, digest: str) -> bool:
        try:
            self.blob_size(digest)
        except BackendError as error:
            if error.status == 404:
                return False
            raise
        return True

    def blob(self, digest: str, size: int | None = None) -> FileStream:
        """A blob as a stream, checked at its end."""
        found = self.blob_size(digest)
        if size is not None and found != size:
            raise BackendError(f"{self}: {digest}: expected {size} bytes, found {found}", permanent=True)
        return FileStream(self.files, digest, found)

    def read_range(self, digest: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes at ``offset`` of a blob."""
        try:
            data = self.files.read(blob_path(digest), offset, length)
        except KeyError:
            raise BackendError(f"{self}: no blob {digest}", permanent=True, status=404) from None
        if len(data) != length:
            where = f"{self}: {digest}"
            message = f"{where}: expected {length} bytes at offset {offset}, got {len(data)}"
            raise BackendError(message, permanent=True)
        return data

    def referrers(self, digest: str) -> list[Descriptor]:
        """What has a manifest as its subject; layouts do not keep that."""
        return []


class Layout(LayoutReader):
    """An OCI layout directory that can be written too; made if missing. Thread- and process-safe.

    Args:
        image: the whole reference of the image that is written; "" to note only the name it is stored under.
    """

    def __init__(self, root: str | os.PathLike[str], image: str = "") -> None:
        self.root, self._image = Path(root), image
        super().__init__(Directory(self.root))

    def create(self) -> Layout:
        """Makes the folder an (empty) layout unless it is one.

        Raises:
            BackendError: it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._changing():
                if not (self.root / "oci-layout").exists():
                    self._replace("oci-layout", LAYOUT)
                if not (self.root / "index.json").exists():
                    index = model.Index(schema_version=2, media_type=model.OCI_INDEX, manifests=())
                    self._replace("index.json", model.encode(index))
            (self.root / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _disk(error, self.root) from error
        return self

    def mount_blob(self, digest: str, source: str) -> bool:
        """There is nothing to link from."""
        return False

    def probe(self) -> None:
        """Nothing has to be asked: :meth:`create` has found out."""

    def upload(self) -> FileUpload:
        """Begins a blob whose digest is known only at its end."""
        return FileUpload(self.root / "blobs", lambda digest: self.root / blob_path(digest))

    def put_blob(self, data: bytes, media_type: str, **more: object) -> Descriptor:
        """Stores a small blob unless it is there."""
        described = model.describe(data, media_type, **more)
        if not self.has_blob(described.digest):
            with self.upload() as upload:
                upload.write(data)
                upload.commit(described.digest)
        return described

    def put_manifest(
        self, reference: str, data: bytes, media_type: str, annotations: dict[str, str] | None = None
    ) -> Descriptor:
        """Stores a manifest or index; under a name it goes into ``index.json`` and replaces that name."""
        described = self.put_blob(data, media_type)
        if reference.startswith("sha256:"):
            return described
        names = {REF_NAME: reference, **({IMAGE_NAME: self._image} if self._image else {})}
        entry = msgspec.structs.replace(described, annotations={**names, **(annotations or {})})
        try:
            with self._changing():
                self.index()  # says what is wrong with it
                # The entries of other images may hold what we do not know.
                index = msgspec.json.decode((self.root / "index.json").read_bytes())
                others = (e for e in index["manifests"] if _ref_name(e) != reference)
                index["manifests"] = [*others, msgspec.to_builtins(entry)]
                self._replace("index.json", model.encode(index))
        except OSError as error:
            raise _disk(error, self.root) from error
        return described

    def _replace(self, name: str, data: bytes) -> None:
        with tempfile.NamedTemporaryFile(dir=self.root, prefix=".", delete=False) as file:
            aside = Path(file.name)
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                aside.chmod(0o644)
                aside.replace(self.root / name)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise

    @contextmanager
    def _changing(self) -> Iterator[None]:
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class FileUpload:
    """A blob on its way into a folder; the methods are those of :class:`nydus.oci.upload.Upload`.

    Args:
        root: where it is written first.
        place: digest -> path in the same file system, where it appears whole or not at all.
    """

    def __init__(self, root: Path, place: Callable[[str], Path]) -> None:
        self._root, self._place = root, place
        self._hash = hashlib.sha256()
        self.sent = 0
        try:
            self._file = tempfile.NamedTemporaryFile(dir=root, prefix=".", delete=False)  # noqa: SIM115
        except OSError as error:
            raise _disk(error, root) from error

    def __enter__(self) -> FileUpload:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            self.cancel()

    def write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise _disk(error, self._root) from error
        self._hash.update(data)
        self.sent += len(data)

    def commit(self, digest: str) -> None:
        found = f"sha256:{self._hash.hexdigest()}"
        if found != digest:
            self.cancel()
            raise BackendError(f"{self._root}: wrote {found}, expected {digest}", permanent=True)
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            aside = Path(self._file.name)
            aside.chmod(0o644)
            aside.replace(self._place(digest))
            self._file.close()
        except OSError as error:
            self.cancel()
            raise _disk(error, self._root) from error

    def cancel(self) -> None:
        self._file.close()
        Path(self._file.name).unlink(missing_ok=True)


def _ref_name(entry: dict[str, Any]) -> str | None:
    name: str | None = (entry.get("annotations") or {}).get(REF_NAME)
    return name


def blob_path(digest: str) -> str:
    """Where a layout keeps a blob.

    Raises:
        BackendError: it is no digest; blob ids and annotations say what they like.
    """
    if not DIGEST.fullmatch(digest):
        raise BackendError(f"{digest[:80]!r} is not the digest of a blob", permanent=True, status=404)
    return f"blobs/{digest.replace(':', '/')}"


def _missing(error: OSError, path: Path) -> Exception:
    """What a file that cannot be read is: not there, or there."""
    absent = isinstance(error, FileNotFoundError | NotADirectoryError)
    return KeyError(str(path)) if absent else _disk(error, path)


def _disk(error: OSError, root: Path) -> BackendError:
    return BackendError(f"{error.filename or root}: {error.strerror}", permanent=True)
