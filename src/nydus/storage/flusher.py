"""One background thread that makes what caches have placed outlast a power cut."""

from __future__ import annotations

import logging
import threading
import weakref
from contextlib import suppress
from typing import Protocol

log = logging.getLogger(__name__)

#: How long placed chunks may stay unrecorded: seconds, and bytes of one cache. A sync costs 0.8 ms a MiB.
INTERVAL = 3.0
DIRTY_BYTES = 32 << 20


class Flushable(Protocol):
    def flush(self) -> None: ...


class Flusher:
    """Flushes every cache that has reported changes, soon after the first one or at once on request."""

    def __init__(self, interval: float = INTERVAL) -> None:
        self._interval = interval
        self._lock = threading.Lock()
        self._urgent = threading.Event()
        self._dirty: weakref.WeakSet[Flushable] = weakref.WeakSet()
        self._thread: threading.Thread | None = None

    def changed(self, cache: Flushable, *, urgent: bool = False) -> None:
        """Flush this cache within the interval, or now."""
        with self._lock:
            self._dirty.add(cache)
            # A forked child has the object but not the thread; is_alive() knows.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="cache-flusher", daemon=True)
                with suppress(RuntimeError):  # no thread to be had: the next change tries again
                    self._thread.start()
        if urgent:
            self._urgent.set()

    def _run(self) -> None:
        while True:
            self._urgent.wait(self._interval)
            self._urgent.clear()
            with self._lock:
                caches = list(self._dirty)
                self._dirty.clear()
                if not caches:
                    self._thread = None
                    return
            while caches:
                try:
                    caches.pop().flush()
                except Exception:
                    log.exception("cache flush failed")


#: The flusher of this process.
flusher = Flusher()
