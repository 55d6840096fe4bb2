"""The ten calls of a snapshotter: which layers need no download, what a container's root is made of."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from nydus.errors import NydusError
from nydus.snapshotter import daemons, mounts, template
from nydus.snapshotter import labels as label
from nydus.snapshotter.config import Config
from nydus.snapshotter.errors import AlreadyExists, FailedPrecondition, SnapshotError
from nydus.snapshotter.filters import compile_filters
from nydus.snapshotter.images import Images
from nydus.snapshotter.mounts import Mount
from nydus.snapshotter.store import Kind, Snapshot, Store

log = logging.getLogger(__name__)


class Snapshotter:
    """Snapshots of ordinary and Nydus images. Every method may raise SnapshotError. Thread-safe."""

    def __init__(self, config: Config, store: Store, images: Images) -> None:
        self._config, self._store, self._images = config, store, images

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A writable snapshot: a layer to unpack, or a container's.

        Raises:
            AlreadyExists: besides a taken key: the layer needs no download and is committed as its chain ID.
        """
        target = labels.get(label.TARGET)
        if target and label.BLOB in labels and label.BOOTSTRAP not in labels:
            self._store.create(Kind.COMMITTED, target, parent, labels)
            raise AlreadyExists(f'target snapshot "{target}": already exists')
        mapping = mounts.id_mapping(labels)
        owner = (mapping.host, mapping.host) if mapping else None
        return self._created(self._store.create(Kind.ACTIVE, key, parent, labels, owner))

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A read-only snapshot."""
        if parent:
            above = self._store.get(parent)
            if label.BLOB in above.labels and label.BOOTSTRAP not in above.labels:
                raise SnapshotError(
                    f"can only view the topmost layer of a Nydus image: {parent} has no files of its own"
                )
        return self._created(self._store.create(Kind.VIEW, key, parent, labels))

    def mounts(self, key: str) -> list[Mount]:
        """The mounts of a view or active snapshot, the same as when it was made."""
        chain = self._store.chain(key)
        if chain[0].kind == Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {key} is committed and has no mounts: failed precondition")
        return self._mounts(chain)

    def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Make an active snapshot the committed one ``name``."""
        snapshot = self._store.get(key)
        size, inodes = _disk_usage(self._store.directory(snapshot.id) / "fs")
        self._store.commit(name, key, labels, size, inodes)
        if label.BOOTSTRAP in labels:
            try:
                self._images.register(self._store.get(name))
            except (NydusError, OSError) as error:
                # Mounting it will say the same, to the one who wants it.
                log.warning("layer %s is no usable bootstrap: %s", name, error)

    def remove(self, key: str) -> None:
        """Forget a snapshot; its files and mounts go with the next cleanup, or now with ``sync_remove``."""
        self._store.remove(key)
        if self._config.snapshot.sync_remove:
            self._sweep()

    def stat(self, key: str) -> Snapshot:
        """One record."""
        return self._store.get(key)

    def update(self, name: str, labels: Mapping[str, str], paths: list[str]) -> Snapshot:
        """Change labels; ``paths`` is the request's field mask."""
        return self._store.update(name, labels, paths)

    def find(self, filters: list[str]) -> list[Snapshot]:
        """The records that match, oldest first."""
        matches = compile_filters(filters)
        return [snapshot for snapshot in self._store.all() if matches(snapshot)]

    def usage(self, key: str) -> tuple[int, int]:
        """Bytes on disk and inodes; of a lazily loaded layer, what the cache holds of it."""
        snapshot = self._store.get(key)
        if snapshot.kind == Kind.ACTIVE:
            return _disk_usage(self._store.directory(snapshot.id) / "fs")
        size, inodes = snapshot.size, snapshot.inodes
        if snapshot.kind == Kind.COMMITTED and label.BLOB in snapshot.labels:
            cached, files = self._images.cached(label.layer_digest(snapshot.labels))
            size, inodes = size + cached, inodes + files
        return size, inodes

    def cleanup(self) -> None:
        """Delete the directories, mounts, daemons and cached blobs that nothing needs any more."""
        self._sweep()
        self._images.collect_blobs()

    # Inside

    def _created(self, snapshot: Snapshot) -> list[Mount]:
        try:
            return self._mounts(self._store.chain(snapshot.name))
        except BaseException:
            try:
                self._store.remove(snapshot.name)
                shutil.rmtree(self._store.directory(snapshot.id), ignore_errors=True)
            except (SnapshotError, OSError) as error:
                log.warning("cannot undo the failed preparation of %s: %s", snapshot.name, error)
            raise

    def _mounts(self, chain: list[Snapshot]) -> list[Mount]:
        snapshot, parents = chain[0], chain[1:]
        directory = self._store.directory(snapshot.id)
        active = snapshot.kind == Kind.ACTIVE
        lower: list[Path] = []
        image: Snapshot | None = None
        for parent in parents:
            if label.BOOTSTRAP in parent.labels:
                # The image shows all its layers; what lies below has no files.
                image = parent
                lower.append(self._images.mountpoint(parent))
                break
            lower.append(self._store.directory(parent.id) / "fs")
        if not lower:
            return mounts.bind(directory / "fs", writable=active)
        if not active and len(lower) == 1:
            if image is None:
                return mounts.bind(lower[0], writable=False)
            lower.append(directory / "fs")  # an overlay without a writable layer needs two
        options: list[str] = []
        if active:
            if label.VOLATILE in snapshot.labels or (
                image and self._config.snapshot.enable_overlayfs_volatile
            ):
                options.append("volatile")
            if mapping := mounts.id_mapping(snapshot.labels):
                options += mapping.options()
        made = mounts.overlay(lower, directory if active else None, options)
        if image and self._config.snapshot.enable_nydus_overlayfs:
            bootstrap, document = self._images.configuration(image)
            made[0].options.append(
                mounts.extra_option(bootstrap, template.without_secrets(document), directory)
            )
            return [made[0]._replace(type=f"fuse.{self._config.snapshot.nydus_overlayfs_path}")]
        return made

    def _sweep(self) -> None:
        self._images.collect()
        for directory in self._store.sweep():
            try:
                daemons.detach(directory)
                shutil.rmtree(directory)
            except FileNotFoundError:
                pass  # another cleanup was faster
            except (NydusError, OSError) as error:
                log.warning("cannot delete %s yet: %s", directory, error)


def _disk_usage(root: Path) -> tuple[int, int]:
    """Bytes of the blocks, and the number of inodes, at and below a directory; hard links count once."""
    status = os.lstat(root)
    size, seen = status.st_blocks * 512, {(status.st_dev, status.st_ino)}
    waiting = [os.fspath(root)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    inode = (status.st_dev, status.st_ino)
                    if inode not in seen:
                        seen.add(inode)
                        size += status.st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except FileNotFoundError:
            continue  # a container deletes its files meanwhile
    return size, len(seen)
