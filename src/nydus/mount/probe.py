"""What can this kernel really do? Found out by doing it, never by its version.

A provider is the way an image gets into the mount tree:

* ``blobfs``: the kernel's EROFS on lazily filled files of :mod:`nydus.mount.blobfs`;
* ``fuse``: the whole file system in user space (:mod:`nydus.mount.fuse`).

With ``blobfs``, blobs that are complete already are given to EROFS as the plain files they are.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nydus.errors import MountError
from nydus.mount import erofs
from nydus.mount.blobfs import BLOCK, BlobFs, Buffer

PROVIDERS = ("blobfs", "fuse")
_NAME = b"file"


@dataclass(frozen=True, slots=True)
class Choice:
    """A provider and why it was taken."""

    provider: str
    reason: str


def choose(directory: Path, forced: str | None = None) -> Choice:
    """The best provider that works for bootstraps in ``directory``.

    Args:
        directory: a writable directory on the file system where bootstraps and caches will lie.
        forced: take this one and do not ask the kernel.
    """
    if forced and forced != "auto":
        if forced not in PROVIDERS:
            raise MountError(f"no provider {forced!r}; there are {', '.join(PROVIDERS)}")
        return Choice(forced, "asked for")
    return _probed(str(directory.resolve()))


@lru_cache(maxsize=64)
def _probed(directory: str) -> Choice:
    try:
        _try_blobfs(directory)
    except (MountError, OSError) as error:
        return Choice("fuse", f"EROFS on blobfs does not work here: {error}")
    return Choice("blobfs", "a test image mounted and read back right")


class _Pattern:
    """A device of one block whose bytes are known."""

    length = BLOCK
    data = hashlib.shake_256(b"nydus").digest(BLOCK)

    def ready(self, offset: int, length: int) -> bool:
        return True

    def read(self, offset: int, length: int) -> list[Buffer]:
        return [self.data[offset : offset + length]]


def _try_blobfs(directory: str) -> None:
    with tempfile.TemporaryFile(dir=directory) as bootstrap:
        bootstrap.write(tiny_image())
        bootstrap.flush()
        blobfs = BlobFs.create(threads=1, source="nydus-probe")
        try:
            blobfs.serve()
            file = blobfs.add(2, BLOCK, "probe", _Pattern())
            data = blobfs.waiting_for_it(
                lambda: _read_back(f"/proc/self/fd/{bootstrap.fileno()}", blobfs.path(file))
            )
            if data != _Pattern.data:
                raise MountError("a test image reads back wrong")
        finally:
            # The kernel takes its time for unmounting; nobody has to wait for it.
            threading.Thread(target=blobfs.close, daemon=True).start()


def _read_back(bootstrap: str, device: str) -> bytes:
    mount = erofs.open_detached(bootstrap, [device])
    try:
        fd = os.open(_NAME, os.O_RDONLY | os.O_CLOEXEC, dir_fd=mount)
        try:
            return os.read(fd, 2 * BLOCK)
        finally:
            os.close(fd)
    finally:
        os.close(mount)


def tiny_image() -> bytes:
    """An EROFS image (rafs.md §2.1–2.9) of one file of one block, which lies on one device of one block."""
    image = bytearray(2 * BLOCK)
    incompat = 0xC  # chunked files, device table
    # super block: magic, checksum, features, block bits, slots, root nid, inodes, time, blocks, meta, xattrs
    struct.pack_into("<IIIBBHQQIIII", image, 1024, 0xE0F5E1E2, 0, 0, 12, 0, 0, 2, 0, 0, 2, 1, 0)
    struct.pack_into("<IHHH", image, 1024 + 80, incompat, 0, 1, 11)
    struct.pack_into("<64sII", image, 1408, b"probe", 1, 2)
    # root: a compact inode (inline data), its three names behind it; nids count 32 bytes
    file_nid = 4
    names = [(b".", 0, 2), (b"..", 0, 2), (_NAME, file_nid, 1)]
    offset, entries, text = 12 * len(names), b"", b""
    for name, nid, kind in names:
        entries += struct.pack("<QHBB", nid, offset + len(text), kind, 0)
        text += name
    inline = entries + text
    struct.pack_into("<HHHHIIIIHHI", image, BLOCK, 2 << 1, 0, 0o40755, 2, len(inline), 0, 0, 1, 0, 0, 0)
    image[BLOCK + 32 : BLOCK + 32 + len(inline)] = inline
    # the file: chunk format "blocks of 4 KiB, 8-byte indexes", one index: device 1, block 0
    at = BLOCK + 32 * file_nid
    struct.pack_into("<HHHHIIIIHHI", image, at, 4 << 1, 0, 0o100444, 1, BLOCK, 0, 0x20, 2, 0, 0, 0)
    struct.pack_into("<HHI", image, at + 32, 0, 1, 0)
    return bytes(image)
