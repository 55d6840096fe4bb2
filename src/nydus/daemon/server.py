"""The daemon proper: its states, its mounts, and what a successor needs to carry on.

One :class:`Daemon` lives in each worker process. It knows nothing of HTTP, of processes only its predecessor.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from nydus.daemon import config as configs
from nydus.daemon.devices import Devices, Owner
from nydus.daemon.image import Image, Pool
from nydus.daemon.instance import Instance
from nydus.daemon.options import Options
from nydus.daemon.state import FileState, InstanceState, State
from nydus.daemon.verify import verify
from nydus.errors import MountError, NydusError
from nydus.mount import probe, syscalls, table
from nydus.mount.blobfs import BlobFs

log = logging.getLogger(__name__)

INIT, READY, RUNNING, STOPPED = "INIT", "READY", "RUNNING", "STOPPED"

_EXISTS = "object or filesystem already exists"
_MISSING = "object or filesystem doesn't exist"
_MAX_INSTANCES = 4096
_SETTLE = 2.0  # seconds that requests get to finish at the end
_RUNTIME_KEYS = {"registry_auth", "proxy_url", "dragonfly_scheduler_endpoint"}


class NotFound(NydusError):
    """No such mount."""


class WrongState(NydusError):
    """The daemon is in another state than the request needs; the text is the name of the event."""


class Daemon:
    """Serves any number of mounts. Thread-safe; requests for different mountpoints run side by side.

    Args:
        options: the command line.
        report: told the new state after every change; must not fail.
        descriptors: told (``/dev/fuse``, blobfs mount) as soon as there is a connection.
        busy: told whether some thread is inside a mount, where it waits for threads of this same process.
    """

    def __init__(
        self,
        options: Options,
        *,
        report: Callable[[State], None] = lambda state: None,
        descriptors: Callable[[int, int], None] = lambda device, mount: None,
        busy: Callable[[bool], None] = lambda busy: None,
    ) -> None:
        self.options = options
        self.began = time.time()
        self.pool = Pool()
        self.devices = Devices(threads=options.threads, descriptors=descriptors, changed=self._on_change)
        self.state = INIT
        self.held = False  # a controller has our descriptors, and can start a successor
        self._pid = os.getppid()  # of the supervisor, which ends after its last worker
        self._predecessor = 0
        self._report, self._tell_busy = report, busy
        self._mounting = 0
        self._lock = threading.RLock()
        self._shared = options.shared
        self._instances: dict[int, Instance] = {}
        self._next_number = 1
        self._runtime: dict[str, dict[str, str]] = {}
        self._busy: set[str] = set()
        self._dirty = threading.Event()
        self._collector: threading.Thread | None = None

    # What it is

    def instances(self) -> dict[str, Instance]:
        """The mounts, by mountpoint."""
        with self._lock:
            return {i.state.mountpoint: i for i in self._instances.values() if i.state.mounted}

    def instance(self, mountpoint: str) -> Instance:
        try:
            return self.instances()[normal(mountpoint)]
        except KeyError:
            raise NotFound(_MISSING) from None

    def snapshot(self) -> State:
        """All that a successor needs."""
        with self._lock:
            return State(
                state=self.state,
                pid=self._pid,
                held=self.held,
                shared=self._shared,
                next_number=self._next_number,
                instances=[instance.state for instance in self._instances.values()],
                files=self.devices.states(),
                runtime=self._runtime,
            )

    # Life

    def start(self) -> None:
        """A fresh start: mounts what the command line names, INIT → RUNNING."""
        options = self.options
        if options.shared:
            self._mount_root()
        try:
            if options.bootstrap is not None:
                text = options.config_text()
                self.mount(options.virtual_mountpoint, str(options.bootstrap), text, options.prefetch_files)
        except BaseException:
            if options.shared:
                syscalls.detach(options.mountpoint)
            raise
        self._enter(RUNNING)

    def restore(self, state: State, device: int | None, mount: int | None) -> None:
        """INIT → READY: becomes the daemon whose state this is, without serving or reporting yet."""
        with self._lock:
            if self.state != INIT:
                raise WrongState("Takeover")
            self._shared, self.held, self._predecessor = state.shared, state.held, state.pid
            self._next_number, self._runtime = state.next_number, state.runtime
            for saved in state.instances:
                try:
                    image = Image(Path(saved.bootstrap), configs.parse(saved.config), self.pool)
                except NydusError as error:
                    log.error("the image of %s cannot be opened again: %s", saved.mountpoint, error)
                    continue
                self._instances[saved.number] = Instance.left(saved, image)
            if device is not None:
                self.devices.adopt(device, -1 if mount is None else mount, state.files, self._owner)
            for instance in self._instances.values():
                _introduce(instance.image)
            for mountpoint, values in self._runtime.items():
                self._apply(mountpoint, values)
            # Not reported: if this process dies now, its successor must find RUNNING if that is what it was.
            self.state = READY

    def resume(self) -> None:
        """READY → RUNNING after a takeover: from here on this process answers the kernel."""
        with self._lock:
            if self.state != READY:
                raise WrongState("Start")
            if self.devices.blobfs is not None:
                resend = self.options.failover_policy != "none"
                leaving = self._leaving() if resend else None
                self.devices.blobfs.serve(resend=resend)
                if leaving is not None:
                    args = (self.devices.blobfs, leaving)
                    threading.Thread(target=_resend_later, args=args, name="resend", daemon=True).start()
            self._enter(RUNNING)
        self._settle()
        for instance in self.instances().values():
            if instance.state.provider == "fuse":
                instance.remount_fuse()
            instance.fetch_ahead()
            verify(instance.image)
        self._on_change()

    def stop(self, *, keep_mounts: bool = False) -> None:
        """Ends: unmounts everything, unless a successor goes on."""
        with self._lock:
            self.state = STOPPED
        if keep_mounts:
            return
        # What is just being mounted would stay behind. Nothing new begins now.
        end = time.monotonic() + _SETTLE
        while self._busy and time.monotonic() < end:
            time.sleep(0.01)
        for instance in self.instances().values():
            if instance.prefetch is not None:
                instance.prefetch.close()
            with suppress(NydusError, OSError):
                instance.detach()
        if self._shared:
            with suppress(OSError):
                syscalls.detach(self.options.mountpoint)

    def flush(self) -> None:
        """Writes the caches down, so that the next daemon need not check them again."""
        for opened in self.pool.caches.all():
            try:
                opened.cache.close()
            except (NydusError, OSError) as error:
                log.warning("closing a cache: %s", error)

    # Mounts

    def mount(
        self, mountpoint: str, source: str, config_text: str, prefetch_files: list[str] | None = None
    ) -> None:
        """Mounts an image.

        Args:
            mountpoint: absolute path inside the daemon's mountpoint.
            source: path of the bootstrap.
            config_text: configuration document.
            prefetch_files: absolute paths to fetch ahead.

        Raises:
            NydusError: anything that is wrong with them, or the kernel's refusal.
        """
        mountpoint = normal(mountpoint)
        with self._claim(mountpoint):
            self._check_place(mountpoint)
            # Its name says which blob it belongs to: a successor must see the same one.
            image = Image(Path(source).resolve(), configs.parse(config_text), self.pool)
            try:
                instance = self._instance(mountpoint, image, config_text, prefetch_files)
                try:
                    self._attach(instance)
                    instance.state.mounted = True
                finally:
                    instance.mounting = False
                    self.report()
            except BaseException:
                image.close()
                self._remove_directories(mountpoint)
                raise
        instance.fetch_ahead()
        verify(image)
        state = instance.state
        log.info("mounted %s at %s by %s (%s)", source, state.path, state.provider, state.reason)

    def umount(self, mountpoint: str) -> None:
        mountpoint = normal(mountpoint)
        with self._claim(mountpoint):
            instance = self.instance(mountpoint)
            instance.detach()
            self._gone(instance)
            self._remove_directories(mountpoint)
        log.info("unmounted %s", instance.state.path)

    def remount(self, mountpoint: str, source: str, config_text: str) -> None:
        """Replaces a mount by another image at the same place."""
        previous = self.instance(mountpoint)
        Image(Path(source), configs.parse(config_text), self.pool).close()  # it must be good
        self.umount(mountpoint)
        self.mount(mountpoint, source, config_text, previous.state.prefetch_files)

    def configure(self, mountpoint: str, values: dict[str, str]) -> None:
        """Changes run-time values of a mount, all or none."""
        unknown = sorted(set(values) - _RUNTIME_KEYS)
        if unknown:
            raise NydusError(f"unknown run-time keys: {', '.join(unknown)}")
        with self._lock:
            self.instance(mountpoint)
            self._apply(normal(mountpoint), values)
            self._runtime.setdefault(normal(mountpoint), {}).update(values)
        self.report()

    def runtime(self, mountpoint: str | None) -> dict[str, str]:
        """Run-time values with credentials blanked; of all mounts, as ``<mountpoint>:<key>``, for None."""
        with self._lock:
            shown = {
                name: {
                    key: "" if key == "registry_auth" else configs.redact(value)
                    for key, value in values.items()
                }
                for name, values in self._runtime.items()
            }
        if mountpoint is not None:
            return shown.get(normal(mountpoint), {})
        return {f"{name}:{key}": value for name, values in shown.items() for key, value in values.items()}

    def check_mounts(self) -> bool:
        """Notices what was unmounted from outside. False when a dedicated daemon has lost its only mount."""
        if self.state != RUNNING:
            return True
        known = self.instances()  # before the table: what is mounted meanwhile is not in it
        present = {mount.id for mount in table.read()}
        for mountpoint, instance in known.items():
            if instance.mount_id and instance.mount_id not in present and mountpoint not in self._busy:
                log.info("%s was unmounted from outside", instance.state.path)
                self._gone(instance)
        return self._shared or bool(self.instances())

    # Inside

    def _leaving(self) -> int | None:
        """A pid descriptor of the predecessor, where that has not ended yet."""
        with suppress(OSError):
            if self._predecessor not in (0, self._pid):
                return os.pidfd_open(self._predecessor)
        return None

    def _owner(self, file: FileState) -> Owner | None:
        """Who describes a file to a successor: whoever did before, else another image that has it, too.

        The bootstrap of an unmounted image may be gone while others still use its blobs.
        """
        users = [number for number, instance in self._instances.items() if file.node in instance.state.nodes]
        for number in (file.instance, *users):
            if number in self._instances:
                image = self._instances[number].image
                for blob, info in enumerate(image.blobs):
                    if info.id == file.label:
                        return Owner(number, image, blob)
        return None

    def _enter(self, state: str) -> None:
        self.state = state
        self.report()

    def report(self) -> None:
        with self._lock:
            self._report(self.snapshot())

    def _on_change(self) -> None:
        """A file was opened or closed: a successor must know, and perhaps something is of no more use."""
        self.report()
        self._dirty.set()
        with self._lock:
            if self._collector is None:
                collector = threading.Thread(target=self._collect, name="collector", daemon=True)
                with suppress(RuntimeError):  # no thread to be had: the next change tries again
                    collector.start()
                    self._collector = collector

    def _collect(self) -> None:
        while True:
            self._dirty.wait()
            time.sleep(0.02)
            self._dirty.clear()
            with self._lock:
                if self.state != RUNNING:
                    continue
                alive = {number: i for number, i in self._instances.items() if i.alive}
                used = {node for instance in alive.values() for node in instance.state.nodes}
                give_up, owners = self.devices.collect(used, set(alive))
            give_up()
            with self._lock:
                for number, instance in list(self._instances.items()):
                    if not instance.alive and number not in owners:
                        del self._instances[number]
            self.report()

    @contextmanager
    def _claim(self, mountpoint: str) -> Iterator[None]:
        with self._lock:
            if mountpoint in self._busy:
                raise NydusError(f"{mountpoint}: another request is working on it")
            self._busy.add(mountpoint)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(mountpoint)

    def _check_place(self, mountpoint: str) -> None:
        if self.state not in (INIT, RUNNING):
            raise WrongState("Mount")
        taken = set(self.instances()) | (self._busy - {mountpoint})
        if mountpoint in taken:
            raise MountError(_EXISTS)
        if len(taken) >= _MAX_INSTANCES:
            raise MountError(f"more than {_MAX_INSTANCES} mounts")
        path = PurePosixPath(mountpoint)
        for other in taken:
            if path.is_relative_to(other) or PurePosixPath(other).is_relative_to(path):
                raise MountError(f"{mountpoint} and {other}: one would hide the other")

    def _mount_root(self) -> None:
        """An empty directory to mount images below."""
        try:
            with syscalls.FsContext("tmpfs") as context:
                context.set("source", "nydus")
                context.set("mode", "0755")
                context.set("size", "1m")
                context.create()
                fd = context.mount(syscalls.ATTR_NODEV | syscalls.ATTR_NOSUID | syscalls.ATTR_NOATIME)
            try:
                syscalls.attach(fd, self.options.mountpoint)
            finally:
                os.close(fd)
        except OSError as error:
            raise MountError(f"{self.options.mountpoint}: cannot mount: {error.strerror}") from error

    def _instance(
        self, mountpoint: str, image: Image, config_text: str, prefetch: list[str] | None
    ) -> Instance:
        choice = self._choose(image)
        path = str(self.options.mountpoint) + mountpoint.rstrip("/")
        if mountpoint != "/":
            os.makedirs(path, exist_ok=True)
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e9):09d} +00:00:00"
        with self._lock:
            state = InstanceState(
                number=self._next_number,
                mountpoint=mountpoint,
                path=path,
                bootstrap=str(image.bootstrap),
                config=config_text,
                prefetch_files=prefetch,
                mounted_time=stamp,
                provider=choice.provider,
                reason=choice.reason,
            )
            self._next_number += 1
            self._instances[state.number] = instance = Instance(state, image, mounting=True)
        return instance

    def _choose(self, image: Image) -> probe.Choice:
        try:
            os.makedirs(image.work_dir, exist_ok=True)
            return probe.choose(image.work_dir, self.options.provider)
        except OSError as error:
            raise NydusError(f"{image.work_dir}: cannot use the cache directory: {error.strerror}") from error

    def _attach(self, instance: Instance) -> None:
        if instance.state.provider == "fuse":
            instance.mount_fuse()
            return
        sources = instance.sources(self.devices)
        # A successor must be able to answer for these files while the kernel opens them.
        self.report()
        with self._in_mount():
            self.devices.waiting_for_it(lambda: instance.mount_erofs(sources))

    @contextmanager
    def _in_mount(self) -> Iterator[None]:
        with self._lock:
            self._mounting += 1
            self._tell_busy(True)
        try:
            yield
        finally:
            with self._lock:
                self._mounting -= 1
                self._tell_busy(self._mounting > 0)

    def _gone(self, instance: Instance) -> None:
        """After an unmount, by whomever."""
        with self._lock:
            if not instance.state.mounted:
                return
            instance.state.mounted = False
            self._runtime.pop(instance.state.mountpoint, None)
        instance.close()
        self._on_change()

    def _remove_directories(self, mountpoint: str) -> None:
        """The empty directories that a mount needed."""
        self._dirty.set()
        if not self._shared:
            return
        path = self.options.mountpoint / mountpoint.strip("/")
        while path != self.options.mountpoint:
            try:
                path.rmdir()
            except OSError:
                return
            path = path.parent

    def _apply(self, mountpoint: str, values: dict[str, str]) -> None:
        instance = self.instances().get(mountpoint)
        set_auth = getattr(instance.image.backend, "set_auth", None) if instance else None
        if set_auth is not None and "registry_auth" in values:
            set_auth(values["registry_auth"])

    def _settle(self) -> None:
        """Finishes what a predecessor was killed in: a mount nobody was told of, an unmount not yet noted."""
        mounted = self.instances()
        paths = {instance.state.path for instance in mounted.values()}
        for instance in list(self._instances.values()):
            state = instance.state
            here = table.at(state.path)
            if state.mounted and state.provider != "fuse" and here is None:
                self._gone(instance)
            elif not state.mounted and state.path not in paths:
                if (
                    here is not None
                    and here.kind == "erofs"
                    and here.source == str(instance.image.metadata.path)
                ):
                    with suppress(OSError):
                        syscalls.detach(state.path)
                self._remove_directories(state.mountpoint)


def _resend_later(blobfs: BlobFs, leaving: int) -> None:
    """Has sent again what a predecessor takes after its successor has come, and before it ends."""
    try:
        poll = select.poll()
        poll.register(leaving, select.POLLIN)
        poll.poll()
    finally:
        os.close(leaving)
    blobfs.resend()


def _introduce(image: Image) -> None:
    """Tells the caches that images share what this image knows of them, as its mount did once."""
    for blob, info in enumerate(image.blobs):
        try:
            image.open_cache(blob)
        except NydusError as error:
            log.error("blob %s of %s: %s", info.id, image.bootstrap, error)
        else:
            image.release_cache(blob)


def normal(mountpoint: str) -> str:
    """A mountpoint in its one spelling. Raises MountError where it is not absolute or climbs."""
    path = PurePosixPath(mountpoint)
    if not path.is_absolute() or ".." in path.parts:
        raise MountError(f"mountpoint {mountpoint!r} is not an absolute path")
    return "/" + "/".join(path.parts[1:])
