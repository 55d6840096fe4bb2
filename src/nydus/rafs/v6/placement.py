"""Where inodes and their data lie in the metadata area, as the reference places them; rafs.md 2.7."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from nydus.rafs.model import Array
from nydus.rafs.v6 import layout

#: What an inode's bytes consist of besides the inode itself.
TAIL, CHUNKS, NOTHING = 0, 1, 2


@dataclass(slots=True)
class Placement:
    """Byte offsets without the base of the metadata area, by item.

    Attributes:
        inode: offset of the inode.
        data: offset of the data that is not inlined (of directories and symbolic links).
        inline: whether the last partial block of the data follows the inode.
        end: the first byte behind everything.
    """

    inode: Array
    data: Array
    inline: Array
    end: int


def place(kinds: Array, sizes: Array, lengths: Array, block: int) -> Placement:
    """Place items in the given order.

    Args:
        kinds: TAIL (directory or symbolic link), CHUNKS (regular file) or NOTHING.
        sizes: bytes of inode and attributes.
        lengths: bytes of data (TAIL) or of the chunk list (CHUNKS).
        block: block size.

    The loop is one pass over plain integers: every place depends on the gaps that those before it left.
    """
    inodes: list[int] = []
    datas: list[int] = []
    tails = (lengths % block).astype(np.int64)
    inline = (kinds == TAIL) & (tails != 0) & (sizes + tails <= block)
    slots = block // 32
    # gaps[k]: blocks with 32 * k free bytes at their end, first in first out; bit k of mask: there are some.
    gaps: list[deque[int]] = [deque() for _ in range(slots)]
    mask = 0
    cursor = layout.META_RESERVED
    for kind, size, length, tail, inlined in zip(
        kinds.tolist(), sizes.tolist(), lengths.tolist(), tails.tolist(), inline.tolist(), strict=True
    ):
        if kind == NOTHING:
            inodes.append(cursor)
            datas.append(0)
            cursor += size + 31 & ~31
            continue
        # What must be found room for in one place.
        need = (size + 7 & ~7) + length if kind == CHUNKS else size + tail * inlined
        units = (need + 31) // 32
        fitting = mask >> units if need < block else 0
        if fitting:
            k = units + (fitting & -fitting).bit_length() - 1
            queue = gaps[k]
            start = queue.popleft()
            if not queue:
                mask ^= 1 << k
            offset = start + block - 32 * k
            rest = k - units
            if rest:
                gaps[rest].append(start)
                mask |= 1 << rest
        else:
            if inlined and block - cursor % block < need:
                mask = _give(gaps, mask, cursor, block)
                cursor = -(-cursor // block) * block
            offset = cursor
            cursor += need
        inodes.append(offset)
        if kind == CHUNKS:
            datas.append(0)
        else:
            body = length - tail if inlined else length
            if body:
                mask = _give(gaps, mask, cursor, block)
                cursor = -(-cursor // block) * block
            datas.append(cursor)
            cursor += body if inlined else -(-body // block) * block
        cursor = cursor + 31 & ~31
    return Placement(np.array(inodes, np.int64), np.array(datas, np.int64), inline, cursor)


def _give(gaps: list[deque[int]], mask: int, offset: int, block: int) -> int:
    """Remember the free end of the block that ``offset`` lies in."""
    used = offset % block
    k = (block - used) // 32
    if not used or not k:
        return mask
    gaps[k].append(offset - used)
    return mask | 1 << k
