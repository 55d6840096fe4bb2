"""The provider that works everywhere: a whole file system in user space, by libfuse.

It is for kernels that cannot mount EROFS from files, and for users without the right to. Every ``stat`` and
``open`` comes to Python once, then the kernel keeps it. A library cannot take over a live descriptor: when
its process dies so does the mount, and a successor makes a new one.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from nydus.errors import MountError, NydusError
from nydus.mount import syscalls, table
from nydus.rafs.model import SuperFlag, Tree

log = logging.getLogger(__name__)

_FOREVER = 1 << 31  # seconds
_START = 10.0  # seconds for the mount to appear


class Source(Protocol):
    def read(self, offset: int, length: int) -> Sequence[bytes | memoryview]: ...


class TreeOperations:
    """A tree as :mod:`mfusepy` wants it; paths are absolute.

    Args:
        tree: the file system.
        sources: the uncompressed bytes of each of its blobs.
    """

    use_ns = True

    def __init__(self, tree: Tree, sources: Sequence[Source]) -> None:
        self._tree, self._sources = tree, sources
        fields = ["link", "mode", "uid", "gid", "nlink", "size", "mtime", "mtime_ns", "rdev"]
        self._columns = tree.nodes[fields]
        explicit = bool(tree.flags & SuperFlag.EXPLICIT_UID_GID)
        self._owner = None if explicit else (os.geteuid(), os.getegid())
        self._find = functools.lru_cache(1 << 16)(self._find_slowly)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        link, mode, uid, gid, nlink, size, mtime, mtime_ns, rdev = self._columns[self._find(path)].item()
        if self._owner is not None:
            uid, gid = self._owner
        time_ns = mtime * 1_000_000_000 + mtime_ns
        return {
            "st_ino": link + 1,
            "st_mode": mode,
            "st_nlink": nlink,
            "st_uid": uid,
            "st_gid": gid,
            "st_rdev": os.makedev(*_split_device(rdev)),
            "st_size": size,
            "st_blocks": (size + 511) // 512,
            "st_atime": time_ns,
            "st_mtime": time_ns,
            "st_ctime": time_ns,
        }

    def readdir(self, path: str, fh: int) -> Iterator[tuple[str, dict[str, int], int]]:
        row = self._find(path)
        yield self._entry(".", row)
        yield self._entry("..", int(self._tree.nodes[row]["parent"]))
        for child in self._tree.children(row):
            yield self._entry(os.fsdecode(self._tree.name(child)), child)

    def readlink(self, path: str) -> str:
        return os.fsdecode(self._tree.target(self._find(path)))

    def open(self, path: str, flags: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self._find(path)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        row = fh
        end = min(offset + size, int(self._tree.nodes[row]["size"]))
        parts: list[bytes | memoryview] = []
        chunk_size = self._tree.chunk_size
        chunks = self._tree.node_chunks(row)
        while offset < end:
            chunk = chunks[offset // chunk_size]
            inside = offset % chunk_size
            length = min(end - offset, int(chunk["usize"]) - inside)
            blob, start = int(chunk["blob_index"]), int(chunk["uoffset"]) + inside
            try:
                if length <= 0:
                    raise NydusError("a chunk is shorter than its file")
                parts += self._sources[blob].read(start, length)
            except Exception as error:
                name = self._tree.blobs[blob].id
                log.error("blob %s at offset %d, %d bytes: %s", name, start, length, error)
                raise OSError(errno.EIO, os.strerror(errno.EIO)) from None
            offset += length
        return b"".join(parts)

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        wanted = os.fsencode(name)
        for key, value in self._tree.node_xattrs(self._find(path)):
            if key == wanted:
                return value
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))

    def listxattr(self, path: str) -> list[str]:
        return [os.fsdecode(key) for key, _ in self._tree.node_xattrs(self._find(path))]

    def statfs(self, path: str) -> dict[str, int]:
        blocks = sum(blob.uncompressed_size for blob in self._tree.blobs) // 512
        return {
            "f_bsize": 512,
            "f_frsize": 512,
            "f_namemax": 255,
            "f_files": len(self._tree),
            "f_blocks": blocks,
        }

    def _entry(self, name: str, row: int) -> tuple[str, dict[str, int], int]:
        # The C library hides names whose inode number is 0.
        link, mode, *_ = self._columns[row].item()
        return name, {"st_ino": link + 1, "st_mode": mode}, 0

    def _find_slowly(self, path: str) -> int:
        row = self._tree.find(os.fsencode(path))
        if row is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return row


class FuseMount:
    """A running mount, served by threads of this process.

    Args:
        operations: the file system.
        mountpoint: an existing directory.
        on_close: called once after the end.

    Raises:
        MountError: there is no libfuse, or it could not mount.
    """

    def __init__(
        self, operations: TreeOperations, mountpoint: Path, on_close: Callable[[], None] = lambda: None
    ) -> None:
        try:
            import mfusepy
        except (ImportError, OSError) as error:
            raise MountError(f"the fuse provider needs libfuse (Debian: libfuse3-3): {error}") from None
        self.mountpoint, self._on_close = mountpoint, on_close
        self._fuse = mfusepy.FUSE
        self._operations = operations
        self._problem = ""
        before = table.at(mountpoint)
        self._thread = threading.Thread(target=self._run, name="fuse", daemon=True)
        self._thread.start()
        end = time.monotonic() + _START
        while (now := table.at(mountpoint)) is None or now == before:
            if not self._thread.is_alive():
                raise MountError(f"{mountpoint}: libfuse cannot mount here: {self._problem}")
            if time.monotonic() > end:
                raise MountError(f"{mountpoint}: libfuse has not mounted after {_START:g} s")
            time.sleep(0.002)
        self.mount_id = now.id

    def close(self) -> None:
        """Unmounts; lazily if it is in use."""
        unmount(self.mountpoint)
        self._thread.join(1.0)

    def _run(self) -> None:
        options: dict[str, Any] = {"allow_other": True} if os.geteuid() == 0 else {}
        try:
            self._fuse(
                self._operations,
                str(self.mountpoint),
                foreground=True,
                ro=True,
                nosuid=True,
                nodev=True,
                default_permissions=True,
                fsname="rafs",
                use_ino=True,
                max_idle_threads=16,
                kernel_cache=True,
                attr_timeout=_FOREVER,
                entry_timeout=_FOREVER,
                negative_timeout=_FOREVER,
                **options,
            )
        except Exception as error:
            self._problem = f"it ended with {error}; its own words are in the log"
        finally:
            self._on_close()


def unmount(mountpoint: Path) -> None:
    """Lazily unmounts, with libfuse's helper where the user may not."""
    try:
        syscalls.detach(mountpoint)
    except PermissionError:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["fusermount3", "-u", "-z", str(mountpoint)], capture_output=True, timeout=10)


def _split_device(rdev: int) -> tuple[int, int]:
    """Major and minor number of the device number that the formats store (``new_encode_dev`` of Linux)."""
    return (rdev & 0xFFF00) >> 8, (rdev & 0xFF) | ((rdev >> 12) & 0xFFF00)
