"""The snapshotter's database, and the lock that keeps a second snapshotter out of its root."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nydus.errors import NydusError


class Database:
    """One SQLite file. Thread-safe.

    Reads do not wait for a commit that is being synced to disk: they have a connection of their own. Every
    transaction holds ``write_lock``; who must undo more than the database does takes it before.
    """

    def __init__(self, path: Path) -> None:
        """Raises NydusError if the file is not a database or cannot be written."""
        self._writer, self.write_lock = _connect(path), threading.RLock()
        self._reader, self._read_lock = _connect(path), threading.Lock()

    def query(self, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        """The rows of one SELECT."""
        with self._read_lock:
            return self._reader.execute(sql, arguments).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is durable when the block has ended, and undone if it raises."""
        with self.write_lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close both connections."""
        with self.write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()


class RootLock:
    """The exclusive lock on a snapshotter's root, held until :meth:`close` or the end of the process."""

    def __init__(self, root: Path) -> None:
        """Raises NydusError, naming the holder, if another process has it."""
        path = root / "lock"
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(self._descriptor)
            raise NydusError(f"{root} is in use by {holder}; stop it or choose another --root") from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"containerd-nydus-grpc, pid {os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Give the root back."""
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def _connect(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        connection.execute("PRAGMA journal_mode = WAL")
        # What containerd was told must be true after a power cut.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error as error:
        raise NydusError(f"{path}: cannot use the database: {error}") from error
    path.chmod(0o600)
    return connection
