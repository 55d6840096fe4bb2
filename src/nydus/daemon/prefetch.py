"""What an image has fetched ahead, and when: the order of nydusd.md §5.4."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nydus.daemon.image import Image
from nydus.errors import NydusError
from nydus.rafs.model import Tree
from nydus.storage.prefetch import Piece, Prefetcher, whole

if TYPE_CHECKING:
    from nydus.storage.cache import BlobCache

log = logging.getLogger(__name__)

_IDLE = 0.5  # seconds without a reader before the first byte is fetched ahead
_PATIENCE = 10.0  # seconds to wait for that


class ImagePrefetch:
    """Fetches ahead in the background until closed.

    Args:
        image: its configuration says whether, how fast, and whether everything.
        files: absolute paths to fetch first (a directory is all below it); None takes the image's own table.
    """

    def __init__(self, image: Image, files: list[str] | None) -> None:
        self._image, self._files = image, files
        self._caches: list[BlobCache] = []
        self._stop = threading.Event()
        self._prefetcher: Prefetcher | None = None
        try:
            for blob in range(len(image.blobs)):
                self._caches.append(image.open_cache(blob))
            threading.Thread(target=self._run, name="prefetch", daemon=True).start()
        except BaseException:
            self._release()
            raise

    def metrics(self) -> dict[str, Any]:
        return self._prefetcher.metrics() if self._prefetcher is not None else {}

    def close(self) -> None:
        """Takes no more; returns at once."""
        self._stop.set()
        if self._prefetcher is not None:
            self._prefetcher.stop(0)

    def _run(self) -> None:
        try:
            self._wait_for_idleness()
            settings = self._image.config.fs_prefetch
            if not self._stop.is_set():
                self._prefetcher = Prefetcher(
                    self._pieces(settings.prefetch_all),
                    threads=settings.threads_count,
                    batch=settings.merging_size,
                    bandwidth=settings.bandwidth_rate,
                    busy=lambda: any(cache.busy for cache in self._caches),
                )
                self._prefetcher.start()
                while not self._stop.is_set() and not self._prefetcher.join(0.5):
                    pass
                self._prefetcher.stop(5)
        except NydusError as error:
            log.warning("nothing is fetched ahead of %s: %s", self._image.bootstrap, error)
        finally:
            self._release()

    def _release(self) -> None:
        for blob in range(len(self._caches)):
            self._image.release_cache(blob)

    def _wait_for_idleness(self) -> None:
        """A container that starts needs the link for itself."""
        began = since = time.monotonic()
        while not self._stop.wait(0.05):
            now = time.monotonic()
            if any(cache.busy for cache in self._caches):
                since = now
            if now - since > _IDLE or now - began > _PATIENCE:
                return

    def _pieces(self, everything: bool) -> Iterator[Piece]:
        listed = self._files
        if listed or (listed is None and self._image.head.prefetch):
            tree = self._image.tree()
            rows = [tree.find(path.encode()) for path in listed] if listed else list(tree.prefetch)
            everything = everything or listed == ["/"] or (listed is None and 0 in rows)
            if not everything or 0 not in rows:
                yield from pieces_of(tree, [row for row in rows if row is not None], self._caches)
        if everything:
            yield from whole(self._caches)


def pieces_of(tree: Tree, rows: Sequence[int], caches: Sequence[BlobCache]) -> Iterator[Piece]:
    """The chunks of files, and of all files below directories, in order; neighbours are joined."""
    last: Piece | None = None
    for row in _below(tree, rows):
        for chunk in tree.node_chunks(row):
            cache, offset, size = caches[int(chunk["blob_index"])], int(chunk["uoffset"]), int(chunk["usize"])
            if last is not None and last.cache is cache and 0 <= offset - last.offset - last.length < 4096:
                last = Piece(cache, last.offset, offset + size - last.offset)
                continue
            if last is not None:
                yield last
            last = Piece(cache, offset, size)
    if last is not None:
        yield last


def _below(tree: Tree, rows: Sequence[int]) -> Iterator[int]:
    stack = list(reversed(rows))
    while stack:
        row = stack.pop()
        yield row
        stack.extend(reversed(tree.children(row)))
