"""Blobs as files of a directory (nydusd.md 2.6)."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

from nydus.errors import BackendError, ConfigError
from nydus.storage.backend import MeteredBackend
from nydus.storage.files import OpenFile


class LocalFs(MeteredBackend):
    """Reads ``dir/<blob id>``, or the same name in ``alt_dirs`` where that is missing or empty.

    Args:
        blob_file: one file that holds every blob, instead of a directory.
        dir: directory of blobs.
        alt_dirs: more directories, searched in order.
    """

    def __init__(self, *, blob_file: str = "", dir: str = "", alt_dirs: tuple[str, ...] = ()) -> None:
        super().__init__("localfs")
        if not blob_file and not dir:
            raise ConfigError("localfs backend: one of 'blob_file' and 'dir' is required")
        self._blob_file = Path(blob_file) if blob_file else None
        self._dirs = [Path(d) for d in (dir, *alt_dirs) if d]
        self._lock = threading.Lock()
        self._files: dict[str, OpenFile] = {}
        self._closed = False

    def _open(self, blob_id: str) -> OpenFile:
        with self._lock:
            file = self._files.get(blob_id)
            if file is not None:
                return file
            if self._closed:
                raise BackendError("localfs backend is closed", permanent=True)
            file = self._files[blob_id] = self._find(blob_id)
            return file

    def _find(self, blob_id: str) -> OpenFile:
        if "/" in blob_id or "\0" in blob_id or blob_id in ("", ".", ".."):
            raise BackendError(f"invalid blob id {blob_id!r}", permanent=True)
        candidates = [self._blob_file] if self._blob_file else [d / blob_id for d in self._dirs]
        empty: OpenFile | None = None
        for path in candidates:
            try:
                # O_NONBLOCK: a FIFO of this name must not stop us before we see that it is one.
                file = OpenFile(path, os.O_RDONLY | os.O_NONBLOCK)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise BackendError(f"{path}: {os.strerror(error.errno or 0)}", permanent=True) from None
            info = os.fstat(file.fd)
            if not stat.S_ISREG(info.st_mode):
                raise BackendError(f"{path}: not a regular file", permanent=True)
            if info.st_size:
                return file
            empty = empty or file
        if empty is not None:
            return empty
        places = ", ".join(str(path) for path in candidates)
        raise BackendError(f"blob {blob_id}: no such file ({places})", permanent=True)

    def _read(self, blob_id: str, offset: int, size: int) -> bytes:
        file = self._open(blob_id)
        try:
            data = file.read(offset, size)
        except OSError as error:
            raise BackendError(
                f"{file.path}: {os.strerror(error.errno or 0)} at offset {offset:#x}"
            ) from None
        if len(data) != size:
            # The file may be replaced by a whole one; do not keep this one open.
            with self._lock:
                if self._files.get(blob_id) is file:
                    del self._files[blob_id]
            raise BackendError(
                f"{file.path}: truncated, expected {size} bytes at offset {offset:#x}, got {len(data)}"
            )
        return data

    def size(self, blob_id: str) -> int:
        return self._open(blob_id).size()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._files.clear()
