"""Images for everything that reads through fsspec: pandas, dask, pyarrow and friends.

fsspec.open("nydus://etc/os-release::./bootstrap")
pandas.read_csv("nydus://data/table.csv::s3://bucket/bootstrap", storage_options={"s3": {...}})
fsspec.filesystem("nydus", fo="bootstrap", blobs="blobs/").ls("/")
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from nydus import image
from nydus.errors import BackendError, NydusError
from nydus.image import Entry
from nydus.rafs.model import Tree
from nydus.storage.backend import Backend, MeteredBackend


class NydusFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The files of one image, read-only. Symbolic links are followed inside the image.

    Args:
        fo: the image, as :func:`nydus.open` takes it, or the URL of a bootstrap in any file system that
            fsspec knows.
        blobs: where the data are, as :func:`nydus.open` takes it, or the URL of a directory. By default the
            directory of the bootstrap.
        target_protocol, target_options: of the file system that ``fo`` is in.
    """

    protocol = "nydus"
    root_marker = "/"
    cachable = False

    def __init__(
        self,
        fo: str | os.PathLike[str] | bytes | Tree | image.Image = "",
        blobs: str | os.PathLike[str] | Backend | Mapping[str, Any] | None = None,
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if isinstance(fo, str | os.PathLike) and not os.fspath(fo):
            raise NydusError("which image? Give its bootstrap: nydus://PATH::BOOTSTRAP, or fo=BOOTSTRAP")
        remote = target_options or {}
        if isinstance(blobs, str) and "://" in blobs:
            blobs = FsspecBackend(*fsspec.core.url_to_fs(blobs, **remote))
        if isinstance(fo, str) and fo.startswith(image.TRANSPORTS):
            fo = image.open(fo, blobs)
        if isinstance(fo, str) and ("://" in fo or target_protocol not in (None, "file", "local")):
            where = fo if "://" in fo else f"{target_protocol}://{fo}"
            source, path = fsspec.core.url_to_fs(where, **remote)
            blobs = FsspecBackend(source, source._parent(path)) if blobs is None else blobs
            fo = source.cat_file(path)
        self.image = fo if isinstance(fo, image.Image) else image.open(fo, blobs)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """What fsspec wants to know of a path, and mode, owner and time beside it."""
        full = "/" + self._strip_protocol(path).strip("/")
        return self._describe(full, self.image.stat(full, follow_symlinks=False))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        full = "/" + self._strip_protocol(path).strip("/")
        entry = self.image.stat(full)
        if not entry.is_dir:
            found = [self.info(full)]
        else:
            prefix = full.rstrip("/")
            found = [self._describe(f"{prefix}/{item.name}", item) for item in self.image.scandir(full)]
            for item in found:  # else a walk would go round in circles
                if item["islink"] and item["type"] == "directory":
                    item["type"] = "link"
        return found if detail else [item["name"] for item in found]

    def _describe(self, name: str, entry: Entry) -> dict[str, Any]:
        result = {
            "name": name,
            "mode": entry.mode,
            "uid": entry.uid,
            "gid": entry.gid,
            "mtime": entry.mtime + entry.mtime_ns / 1e9,
            "nlink": entry.nlink,
            "ino": entry.inode,
            "islink": entry.is_symlink,
        }
        if entry.is_symlink:
            result["destination"] = entry.target
            with contextlib.suppress(OSError):  # it may lead nowhere
                entry = self.image.stat(name)
        result["size"] = entry.size if entry.is_file else 0
        result["type"] = "directory" if entry.is_dir else "file" if entry.is_file else "other"
        return result

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "rb":
            raise NydusError(f"images cannot be written to (mode {mode!r})")
        return self.image.open("/" + self._strip_protocol(path).strip("/"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        full = "/" + self._strip_protocol(path).strip("/")
        row = self.image.file(full)
        first, last, _ = slice(start, end).indices(int(self.image.tree.nodes["size"][row]))
        return self.image.read(full, first, max(last - first, 0))


class FsspecBackend(MeteredBackend):
    """Blobs as files of a directory of any fsspec file system."""

    def __init__(self, source: AbstractFileSystem, directory: str) -> None:
        super().__init__("fsspec")
        self._source, self._directory = source, directory.rstrip("/")

    def _path(self, blob_id: str) -> str:
        if "/" in blob_id or blob_id in ("", ".", ".."):
            raise BackendError(f"invalid blob id {blob_id!r}", permanent=True)
        return f"{self._directory}/{blob_id}"

    def _read(self, blob_id: str, offset: int, size: int) -> bytes:
        try:
            return bytes(self._source.cat_file(self._path(blob_id), start=offset, end=offset + size))
        except FileNotFoundError:
            raise BackendError(f"blob {blob_id}: no such file in {self._directory}", permanent=True) from None
        except Exception as error:  # each file system has its own
            raise BackendError(f"blob {blob_id}: {error}") from error

    def size(self, blob_id: str) -> int:
        try:
            return int(self._source.size(self._path(blob_id)))
        except FileNotFoundError:
            raise BackendError(f"blob {blob_id}: no such file in {self._directory}", permanent=True) from None
        except Exception as error:
            raise BackendError(f"blob {blob_id}: {error}") from error

    def close(self) -> None:
        pass
