"""Mounted images: which snapshot needs which one, the daemons that serve them, the blobs they keep cached.

An *instance* is one image from one repository, mounted once however many snapshots (of other names or
namespaces) hold its bootstrap. It has files of its own, so that any of those snapshots may go while it stays.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from nydus.daemon.client import DaemonError
from nydus.errors import FormatError, NydusError
from nydus.oci import reference as references
from nydus.snapshotter import daemons, template
from nydus.snapshotter import labels as label
from nydus.snapshotter.access import Access
from nydus.snapshotter.config import Config, duration
from nydus.snapshotter.daemons import Daemon, Launcher, Watcher
from nydus.snapshotter.database import Database
from nydus.snapshotter.errors import FailedPrecondition, NotFound, SnapshotError, Unavailable
from nydus.snapshotter.store import Kind, Snapshot, Store

log = logging.getLogger(__name__)

WAIT = 60.0
"""Seconds a call waits for its image; then it is told to come again, and the mount goes on meanwhile."""
MAX_WAITING = 24
"""Calls that may wait at the same time; more are told to come again, so that other calls get through."""
MAX_STARTS = 8
_MAX_RESTARTS = 5
_RESTART_WINDOW = 60.0
SHARED = "shared"

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS instances (
        id     INTEGER PRIMARY KEY,  -- the snapshot it was first mounted for
        key    TEXT NOT NULL UNIQUE,
        image  TEXT NOT NULL,
        daemon TEXT NOT NULL
    )""",
    """CREATE TABLE IF NOT EXISTS uses (
        snapshot INTEGER PRIMARY KEY,
        instance INTEGER NOT NULL REFERENCES instances (id)
    )""",
    # Every blob of every image that is here, mounted or not: what the cache must keep.
    "CREATE TABLE IF NOT EXISTS blobs (snapshot INTEGER, blob TEXT, PRIMARY KEY (snapshot, blob))",
    "CREATE TABLE IF NOT EXISTS retired_blobs (blob TEXT PRIMARY KEY, since INTEGER NOT NULL)",
)
_NONE = ""
_BLOB_FILE = re.compile(r"([0-9a-f]{64})(?:\..*)?")


class Instance(msgspec.Struct, frozen=True):
    """One image that is, was or will be mounted; ``daemon`` names its daemon."""

    id: int
    key: str
    image: str
    daemon: str


class Images:
    """All instances below the root of one snapshotter. Thread-safe."""

    def __init__(
        self,
        config: Config,
        database: Database,
        store: Store,
        launcher: Launcher,
        filler: template.Template,
    ) -> None:
        self._config, self._database, self._store = config, database, store
        self._launcher, self._template = launcher, filler
        self._root, self._cache = config.root_path, config.cache_dir
        self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._starting: dict[int, Future[Path]] = {}
        self._ready: dict[int, Path] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._watched: set[str] = set()
        self._stopping: set[str] = set()
        self._deaths: dict[str, list[float]] = {}
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        self._cache_lock = threading.Lock()
        self._executor = ThreadPoolExecutor(MAX_STARTS, "image")
        self._access = Access()
        self._watcher = Watcher()
        with database.transaction() as db:
            for statement in _SCHEMA:
                db.execute(statement)

    # Mounting

    def mountpoint(self, meta: Snapshot) -> Path:
        """Where the image of a bootstrap snapshot is mounted; mounts it if need be.

        Raises:
            Unavailable: not mounted in time, or too many calls wait.
            FailedPrecondition: the snapshot lacks what is needed to mount it.
            SnapshotError: the daemon failed; the text has its reason.
        """
        ready = self._ready.get(meta.id)
        with suppress(OSError):  # of a mount whose server is dead: it is mounted again
            if ready is not None and ready.is_mount():
                return ready
        with self._lock:
            future = self._starting.get(meta.id)
            if future is None:
                future = self._starting[meta.id] = self._executor.submit(self._mount, meta)
        if not self._waiting.acquire(blocking=False):
            raise Unavailable(f"{MAX_WAITING} other calls wait for their images; try again")
        try:
            return future.result(WAIT)
        except FutureTimeoutError:
            raise Unavailable(
                f"image of snapshot {meta.name} is not mounted after {WAIT:g} s; try again"
            ) from None
        except SnapshotError:
            raise
        except (NydusError, OSError) as error:
            image = label.image_reference(meta.labels) or meta.name
            raise SnapshotError(f"cannot mount image {image}: {error}") from error
        finally:
            self._waiting.release()

    def configuration(self, meta: Snapshot) -> tuple[Path, dict[str, Any]]:
        """The bootstrap of a snapshot and the daemon configuration for it."""
        reference = _reference(meta.labels, self._template.backend)
        return self._bootstrap(meta), self._template.fill(f"/{meta.id}", reference, meta.labels)

    def register(self, meta: Snapshot) -> None:
        """Note which blobs a committed bootstrap needs, so that the cache keeps them.

        Raises:
            FormatError, NotFound: it is no bootstrap, or missing; it needs none, as it cannot be mounted.
        """
        try:
            blobs = _blobs(self._bootstrap(meta))
        except (FormatError, NotFound):
            self._note_blobs(meta, [])
            raise
        self._note_blobs(meta, blobs)
        if blobs and self._template.backend == "registry" and label.image_reference(meta.labels):
            self._access.ask(meta.id, self._backend(meta), blobs[0])

    def recover(self) -> None:
        """Adopt the daemons of an earlier run, start those again whose mounts are dead. Does not wait."""
        instances = self._instances()
        self._executor.submit(self._end_unknown, {instance.daemon for instance in instances})
        for instance in instances:
            self._executor.submit(self._recover, instance)

    # Removing

    def collect(self) -> None:
        """Unmount the images no snapshot holds any more, and end daemons that have none left."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM uses WHERE snapshot NOT IN (SELECT id FROM snapshots)")
            unused = [
                Instance(*row)
                for row in db.execute(
                    "SELECT id, key, image, daemon FROM instances WHERE id NOT IN (SELECT instance FROM uses)"
                )
            ]
        for instance in unused:
            with self._key_lock(instance.key):
                self._drop(instance)

    def collect_blobs(self) -> int:
        """Delete the cached blobs that no image here has needed for ``gc_period``; returns how many."""
        if self._config.cache_manager.disable:
            return 0
        committed = [
            snapshot
            for snapshot in self._store.all()
            if snapshot.kind == Kind.COMMITTED and label.BOOTSTRAP in snapshot.labels
        ]
        known = {row[0] for row in self._database.query("SELECT DISTINCT snapshot FROM blobs")}
        for snapshot in committed:
            if snapshot.id not in known:
                try:
                    self.register(snapshot)
                except (FormatError, NotFound) as error:
                    log.warning("image %s cannot be mounted: %s", snapshot.name, error)
                except (NydusError, OSError) as error:
                    # Unknown means in use.
                    log.warning(
                        "the blob cache is not cleaned: blobs of %s are unknown: %s", snapshot.name, error
                    )
                    return 0
        with self._cache_lock:
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

    def close(self, *, unmount: bool = False) -> None:
        """Let the daemons go on, or with ``unmount`` end them all."""
        self._executor.shutdown(cancel_futures=True)
        if unmount:
            for instance in self._instances():
                self._stopping.add(instance.daemon)
            for daemon in {self._daemon(instance.daemon) for instance in self._instances()}:
                daemon.stop()
        self._access.close()
        self._watcher.close()

    # Inside: the life of an instance

    def _mount(self, meta: Snapshot) -> Path:
        try:
            instance = self._instance(meta)
            rows = self._database.query(
                "SELECT blob FROM blobs WHERE snapshot = ? AND blob != ?", meta.id, _NONE
            )
            if rows and self._template.backend == "registry":
                self._access.check(meta.id, self._backend(meta), rows[0][0])
            with self._key_lock(instance.key):
                where = self._ensure(instance, meta)
            self._ready[meta.id] = where
            return where
        finally:
            with self._lock:
                self._starting.pop(meta.id, None)

    def _instance(self, meta: Snapshot) -> Instance:
        """The instance of a snapshot, recorded and with its files in place."""
        rows = self._database.query(
            "SELECT i.id, i.key, i.image, i.daemon FROM uses u JOIN instances i ON i.id = u.instance"
            " WHERE u.snapshot = ?",
            meta.id,
        )
        if rows:
            return Instance(*rows[0])
        bootstrap = self._bootstrap(meta)
        reference = _reference(meta.labels, self._template.backend)
        image = label.image_reference(meta.labels) or meta.name
        digest = blake3()
        digest.update_mmap(bootstrap)
        key = f"{digest.hexdigest()} {reference.name if reference else ''}"
        with self._key_lock(key):
            rows = self._database.query("SELECT id, key, image, daemon FROM instances WHERE key = ?", key)
            daemon = SHARED if self._config.shared else str(meta.id)
            instance = Instance(*rows[0]) if rows else Instance(meta.id, key, image, daemon)
            with self._database.transaction() as db:
                db.execute(
                    "INSERT OR IGNORE INTO instances VALUES (?, ?, ?, ?)", msgspec.structs.astuple(instance)
                )
                db.execute("INSERT OR IGNORE INTO uses VALUES (?, ?)", (meta.id, instance.id))
        return instance

    def _ensure(self, instance: Instance, meta: Snapshot) -> Path:
        """Make the instance, which ``meta`` uses, mounted and served; called with its lock held."""
        where = self._mountpoint(instance)
        daemon = self._daemon(instance.daemon)
        alive = daemon.alive()
        if alive and where.is_mount():
            self._watch(instance, daemon)
            return where
        started = time.monotonic()
        reference = _reference(meta.labels, self._template.backend)
        directory = self._directory(instance)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        bootstrap = directory / "image.boot"
        if not bootstrap.exists():
            _link(self._bootstrap(meta), bootstrap)
        if instance.daemon == SHARED:
            with self._key_lock(SHARED):
                if not daemon.alive():
                    daemon.stop()
                    daemon.start(self._launcher, self._arguments())
            document = self._template.fill(f"/{instance.id}", reference, meta.labels)
            template.write(directory / "config.json", document)
            with suppress(DaemonError):
                daemon.client.umount(f"/{instance.id}")
            daemon.client.mount(f"/{instance.id}", bootstrap, document)
        else:
            daemon.stop()
            document = self._template.fill("/", reference, meta.labels)
            template.write(directory / "config.json", document)
            config = ["--config", str(directory / "config.json"), "--bootstrap", str(bootstrap)]
            daemon.start(self._launcher, config + self._arguments())
        if not where.is_mount():
            daemon.stop()
            raise NydusError(f"nydusd says it serves {where}, but nothing is mounted there")
        log.info("mounted %s at %s in %.0f ms", instance.image, where, (time.monotonic() - started) * 1000)
        self._watch(instance, daemon)
        return where

    def _drop(self, instance: Instance) -> None:
        """Unmount an instance and forget it; called with its lock held."""
        with self._database.transaction() as db:
            if db.execute("SELECT 1 FROM uses WHERE instance = ?", (instance.id,)).fetchone():
                return
            db.execute("DELETE FROM instances WHERE id = ?", (instance.id,))
            others = db.execute("SELECT 1 FROM instances WHERE daemon = ?", (instance.daemon,)).fetchone()
        self._ready = {
            snapshot: at for snapshot, at in self._ready.items() if at != self._mountpoint(instance)
        }
        where = self._mountpoint(instance)
        if others or not self._end_unused(instance.daemon):
            with suppress(DaemonError):
                self._daemon(instance.daemon).client.umount(f"/{instance.id}")
            daemons.detach(where)
            with suppress(OSError):
                where.rmdir()
            shutil.rmtree(self._directory(instance), ignore_errors=True)
        log.info("unmounted %s", instance.image)

    def _recover(self, instance: Instance) -> None:
        try:
            with self._key_lock(instance.key):
                daemon = self._daemon(instance.daemon)
                if daemon.alive() and self._mountpoint(instance).is_mount():
                    self._watch(instance, daemon)
                elif daemons.is_mounted(self._mountpoint(instance)):
                    self._restart(instance)
                # Otherwise the machine was restarted: it is mounted when somebody asks for it.
        except (NydusError, OSError) as error:
            log.error("cannot bring back %s: %s", instance.image, error)

    def _end_unknown(self, known: set[str]) -> None:
        """End what was forgotten and not ended yet when an earlier run was killed."""
        for place in ("mnt", "config", "socket"):
            with suppress(FileNotFoundError):
                for path in list((self._root / place).iterdir()):
                    if path.name in known or self._database.query(
                        "SELECT 1 FROM instances WHERE daemon = ?", path.name
                    ):
                        continue
                    try:
                        self._end(path.name)
                    except (NydusError, OSError) as error:
                        log.warning("cannot end daemon %s of an earlier run: %s", path.name, error)

    def _end_unused(self, name: str) -> bool:
        """End a daemon unless another image has come to it since."""
        with self._key_lock(name):
            if self._database.query("SELECT 1 FROM instances WHERE daemon = ?", name):
                return False
            self._end(name)
            return True

    def _end(self, name: str) -> None:
        """End a daemon and remove its files."""
        daemon = self._daemon(name)
        with self._lock:
            self._stopping.add(name)
        daemon.stop()
        for directory in (daemon.socket_path.parent, daemon.log_file.parent, self._root / "config" / name):
            shutil.rmtree(directory, ignore_errors=True)
        # Only what is empty: it may be somebody's mount after all.
        for path in (*daemon.mountpoint.glob("*"), daemon.mountpoint):
            with suppress(OSError):
                path.rmdir()

    def _watch(self, instance: Instance, daemon: Daemon) -> None:
        with self._lock:
            self._stopping.discard(instance.daemon)
            if instance.daemon in self._watched:
                return
            self._watched.add(instance.daemon)
        if not self._watcher.watch(daemon, lambda: self._ended(instance.daemon)):
            self._ended(instance.daemon)

    def _ended(self, name: str) -> None:
        """A daemon's process has ended, by our doing or not."""
        now = time.monotonic()
        with self._lock:
            self._watched.discard(name)
            if name in self._stopping:
                return
            deaths = [when for when in self._deaths.get(name, []) if now - when < _RESTART_WINDOW] + [now]
            self._deaths[name] = deaths
        affected = [instance for instance in self._instances() if instance.daemon == name]
        for instance in affected:
            log.error("the daemon of %s has ended: %s", instance.image, self._daemon(name).last_words())
        if self._config.daemon.recover_policy == "none":
            return
        if len(deaths) > _MAX_RESTARTS:
            log.error(
                "daemon %s ends too often; it is started again when a container asks for its image", name
            )
            return
        for instance in affected:
            with suppress(RuntimeError):  # we are being closed
                self._executor.submit(self._recover, instance)

    def _restart(self, instance: Instance) -> None:
        rows = self._database.query(
            "SELECT s.name FROM uses u JOIN snapshots s ON s.id = u.snapshot WHERE u.instance = ?",
            instance.id,
        )
        if rows:
            self._ensure(instance, self._store.get(rows[0][0]))

    # Inside: names and places

    def _instances(self) -> list[Instance]:
        return [
            Instance(*row) for row in self._database.query("SELECT id, key, image, daemon FROM instances")
        ]

    def _daemon(self, name: str) -> Daemon:
        return Daemon(
            self._root / "socket" / name / "api.sock",
            self._root / "mnt" / name,
            self._config.log_dir / name / "nydusd.log",
        )

    def _mountpoint(self, instance: Instance) -> Path:
        root = self._root / "mnt" / instance.daemon
        return root / str(instance.id) if instance.daemon == SHARED else root

    def _directory(self, instance: Instance) -> Path:
        return self._root / "config" / instance.daemon / str(instance.id)

    def _arguments(self) -> list[str]:
        settings = self._config.daemon
        arguments = ["--log-level", self._config.log.level, "--failover-policy", settings.failover_policy]
        if settings.log_rotation_size:
            arguments += ["--log-rotation-size", str(settings.log_rotation_size)]
        if settings.threads_number:
            arguments += ["--thread-num", str(settings.threads_number)]
        return arguments

    def _note_blobs(self, meta: Snapshot, blobs: list[str]) -> None:
        with self._cache_lock, self._database.transaction() as db:
            # An image without blobs has a row too: they are known.
            rows = [(meta.id, blob) for blob in blobs or [_NONE]]
            db.executemany("INSERT OR IGNORE INTO blobs VALUES (?, ?)", rows)

    def _backend(self, meta: Snapshot) -> dict[str, Any]:
        reference = _reference(meta.labels, self._template.backend)
        backend: dict[str, Any] = self._template.fill("/", reference, meta.labels)["device"]["backend"]
        return backend

    def _bootstrap(self, meta: Snapshot) -> Path:
        directory = self._store.directory(meta.id) / "fs"
        for path in (directory / "image" / "image.boot", directory / "image.boot"):
            # The layer's tar may hold anything: a link would lead us out of the snapshot.
            if path.is_file() and not path.is_symlink() and not path.parent.is_symlink():
                return path
        raise NotFound(f"snapshot {meta.name} holds no bootstrap (image/image.boot): not found")

    def _key_lock(self, key: str) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(key, threading.Lock())

    def _retire(self, cached: set[str]) -> set[str]:
        """Those of the cached blobs that have been without an image for long enough."""
        now, period = int(time.time()), duration(self._config.cache_manager.gc_period)
        with self._database.transaction() as db:
            db.execute("DELETE FROM blobs WHERE snapshot NOT IN (SELECT id FROM snapshots)")
            used = {row[0] for row in db.execute("SELECT blob FROM blobs")}
            db.executemany(
                "INSERT OR IGNORE INTO retired_blobs VALUES (?, ?)", [(b, now) for b in cached - used]
            )
            since = dict(db.execute("SELECT blob, since FROM retired_blobs"))
            expired = {blob for blob in cached - used if now - since[blob] >= period}
            gone = [(blob,) for blob in since if blob in expired or blob in used or blob not in cached]
            db.executemany("DELETE FROM retired_blobs WHERE blob = ?", gone)
        return expired


_SUFFIXES = (
    "",
    ".chunk_map",
    ".blob.data",
    ".blob.data.chunk_map",
    ".blob.meta",
    ".image.disk",
    ".layer.disk",
)


def _reference(labels: dict[str, str], backend: str) -> references.Reference | None:
    text = label.image_reference(labels)
    if text:
        return references.parse(text)
    if backend == "registry":
        raise FailedPrecondition(
            f"the snapshot has no label {label.IMAGE_REF}: set disable_snapshot_annotations = false in"
            " containerd's CRI configuration, remove the image and pull it again (failed precondition)"
        )
    return None


def _blobs(bootstrap: Path) -> list[str]:
    """The blob IDs in a bootstrap's device table."""
    from nydus import rafs

    if not bootstrap.stat().st_size:
        raise FormatError("the bootstrap is empty", where=str(bootstrap))
    with open(bootstrap, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return [blob.id for blob in rafs.superblock(data, str(bootstrap)).blobs]


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or where that is not possible a copy, whole or not at all."""
    try:
        os.link(source, target)
    except OSError:
        aside = target.with_suffix(".new")
        shutil.copyfile(source, aside)
        aside.rename(target)
