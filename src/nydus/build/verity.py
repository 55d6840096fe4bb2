"""Hash trees as dm-verity reads them (format 1, sha256, no salt, no super block); rafs.md 4.9."""

from __future__ import annotations

import hashlib

#: Size of a hash page; the last level is one page.
PAGE = 4096
_DIGEST = 32
#: Fills pages up, as the reference does. The kernel does not look at it; ``veritysetup verify`` wants zeros.
FILLER = hashlib.sha256(bytes(PAGE)).digest()


class Verity:
    """Hashes data blocks as they pass, and builds the tree over them.

    Args:
        block: size of a data block in bytes.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self._leaves: list[bytes] = []
        self._rest = b""

    @property
    def blocks(self) -> int:
        """Whole data blocks so far."""
        return len(self._leaves)

    def update(self, data: bytes) -> None:
        block = self.block
        if self._rest:
            data = self._rest + data
        end = len(data) - len(data) % block
        view = memoryview(data)
        sha256 = hashlib.sha256
        self._leaves += [sha256(view[at : at + block]).digest() for at in range(0, end, block)]
        self._rest = data[end:]

    def tree(self) -> tuple[bytes, bytes]:
        """All hash pages, the top one first, and its digest: the root hash."""
        level = b"".join(self._leaves)
        pages = []
        while True:
            level += FILLER * (-len(level) % PAGE // _DIGEST if level else PAGE // _DIGEST)
            pages.append(level)
            digests = [hashlib.sha256(level[at : at + PAGE]).digest() for at in range(0, len(level), PAGE)]
            if len(digests) == 1:
                return b"".join(reversed(pages)), digests[0]
            level = b"".join(digests)
