"""Which cached blobs are needed: those of every image that is here, mounted or not."""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

from nydus.snapshotter.database import Database

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS blobs (snapshot INTEGER, blob TEXT, PRIMARY KEY (snapshot, blob))",
    "CREATE TABLE IF NOT EXISTS retired_blobs (blob TEXT PRIMARY KEY, since INTEGER NOT NULL)",
)
_NONE = ""
_BLOB_FILE = re.compile(r"([0-9a-f]{64})(?:\..*)?")
_SUFFIXES = (
    "",
    ".chunk_map",
    ".blob.data",
    ".blob.data.chunk_map",
    ".blob.meta",
    ".image.disk",
    ".layer.disk",
)


class Blobs:
    """The blobs that the images of one snapshotter need, and their files in its cache. Thread-safe.

    Args:
        cache: directory of the cache, made when missing.
        period: seconds that a blob stays there after its last image has gone.
    """

    def __init__(self, database: Database, cache: Path, period: float) -> None:
        self._database, self._cache, self._period = database, cache, period
        self._lock = threading.Lock()
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with database.transaction() as db:
            for statement in _SCHEMA:
                db.execute(statement)

    def note(self, snapshot: int, blobs: list[str]) -> None:
        """Note what the image of a bootstrap snapshot needs."""
        with self._lock, self._database.transaction() as db:
            # An image without blobs has a row too: they are known.
            rows = [(snapshot, blob) for blob in blobs or [_NONE]]
            db.executemany("INSERT OR IGNORE INTO blobs VALUES (?, ?)", rows)

    def noted(self) -> set[int]:
        """The snapshots whose needs are known."""
        return {row[0] for row in self._database.query("SELECT DISTINCT snapshot FROM blobs")}

    def of(self, snapshot: int) -> list[str]:
        """What was noted for a snapshot."""
        rows = self._database.query(
            "SELECT blob FROM blobs WHERE snapshot = ? AND blob != ?", snapshot, _NONE
        )
        return [row[0] for row in rows]

    def collect(self) -> int:
        """Delete the cached blobs that no image has needed for long enough; returns how many."""
        with self._lock:
            cached = {
                match[1] for entry in os.scandir(self._cache) if (match := _BLOB_FILE.fullmatch(entry.name))
            }
            expired = self._retire(cached)
            for entry in list(os.scandir(self._cache)):
                if (match := _BLOB_FILE.fullmatch(entry.name)) and match[1] in expired:
                    Path(entry.path).unlink(missing_ok=True)
        return len(expired)

    def cached(self, digest: str) -> tuple[int, int]:
        """Bytes on disk and number of the cache files of one blob (``sha256:…``)."""
        size = files = 0
        blob = digest.partition(":")[2]
        if not re.fullmatch("[0-9a-f]{64}", blob):
            return 0, 0
        for suffix in _SUFFIXES:
            with suppress(OSError):
                size += (self._cache / (blob + suffix)).stat().st_blocks * 512
                files += 1
        return size, files

    def _retire(self, cached: set[str]) -> set[str]:
        """Those of the cached blobs that have been without an image for long enough."""
        now = int(time.time())
        with self._database.transaction() as db:
            db.execute("DELETE FROM blobs WHERE snapshot NOT IN (SELECT id FROM snapshots)")
            used = {row[0] for row in db.execute("SELECT blob FROM blobs")}
            db.executemany(
                "INSERT OR IGNORE INTO retired_blobs VALUES (?, ?)", [(b, now) for b in cached - used]
            )
            since = dict(db.execute("SELECT blob, since FROM retired_blobs"))
            expired = {blob for blob in cached - used if now - since[blob] >= self._period}
            gone = [(blob,) for blob in since if blob in expired or blob in used or blob not in cached]
            db.executemany("DELETE FROM retired_blobs WHERE blob = ?", gone)
        return expired
