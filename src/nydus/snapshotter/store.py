"""The snapshots and their directories: records in SQLite, one directory for each ID.

A record and its directory come together or not at all: the record is inserted, the directory is made aside
and renamed to the ID, and only then is the transaction committed. IDs are never reused.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Mapping
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

import msgspec

from nydus.snapshotter.database import Database
from nydus.snapshotter.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS snapshots (
        id      INTEGER PRIMARY KEY AUTOINCREMENT,
        name    TEXT NOT NULL UNIQUE,
        parent  INTEGER REFERENCES snapshots (id),
        kind    INTEGER NOT NULL,
        created INTEGER NOT NULL,
        updated INTEGER NOT NULL,
        labels  TEXT NOT NULL,
        size    INTEGER NOT NULL DEFAULT 0,
        inodes  INTEGER NOT NULL DEFAULT 0
    )""",
    "CREATE INDEX IF NOT EXISTS snapshots_parent ON snapshots (parent)",
)
_SELECT = """
SELECT s.id, s.name, coalesce(p.name, ''), s.kind, s.created, s.updated, s.labels, s.size, s.inodes
FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent
"""
_ANCESTORS = """
WITH RECURSIVE chain (id, parent, depth) AS (
    SELECT id, parent, 0 FROM snapshots WHERE name = ?
    UNION ALL SELECT s.id, s.parent, chain.depth + 1 FROM snapshots s JOIN chain ON s.id = chain.parent
)
"""
_decode_labels = msgspec.json.Decoder(dict[str, str]).decode
_encode = msgspec.json.encode


class Kind(IntEnum):
    """What a snapshot is; the numbers are those of the wire."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


class Snapshot(msgspec.Struct, frozen=True):
    """One record. Times are in nanoseconds since 1970; ``size`` in bytes; ``parent`` is a name or ``""``."""

    id: int
    name: str
    parent: str
    kind: Kind
    created: int
    updated: int
    labels: dict[str, str]
    size: int
    inodes: int


class Store:
    """The snapshot records in ``database``, with the directories ``<root>/<id>/fs`` and ``…/work``."""

    def __init__(self, database: Database, root: Path) -> None:
        self._database, self._root = database, root
        root.mkdir(mode=0o700, exist_ok=True)
        with database.transaction() as db:
            for statement in _SCHEMA:
                db.execute(statement)

    def directory(self, snapshot_id: int) -> Path:
        """The directory of a snapshot."""
        return self._root / str(snapshot_id)

    # Reading

    def get(self, name: str) -> Snapshot:
        """The snapshot of this key or name.

        Raises:
            NotFound: there is none.
        """
        rows = self._select("WHERE s.name = ?", name)
        if not rows:
            raise NotFound(f"snapshot {name} does not exist: not found")
        return rows[0]

    def chain(self, name: str) -> list[Snapshot]:
        """The snapshot of this name followed by its ancestors, nearest first.

        Raises:
            NotFound: there is none.
        """
        rows = self._select("JOIN chain ON chain.id = s.id ORDER BY chain.depth", name, first=_ANCESTORS)
        if not rows:
            raise NotFound(f"snapshot {name} does not exist: not found")
        return rows

    def all(self) -> list[Snapshot]:
        """Every snapshot, oldest first."""
        return self._select("ORDER BY s.id")

    # Writing

    def create(
        self,
        kind: Kind,
        name: str,
        parent: str,
        labels: Mapping[str, str],
        owner: tuple[int, int] | None = None,
    ) -> Snapshot:
        """Add a snapshot with its directory; ``owner`` (uid, gid) of ``fs`` is the parent's unless given.

        Raises:
            AlreadyExists: the name is taken.
            NotFound, InvalidArgument: the parent is unknown or not committed.
        """
        snapshot = None
        # The directory of a failed commit goes before another transaction is given the same ID.
        with self._database.write_lock:
            try:
                with self._database.transaction() as db:
                    snapshot, parent_id = _insert(db, kind, name, parent, labels)
                    if owner is None and parent_id is not None:
                        with suppress(FileNotFoundError):
                            status = (self.directory(parent_id) / "fs").stat()
                            owner = (status.st_uid, status.st_gid)
                    self._make_directory(snapshot, owner)
            except BaseException:
                if snapshot is not None:
                    shutil.rmtree(self.directory(snapshot.id), ignore_errors=True)
                raise
        return snapshot

    def commit(self, name: str, key: str, labels: Mapping[str, str], size: int, inodes: int) -> None:
        """Turn the active snapshot ``key`` into the committed ``name``; ``labels`` replace the old ones.

        Raises:
            NotFound, FailedPrecondition: ``key`` is unknown or not active.
            AlreadyExists: ``name`` is taken.
        """
        with self._database.transaction() as db:
            row = db.execute("SELECT id, kind FROM snapshots WHERE name = ?", (key,)).fetchone()
            if row is None:
                raise NotFound(f"snapshot {key} does not exist: not found")
            if row[1] != Kind.ACTIVE:
                raise FailedPrecondition(f"snapshot {key} is not active: failed precondition")
            if name != key and db.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone():
                raise AlreadyExists(f"snapshot {name}: already exists")
            db.execute(
                "UPDATE snapshots SET name = ?, kind = ?, updated = ?, labels = ?, size = ?, inodes = ?"
                " WHERE id = ?",
                (name, Kind.COMMITTED, time.time_ns(), _encode(dict(labels)).decode(), size, inodes, row[0]),
            )

    def update(self, name: str, labels: Mapping[str, str], paths: list[str]) -> Snapshot:
        """Replace the labels, or those that ``paths`` name as ``labels.<key>``; one without a value goes.

        Raises:
            NotFound, InvalidArgument: ``name`` is unknown; a path names a field that never changes.
        """
        with self._database.transaction() as db:
            row = db.execute("SELECT labels FROM snapshots WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise NotFound(f"snapshot {name} does not exist: not found")
            new = _decode_labels(row[0]) if paths else dict(labels)
            for path in paths:
                if path == "labels":
                    new = dict(labels)
                elif path.startswith("labels."):
                    label = path.removeprefix("labels.")
                    if label in labels:
                        new[label] = labels[label]
                    else:
                        new.pop(label, None)
                else:
                    raise InvalidArgument(
                        f"cannot update field {path!r} of snapshot {name}: invalid argument"
                    )
            db.execute(
                "UPDATE snapshots SET labels = ?, updated = ? WHERE name = ?",
                (_encode(new).decode(), time.time_ns(), name),
            )
        return self.get(name)

    def remove(self, name: str) -> int:
        """Forget a snapshot; its directory stays until :meth:`sweep`. Returns its ID.

        Raises:
            NotFound, FailedPrecondition: ``name`` is unknown; it has children.
        """
        with self._database.transaction() as db:
            row = db.execute("SELECT id FROM snapshots WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise NotFound(f"snapshot {name} does not exist: not found")
            if db.execute("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1", row).fetchone():
                raise FailedPrecondition(f"cannot remove snapshot {name} with children: failed precondition")
            db.execute("DELETE FROM snapshots WHERE id = ?", row)
        return int(row[0])

    def sweep(self) -> list[Path]:
        """Set directories without a record aside and return them; the caller deletes them when unmounted."""
        orphans = []
        # In a transaction, so that a directory whose record is about to be committed is not taken for one.
        with self._database.transaction() as db:
            known = {str(row[0]) for row in db.execute("SELECT id FROM snapshots")}
            for entry in list(os.scandir(self._root)):
                path = Path(entry.path)
                if entry.name in known:
                    continue
                if not entry.name.startswith("rm-"):
                    path = self._root / f"rm-{entry.name}"
                    shutil.rmtree(path, ignore_errors=True)
                    Path(entry.path).rename(path)
                orphans.append(path)
        return orphans

    # Inside

    def _select(self, clause: str, *arguments: object, first: str = "") -> list[Snapshot]:
        rows = self._database.query(first + _SELECT + clause, *arguments)
        return [
            Snapshot(
                row[0], row[1], row[2], Kind(row[3]), row[4], row[5], _decode_labels(row[6]), row[7], row[8]
            )
            for row in rows
        ]

    def _make_directory(self, snapshot: Snapshot, owner: tuple[int, int] | None) -> None:
        final = self.directory(snapshot.id)
        aside = self._root / f"new-{snapshot.id}"
        # After a crash before the commit, the same ID comes again with its directory already there.
        for stale in (aside, final):
            if stale.exists():
                shutil.rmtree(stale)
        try:
            aside.mkdir(mode=0o700)
            _mkdir(aside / "fs", 0o755)
            if owner is not None:
                os.chown(aside / "fs", *owner)
            if snapshot.kind == Kind.ACTIVE:
                _mkdir(aside / "work", 0o711)
            aside.rename(final)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _insert(
    db: sqlite3.Connection, kind: Kind, name: str, parent: str, labels: Mapping[str, str]
) -> tuple[Snapshot, int | None]:
    """The new record, and the ID of its parent."""
    if db.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone():
        raise AlreadyExists(f"snapshot {name}: already exists")
    parent_id = None
    if parent:
        row = db.execute("SELECT id, kind FROM snapshots WHERE name = ?", (parent,)).fetchone()
        if row is None:
            raise NotFound(f"parent snapshot {parent} does not exist: not found; pull the image again")
        if row[1] != Kind.COMMITTED:
            raise InvalidArgument(f"parent snapshot {parent} is not committed: invalid argument")
        parent_id = int(row[0])
    now = time.time_ns()
    cursor = db.execute(
        "INSERT INTO snapshots (name, parent, kind, created, updated, labels) VALUES (?, ?, ?, ?, ?, ?)",
        (name, parent_id, kind, now, now, _encode(dict(labels)).decode()),
    )
    assert cursor.lastrowid is not None
    return Snapshot(cursor.lastrowid, name, parent, kind, now, now, dict(labels), 0, 0), parent_id


def _mkdir(path: Path, mode: int) -> None:
    path.mkdir()
    path.chmod(mode)  # whatever the umask
