"""One image as the daemon sees it: a bootstrap, a configuration, and a cache for each of its blobs."""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import msgspec
import numpy as np

from nydus import rafs
from nydus.daemon import metadata
from nydus.daemon.config import DaemonConfig
from nydus.errors import FormatError, NydusError
from nydus.rafs import blobmeta
from nydus.rafs.blobmeta import ChunkMap
from nydus.rafs.model import CHUNK, Array, BlobFeature, BlobInfo, Super, Tree
from nydus.storage import backends
from nydus.storage.backend import Backend

if TYPE_CHECKING:
    from nydus.storage.cache import BlobCache

log = logging.getLogger(__name__)

_UNKNOWN = np.void(bytes(32))


class _Closing(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closing)


class Shared(Generic[T]):
    """Things opened once for each key and closed with their last user. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[T, int]] = {}

    def acquire(self, key: str, make: Callable[[], T]) -> T:
        with self._lock:
            thing, users = self._open[key] if key in self._open else (make(), 0)
            self._open[key] = (thing, users + 1)
            return thing

    def release(self, key: str) -> None:
        with self._lock:
            thing, users = self._open.pop(key)
            if users > 1:
                self._open[key] = (thing, users - 1)
                return
        thing.close()

    def all(self) -> list[T]:
        with self._lock:
            return [thing for thing, _ in self._open.values()]


class OpenCache:
    """An open cache with the backend it reads from, and what the images that share it know of its chunks."""

    def __init__(self, cache: BlobCache, release_backend: Callable[[], None]) -> None:
        self.cache = cache
        self.knowledge: list[Callable[[], Array]] = []
        self._release_backend = release_backend

    def close(self) -> None:
        self.cache.close()
        self._release_backend()


class Pool:
    """The backends and caches that the images of one daemon share."""

    def __init__(self) -> None:
        self.backends: Shared[Backend] = Shared()
        self.caches: Shared[OpenCache] = Shared()


class Image:
    """An image whose bootstrap was found good.

    Only the head of a RAFS v6 bootstrap is read here, so that a mount needs neither the backend nor a cache.

    Raises:
        NydusError: the bootstrap cannot be read or is not RAFS, or the backend's configuration is wrong.
    """

    def __init__(self, bootstrap: Path, config: DaemonConfig, pool: Pool) -> None:
        self.bootstrap, self.config = bootstrap, config
        self.work_dir = config.device.cache.work_dir
        self._pool = pool
        self.metadata = metadata.load(bootstrap, self.work_dir)
        self.head: Super = self.metadata.head
        backend = config.device.backend
        document = msgspec.json.encode((backend.type, backend.config), order="deterministic")
        self._backend_key = hashlib.sha256(document).hexdigest()
        self._make_backend = lambda: backends.create(backend.type, backend.config)
        self.backend = pool.backends.acquire(self._backend_key, self._make_backend)
        self._introduced: dict[int, weakref.ref[BlobCache]] = {}
        self._apart: set[int] = set()
        self._identity = str(self.metadata.path)
        with suppress(OSError):  # a path may lead to another bootstrap later
            info = self.metadata.path.stat()
            self._identity += f" {info.st_dev} {info.st_ino} {info.st_mtime_ns}"

    @property
    def blobs(self) -> list[BlobInfo]:
        return self.head.blobs

    def key(self, blob: int) -> str:
        """Names the bytes of a blob: images with the same key share one cache and one file of blobfs."""
        info = self.blobs[blob]
        # Without blob.meta an image only knows the chunks it uses itself: nothing another one could share.
        alone = self._identity if self._without_meta(info) or blob in self._apart else ""
        return f"{self._backend_key} {self.work_dir.resolve()} {info!r} {alone}"

    def device_size(self, blob: int) -> int:
        """Length of a blob's device in bytes, whole pages that cover what the device table promises."""
        size = self.blobs[blob].uncompressed_size
        if self.head.device_blocks:
            size = max(size, self.head.device_blocks[blob] * self.head.block_size)
        return -(-size // 4096) * 4096

    def open_cache(self, blob: int) -> BlobCache:
        """The cache of a blob; give it back with :meth:`release_cache`. Waits for nothing.

        Raises:
            NydusError: the bootstrap cannot be read any more.
        """
        opened = self._pool.caches.acquire(self.key(blob), lambda: self._make_cache(blob))
        cache = opened.cache
        known = self._introduced.get(blob)
        if known is None or known() is not cache:
            # Made by another image, perhaps, which does not know all the chunks that this one uses.
            try:
                self._introduce(opened, blob)
            except BaseException as error:
                self.release_cache(blob)
                if not isinstance(error, NydusError) or blob in self._apart:
                    raise
                # One of the two lies; whoever asks first must not be able to spoil the blob for others.
                log.warning("%s shares blob %s with nobody: %s", self.bootstrap, self.blobs[blob].id, error)
                self._apart.add(blob)
                return self.open_cache(blob)
            self._introduced[blob] = weakref.ref(cache)
        return cache

    def _introduce(self, opened: OpenCache, blob: int) -> None:
        mine = self._known(blob)
        for theirs in opened.knowledge:
            _require_agreement(mine, theirs())
        opened.cache.add_digests(lambda chunks: self._add_digests(chunks, blob))
        opened.knowledge.append(lambda: self._known(blob))

    def _known(self, blob: int) -> Array:
        """The chunk table's records of a blob."""
        if not self.head.chunk_table[1]:
            return np.zeros(0, CHUNK)
        records = self._records()
        known: Array = records[records["blob_index"] == blob]
        return known

    def release_cache(self, blob: int) -> None:
        self._pool.caches.release(self.key(blob))

    def close(self) -> None:
        """Caches that are open go on."""
        self._pool.backends.release(self._backend_key)

    def _make_cache(self, blob: int) -> OpenCache:
        from nydus.storage.cache import BlobCache

        info, config = self.blobs[blob], self.config
        backend = self._pool.backends.acquire(self._backend_key, self._make_backend)
        separate = bool(info.features & BlobFeature.SEPARATE) and not any(info.rafs_digest)
        cache = BlobCache(
            self.work_dir,
            info,
            (lambda: self._chunks_without_meta(blob)) if self._without_meta(info) else None,
            backend,
            digests=lambda chunks: self._add_digests(chunks, blob),
            own_places=self._places_are_ours(info),
            amplify=config.amplify_io,
            validate=config.device.cache.validate,
            # A RAFS blob whose metadata is inlined goes by the name of the bootstrap.
            meta_id=self.bootstrap.name.partition(".")[0] if separate else "",
        )
        self._introduced[blob] = weakref.ref(cache)
        opened = OpenCache(cache, lambda: self._pool.backends.release(self._backend_key))
        opened.knowledge.append(lambda: self._known(blob))
        return opened

    def tree(self) -> Tree:
        """The whole tree. Raises FormatError."""
        tree = rafs.read(self.metadata.read(), str(self.bootstrap))
        return replace(tree, blobs=self.blobs)

    def _places_are_ours(self, blob: BlobInfo) -> bool:
        """Whether chunks lie elsewhere on the device than the author of the blob put them."""
        return self.metadata.source.version == 5 or bool(blob.features & BlobFeature.EXTERNAL)

    def _without_meta(self, blob: BlobInfo) -> bool:
        return self._places_are_ours(blob) or bool(blob.features & BlobFeature.TARFS)

    def _chunks_without_meta(self, blob: int) -> ChunkMap:
        if self._places_are_ours(self.blobs[blob]) and self.head.chunk_table[1]:
            # All trees that we write have their chunks in a table, and so have all external ones.
            return blobmeta.from_records(self.blobs[blob], self._records(), blob)
        return blobmeta.from_tree(self.tree(), blob)

    def _add_digests(self, chunks: ChunkMap, blob: int) -> None:
        if self.head.chunk_table[1]:
            chunks.set_digests(self._records(), blob)

    def _records(self) -> Array:
        return rafs.v6.read_chunk_table(self.metadata.read(), self.head, str(self.bootstrap))


def _require_agreement(one: Array, other: Array) -> None:
    """Raises FormatError where two chunk tables say different things of a chunk."""
    _, left, right = np.intersect1d(one["index"], other["index"], return_indices=True)
    known = (one["digest"][left] != _UNKNOWN) & (other["digest"][right] != _UNKNOWN)
    for name in ("digest", "uoffset", "usize"):
        wrong = known & (one[name][left] != other[name][right])
        if wrong.any():
            chunk = int(one["index"][left][np.argmax(wrong)])
            raise FormatError(f"another image has another {name} of chunk {chunk}")
