"""BlobCache: right bytes, one fetch a chunk, clear errors; whatever the backend and the disk do."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from storage_blobs import (
    Blob,
    FaultyBackend,
    broken,
    cache_of,
    corrupted,
    link,
    make_blob,
    read,
    slow,
    truncated,
)

import nydus.storage.cache
from nydus.errors import BackendError, FormatError, NydusError
from nydus.rafs.blobmeta import ChunkMap
from nydus.rafs.model import Compression, Digester
from nydus.storage.flusher import Flusher
from nydus.storage.store import Store

SIZES = [4096, 100, 70000, 1 << 16, 5, 4097, 300000, 8192] * 6


@pytest.fixture
def blob() -> Blob:
    return make_blob(SIZES)


@pytest.mark.parametrize(
    "kind", [Compression.ZSTD, Compression.LZ4_BLOCK, Compression.GZIP, Compression.NONE]
)
@pytest.mark.parametrize("digester", list(Digester))
def test_every_byte(tmp_path: Path, kind: Compression, digester: Digester) -> None:
    blob = make_blob(SIZES, kind=kind, digester=digester)
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend)
    assert cache.length == len(blob.image)
    rng = random.Random(2)
    for _ in range(200):
        offset = rng.randrange(cache.length)
        length = rng.randrange(1, 200000)
        assert read(cache, offset, length) == blob.image[offset : offset + length]
    assert read(cache, 0, cache.length) == blob.image
    assert set(backend.fetches(blob).values()) == {1}
    assert cache.complete
    file = cache.verified_file()
    assert file is not None and file.path == tmp_path / f"{blob.info.id}.blob.data"
    cache.close()
    assert (tmp_path / f"{blob.info.id}.blob.data").read_bytes() == blob.image


def test_ends_of_the_device(tmp_path: Path, blob: Blob) -> None:
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    assert cache.read(cache.length, 10) == []
    assert cache.read(0, 0) == []
    assert read(cache, cache.length - 10, 100) == blob.image[-10:]
    with pytest.raises(ValueError):
        cache.read(-1, 10)


def test_neighbours_come_in_one_request(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend, amplify=0)
    offset, size = blob.ranges()[2]
    read(cache, offset, size + (1 << 16))
    assert len(backend.requests) == 1
    read(cache, 0, 10)
    assert backend.requests[1] == (0, int(blob.chunks.csize[0]))


def test_amplification_stays_within_its_limit(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend, amplify=100_000)
    read(cache, 0, 1)
    assert len(backend.requests) == 1
    assert 50_000 < backend.requests[0][1] <= 100_000


def test_amplification_follows_the_link(tmp_path: Path) -> None:
    """Jumping about on a slow link moves little more than what is asked for; going straight on does."""
    blob = make_blob([20_000] * 1000)
    backend = FaultyBackend(blob)
    backend.fault = link(10e6)
    cache = cache_of(tmp_path, blob, backend)
    for row in (900, 100, 700, 300, 500):
        read(cache, *blob.ranges()[row])
    assert max(size for _, size in backend.requests) < 500_000
    backend.requests.clear()
    cache = cache_of(tmp_path / "2", blob, backend)
    for offset, size in blob.ranges()[:500]:
        read(cache, offset, size)
    assert max(size for _, size in backend.requests) > 900_000


def test_amplification_is_bounded_in_memory(tmp_path: Path) -> None:
    """A megabyte of stored zeros may be gigabytes."""
    blob = make_blob([1 << 20] * 12, digests=False)
    chunk = b"\0" * (1 << 20)
    from nydus.rafs import codec

    packed = codec.compress(Compression.ZSTD, chunk)
    for row in range(12):
        blob.chunks.coffset[row], blob.chunks.csize[row] = row * len(packed), len(packed)
    blob.stored = packed * 12
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend)
    read(cache, 0, 1)
    assert backend.requests == [(0, backend.requests[0][1])]
    assert backend.requests[0][1] <= 6 * len(packed)


def test_a_large_read_is_fetched_in_parallel(tmp_path: Path) -> None:
    blob = make_blob([1 << 20] * 8, kind=Compression.NONE)
    backend = FaultyBackend(blob)
    backend.fault = slow(0.05)
    cache = cache_of(tmp_path, blob, backend)
    assert read(cache, 0, cache.length) == blob.image
    assert backend.most_running > 1
    assert set(backend.fetches(blob).values()) == {1}


def test_a_read_needs_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = make_blob([1 << 20] * 4)
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    read(cache, 0, 1)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        patch.setattr(nydus.storage.cache, "flusher", Flusher())
        assert read(cache, 0, cache.length) == blob.image
    cache.close()


def test_many_readers_one_fetch(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    backend.fault = slow(0.01)
    cache = cache_of(tmp_path, blob, backend, amplify=50_000)
    wrong: list[object] = []
    start = threading.Barrier(16)

    def reader(seed: int) -> None:
        rng = random.Random(seed)
        start.wait()
        for _ in range(30):
            offset = rng.randrange(cache.length)
            length = rng.randrange(1, 1 << 17)
            try:
                if read(cache, offset, length) != blob.image[offset : offset + length]:
                    wrong.append((offset, length))
            except NydusError as error:
                wrong.append(error)

    threads = [threading.Thread(target=reader, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert max(backend.fetches(blob).values()) == 1
    assert not cache._fetcher._flights  # type: ignore[union-attr]


@pytest.mark.parametrize("fault", [broken, truncated, corrupted])
def test_a_failed_fetch_is_an_error_and_leaves_nothing(
    tmp_path: Path, blob: Blob, caplog: pytest.LogCaptureFixture, fault: object
) -> None:
    backend = FaultyBackend(blob)
    backend.fault = fault  # type: ignore[assignment]
    cache = cache_of(tmp_path, blob, backend, attempts=2, amplify=0)
    offset, size = blob.ranges()[2]
    with caplog.at_level(logging.ERROR), pytest.raises(BackendError):
        cache.read(offset, size)
    assert blob.info.id in caplog.text
    assert f"at offset {int(blob.chunks.coffset[2]):#x}" in caplog.text
    assert len(backend.requests) == 2
    assert not cache.ready(offset, size)
    backend.fault = None
    assert read(cache, offset, size) == blob.image[offset : offset + size]
    cache.close()


def test_a_flapping_backend_is_no_error(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    turns = iter([broken, corrupted] * 1000)
    calls = threading.Lock()

    def flap(offset: int, size: int, data: bytes) -> bytes:
        with calls:
            turn = next(turns)
        return turn(offset, size, data) if random.random() < 0.3 else data

    backend.fault = flap
    cache = cache_of(tmp_path, blob, backend, attempts=8, deadline=60)
    assert read(cache, 0, cache.length) == blob.image


def test_a_broken_neighbour_does_not_matter(tmp_path: Path, blob: Blob) -> None:
    """Chunk 3 is damaged in the blob; chunk 2, whose request takes 3 along, can be read, and 3 never."""
    bad = int(blob.chunks.coffset[3]) + 20
    backend = FaultyBackend(blob)
    backend.blobs[blob.info.id] = blob.stored[:bad] + b"xxxx" + blob.stored[bad + 4 :]
    cache = cache_of(tmp_path, blob, backend, attempts=1)
    offset, size = blob.ranges()[2]
    assert read(cache, offset, size) == blob.image[offset : offset + size]
    offset, size = blob.ranges()[3]
    for _ in range(2):
        with pytest.raises(BackendError):
            cache.read(offset + 5, 10)
    offset, size = blob.ranges()[4]
    assert read(cache, offset, size) == blob.image[offset : offset + size]


def test_a_cut_off_blob_gives_what_it_has(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    backend.blobs[blob.info.id] = blob.stored[: int(blob.chunks.coffset[10]) + 1]
    cache = cache_of(tmp_path, blob, backend, attempts=2)
    offset = blob.ranges()[9][0]
    assert read(cache, offset, 10) == blob.image[offset : offset + 10]
    with pytest.raises(BackendError):
        cache.read(blob.ranges()[10][0], 1)


def test_a_failure_wakes_all_waiters(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    release = threading.Event()

    def hang(*_: object) -> bytes:
        release.wait(10)
        raise BackendError("gone")

    backend.fault = hang
    cache = cache_of(tmp_path, blob, backend, attempts=1)
    errors: list[float] = []

    def reader() -> None:
        with pytest.raises(BackendError):
            cache.read(0, 4096)
        errors.append(time.monotonic())

    threads = [threading.Thread(target=reader) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    released = time.monotonic()
    release.set()
    for thread in threads:
        thread.join(5)
    assert len(errors) == 8
    assert max(errors) - released < 1
    assert len(backend.requests) == 1


def test_waiting_is_bounded(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    backend.fault = slow(0.3)

    def fail(offset: int, size: int, data: bytes) -> bytes:
        time.sleep(0.3)
        raise BackendError("no")

    backend.fault = fail
    cache = cache_of(tmp_path, blob, backend, attempts=100, deadline=1)
    started = time.monotonic()
    with pytest.raises(BackendError):
        cache.read(0, 1)
    assert time.monotonic() - started < 2


def test_permanent_errors_are_not_repeated(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)

    def gone(*_: object) -> bytes:
        raise BackendError("404", permanent=True, status=404)

    backend.fault = gone
    cache = cache_of(tmp_path, blob, backend, amplify=0)
    with pytest.raises(BackendError):
        cache.read(0, 1)
    assert len(backend.requests) == 1


def test_checksum_where_there_is_no_digest(tmp_path: Path) -> None:
    blob = make_blob(SIZES, kind=Compression.NONE, digests=False, crc=True)
    backend = FaultyBackend(blob)
    backend.fault = corrupted
    cache = cache_of(tmp_path, blob, backend, attempts=1, amplify=0)
    with pytest.raises(BackendError):
        cache.read(0, 1)
    backend.fault = None
    assert read(cache, 0, cache.length) == blob.image
    assert cache.verified_file()


def test_digests_from_the_bootstrap(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blob = make_blob(SIZES, kind=Compression.NONE)
    digests, blob.chunks.digests = blob.chunks.digests, None
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path / "1", blob, backend)
    assert read(cache, 0, cache.length) == blob.image
    assert "no chunk digests" in caplog.text
    assert cache.complete
    assert cache.verified_file() is None
    backend.fault = corrupted

    def add(chunks: object) -> None:
        chunks.digests = digests  # type: ignore[attr-defined]

    cache = cache_of(tmp_path / "2", blob, backend, attempts=1, digests=add)
    with pytest.raises(BackendError):
        cache.read(0, 1)
    backend.fault = None
    assert read(cache, 0, cache.length) == blob.image
    assert cache.verified_file()


def test_chunks_that_no_file_uses(tmp_path: Path, blob: Blob) -> None:
    """Merged images have them; they have no digest. They are neither needed nor taken along."""
    assert blob.chunks.digests is not None
    blob.chunks.digests[7] = 0
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend, amplify=100)
    for row, (offset, size) in enumerate(blob.ranges()):
        if row != 7:
            read(cache, offset, size)
    assert cache.complete
    assert cache.verified_file()
    assert backend.fetches(blob)[7] == 0
    offset, size = blob.ranges()[7]
    assert read(cache, offset, size) == blob.image[offset : offset + size]
    cache.close()
    cache = cache_of(tmp_path, blob, backend)
    assert cache.verified_file()
    assert not cache.ready(offset, size)


def test_another_image_shares_the_cache(tmp_path: Path, blob: Blob) -> None:
    """It uses a chunk that the first one does not know: complete for one is not complete for both."""
    digests = blob.chunks.digests
    assert digests is not None

    def know(*rows: int) -> Callable[[ChunkMap], None]:
        def add(chunks: ChunkMap) -> None:
            if chunks.digests is None:
                chunks.digests = np.zeros((len(chunks), 32), np.uint8)
            chunks.digests[list(rows)] = digests[list(rows)]

        return add

    blob.chunks.digests = None
    first = list(range(7)) + list(range(9, 48))
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend, amplify=0, digests=know(*first))
    for row in first:
        read(cache, *blob.ranges()[row])
    read(cache, *blob.ranges()[8])  # nobody's chunk yet, and therefore not verified
    assert cache.verified_file()
    cache.add_digests(know(7, 8, 9))
    assert not cache.complete
    assert cache.verified_file() is None
    assert not cache.ready(*blob.ranges()[8])
    for row in (7, 8):
        offset, size = blob.ranges()[row]
        assert read(cache, offset, size) == blob.image[offset : offset + size]
        read(cache, offset, size)
    assert set(backend.fetches(blob).values()) == {1}
    assert cache.verified_file()

    def lie(chunks: ChunkMap) -> None:
        know(3)(chunks)
        assert chunks.digests is not None
        chunks.digests[3] ^= 1

    with pytest.raises(FormatError, match="different digests"):
        cache.add_digests(lie)
    assert cache.verified_file()


def test_another_image_shares_a_cache_not_opened_yet(tmp_path: Path, blob: Blob) -> None:
    digests, blob.chunks.digests = blob.chunks.digests, None

    def know(start: int) -> Callable[[ChunkMap], None]:
        def add(chunks: ChunkMap) -> None:
            if chunks.digests is None:
                chunks.digests = np.zeros((len(chunks), 32), np.uint8)
            assert digests is not None
            chunks.digests[start::2] = digests[start::2]

        return add

    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend, digests=know(0), attempts=1, amplify=0)
    cache.add_digests(know(1))
    backend.fault = corrupted
    for row in (0, 1):
        with pytest.raises(BackendError):
            cache.read(*blob.ranges()[row])
    backend.fault = None
    assert read(cache, 0, cache.length) == blob.image
    assert cache.verified_file()


def test_full_disk(
    tmp_path: Path, blob: Blob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend, amplify=0)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", full)
        for _ in range(3):
            for offset, size in blob.ranges()[:8]:
                assert read(cache, offset, size) == blob.image[offset : offset + size]
        assert caplog.text.count("No space left") == 1
        assert not cache.ready(0, 1)
    assert read(cache, 0, cache.length) == blob.image
    assert cache.complete


def test_reads_after_close(tmp_path: Path, blob: Blob) -> None:
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    read(cache, 0, 10)
    cache.close()
    with pytest.raises(BackendError, match="closed"):
        cache.read(0, 10)
    cache.close()


def test_close_wakes_readers(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    backend.fault = broken
    cache = cache_of(tmp_path, blob, backend, attempts=100, deadline=60)
    failed = threading.Event()

    def reader() -> None:
        with pytest.raises(NydusError):
            cache.read(0, 1)
        failed.set()

    thread = threading.Thread(target=reader)
    thread.start()
    time.sleep(0.3)
    cache.close()
    assert failed.wait(2)
    thread.join()


def test_no_descriptors_are_left(tmp_path: Path, blob: Blob) -> None:
    def opened() -> list[str]:
        found = []
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # the one that lists them
                found.append(str(descriptor.readlink()))
        return [path for path in found if path.startswith(str(tmp_path))]

    for i in range(5):
        cache = cache_of(tmp_path / str(i), blob, FaultyBackend(blob))
        read(cache, 0, cache.length)
        assert opened()
        cache.close()
        assert opened() == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a\0b", "x" * 300])
def test_hostile_names(tmp_path: Path, name: str) -> None:
    blob = make_blob([10], name=name)
    with pytest.raises(FormatError):
        cache_of(tmp_path, blob, FaultyBackend(blob))


def test_metrics(tmp_path: Path, blob: Blob) -> None:
    cache = cache_of(tmp_path, blob, FaultyBackend(blob), amplify=0)
    read(cache, 0, 10)
    read(cache, 0, 10)
    read(cache, 0, 4097)
    metrics = cache.metrics()
    assert (metrics["total"], metrics["whole_hits"], metrics["partial_hits"]) == (3, 1, 1)
    assert metrics["entries_count"] == 2
    assert metrics["underlying_files"] == [f"{blob.info.id}.blob.data"]
    assert not metrics["data_all_ready"]
    read(cache, 0, cache.length)
    assert cache.metrics()["data_all_ready"]
