"""Mounted images: which snapshot needs which one, and the daemons that serve them.

An *instance* is one image from one repository, mounted once however many snapshots (of other names or
namespaces) hold its bootstrap. It has files of its own, so that any of those snapshots may go while it stays.
"""

from __future__ import annotations

import logging
import mmap
import os
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
from nydus.durations import duration
from nydus.errors import FormatError, NydusError
from nydus.oci import reference as references
from nydus.snapshotter import daemons, template
from nydus.snapshotter import labels as label
from nydus.snapshotter.access import Access
from nydus.snapshotter.blobs import Blobs
from nydus.snapshotter.config import Config
from nydus.snapshotter.daemons import Daemon, Launcher, Watcher
from nydus.snapshotter.database import Database
from nydus.snapshotter.errors import FailedPrecondition, NotFound, SnapshotError, Unavailable
from nydus.snapshotter.keeper import Keeper
from nydus.snapshotter.locks import Locks
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
)


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
        self._root = config.root_path
        self._blobs = Blobs(database, config.cache_dir, duration(config.cache_manager.gc_period))
        self._lock = threading.Lock()
        self._starting: dict[int, Future[Path]] = {}
        self._ready: dict[int, Path] = {}
        self._locked = Locks()
        self._watched: set[str] = set()
        self._stopping: set[str] = set()
        self._deaths: dict[str, list[float]] = {}
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        self._executor = ThreadPoolExecutor(MAX_STARTS, "image")
        # Of its own: readers of a dead daemon must not wait behind images that come from a slow registry.
        self._recovery = ThreadPoolExecutor(MAX_STARTS, "recovery")
        self._access = Access()
        self._watcher = Watcher()
        self._keeper = Keeper(self._root / "supervisor")
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
            self._blobs.note(meta.id, [])
            raise
        self._blobs.note(meta.id, blobs)
        if blobs and self._template.backend == "registry" and label.image_reference(meta.labels):
            self._access.ask(meta.id, self._backend(meta), blobs[0])

    def recover(self) -> None:
        """Adopt the daemons of an earlier run, start those again whose mounts are dead. Does not wait."""
        names = {instance.daemon for instance in self._instances()}
        self._recovery.submit(self._end_unknown, names)
        for name in names:
            self._recovery.submit(self._recover, name)

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
            with self._locked(instance.key):
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
        known = self._blobs.noted()
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
        return self._blobs.collect()

    def cached(self, digest: str) -> tuple[int, int]:
        """Bytes on disk and number of the cache files of one blob (``sha256:…``)."""
        return self._blobs.cached(digest)

    def close(self, *, unmount: bool = False) -> None:
        """Let the daemons go on, or with ``unmount`` end them all."""
        self._executor.shutdown(cancel_futures=True)
        self._recovery.shutdown(cancel_futures=True)
        if unmount:
            names = {instance.daemon for instance in self._instances()}
            self._stopping |= names
            for name in names:
                self._stop(name)
        self._access.close()
        self._watcher.close()
        self._keeper.close()

    # Inside: the life of an instance

    def _mount(self, meta: Snapshot) -> Path:
        try:
            instance = self._instance(meta)
            blobs = self._blobs.of(meta.id)
            if blobs and self._template.backend == "registry":
                self._access.check(meta.id, self._backend(meta), blobs[0])
            with self._locked(instance.key):
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
        with self._locked(key):
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
        if self._serves(instance.daemon) and self._mounted(instance):
            return where
        started = time.monotonic()
        reference = _reference(meta.labels, self._template.backend)
        directory = self._directory(instance)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        bootstrap = directory / "image.boot"
        if not bootstrap.exists():
            _link(self._bootstrap(meta), bootstrap)
        name, shared, inside = instance.daemon, instance.daemon == SHARED, _inside(instance)
        document = self._template.fill(inside, reference, meta.labels)
        template.write(directory / "config.json", document)
        daemon = self._daemon(name)
        with self._locked(name):
            if not shared or not self._alive(name):
                self._stop(name)
                daemon.start(self._launcher, self._arguments(name))
        try:
            if shared:
                with suppress(DaemonError):
                    daemon.client.umount(inside)
                daemons.detach(where)  # of a daemon that did not live to tell us
                daemon.client.mount(inside, bootstrap, document)
            with self._locked(name):
                self._keep(name)
            self._watch(name)
            # Asked last: a successor may have come, with what was kept before.
            if not self._mounted(instance):
                raise NydusError(f"nydusd says it serves {where}, but nothing is mounted there")
        except NydusError:
            if not shared:
                self._stop(name)
            daemons.detach(where)
            raise
        log.info("mounted %s at %s in %.0f ms", instance.image, where, (time.monotonic() - started) * 1000)
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
                with self._locked(instance.daemon):
                    self._keep(instance.daemon)
            daemons.detach(where)
            with suppress(OSError):
                where.rmdir()
            shutil.rmtree(self._directory(instance), ignore_errors=True)
        log.info("unmounted %s", instance.image)

    def _serves(self, name: str) -> bool:
        """Whether a daemon serves, or a successor that has just taken over the mounts it left."""
        with self._locked(name):
            alive = self._alive(name)
        if alive:
            self._watch(name)
        return alive

    def _alive(self, name: str) -> bool:
        """As :meth:`_serves`, with the lock of the name held. What is kept must be watched from then on."""
        daemon = self._daemon(name)
        if daemon.alive():
            try:
                if name not in self._keeper:
                    self._keep(name)
            except DaemonError:
                return False
            return True
        if name not in self._keeper or not daemon.gone():
            return False
        for _ in range(_MAX_RESTARTS):
            if not daemons.is_mounted(daemon.mountpoint):  # it has ended in order
                break
            try:
                daemon.start(self._launcher, [*self._arguments(name), "--upgrade"], state="INIT")
                self._keeper.give(name, daemon.client)
                daemon.client.start()
            except (NydusError, OSError) as error:
                log.error("daemon %s: its successor has failed: %s", name, error)
                daemon.kill()
            else:
                log.warning("daemon %s has a successor, which serves its mounts", name)
                return True
        self._stop(name)  # whoever waits for it must not wait for ever
        return False

    def _mounted(self, instance: Instance) -> bool:
        """Whether its daemon knows of the mount that is there: a killed one may have left another."""
        known = self._daemon(instance.daemon).client.info()["backend_collection"]
        try:
            return _inside(instance) in known and self._mountpoint(instance).is_mount()
        except OSError:  # the server of a FUSE mount is gone
            return False

    def _keep(self, name: str) -> None:
        """Keep what a successor of the daemon needs as of now. Raises DaemonError if the daemon is dead."""
        if self._config.daemon.recover_policy != "failover":
            return
        try:
            self._keeper.receive(name, self._daemon(name).client)
        except (NydusError, OSError) as error:
            if isinstance(error, DaemonError) and error.status is None:
                raise
            log.warning("daemon %s can have no successor if it is killed: %s", name, error)

    def _recover(self, name: str) -> None:
        """Bring back a daemon that has ended, or was found at the start, with its mounts."""
        with suppress(NydusError, OSError):  # said below
            # Before anything else: who mounts an image holds its lock, and may wait for the successor itself.
            self._serves(name)
        for instance in self._instances():
            if instance.daemon != name:
                continue
            try:
                with self._locked(instance.key):
                    served = self._serves(name) and self._mounted(instance)
                    if not served and daemons.is_mounted(self._mountpoint(instance)):
                        self._restart(instance)
                    # Otherwise the machine was restarted: it is mounted when somebody asks for it.
            except (NydusError, OSError) as error:
                log.error("cannot bring back %s: %s", instance.image, error)

    def _stop(self, name: str) -> None:
        """End a daemon with all its mounts; nobody waits for it any more."""
        self._keeper.drop(name)
        self._daemon(name).stop()

    def _end_unknown(self, known: set[str]) -> None:
        """End what was forgotten and not ended yet when an earlier run was killed."""
        for place in ("mnt", "config", "socket"):
            with suppress(FileNotFoundError):
                for path in list((self._root / place).iterdir()):
                    if path.name in known:
                        continue
                    try:
                        self._end_unused(path.name)
                    except (NydusError, OSError) as error:
                        log.warning("cannot end daemon %s of an earlier run: %s", path.name, error)

    def _end_unused(self, name: str) -> bool:
        """End a daemon unless another image has come to it since."""
        with self._locked(name):
            if self._database.query("SELECT 1 FROM instances WHERE daemon = ?", name):
                return False
            self._end(name)
            return True

    def _end(self, name: str) -> None:
        """End a daemon and remove its files."""
        daemon = self._daemon(name)
        with self._lock:
            if name in self._watched:
                self._stopping.add(name)
        self._stop(name)
        for directory in (daemon.socket_path.parent, daemon.log_file.parent, self._root / "config" / name):
            shutil.rmtree(directory, ignore_errors=True)
        # Only what is empty: it may be somebody's mount after all.
        for path in (*daemon.mountpoint.glob("*"), daemon.mountpoint):
            with suppress(OSError):
                path.rmdir()

    def _watch(self, name: str) -> None:
        """Have a daemon replaced, or started again, when it ends."""
        with self._lock:
            self._stopping.discard(name)
            if name in self._watched:
                return
            self._watched.add(name)
        if not self._watcher.watch(self._daemon(name), lambda: self._ended(name)):
            self._ended(name)

    def _ended(self, name: str) -> None:
        """A daemon's process has ended, by our doing or not."""
        now = time.monotonic()
        with self._lock:
            self._watched.discard(name)
            if name in self._stopping:
                self._stopping.discard(name)
                self._deaths.pop(name, None)
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
            with self._locked(name):
                self._keeper.drop(name)
            return
        with suppress(RuntimeError):  # we are being closed
            self._recovery.submit(self._recover, name)

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

    def _arguments(self, name: str) -> list[str]:
        settings = self._config.daemon
        arguments = ["--log-level", self._config.log.level, "--failover-policy", settings.failover_policy]
        if settings.recover_policy == "failover":
            arguments += ["--id", name, "--supervisor", str(self._keeper.socket_path(name))]
        if name != SHARED:
            directory = self._root / "config" / name / name
            arguments += ["--config", str(directory / "config.json")]
            arguments += ["--bootstrap", str(directory / "image.boot")]
        if settings.log_rotation_size:
            arguments += ["--log-rotation-size", str(settings.log_rotation_size)]
        if settings.threads_number:
            arguments += ["--thread-num", str(settings.threads_number)]
        return arguments

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


def _inside(instance: Instance) -> str:
    """Where a daemon has its mount, below its own mountpoint."""
    return f"/{instance.id}" if instance.daemon == SHARED else "/"


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
