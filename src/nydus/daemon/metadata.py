"""What the kernel mounts of an image: the bootstrap itself where that is EROFS, else one made from it."""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass, replace
from pathlib import Path

from nydus import rafs
from nydus.errors import FormatError, NydusError
from nydus.rafs.buffer import Source
from nydus.rafs.model import Super

#: Blobs that hold their own bootstrap have this id in it, and are called by the name of their file.
_UNKNOWN_ID = "x" * 64
#: Part of the names of files made here. Count it up when the same bootstrap gives other bytes than before:
#: chunks would be looked for where another version of ours did not put them.
LAYOUT = 2


@dataclass(frozen=True, slots=True)
class Metadata:
    """EROFS metadata of an image.

    Attributes:
        path: file for EROFS.
        head: its head; it describes the blobs of the devices.
        source: the head of the bootstrap, which is another one where that is RAFS v5.
    """

    path: Path
    head: Super
    source: Super
    made: mmap.mmap | None = None

    def read(self) -> mmap.mmap:
        """The bytes of the file. Raises NydusError where a bootstrap is gone; what was made is kept open."""
        return self.made or _map(self.path)


def load(bootstrap: Path, work_dir: Path) -> Metadata:
    """Opens a bootstrap, RAFS v5 or v6, or a blob that ends with one.

    What EROFS cannot mount is written as EROFS metadata into the cache directory, named by the sha256 of the
    bootstrap and :data:`LAYOUT`. The same bootstrap always gives the same file, so it may be deleted at any
    time.

    Raises:
        FormatError: it is no bootstrap.
        NydusError: it cannot be read, or the cache directory not written.
    """
    where = str(bootstrap)
    data: Source = _map(bootstrap)
    inlined = not _detected(data)
    if inlined:
        data = _extract(data, where)
    source = _named(rafs.superblock(data, where), bootstrap)
    if source.version == 6 and not inlined:
        return Metadata(bootstrap, source, source)
    path = work_dir.resolve() / f"{hashlib.sha256(data).hexdigest()}.v{LAYOUT}.erofs"
    made = _existing(path)
    if made is None:
        _write(path, _as_erofs(data, where) if source.version == 5 else bytes(data))
        made = _map(path)
    return Metadata(path, _named(rafs.v6.read_superblock(made, str(path)), bootstrap), source, made)


def _detected(data: Source) -> bool:
    try:
        rafs.detect(data)
    except FormatError:
        return False
    return True


def _extract(data: Source, where: str) -> bytes:
    from nydus.rafs import toc

    try:
        return toc.extract_bootstrap(
            lambda offset, size: bytes(data[offset : offset + size]), len(data), where
        )
    except FormatError as error:
        raise FormatError(f"neither a bootstrap nor a blob with one: {error.what}", where=where) from None


def _named(head: Super, bootstrap: Path) -> Super:
    name = bootstrap.name.partition(".")[0]
    return replace(
        head, blobs=[replace(blob, id=name) if blob.id == _UNKNOWN_ID else blob for blob in head.blobs]
    )


def _as_erofs(data: Source, where: str) -> bytes:
    from nydus.rafs.device import as_erofs

    return rafs.v6.write(as_erofs(rafs.v5.read(data, where)))


def _existing(path: Path) -> mmap.mmap | None:
    try:
        data = _map(path)
        rafs.v6.read_superblock(data, str(path))
        return data
    except NydusError:
        return None


def _write(path: Path, data: bytes) -> None:
    from nydus.storage.store import write_aside

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, data)
    except OSError as error:
        raise NydusError(f"{path}: cannot write into the cache directory: {error.strerror}") from error


def _map(path: Path) -> mmap.mmap:
    """A file's bytes. Raises FormatError where it is empty, NydusError where it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NydusError(f"{path}: cannot open the bootstrap: {error.strerror}") from None
    try:
        if os.fstat(fd).st_size == 0:
            raise FormatError("the bootstrap is empty", where=str(path))
        # The kernel will want all of it, and soon; ext4 complains when EROFS is the first to read a page.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    except OSError as error:
        raise NydusError(f"{path}: cannot read the bootstrap: {error.strerror}") from None
    finally:
        os.close(fd)
