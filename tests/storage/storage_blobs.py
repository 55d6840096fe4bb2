"""Blobs made for tests, and a backend that fails on request."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nydus.errors import BackendError
from nydus.rafs import codec
from nydus.rafs.blobmeta import ChunkMap
from nydus.rafs.model import BlobInfo, ChunkFlag, Compression, Digester
from nydus.storage.backend import MeteredBackend
from nydus.storage.cache import BlobCache

SIZES = [4096, 100, 70000, 1 << 16, 5, 4097, 300000, 8192] * 6


@dataclass
class Blob:
    """A blob with its chunk table, its stored bytes, and what its device must read as."""

    info: BlobInfo
    chunks: ChunkMap
    stored: bytes
    image: bytes

    def ranges(self) -> list[tuple[int, int]]:
        return [(int(o), int(s)) for o, s in zip(self.chunks.uoffset, self.chunks.usize, strict=True)]


def make_blob(
    sizes: list[int],
    *,
    kind: Compression = Compression.ZSTD,
    digester: Digester = Digester.BLAKE3,
    digests: bool = True,
    crc: bool = False,
    seed: int = 1,
    name: str = "b" * 64,
) -> Blob:
    """A blob of chunks with half-compressible, all different contents."""
    rng = random.Random(seed)
    pieces = []
    for i, size in enumerate(sizes):
        noise = rng.randbytes((size + 1) // 2)
        pieces.append((b"%08d" % i + noise + bytes(size))[:size])
    count = len(sizes)
    stored, image = bytearray(), bytearray()
    columns = {name: np.zeros(count, "<u8") for name in ("uoffset", "coffset")}
    columns |= {
        name: np.zeros(count, "<u4") for name in ("usize", "csize", "crc", "context", "context_offset")
    }
    flags = np.zeros(count, np.uint8)
    table = np.zeros((count, 32), np.uint8)
    for i, data in enumerate(pieces):
        packed = codec.compress(kind, data)
        if kind != Compression.NONE and len(packed) < len(data):
            flags[i] |= ChunkFlag.COMPRESSED
        else:
            packed = data
        columns["uoffset"][i], columns["usize"][i] = len(image), len(data)
        columns["coffset"][i], columns["csize"][i] = len(stored), len(packed)
        if crc:
            flags[i] |= ChunkFlag.HAS_CRC
            columns["crc"][i] = codec.crc32c(data)
        table[i] = np.frombuffer(codec.digest(digester, data), np.uint8)
        stored += packed
        image += data + bytes(-len(data) % 4096)
    info = BlobInfo(
        id=name,
        chunk_size=1 << 20,
        chunk_count=count,
        compression=kind,
        digester=digester,
        compressed_size=len(stored),
        uncompressed_size=len(image),
    )
    chunks = ChunkMap(blob=info, flags=flags, digests=table if digests else None, **columns)
    return Blob(info, chunks, bytes(stored), bytes(image))


class FaultyBackend(MeteredBackend):
    """Holds blobs in memory, and remembers what was read of them.

    Attributes:
        fault: called with (offset, size, right bytes) before each answer; may raise, wait, or change them.
    """

    def __init__(self, *blobs: Blob) -> None:
        super().__init__("memory")
        self.blobs = {blob.info.id: blob.stored for blob in blobs}
        self.fault: Callable[[int, int, bytes], bytes] | None = None
        self.requests: list[tuple[int, int]] = []
        self.running = self.most_running = 0
        self._lock = threading.Lock()

    def _read(self, blob_id: str, offset: int, size: int) -> bytes:
        with self._lock:
            self.requests.append((offset, size))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            data = self.blobs[blob_id][offset : offset + size]
            return self.fault(offset, size, data) if self.fault else data
        finally:
            with self._lock:
                self.running -= 1

    def size(self, blob_id: str) -> int:
        return len(self.blobs[blob_id])

    def close(self) -> None:
        pass

    def fetches(self, blob: Blob) -> Counter[int]:
        """How often each chunk was inside of a request."""
        found: Counter[int] = Counter()
        for row in range(len(blob.chunks)):
            start = int(blob.chunks.coffset[row])
            end = start + int(blob.chunks.csize[row])
            found[row] = sum(o <= start and end <= o + s for o, s in self.requests)
        return found


def broken(_offset: int, _size: int, _data: bytes) -> bytes:
    raise BackendError("500 out of order", status=500)


def truncated(_offset: int, _size: int, data: bytes) -> bytes:
    return data[:-1]


def corrupted(_offset: int, _size: int, data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:-1] + bytes([data[-1] ^ 1])


def slow(seconds: float) -> Callable[[int, int, bytes], bytes]:
    def wait(_offset: int, _size: int, data: bytes) -> bytes:
        time.sleep(seconds)
        return data

    return wait


def link(bytes_per_second: float) -> Callable[[int, int, bytes], bytes]:
    """A link shared by all requests."""
    lock = threading.Lock()

    def wait(_offset: int, size: int, data: bytes) -> bytes:
        with lock:
            time.sleep(size / bytes_per_second)
        return data

    return wait


def cache_of(path: Path, blob: Blob, backend: FaultyBackend, **options: object) -> BlobCache:
    return BlobCache(path, blob.info, blob.chunks, backend, **options)  # type: ignore[arg-type]


def read(cache: BlobCache, offset: int, length: int) -> bytes:
    return b"".join(cache.read(offset, length))


def data_file(path: Path, blob: Blob) -> Path:
    return path / f"{blob.info.id}.blob.data"


def map_file(path: Path, blob: Blob) -> Path:
    return path / f"{blob.info.id}.blob.data.chunk_map"
