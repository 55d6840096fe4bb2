"""The RAFS formats, bytes in and bytes out. Imports nothing of ours but :mod:`nydus.errors`."""

from __future__ import annotations

from nydus.errors import FormatError
from nydus.rafs import v5, v6
from nydus.rafs.buffer import Buffer, Source
from nydus.rafs.model import Super, Tree

#: Bytes at the start of a bootstrap that :func:`detect` needs.
HEAD_SIZE = 1028

__all__ = ["HEAD_SIZE", "Super", "Tree", "detect", "read", "superblock", "v5", "v6", "write"]


def detect(head: Source, where: str = "") -> int:
    """The RAFS version, 5 or 6, of a bootstrap that starts with ``head`` (:data:`HEAD_SIZE` bytes suffice).

    Raises:
        FormatError: neither; rafs.md 0.4.
    """
    buffer = Buffer(head, where)
    if buffer.size >= 8:
        magic, version = (int(word) for word in buffer.array(0, 2, "<u4", "magic"))
        if magic == 0x52414653:
            if version != 0x500:
                raise buffer.error("RAFS version not supported", 4, found=hex(version), expected="0x500")
            return 5
    if buffer.size >= HEAD_SIZE and int(buffer.array(1024, 1, "<u4", "magic")[0]) == 0xE0F5E1E2:
        return 6
    raise FormatError("not a RAFS bootstrap", where=where)


def superblock(data: Source, where: str = "") -> Super:
    """The head of a bootstrap of either version, without its tree."""
    if detect(data, where) == 5:
        return v5.read_superblock(data, where)
    return v6.read_superblock(data, where)


def read(data: Source, where: str = "") -> Tree:
    """The tree of a bootstrap of either version."""
    return v5.read(data, where) if detect(data, where) == 5 else v6.read(data, where)


def write(tree: Tree) -> bytes:
    """The bootstrap of a tree, in the version that ``tree.version`` says."""
    return v5.write(tree) if tree.version == 5 else v6.write(tree)
