"""Images as one file that the kernel mounts: metadata and uncompressed blobs; rafs.md 2.11 and 4.9."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nydus import rafs
from nydus.build.verity import Verity
from nydus.errors import FormatError
from nydus.rafs import v6
from nydus.rafs.device import as_erofs
from nydus.rafs.model import BlobFeature, Super

if TYPE_CHECKING:
    from nydus.image import Image

#: Blobs start at multiples of this.
_ALIGN = 0x80000
_FLUSH = 1 << 20
#: Where device slots start, their size, and the place of the mapped address in one (rafs.md 2.3).
_SLOTS, _SLOT, _MAPPED = 1408, 128, 68
#: A blob that is so much longer than its chunks is not believed, rather than written as zeros.
_MAX_TAIL = 32 << 20


@dataclass(frozen=True, slots=True)
class Disk:
    """What was written.

    Attributes:
        size: bytes of the file system, without the hash tree.
        block_size: 512 where a tar archive is the data, else 4096.
        hash_offset, root_hash: of the hash tree; 0 and b"" without.
    """

    size: int
    block_size: int
    hash_offset: int = 0
    root_hash: bytes = b""

    def verity_options(self) -> str:
        """The options for ``veritysetup`` in the form that callers parse (cli.md 1.11)."""
        return (
            f'dm-verity options: --no-superblock --format=1 -s "" --hash=sha256 '
            f"--data-block-size={self.block_size} --hash-block-size=4096 "
            f"--data-blocks {self.size // self.block_size} --hash-offset {self.hash_offset} "
            f"{self.root_hash.hex()}"
        )


def write_disk(
    image: Image, write: Callable[[bytes], object], *, bootstrap: bytes = b"", verity: bool = False
) -> Disk:
    """Write a flat image: the bootstrap, then each blob at the address that its device slot says.

    Args:
        write: gets the bytes in order, about 1 MiB at a time.
        bootstrap: the image's own v6 bootstrap; left out, it is made (as for v5, which EROFS cannot read).
        verity: append a hash tree.

    Raises:
        FormatError, BackendError: a chunk is wrong, or cannot be had.
    """
    if not bootstrap or rafs.detect(bootstrap) == 5:
        image = image.with_tree(as_erofs(image.tree))
        bootstrap = v6.write(image.tree)
    head = v6.read_superblock(bootstrap)
    data = _with_addresses(bootstrap, head)
    out = _Sink(write, Verity(head.block_size) if verity else None)
    out.put(data)
    for number in range(len(head.blobs)):
        out.skip_to(head.mapped_blocks[number] * head.block_size)
        end = out.size + head.device_blocks[number] * head.block_size
        if head.blobs[number].features & BlobFeature.TARFS:
            _put_archive(image, number, out)
        else:
            _put_chunks(image, number, out)
        if not 0 <= end - out.size <= _MAX_TAIL:
            raise FormatError(
                "the chunks of a blob do not fill its device",
                where=head.blobs[number].id,
                found=out.size,
                expected=end,
            )
        out.skip_to(end)
    out.skip_to(-(-out.size // head.block_size) * head.block_size)
    size = out.size
    if out.verity is None:
        out.flush()
        return Disk(size, head.block_size)
    offset = -(-size // 4096) * 4096
    out.flush()
    tree, root = out.verity.tree()
    write(bytes(offset - size) + tree)
    return Disk(size, head.block_size, offset, root)


def _with_addresses(bootstrap: bytes, head: Super) -> bytes:
    """The bootstrap with a right address for every blob; old builders wrote other ones or none."""
    data = bytearray(bootstrap)
    position = len(data)
    for number, blob in enumerate(head.blobs):
        blocks = head.device_blocks[number]
        if blocks * head.block_size > blob.uncompressed_size + _ALIGN:
            raise FormatError(
                "a device is longer than its blob",
                where=blob.id,
                found=blocks * head.block_size,
                expected=blob.uncompressed_size,
            )
        mapped = -(-position // _ALIGN) * _ALIGN // head.block_size
        if head.mapped_blocks[number] != mapped:
            at = _SLOTS + _SLOT * number + _MAPPED
            data[at : at + 4] = mapped.to_bytes(4, "little")
            head.mapped_blocks[number] = mapped
        position = (mapped + blocks) * head.block_size
    if position // head.block_size > 0xFFFF_FFFF:
        raise FormatError("the image is too large to be one device", found=position)
    return bytes(data)


class _Sink:
    """Collects small pieces, and hashes them on the way."""

    def __init__(self, write: Callable[[bytes], object], verity: Verity | None) -> None:
        self._write = write
        self.verity = verity
        self.size = 0
        self._pending: list[bytes | memoryview] = []
        self._waiting = 0

    def put(self, data: bytes | memoryview) -> None:
        self._pending.append(data)
        self._waiting += len(data)
        self.size += len(data)
        if self._waiting >= _FLUSH:
            self.flush()

    def skip_to(self, offset: int) -> None:
        """Zeros up to an offset."""
        while self.size < offset:
            self.put(bytes(min(offset - self.size, _FLUSH)))

    def flush(self) -> None:
        data = b"".join(self._pending)
        self._pending.clear()
        self._waiting = 0
        if self.verity is not None:
            self.verity.update(data)
        self._write(data)


def _put_chunks(image: Image, number: int, out: _Sink) -> None:
    chunks = image.reader.chunk_map(number)
    rows = np.flatnonzero(chunks.usize)
    base = out.size
    stream = image.reader.stream(np.full(len(rows), number), rows)
    for offset, data in zip(chunks.uoffset[rows].tolist(), stream, strict=True):
        if offset - (out.size - base) > _MAX_TAIL:
            raise FormatError("chunks lie too far apart", where=chunks.blob.id, offset=offset)
        out.skip_to(base + offset)
        out.put(data)


def _put_archive(image: Image, number: int, out: _Sink) -> None:
    """A tar archive that serves as blob: its headers, too, so that the device is the archive."""
    size = image.tree.blobs[number].uncompressed_size
    for piece in image.reader.raw(number, size):
        out.put(piece)
