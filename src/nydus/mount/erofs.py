"""Mounting RAFS v6 images with the kernel's EROFS (rafs.md §2.11): a bootstrap and one file for each blob."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nydus.errors import MountError
from nydus.mount import syscalls


def mount(bootstrap: Path | str, devices: Sequence[Path | str], mountpoint: Path | str) -> None:
    """Mounts an image read-only.

    Args:
        bootstrap: the EROFS metadata; a file on a real disk (not tmpfs, not a memfd).
        devices: one file for each row of the bootstrap's device table, in its order; at most 255 bytes each.
        mountpoint: an existing directory.

    Raises:
        MountError: with the kernel's own words.
    """
    fd = open_detached(bootstrap, devices)
    try:
        syscalls.attach(fd, mountpoint)
    except OSError as error:
        raise MountError(f"{mountpoint}: cannot mount here: {error.strerror}") from error
    finally:
        os.close(fd)


def open_detached(bootstrap: Path | str, devices: Sequence[Path | str]) -> int:
    """Like :func:`mount`, but gives a descriptor of a mount that is nowhere in the tree yet."""
    opened: list[int] = []
    kernel_log = _KernelLog()
    try:
        with syscalls.FsContext("erofs") as context:
            context.set("source", _short(bootstrap, opened))
            for device in devices:
                context.set("device", _short(device, opened))
            context.set("ro")
            context.create()
            # The image is somebody else's: its set-uid programs and devices must not work on the host. (They
            # do in a container, whose overlay has flags of its own.)
            return context.mount(syscalls.ATTR_RDONLY | syscalls.ATTR_NODEV | syscalls.ATTR_NOSUID)
    except OSError as error:
        text = "; ".join([_explain(error), *kernel_log.said()])
        raise MountError(f"{bootstrap}: the kernel refuses the image: {text}") from error
    finally:
        kernel_log.close()
        for fd in opened:
            os.close(fd)


def umount(mountpoint: Path | str) -> None:
    """Unmounts; lazily if it is in use.

    Raises:
        MountError: nothing is mounted there.
    """
    try:
        syscalls.umount(mountpoint)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise MountError(f"{mountpoint}: cannot unmount: {error.strerror}") from error
        with suppress(OSError):
            syscalls.detach(mountpoint)


class _KernelLog:
    """What EROFS writes into the kernel's log from now on: its reasons are nowhere else."""

    def __init__(self) -> None:
        self._fd = -1
        with suppress(OSError):  # only root may read it
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)

    def said(self) -> list[str]:
        lines: list[str] = []
        while self._fd >= 0 and len(lines) < 4:
            try:
                record = os.read(self._fd, 8192).decode(errors="replace")
            except OSError:
                break
            text = record.partition(";")[2].partition("\n")[0]
            if text.startswith("erofs"):
                lines.append(text.partition(": ")[2] or text)
        return lines

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _short(path: Path | str, opened: list[int]) -> str:
    """The path, or a short name of the same file where the kernel would not take the path."""
    text = os.fspath(path)
    if len(os.fsencode(text)) <= 255:
        return text
    opened.append(os.open(text, os.O_RDONLY | os.O_CLOEXEC))
    return f"/proc/thread-self/fd/{opened[-1]}"


def _explain(error: OSError) -> str:
    text = error.strerror or str(error)
    if error.errno == errno.ENODEV:
        text += "; this kernel has no EROFS"
    elif error.errno == errno.ENOTBLK:
        text += "; it cannot mount this file without a block device (Linux 6.12 or newer, not on tmpfs)"
    elif error.errno == errno.EPERM:
        text += "; mounting EROFS needs CAP_SYS_ADMIN"
    return text
