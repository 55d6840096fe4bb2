"""What the embedded registry keeps on disk.

``blobs/sha256/<hex>`` holds every blob and manifest once; ``repositories/<name>/`` has
``_blobs/<hex>`` (what the repository may give out), ``_manifests/<hex>`` (holding the media type) and
``_tags/<tag>`` (holding the digest).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
import uuid
from pathlib import Path

from nydus.errors import ConfigError

SHA256 = re.compile(r"sha256:([0-9a-f]{64})")


class Refusal(Exception):
    """An answer with an error code of the distribution specification."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Store:
    """The folder of a registry, while one server uses it.

    Args:
        root: made if missing. Uploads that an earlier server did not end are removed.

    Raises:
        ConfigError: it is in use, or not empty and not a registry's. OSError: it cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs" / "sha256"
        self.uploads = root / "uploads"
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()) and not self.blobs.is_dir():
            raise ConfigError(f"{root}: holds something else than a registry; name an empty folder")
        self._lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.uploads, ignore_errors=True)
            self.blobs.mkdir(parents=True, exist_ok=True)
            self.uploads.mkdir(parents=True)
        except BlockingIOError:
            self.close()
            raise ConfigError(f"{root}: is in use by another registry") from None
        except OSError:
            self.close()
            raise
        self.sessions: dict[str, Session] = {}

    def expire(self, idle: float) -> None:
        """Drops the uploads to which nothing was added for some seconds: their clients have gone."""
        for session in list(self.sessions.values()):
            if time.monotonic() - session.touched > idle and session.lock.acquire(blocking=False):
                try:
                    self.sessions.pop(session.id, None)
                    session.drop()
                finally:
                    session.lock.release()

    def close(self) -> None:
        """Lets another server have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def repository(self, name: str) -> Path:
        return self.root / "repositories" / name

    def repositories(self) -> list[str]:
        base = self.root / "repositories"
        return sorted(str(found.parent.relative_to(base)) for found in base.rglob("_manifests"))

    def link(self, name: str, kind: str, entry: str, content: str = "") -> None:
        folder = self.repository(name) / kind
        folder.mkdir(parents=True, exist_ok=True)
        aside = self.uploads / uuid.uuid4().hex
        aside.write_text(content)
        aside.replace(folder / entry)

    def has_blob(self, name: str, hexdigest: str) -> bool:
        return (self.repository(name) / "_blobs" / hexdigest).exists()

    def resolve(self, name: str, reference: str) -> tuple[str, str, Path]:
        """Digest, media type and file of a manifest."""
        folder = self.repository(name)
        match = SHA256.fullmatch(reference)
        try:
            digest = reference if match else (folder / "_tags" / reference).read_text()
            hexdigest = digest.removeprefix("sha256:")
            return digest, (folder / "_manifests" / hexdigest).read_text(), self.blobs / hexdigest
        except OSError:
            what = "manifest" if folder.exists() else "repository"
            code = "MANIFEST_UNKNOWN" if folder.exists() else "NAME_UNKNOWN"
            raise Refusal(404, code, f"{what} unknown: {name}:{reference}") from None


class Session:
    """An upload that has begun."""

    def __init__(self, folder: Path) -> None:
        self.id = uuid.uuid4().hex
        self.path = folder / self.id
        self.file = open(self.path, "wb", buffering=0)  # noqa: SIM115
        self.hash = hashlib.sha256()
        self.size = 0
        self.touched = time.monotonic()
        self.lock = threading.Lock()

    def add(self, data: bytes) -> None:
        """Appends all of the data, or nothing if the disk is full (OSError)."""
        view = memoryview(data)
        try:
            while view:
                view = view[self.file.write(view) :]
        except OSError:
            self.file.seek(self.size)
            self.file.truncate()
            raise
        self.hash.update(data)
        self.size += len(data)
        self.touched = time.monotonic()

    def drop(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)
