"""Who serves a mountpoint: a lock file for each, so that nobody mounts over a living daemon's images, and so
that what a dead one left behind is recognized."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from nydus.errors import NydusError
from nydus.mount import table
from nydus.mount.table import Mount

_DIRECTORIES = (Path("/run/nydusd"), Path(tempfile.gettempdir()) / f"nydusd-{os.getuid()}")


class MountLock:
    """The lock of one mountpoint. It is held by every process that inherited it, until the last one ends.

    Args:
        mountpoint: absolute path, whether it is accessible or not.
    """

    def __init__(self, mountpoint: Path) -> None:
        self._mountpoint = mountpoint
        self._fd = -1
        self._path: Path | None = None

    def acquire(self) -> bool:
        """Takes the lock. Returns whether a daemon that is dead now has left its mount here.

        Raises:
            NydusError: a living daemon, or somebody else, has something mounted here.
        """
        mounted = table.at(self._mountpoint)
        known = self._open()
        if not self._lock():
            owner = os.pread(self._fd, 32, 0).decode(errors="replace").partition("\n")[0]
            self._forget()
            raise NydusError(f"{self._mountpoint}: is served by another nydusd, process {owner}")
        self._sweep()
        if mounted is None:
            return False
        if not is_ours(mounted) or not (known or self._disconnected()):
            if not known and self._path is not None:
                self._path.unlink(missing_ok=True)
            self._forget()
            raise NydusError(f"{self._mountpoint}: {mounted.kind} is mounted here already")
        return True

    def adopt(self) -> None:
        """Takes the lock if it can be had: after an upgrade the predecessor may hold it for a moment more."""
        if self._fd >= 0:
            return
        self._open()
        if not self._lock():
            self._forget()

    def release(self) -> None:
        """Gives the lock up; the file stays if something is still mounted (a successor's, or the dead's)."""
        if self._fd < 0:
            return
        if self._path is not None and table.at(self._mountpoint) is None:
            self._path.unlink(missing_ok=True)
        self._forget()

    def _forget(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def _lock(self) -> bool:
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            with suppress(FileNotFoundError):
                if self._path is not None and os.path.samestat(os.fstat(self._fd), self._path.stat()):
                    break
            os.close(self._fd)  # it was removed while we opened it
            self._open()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, b"%d\n%s\n" % (os.getpid(), os.fsencode(self._mountpoint)), 0)
        return True

    def _open(self) -> bool:
        """Opens the lock file. Returns whether it was there: some daemon has used this mountpoint."""
        name = hashlib.sha256(os.fsencode(self._mountpoint)).hexdigest()[:32]
        for directory in _DIRECTORIES:
            path = directory / name
            try:
                directory.mkdir(mode=0o700, exist_ok=True)
                known = path.exists()
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
                    raise NydusError(f"{path}: cannot make the lock file: {error.strerror}") from None
                continue
            self._path = path
            return known
        raise NydusError(f"{_DIRECTORIES[-1]}: cannot make a lock file")

    def _sweep(self) -> None:
        """Removes the lock files of daemons that were killed and whose mounts are gone."""
        if self._path is None:
            return
        mounted = {mount.path for mount in table.read()}
        for path in self._path.parent.iterdir():
            with suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _, _, place = os.pread(fd, 8192, 0).partition(b"\n")
                    if os.path.realpath(os.fsdecode(place.rstrip(b"\n"))) not in mounted:
                        path.unlink()
                finally:
                    os.close(fd)

    def _disconnected(self) -> bool:
        """Whether the mount is a FUSE mount that nobody serves any more, some other daemon's perhaps."""
        try:
            self._mountpoint.stat()
        except OSError as error:
            return error.errno == errno.ENOTCONN
        return False


def is_ours(mount: Mount) -> bool:
    """Whether it is something that a nydusd mounts."""
    return (
        mount.kind == "erofs"
        or (mount.kind.startswith("fuse") and mount.source == "rafs")
        or (mount.kind == "tmpfs" and mount.source == "nydus")
    )
