"""The files of blobfs: which blob each one is, and when it is of no more use."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from nydus.daemon.image import Image
from nydus.daemon.state import FileState
from nydus.errors import MountError, NydusError
from nydus.mount.blobfs import ROOT, BlobFs, Buffer, File

log = logging.getLogger(__name__)

T = TypeVar("T")

# KiB. It counts when EROFS opens a file and cannot be changed after. 1 MiB makes 95 reads of 700 and saves a
# third of the CPU time, but small random reads then ask for half as much again; whoever streams is helped by
# amplification and prefetch in the cache.
_READAHEAD = 128


@dataclass(slots=True)
class _Device:
    file: File
    key: str
    image: Image | None
    owner: int  # number of the instance whose bootstrap and configuration describe the blob
    blob: int
    users: set[int] = field(default_factory=set)  # numbers of the instances that asked for it


class Owner(NamedTuple):
    """Blob number ``blob`` of the image of an instance."""

    instance: int
    image: Image
    blob: int


class Devices:
    """The blobfs connection of a daemon, made when the first file is wanted. Thread-safe.

    Args:
        threads: threads that read requests.
        descriptors: told (``/dev/fuse``, blobfs mount) as soon as they exist.
        changed: told when the kernel opened or closed a file; from a serving thread, so it must not wait for
            anything that waits for the kernel.
    """

    def __init__(
        self,
        *,
        threads: int = 4,
        descriptors: Callable[[int, int], None] = lambda device, mount: None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._threads, self._descriptors, self._changed = threads, descriptors, changed
        self._lock = threading.RLock()
        self._by_node: dict[int, _Device] = {}
        self._by_key: dict[str, _Device] = {}
        self._last_node = ROOT
        self.blobfs: BlobFs | None = None

    def adopt(
        self, device: int, mount: int, files: list[FileState], owner: Callable[[FileState], Owner | None]
    ) -> None:
        """Takes over a connection and its files, without serving yet.

        Args:
            owner: finds the image that describes a file; where there is none it can only answer EIO.
        """
        with self._lock:
            self._use(BlobFs(device, mount, threads=self._threads, on_change=self._on_change))
            for file in files:
                found = owner(file)
                if found is not None:
                    self._add(file.node, found.image, found.blob, found.instance, file.size, file.handles)
                else:
                    assert self.blobfs is not None
                    source = _Unavailable(file.size)
                    added = self.blobfs.add(file.node, file.size, file.label, source, file.handles)
                    self._by_node[file.node] = _Device(added, "", None, file.instance, file.blob)

    def get(self, image: Image, blob: int, owner: int) -> File:
        """The file of a blob, the same for all images that have the blob from the same place.

        Raises:
            MountError: there cannot be a FUSE mount here.
        """
        with self._lock:
            blobfs = self.blobfs
            if blobfs is None:
                blobfs = BlobFs.create(threads=self._threads, on_change=self._on_change)
                self._use(blobfs)
                blobfs.set_readahead(_READAHEAD)
                blobfs.serve()
            device = self._by_key.get(image.key(blob))
            if device is None:
                if blobfs.mount < 0:
                    raise MountError(
                        "the controller did not hand over the blobfs mount: no image can be added"
                    )
                # New to the kernel, too, which would give the bytes of the file that had the number before: a
                # successor may not have been told of the last files of its predecessor.
                self._last_node = max(self._last_node + 1, time.monotonic_ns())
                device = self._add(self._last_node, image, blob, owner, image.device_size(blob))
            device.users.add(owner)
            return device.file

    def path(self, file: File) -> str:
        assert self.blobfs is not None
        return self.blobfs.path(file)

    def waiting_for_it(self, function: Callable[[], T]) -> T:
        """Runs a function in which the kernel may ask this process: see :class:`BlobFs`."""
        return function() if self.blobfs is None else self.blobfs.waiting_for_it(function)

    def states(self) -> list[FileState]:
        with self._lock:
            return [
                FileState(node, d.file.size, d.file.label, d.owner, d.blob, sorted(d.file.handles))
                for node, d in self._by_node.items()
            ]

    def collect(self, used: set[int], alive: set[int]) -> tuple[Callable[[], None], set[int]]:
        """Forgets the files that are neither open in the kernel, nor among the ``used`` nodes, nor asked for
        by an instance that is ``alive`` (it may be about to have them opened).

        Returns:
            What gives them up; it may wait for the kernel. And the instances that still own a file.
        """
        dropped: list[_Device] = []
        with self._lock:
            for node, device in list(self._by_node.items()):
                if not device.file.handles and node not in used and not device.users & alive:
                    del self._by_node[node]
                    self._by_key.pop(device.key, None)
                    dropped.append(device)
            owners = {device.owner for device in self._by_node.values()}
        return lambda: self._give_up(dropped), owners

    def _give_up(self, dropped: list[_Device]) -> None:
        for device in dropped:
            assert self.blobfs is not None
            self.blobfs.remove(device.file.node)
            if device.image is not None:
                with suppress(NydusError, OSError):
                    device.image.release_cache(device.blob)

    def _use(self, blobfs: BlobFs) -> None:
        self.blobfs = blobfs
        self._descriptors(blobfs.device, blobfs.mount)

    def _add(
        self, node: int, image: Image, blob: int, owner: int, size: int, handles: Sequence[int] = ()
    ) -> _Device:
        assert self.blobfs is not None
        cache = image.open_cache(blob)
        file = self.blobfs.add(node, size, image.blobs[blob].id, cache, handles)
        device = _Device(file, image.key(blob), image, owner, blob)
        self._by_node[node] = self._by_key[device.key] = device
        return device

    def _on_change(self, file: File) -> None:
        self._changed()


class _Unavailable:
    """A source for a file whose image a successor could not open again."""

    def __init__(self, length: int) -> None:
        self.length = length

    def ready(self, offset: int, length: int) -> bool:
        return True

    def read(self, offset: int, length: int) -> list[Buffer]:
        raise NydusError("its image could not be opened again")
