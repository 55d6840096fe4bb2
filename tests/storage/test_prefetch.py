"""Prefetch fills what it is told to, in order, at its rate, and stands back for readers."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from storage_blobs import Blob, FaultyBackend, broken, cache_of, link, make_blob, slow

from nydus.storage.cache import BlobCache
from nydus.storage.prefetch import Piece, Prefetcher, whole

SIZES = [100_000] * 40


@pytest.fixture
def blob() -> Blob:
    return make_blob(SIZES)


def test_whole_blobs(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend)
    prefetcher = Prefetcher(whole([cache]), threads=4, batch=1 << 20)
    prefetcher.start()
    assert prefetcher.join(10)
    assert cache.complete
    assert cache.ready(0, cache.length)
    assert set(backend.fetches(blob).values()) == {1}
    metrics = prefetcher.metrics()
    assert metrics["prefetch_data_amount"] >= len(blob.stored)
    assert metrics["prefetch_requests_count"] <= 8
    assert metrics["prefetch_workers"] == 0
    assert cache.metrics()["total"] == 0  # no reader was there


def test_order(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend)
    ranges = blob.ranges()
    pieces = [Piece(cache, *ranges[30]), Piece(cache, *ranges[5]), *whole([cache])]
    prefetcher = Prefetcher(pieces, threads=1, batch=1 << 17)
    prefetcher.start()
    assert prefetcher.join(10)
    starts = [int(blob.chunks.coffset[row]) for row in (30, 5, 0)]
    assert [offset for offset, _ in backend.requests][:3] == starts
    assert cache.complete


def test_bandwidth(tmp_path: Path, blob: Blob) -> None:
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    rate = len(blob.stored) // 2
    prefetcher = Prefetcher(whole([cache]), threads=2, batch=1 << 18, bandwidth=rate)
    started = time.monotonic()
    prefetcher.start()
    assert prefetcher.join(10)
    assert 0.7 < time.monotonic() - started < 3  # two seconds' worth, one of them saved up


def test_readers_come_first(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend)
    waiting = threading.Event()
    waiting.set()
    prefetcher = Prefetcher(whole([cache]), threads=4, busy=waiting.is_set)
    prefetcher.start()
    time.sleep(0.1)
    assert not backend.requests
    waiting.clear()
    assert prefetcher.join(10)
    assert cache.complete


def test_a_waiting_reader_makes_the_cache_busy(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    backend.fault = slow(0.2)
    cache = cache_of(tmp_path, blob, backend)
    assert not cache.busy
    reader = threading.Thread(target=cache.read, args=(0, 10))
    reader.start()
    time.sleep(0.05)
    assert cache.busy
    reader.join()
    time.sleep(0.1)
    assert not cache.busy


def test_stop(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    backend.fault = slow(0.05)
    cache = cache_of(tmp_path, blob, backend)
    prefetcher = Prefetcher(whole([cache]), threads=1, batch=1 << 17)
    prefetcher.start()
    time.sleep(0.1)
    prefetcher.stop()
    count = len(backend.requests)
    time.sleep(0.1)
    assert 0 < count < 20
    assert len(backend.requests) == count


def test_failures_are_tried_again_and_then_left(
    tmp_path: Path, blob: Blob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nydus.storage.prefetch._BACKOFF", 0.01)
    backend = FaultyBackend(blob)
    cache = BlobCache(tmp_path, blob.info, blob.chunks, backend, attempts=1)
    left = [2]

    def fail_twice(offset: int, size: int, data: bytes) -> bytes:
        left[0] -= 1
        return broken(offset, size, data) if left[0] >= 0 else data

    backend.fault = fail_twice
    prefetcher = Prefetcher(whole([cache]), threads=1)
    prefetcher.start()
    assert prefetcher.join(10)
    assert cache.complete
    assert "given up" not in caplog.text
    second = cache_of(tmp_path / "2", blob, backend)
    backend.fault = broken
    prefetcher = Prefetcher([Piece(second, 0, 10)], threads=1, attempts=2)
    prefetcher.start()
    assert prefetcher.join(10)
    assert "given up" in caplog.text


def test_a_slow_link_is_not_taken_from_readers(tmp_path: Path) -> None:
    blob = make_blob([100_000] * 20)
    backend = FaultyBackend(blob)
    backend.fault = link(3e6)
    cache = cache_of(tmp_path, blob, backend)
    prefetcher = Prefetcher(whole([cache]), threads=8)
    prefetcher.start()
    assert prefetcher.join(20)
    assert cache.complete
    assert max(size for _, size in backend.requests) < 700_000
    assert backend.most_running == 1
