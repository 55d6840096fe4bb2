"""One mount: how an image comes to its place in the mount tree, and leaves it."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nydus.daemon.devices import Devices
from nydus.daemon.image import Image
from nydus.daemon.prefetch import ImagePrefetch
from nydus.daemon.state import InstanceState
from nydus.errors import MountError, NydusError
from nydus.mount import erofs, syscalls, table

if TYPE_CHECKING:
    from nydus.mount.fuse import FuseMount
    from nydus.storage.files import OpenFile

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Sources:
    """What EROFS is to have as its devices: a path for each blob, good as long as this object is there."""

    paths: list[Path | str]
    plain: list[OpenFile]


@dataclass(slots=True)
class Instance:
    """One image that is mounted, being mounted, or unmounted but still open in the kernel."""

    state: InstanceState
    image: Image
    mounting: bool = False
    mount_id: int = 0
    fuse: FuseMount | None = None
    prefetch: ImagePrefetch | None = None

    @classmethod
    def left(cls, state: InstanceState, image: Image) -> Instance:
        """What a predecessor has left."""
        found = table.at(state.path) if state.mounted and state.provider != "fuse" else None
        return cls(state, image, mount_id=found.id if found else 0)

    @property
    def alive(self) -> bool:
        return self.state.mounted or self.mounting

    def sources(self, devices: Devices) -> Sources:
        """The blobs' own files where every byte of them is there and verified, else files of blobfs.

        Raises:
            MountError: there cannot be a FUSE mount here.
        """
        result = Sources([], [])
        for blob in range(len(self.image.blobs)):
            if plain := self._plain_file(blob):
                result.plain.append(plain)
                result.paths.append(f"/proc/self/fd/{plain.fd}")
            else:
                file = devices.get(self.image, blob, self.state.number)
                self.state.nodes.append(file.node)
                result.paths.append(devices.path(file))
        return result

    def mount_erofs(self, sources: Sources) -> None:
        """Has the kernel mount it, which opens and reads the sources.

        Raises:
            MountError: with the kernel's own words.
        """
        mount = self._open_erofs(sources.paths)
        try:
            syscalls.attach(mount, self.state.path)
            self.mount_id = table.id_of(mount)
        except OSError as error:
            raise MountError(f"{self.state.path}: cannot mount here: {error.strerror}") from error
        finally:
            os.close(mount)

    def mount_fuse(self) -> None:
        """Mounts the whole file system through libfuse.

        Raises:
            NydusError: the image is corrupt, or libfuse refuses.
        """
        from nydus.mount.fuse import FuseMount, TreeOperations

        image = self.image
        caches = [image.open_cache(blob) for blob in range(len(image.blobs))]
        opened = list(range(len(caches)))

        def release() -> None:  # at the end, or where there was no beginning
            while opened:
                image.release_cache(opened.pop())

        try:
            operations = TreeOperations(image.tree(), caches)
            self.fuse = FuseMount(operations, Path(self.state.path), release)
        except BaseException:
            release()
            raise
        self.mount_id = self.fuse.mount_id

    def remount_fuse(self) -> None:
        """A library's FUSE connection cannot be taken over: the mount is replaced, open files are lost."""
        from nydus.mount.fuse import unmount

        unmount(Path(self.state.path))
        try:
            self.mount_fuse()
        except (NydusError, OSError) as error:
            log.error("mounting %s again: %s", self.state.path, error)

    def detach(self) -> None:
        """Unmounts it. Raises MountError where nothing is mounted."""
        if self.fuse is not None:
            self.fuse.close()
        else:
            erofs.umount(self.state.path)

    def fetch_ahead(self) -> None:
        """Starts what the configuration has fetched in the background."""
        if self.image.config.fs_prefetch.enable:
            try:
                self.prefetch = ImagePrefetch(self.image, self.state.prefetch_files)
            except (NydusError, RuntimeError) as error:  # the latter where there are no more threads
                log.warning("nothing is fetched ahead of %s: %s", self.image.bootstrap, error)

    def close(self) -> None:
        """Lets go of the image, when it is unmounted."""
        if self.prefetch is not None:
            self.prefetch.close()
        self.image.close()

    def _plain_file(self, blob: int) -> OpenFile | None:
        info = self.image.blobs[blob]
        cache = self.image.open_cache(blob)
        try:
            file = cache.verified_file()
            return file if file and file.size() >= info.uncompressed_size else None
        except (NydusError, OSError) as error:
            log.debug("cache of blob %s: %s", info.id, error)
            return None
        finally:
            self.image.release_cache(blob)

    def _open_erofs(self, devices: list[Path | str]) -> int:
        bootstrap = self.image.metadata.path
        try:
            return erofs.open_detached(bootstrap, devices)
        except MountError as error:
            cause = error.__cause__
            if not (isinstance(cause, OSError) and cause.errno == errno.ENOTBLK):
                raise
        # It lies on tmpfs or the like; the probe has shown that the cache directory does not.
        with tempfile.TemporaryFile(dir=self.image.work_dir) as copy, bootstrap.open("rb") as file:
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.flush()
            return erofs.open_detached(f"/proc/thread-self/fd/{copy.fileno()}", devices)
