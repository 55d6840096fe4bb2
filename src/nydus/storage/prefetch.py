"""Filling caches in the background, without taking the link from readers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from nydus.errors import NydusError

log = logging.getLogger(__name__)

#: How long to look away while readers wait for data.
_YIELD = 0.01
#: How long one step should take at most, in seconds, and its least size in bytes.
_STEP = 0.1
_MIN_BATCH = 128 << 10
#: Pause after a failed piece, doubled each time.
_BACKOFF = 1.0
_MAX_BACKOFF = 30.0


class Cache(Protocol):
    """The part of :class:`nydus.storage.cache.BlobCache` that is needed here."""

    @property
    def length(self) -> int: ...

    @property
    def busy(self) -> bool: ...

    def fill(self, offset: int, length: int) -> int: ...

    def bytes_in(self, seconds: float) -> int: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a device, in bytes."""

    cache: Cache
    offset: int
    length: int


def whole(caches: Iterable[Cache]) -> Iterator[Piece]:
    """Blobs from their start to their end, one after the other."""
    for cache in caches:
        yield Piece(cache, 0, cache.length)


class Limiter:
    """A token bucket: ``take(n)`` waits until n more bytes may pass; a rate of 0 is no limit."""

    def __init__(self, bytes_per_second: int) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def take(self, count: int, stop: threading.Event) -> None:
        if not self._rate:
            return
        with self._lock:
            # One second's worth may have been saved up.
            self._free_at = max(self._free_at, time.monotonic() - 1) + count / self._rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            stop.wait(wait)


class Prefetcher:
    """Makes pieces of devices ready, in their order, while no reader waits.

    Args:
        pieces: what to fill, most wanted first (nydusd.md 5.4: listed files, then whole blobs). Taken lazily.
        threads: how many work on it.
        batch: device bytes that are filled at a time. On a link that needs longer than 100 ms for them it is
            less, and only one thread works: a reader who comes meanwhile has to wait for it.
        bandwidth: stored bytes a second, 0 is no limit.
        busy: whether readers wait, where more than the caches of ``pieces`` count.
        attempts: how often a failing piece is tried; it is then left to the readers.
    """

    def __init__(
        self,
        pieces: Iterable[Piece],
        *,
        threads: int = 8,
        batch: int = 1 << 20,
        bandwidth: int = 0,
        busy: Callable[[], bool] | None = None,
        attempts: int = 4,
    ) -> None:
        self._batch = max(batch, _MIN_BATCH)
        self._slow = False
        self._steps = self._cut(pieces)
        self._count = threads
        self._limiter = Limiter(bandwidth)
        self._busy = busy
        self._attempts = attempts
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._running = 0
        self._bytes = self._requests = 0
        self._began = self._ended = 0.0

    def start(self) -> None:
        self._began = time.time()
        self._running = self._count
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"prefetch-{i}", daemon=True)
            for i in range(self._count)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float = 1.0) -> None:
        """Take no more pieces, and wait a little for those under way."""
        self._stop.set()
        self.join(timeout)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all is filled. Returns whether it is."""
        limit = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if limit is None else max(0.0, limit - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def metrics(self) -> dict[str, Any]:
        """The ``prefetch_*`` counters of ``/api/v1/metrics/blobcache``."""
        with self._lock:
            took = (self._ended or time.time()) - self._began if self._began else 0.0
            return {
                "prefetch_data_amount": self._bytes,
                "prefetch_requests_count": self._requests,
                "prefetch_workers": self._running,
                "prefetch_unmerged_chunks": 0,
                "prefetch_cumulative_time_millis": int(took * 1000),
                "prefetch_begin_time_secs": int(self._began),
                "prefetch_begin_time_millis": int(self._began * 1000) % 1000,
                "prefetch_end_time_secs": int(self._ended),
                "prefetch_end_time_millis": int(self._ended * 1000) % 1000,
            }

    def _work(self, number: int) -> None:
        try:
            while not self._stop.is_set():
                if number and self._slow:
                    self._stop.wait(_STEP)
                    continue
                with self._lock:
                    step = next(self._steps, None)
                if step is None:
                    return
                self._fill(step)
        except Exception:
            log.exception("prefetch stopped")
        finally:
            if not number:
                self._slow = False  # the others must not wait for this one
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._ended = time.time()

    def _fill(self, step: Piece) -> None:
        pause = _BACKOFF
        for attempt in range(1, self._attempts + 1):
            while (self._busy() if self._busy else step.cache.busy) and not self._stop.is_set():
                self._stop.wait(_YIELD)
            if self._stop.is_set():
                return
            try:
                fetched = step.cache.fill(step.offset, step.length)
            except NydusError as error:
                if attempt == self._attempts:
                    log.warning("prefetch of %d bytes at %#x given up: %s", step.length, step.offset, error)
                    return
                if self._stop.wait(pause):
                    return
                pause = min(2 * pause, _MAX_BACKOFF)
                continue
            with self._lock:
                self._bytes += fetched
                self._requests += bool(fetched)
            self._limiter.take(fetched, self._stop)
            return

    def _cut(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            end = piece.offset + piece.length
            at = piece.offset
            while at < end:
                size = min(self._batch, max(piece.cache.bytes_in(_STEP), _MIN_BATCH))
                self._slow = size < self._batch
                # Cut at multiples, so that neighbouring pieces do not cut chunks twice.
                stop = min(end, (at // size + 1) * size)
                yield Piece(piece.cache, at, stop - at)
                at = stop
