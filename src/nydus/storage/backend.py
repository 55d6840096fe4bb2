"""Where stored blob bytes come from: the contract every backend keeps, and its counters."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from typing import Any, Protocol

from nydus.errors import BackendError

#: Lower bounds of request sizes, upper bounds (ms) of latencies (nydusd.md 3.6).
_SIZES = (1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20)
#: Reads of fewer bytes say nothing of the speed of a link.
_MEASURED = 64 << 10
#: How long a read may take longer for bytes that nobody has asked for, in seconds.
_MAX_SPARE = 0.02
_LATENCIES = (1, 20, 50, 100, 500, 1000, 2000)


class BackendMetrics:
    """Counters of one backend, in the JSON shape of ``/api/v1/metrics/backend``. Thread-safe."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self._reads = self._errors = self._bytes = 0
        self._seconds = 0.0
        self._seconds_by_size = [0.0] * 8
        self._reads_by_size = [0] * 8
        self._latencies = [[0] * 8 for _ in range(8)]
        self._latency = float("inf")
        self._seconds_per_byte = 1 / 5e6  # a slow link, until we know better

    def record(self, size: int, seconds: float, *, failed: bool = False) -> None:
        """Count one finished read of ``size`` bytes."""
        column = bisect_right(_SIZES, size)
        latency = next((i for i, limit in enumerate(_LATENCIES) if seconds * 1000 <= limit), 7)
        with self._lock:
            self._reads += 1
            if failed:
                self._errors += 1
                return
            self._bytes += size
            self._seconds += seconds
            self._seconds_by_size[column] += seconds
            self._reads_by_size[column] += 1
            self._latencies[column][latency] += 1
            # The shortest read is all latency; it is forgotten slowly, as links change.
            self._latency = min(self._latency * 1.02, seconds)
            if size >= _MEASURED:
                spent = (seconds - self._latency) / size
                self._seconds_per_byte += (spent - self._seconds_per_byte) / 2

    def bytes_in(self, seconds: float) -> int:
        """How many bytes arrive in this time, latency apart, going by recent reads."""
        return int(seconds / max(self._seconds_per_byte, 1e-12))

    def spare_bytes(self) -> int:
        """How many bytes a read may bring that nobody has asked for, going by recent reads.

        They take half as long as another request for them would, as half of them or more are never wanted.
        """
        return self.bytes_in(min(self._latency / 2, _MAX_SPARE))

    def json(self) -> dict[str, Any]:
        with self._lock:
            return {
                "backend_type": self._kind,
                "read_count": self._reads,
                "read_errors": self._errors,
                "read_amount_total": self._bytes,
                "read_cumulative_latency_millis_total": int(self._seconds * 1000),
                "read_cumulative_latency_millis_dist": [int(s * 1000) for s in self._seconds_by_size],
                "read_count_block_size_dist": list(self._reads_by_size),
                "read_latency_sizes_dist": [list(row) for row in self._latencies],
            }


class Backend(Protocol):
    """Read-only random access to the blobs of one image source.

    All methods may be called from many threads at once. A call makes one attempt (and those a mirror list
    or a proxy with fallback asks for): the *cache* repeats what is worth repeating, so that there is one
    place that bounds the time a reader waits.
    """

    @property
    def metrics(self) -> BackendMetrics: ...

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        """Exactly ``size`` stored bytes of a blob.

        Raises:
            BackendError: anything else; ``permanent`` when another attempt cannot help (no such blob,
                not allowed, beyond the end).
        """
        ...

    def size(self, blob_id: str) -> int:
        """The stored length of a blob in bytes. Raises BackendError as :meth:`read` does."""
        ...

    def doubt(self, blob_id: str) -> None:
        """Told that wrong bytes of a blob came: another attempt may ask somebody else."""
        ...

    def close(self) -> None:
        """Let go of connections and files. May be called twice; reads after it are errors."""
        ...


class MeteredBackend(ABC):
    """What all backends share: counters, and the check that exactly the wanted bytes came."""

    def __init__(self, kind: str) -> None:
        self._metrics = BackendMetrics(kind)

    @property
    def metrics(self) -> BackendMetrics:
        return self._metrics

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0:
            raise BackendError(f"blob {blob_id}: invalid range {offset}+{size}", permanent=True)
        if size == 0:
            return b""
        started = time.monotonic()
        failed = True
        try:
            data = self._read(blob_id, offset, size)
            if len(data) != size:
                raise BackendError(
                    f"blob {blob_id}: expected {size} bytes at offset {offset:#x}, got {len(data)}"
                )
            failed = False
            return data
        finally:
            self._metrics.record(size, time.monotonic() - started, failed=failed)

    @abstractmethod
    def _read(self, blob_id: str, offset: int, size: int) -> bytes: ...

    @abstractmethod
    def size(self, blob_id: str) -> int: ...

    def doubt(self, blob_id: str) -> None:  # noqa: B027  most have nobody else to ask
        """See :class:`Backend`."""

    @abstractmethod
    def close(self) -> None: ...
