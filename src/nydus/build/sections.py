"""The sections that follow the data of a blob, each with a tar header behind it; rafs.md 3.5."""

from __future__ import annotations

import hashlib

from nydus.build.blob import HashingSink
from nydus.rafs import blobmeta, codec, toc
from nydus.rafs.blobmeta import ChunkMap
from nydus.rafs.model import BlobInfo, Compression


class SectionWriter:
    """Writes sections in order and remembers them for the table of contents.

    Args:
        out: the blob, at the end of its data.
        headers: write tar headers: blobs with a bootstrap or a table of contents have them.
    """

    def __init__(self, out: HashingSink, headers: bool) -> None:
        self._out = out
        self._headers = headers
        self._entries: list[toc.TocEntry] = []

    def _header(self, name: str, size: int) -> None:
        if self._headers:
            self._out.write(toc.tar_header(name, size))

    def data(self, info: BlobInfo) -> None:
        """End the data."""
        size = self._out.size
        self._header(toc.IMAGE_BLOB, size)
        # The reference hashes the header, too (rafs.md 3.6).
        digest = self._out.digest.digest()
        self._entries.append(
            toc.TocEntry(toc.IMAGE_BLOB, Compression.NONE, digest, 0, size, info.uncompressed_size)
        )

    def meta(self, chunks: ChunkMap) -> None:
        """Write the chunk table; fills in the ``meta_*`` fields of its blob."""
        info, offset = chunks.blob, self._out.size
        section = blobmeta.store(chunks, offset)
        self._out.write(section.stored)
        self._header(toc.BLOB_META, len(section.stored))
        size = info.meta_compressed_size
        self._entry(toc.BLOB_META, info.meta_compression, section.plain, offset, size)
        self._entry(
            toc.BLOB_META_HEADER, Compression.NONE, section.header, offset + size, len(section.header)
        )

    def digests(self, chunks: ChunkMap) -> None:
        """Write the digest of each chunk; they do not count for the name of the blob (rafs.md 3.7)."""
        assert chunks.digests is not None
        data = chunks.digests.tobytes()
        self._entry(toc.BLOB_DIGEST, Compression.NONE, data, self._out.size, len(data))
        self._out.write(data, named=False)
        self._header(toc.BLOB_DIGEST, len(data))

    def bootstrap(self, data: bytes, kind: Compression) -> None:
        stored = codec.compress(kind, data)
        self._entry(toc.IMAGE_BOOT, kind, data, self._out.size, len(stored))
        self._out.write(stored)
        self._header(toc.IMAGE_BOOT, len(stored))

    def contents(self) -> tuple[bytes, int]:
        """Write the table of contents; returns its sha256 and size."""
        data = toc.write_toc(self._entries)
        self._out.write(data)
        return hashlib.sha256(data).digest(), len(data)

    def entries_digest(self) -> bytes:
        """The sha256 of the entries of the table of contents, without its tar header."""
        return hashlib.sha256(toc.write_toc(self._entries)[: -toc.HEADER_SIZE]).digest()

    def _entry(self, name: str, kind: Compression, data: bytes, offset: int, stored: int) -> None:
        digest = hashlib.sha256(data).digest()
        self._entries.append(toc.TocEntry(name, kind, digest, offset, stored, len(data)))
