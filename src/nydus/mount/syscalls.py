"""The mount system calls that Python does not have, by ctypes.

Only the new mount API is used: ``mount(2)`` silently cuts its options at 4,095 bytes, and an image may have
255 devices. Every function raises :class:`OSError`; nothing here knows what is being mounted.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)

# The numbers are the same on every architecture (asm-generic/unistd.h).
_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_CLOEXEC = 1  # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_FDCWD, _AT_EMPTY_PATH, _AT_STATX_DONT_SYNC = -100, 0x1000, 0x4000

ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOATIME = 1, 2, 4, 0x10
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_CLOSE_RANGE, _CLOSE_RANGE_UNSHARE = 436, 2
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def _call(number: int, what: str, *arguments: object) -> int:
    converted = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]  # type: ignore[arg-type]
    return _check(_libc.syscall(ctypes.c_long(number), *converted), what)


class FsContext:
    """A file system that is being configured (``fsopen``); use it as a context manager.

    The kernel's reasons for a refusal are added to the error's text.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.fd = _call(_FSOPEN, f"fsopen {kind}", kind.encode(), _CLOEXEC)

    def set(self, key: str, value: str | os.PathLike[str] | None = None) -> None:
        """Sets a string option, or a flag where ``value`` is None. The kernel takes at most 255 bytes."""
        if value is None:
            self._config(_FSCONFIG_SET_FLAG, key, None)
        else:
            self._config(_FSCONFIG_SET_STRING, key, os.fsencode(value))

    def create(self) -> None:
        """Makes the super block."""
        self._config(_FSCONFIG_CMD_CREATE, None, None)

    def mount(self, attributes: int = 0) -> int:
        """A descriptor of a detached mount: it disappears with its last descriptor unless it is attached."""
        return _call(_FSMOUNT, f"fsmount {self.kind}", self.fd, _CLOEXEC, attributes)

    def log(self) -> str:
        """What the kernel said since the last call, ``; `` between messages."""
        messages = []
        while True:
            try:
                data = os.read(self.fd, 4096)
            except OSError:
                break
            messages.append(data.decode(errors="replace").partition(" ")[2].strip())
        return "; ".join(filter(None, messages))

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> FsContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _config(self, command: int, key: str | None, value: bytes | None) -> None:
        name = key.encode() if key is not None else None
        try:
            _call(_FSCONFIG, key or "create", self.fd, command, name, value, 0)
        except OSError as error:
            said = self.log()
            reason = f"{error.strerror} ({said})" if said else error.strerror
            raise OSError(error.errno, reason, f"{self.kind} {key or 'mount'}") from None


def attach(mount_fd: int, path: str | os.PathLike[str]) -> None:
    """Attaches a detached mount to a directory."""
    _call(_MOVE_MOUNT, os.fspath(path), mount_fd, b"", _AT_FDCWD, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH)


def umount(path: str | os.PathLike[str], flags: int = 0) -> None:
    _check(
        _libc.umount2(os.fsencode(path), ctypes.c_int(flags | UMOUNT_NOFOLLOW)), f"umount {os.fspath(path)}"
    )


def detach(path: str | os.PathLike[str]) -> bool:
    """Lazily unmounts what is mounted on a path; False if nothing is."""
    try:
        umount(path, MNT_DETACH)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return False
        raise
    return True


def drop_descriptors() -> None:
    """Gives the calling thread a descriptor table of its own, with standard input, output and error only."""
    _call(_CLOSE_RANGE, "close_range", 3, 0xFFFFFFFF, _CLOSE_RANGE_UNSHARE)


def resident_buffer(size: int) -> mmap.mmap:
    """Private memory that the kernel can write to without a page fault, now and later.

    Locked where the limits allow it, so that it is not swapped out either.
    """
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return buffer


def device_of(fd: int) -> tuple[int, int]:
    """Major and minor device number of an open file's file system, without asking a FUSE server."""
    result = ctypes.create_string_buffer(256)  # struct statx
    flags = ctypes.c_int(_AT_EMPTY_PATH | _AT_STATX_DONT_SYNC)
    _check(_libc.statx(ctypes.c_int(fd), b"", flags, ctypes.c_uint(0), result), "statx")
    major, minor = struct.unpack_from("<II", result, 136)
    return major, minor


def die_with_parent(signal_number: int) -> None:
    """Has the kernel send this process a signal when the thread that forked it ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal_number), 0, 0, 0), "prctl")


def name_process(name: str) -> None:
    """Sets the name that ``ps`` shows for this thread (at most 15 bytes)."""
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]), 0, 0, 0)
