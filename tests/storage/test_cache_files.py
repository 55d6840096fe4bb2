"""The files of a cache: what is believed after an orderly stop, a kill, another program, another daemon."""

from __future__ import annotations

import fcntl
import os
import random
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from storage_blobs import (
    SIZES,
    Blob,
    FaultyBackend,
    cache_of,
    corrupted,
    data_file,
    make_blob,
    map_file,
    read,
)

from nydus.errors import BackendError, NydusError
from nydus.rafs import blobmeta
from nydus.rafs.blobmeta import ChunkMap
from nydus.rafs.model import CHUNK, Compression
from nydus.storage.cache import BlobCache
from nydus.storage.flusher import Flusher
from nydus.storage.store import CacheError, Store


@pytest.fixture
def blob() -> Blob:
    return make_blob(SIZES)


def bits(path: Path, blob: Blob) -> np.ndarray:
    raw = map_file(path, blob).read_bytes()
    return np.unpackbits(np.frombuffer(raw[4096:], np.uint8), count=len(blob.chunks)).astype(bool)


def fill(path: Path, blob: Blob, end: int | None = None) -> None:
    cache = cache_of(path, blob, FaultyBackend(blob), amplify=0)
    read(cache, 0, end or cache.length)
    cache.close()


def test_the_reference_layout(tmp_path: Path, blob: Blob) -> None:
    offset, size = blob.ranges()[9]
    fill(tmp_path, blob, offset + size)
    raw = map_file(tmp_path, blob).read_bytes()
    assert len(raw) == 4096 + (len(SIZES) + 7) // 8
    assert raw[:16] == bytes.fromhex("50414d420100000050414d4300000000")
    assert not any(raw[16:4096])
    assert raw[4096:] == bytes([0xFF, 0xC0]) + bytes(4)
    assert data_file(tmp_path, blob).stat().st_size == blob.info.uncompressed_size
    fill(tmp_path, blob)
    raw = map_file(tmp_path, blob).read_bytes()
    assert raw[12:16] == bytes.fromhex("50414d4d")
    assert raw[4096:] == b"\xff" * 6


def test_nothing_is_fetched_twice_after_an_orderly_stop(tmp_path: Path, blob: Blob) -> None:
    fill(tmp_path, blob)
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend)
    assert cache.verified_file()
    assert cache.ready(0, cache.length) or read(cache, 0, 1)
    assert read(cache, 0, cache.length) == blob.image
    assert cache.ready(0, cache.length)
    assert not backend.requests


def test_an_edited_file_is_noticed(tmp_path: Path, blob: Blob, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, blob)
    offset, _ = blob.ranges()[3]
    with data_file(tmp_path, blob).open("r+b") as file:
        file.seek(offset + 50)
        file.write(b"evil")
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend, amplify=0)
    assert cache.verified_file() is None
    assert cache.complete
    assert read(cache, 0, cache.length) == blob.image
    assert backend.fetches(blob).total() == 1
    assert "wrong digest" in caplog.text
    assert cache.verified_file()
    cache.close()
    assert bits(tmp_path, blob).all()
    assert data_file(tmp_path, blob).read_bytes() == blob.image


def test_a_wrong_chunk_loses_its_bit(tmp_path: Path, blob: Blob) -> None:
    fill(tmp_path, blob)
    with data_file(tmp_path, blob).open("r+b") as file:
        file.seek(blob.ranges()[3][0])
        file.write(b"evil")
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    assert cache.verify() == 1
    cache.close()
    assert np.flatnonzero(~bits(tmp_path, blob)).tolist() == [3]


def test_ready_bits_over_holes(tmp_path: Path, blob: Blob) -> None:
    """What a power cut leaves when bits are written before data, as another program may do."""
    fill(tmp_path, blob, 1)
    raw = bytearray(map_file(tmp_path, blob).read_bytes())
    raw[4096:] = b"\xff" * (len(raw) - 4096)
    map_file(tmp_path, blob).write_bytes(raw)
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    assert read(cache, 0, cache.length) == blob.image


def test_an_unverifiable_cache_is_believed_only_after_an_orderly_stop(tmp_path: Path, blob: Blob) -> None:
    digests, blob.chunks.digests = blob.chunks.digests, None
    fill(tmp_path, blob)
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    assert cache.complete
    cache.close()
    # With digests at hand the same files are checked first.
    blob.chunks.digests = digests
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    assert cache.verified_file() is None
    assert cache.verify() == 0
    assert cache.verified_file()
    cache.close()
    blob.chunks.digests = None
    os.utime(data_file(tmp_path, blob))
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend)
    assert read(cache, 0, cache.length) == blob.image
    assert set(backend.fetches(blob).values()) == {1}


@pytest.mark.parametrize(
    "damage", ["data longer", "data shorter", "data gone", "map shorter", "map foreign", "map gone"]
)
def test_files_that_do_not_fit(tmp_path: Path, blob: Blob, damage: str) -> None:
    fill(tmp_path, blob)
    data, chunk_map = data_file(tmp_path, blob), map_file(tmp_path, blob)
    if damage == "data longer":
        os.truncate(data, len(blob.image) + 4096)
    elif damage == "data shorter":
        os.truncate(data, 4096)
    elif damage == "data gone":
        data.unlink()
    elif damage == "map shorter":
        os.truncate(chunk_map, 4097)
    elif damage == "map foreign":
        chunk_map.write_bytes(b"#!/bin/sh\n" + chunk_map.read_bytes()[10:])
    else:
        chunk_map.unlink()
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend)
    assert read(cache, 0, cache.length) == blob.image
    assert set(backend.fetches(blob).values()) == {1}
    cache.close()
    assert bits(tmp_path, blob).all()
    assert data.read_bytes() == blob.image


def test_a_file_truncated_while_open_is_an_error(tmp_path: Path, blob: Blob) -> None:
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    read(cache, 0, cache.length)
    os.truncate(data_file(tmp_path, blob), 5000)
    with pytest.raises(CacheError, match="truncated"):
        cache.read(0, 8192)


def test_validate_checks_every_read(tmp_path: Path, blob: Blob) -> None:
    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend, validate=True)
    assert read(cache, 0, cache.length) == blob.image
    backend.requests.clear()
    assert read(cache, 0, cache.length) == blob.image
    assert not backend.requests
    with data_file(tmp_path, blob).open("r+b") as file:
        file.write(b"evil")
    assert read(cache, 0, cache.length) == blob.image
    assert len(backend.requests) == 1


def test_a_directory_that_cannot_be_used(tmp_path: Path, blob: Blob) -> None:
    (tmp_path / "file").write_text("")
    cache = cache_of(tmp_path / "file", blob, FaultyBackend(blob))
    with pytest.raises(Exception, match="file"):
        cache.read(0, 1)


def test_blob_meta_is_kept_and_fetched_again_when_damaged(tmp_path: Path) -> None:
    blob = make_blob(SIZES)
    section = blobmeta.write(blob.chunks, len(blob.stored))
    blob.stored += section
    blob.info.compressed_size = len(blob.stored)
    blob.info.features = blob.info.features | 0x4000_0001  # aligned, sections after the data
    section = blobmeta.write(blob.chunks, blob.info.meta_offset)
    blob.stored = blob.stored[: blob.info.meta_offset] + section
    records = np.zeros(len(blob.chunks), CHUNK)
    records["digest"] = blob.chunks.digests.view("V32").reshape(-1)
    records["index"] = np.arange(len(records))
    for column in ("uoffset", "usize"):
        records[column] = getattr(blob.chunks, column)

    def add(chunks: ChunkMap) -> None:
        chunks.set_digests(records, 0)

    def open_cache(backend: FaultyBackend) -> BlobCache:
        return BlobCache(tmp_path, blob.info, None, backend, digests=add)

    broken_backend = FaultyBackend(blob)
    broken_backend.fault = corrupted
    cache = open_cache(broken_backend)
    assert not cache.complete  # asks nobody
    assert not broken_backend.requests
    with pytest.raises(Exception, match="blob"):
        cache.read(0, 1)
    broken_backend.fault = None
    assert read(cache, 0, cache.length) == blob.image  # not broken for ever
    cache.close()
    meta = tmp_path / f"{blob.info.id}.blob.meta"
    assert meta.read_bytes()[-4:] == struct.pack("<I", 0xB10BB10B)
    backend = FaultyBackend(blob)
    cache = open_cache(backend)
    assert cache.verified_file()
    assert not backend.requests
    cache.close()
    good = meta.read_bytes()
    cut = bytearray(good)  # well-formed, but a chunk is said to be one byte shorter than the bootstrap says
    cut[160:168] = (int.from_bytes(good[160:168], "little") - (1 << 44)).to_bytes(8, "little")
    for damaged in (good[:-5000], bytes(cut)):
        meta.write_bytes(damaged)
        backend.requests.clear()
        cache = open_cache(backend)
        assert read(cache, 0, cache.length) == blob.image
        assert backend.requests
        cache.close()
        assert meta.read_bytes() == good


def test_the_flusher_makes_bits_durable_in_time(
    tmp_path: Path, blob: Blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nydus.storage.cache.flusher", Flusher(0.05))
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    read(cache, 0, cache.length)
    deadline = time.monotonic() + 5
    while not bits(tmp_path, blob).all() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert bits(tmp_path, blob).all()


def test_bits_are_written_after_the_data(tmp_path: Path, blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, join = Store.sync, Store.join
    monkeypatch.setattr(Store, "sync", lambda self: (events.append("sync"), sync(self))[1])
    monkeypatch.setattr(Store, "join", lambda self, *args: (events.append("join"), join(self, *args))[1])
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    read(cache, 0, cache.length)
    assert not bits(tmp_path, blob).any()
    cache.flush()
    assert events == ["sync", "join"]
    assert bits(tmp_path, blob).all()


def test_power_cut(tmp_path: Path, blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers and a flusher at work; then all data not synced are lost, but the chunk map is kept."""
    unsynced: list[tuple[int, bytes]] = []
    durable = bytearray(len(blob.image))
    lock = threading.Lock()
    write, sync = Store.write, Store.sync

    def logged_write(self: Store, offset: int, buffers: list[bytes]) -> None:
        write(self, offset, buffers)
        with lock:
            unsynced.append((offset, b"".join(buffers)))

    def logged_sync(self: Store) -> None:
        with lock:
            written = list(unsynced)
            unsynced.clear()
        sync(self)
        for offset, data in written:
            durable[offset : offset + len(data)] = data

    monkeypatch.setattr(Store, "write", logged_write)
    monkeypatch.setattr(Store, "sync", logged_sync)
    lost = 0
    for turn in range(20):
        work = tmp_path / str(turn)
        durable[:] = bytes(len(durable))
        unsynced.clear()
        cache = cache_of(work, blob, FaultyBackend(blob), amplify=0)
        stop = threading.Event()

        def flush(cache: BlobCache = cache, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                cache.flush()

        flusher = threading.Thread(target=flush)
        flusher.start()
        rng = random.Random(turn)
        for _ in range(rng.randrange(1, 30)):
            read(cache, rng.randrange(cache.length), rng.randrange(1, 50000))
        kept = map_file(work, blob).read_bytes()
        image = bytes(durable)
        stop.set()
        flusher.join()
        assert kept[:4] == b"PAMB"
        found = np.unpackbits(np.frombuffer(kept[4096:], np.uint8), count=len(SIZES))
        for row in np.flatnonzero(found):
            offset, size = blob.ranges()[row]
            assert image[offset : offset + size] == blob.image[offset : offset + size]
        lost += len(SIZES) - int(found.sum())
        data_file(work, blob).write_bytes(image)
        map_file(work, blob).write_bytes(kept)
        again = cache_of(work, blob, FaultyBackend(blob))
        assert read(again, 0, again.length) == blob.image
    assert lost


def test_a_stopped_process_does_not_block_us_for_ever(
    tmp_path: Path, blob: Blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nydus.storage.store._LOCK_SECONDS", 0.1)
    fill(tmp_path, blob, 1)
    with map_file(tmp_path, blob).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache = cache_of(tmp_path, blob, FaultyBackend(blob))
        with pytest.raises(Exception, match="locked by another process"):
            cache.read(0, 1)
    assert read(cache, 0, cache.length) == blob.image


def test_a_blob_without_chunks(tmp_path: Path) -> None:
    blob = make_blob([])
    for _ in range(2):
        cache = cache_of(tmp_path, blob, FaultyBackend(blob))
        assert cache.length == 0
        assert cache.read(0, 4096) == []
        assert cache.complete
        assert cache.verified_file()
        cache.close()


def test_a_failed_sync_is_not_recorded(tmp_path: Path, blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_store: Store) -> None:
        raise OSError(5, "Input/output error")

    backend = FaultyBackend(blob)
    cache = cache_of(tmp_path, blob, backend)
    read(cache, 0, cache.length)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "sync", fail)
        cache.flush()
    assert not bits(tmp_path, blob).any()
    assert not cache.complete
    assert read(cache, 0, cache.length) == blob.image
    cache.close()
    assert bits(tmp_path, blob).all()


def test_two_caches_in_one_directory(tmp_path: Path, blob: Blob) -> None:
    one, two = (cache_of(tmp_path, blob, FaultyBackend(blob), amplify=0) for _ in range(2))
    half = blob.ranges()[24][0]
    assert read(one, 0, half) == blob.image[:half]
    assert read(two, half, two.length) == blob.image[half:]
    one.flush()
    two.flush()
    assert bits(tmp_path, blob).all()
    backend: FaultyBackend = two._backend  # type: ignore[assignment]
    backend.requests.clear()
    assert read(two, 0, two.length) == blob.image  # the other's chunks, checked
    assert not backend.requests
    one.close()
    two.close()
    assert data_file(tmp_path, blob).read_bytes() == blob.image


@pytest.mark.parametrize("closed", [True, False])
def test_a_lying_image_keeps_its_bytes_to_itself(tmp_path: Path, closed: bool) -> None:
    """The same blob id, other digests and a registry that serves what fits them."""
    good, evil = (make_blob(SIZES, kind=Compression.NONE, seed=seed) for seed in (1, 2))
    assert good.info == evil.info
    one, two = cache_of(tmp_path, good, FaultyBackend(good)), cache_of(tmp_path, evil, FaultyBackend(evil))
    for cache, blob in ((two, evil), (one, good)) if closed else ((one, good), (two, evil)):
        assert read(cache, 0, cache.length) == blob.image
        cache.close() if closed else cache.flush()
    one, two = (one, two) if not closed else (
        cache_of(tmp_path, good, FaultyBackend(good)),
        cache_of(tmp_path, evil, FaultyBackend(evil)),
    )  # fmt: skip
    for cache, blob in ((one, good), (two, evil)):
        file = cache.verified_file()
        assert file is not None
        assert file.read(0, cache.length) == blob.image
        assert read(cache, 0, cache.length) == blob.image


def test_chunks_checked_by_one_image_are_checked_for_another_that_knows_more(
    tmp_path: Path, blob: Blob
) -> None:
    digests = blob.chunks.digests
    assert digests is not None
    blob.chunks.digests = digests.copy()
    blob.chunks.digests[3] = 0
    fill(tmp_path, blob)
    offset, size = blob.ranges()[3]
    blob.chunks.digests = digests.copy()
    for _ in range(2):
        backend = FaultyBackend(blob)
        cache = cache_of(tmp_path, blob, backend)
        assert not backend.requests
        assert read(cache, offset, size) == blob.image[offset : offset + size]
        cache.close()
    # What the second one knew is known of the files now.
    blob.chunks.digests = digests.copy()
    blob.chunks.digests[3] ^= 1
    other = cache_of(tmp_path, blob, FaultyBackend(blob), attempts=1)
    with pytest.raises(BackendError):
        read(other, offset, size)
    assert data_file(tmp_path, blob).read_bytes() == blob.image


def test_digests_that_came_later_are_known_to_other_processes(tmp_path: Path, blob: Blob) -> None:
    digests = blob.chunks.digests
    assert digests is not None
    blob.chunks.digests = digests.copy()
    blob.chunks.digests[3] = 0
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    read(cache, 0, 1)

    def more(chunks: ChunkMap) -> None:
        assert chunks.digests is None
        chunks.digests = digests.copy()

    cache.add_digests(more)
    assert read(cache, 0, cache.length) == blob.image
    evil = make_blob(SIZES)
    assert evil.chunks.digests is not None
    evil.chunks.digests[3] ^= 1
    with pytest.raises(BackendError):
        read(cache_of(tmp_path, evil, FaultyBackend(evil), attempts=1), *evil.ranges()[3])
    assert data_file(tmp_path, blob).read_bytes() == blob.image


def test_the_file_that_was_checked_is_handed_out_whatever_is_in_its_place(tmp_path: Path, blob: Blob) -> None:
    """Somebody emptied the directory and started over: under this name there are only zeros now."""
    fill(tmp_path, blob)
    cache = cache_of(tmp_path, blob, FaultyBackend(blob))
    assert cache.verified_file()
    for path in tmp_path.iterdir():
        path.unlink()
    cache_of(tmp_path, blob, FaultyBackend(blob)).verified_file()
    assert data_file(tmp_path, blob).stat().st_blocks == 0
    file = cache.verified_file()
    assert file is not None and file.read(0, cache.length) == blob.image
    assert read(cache, 0, cache.length) == blob.image


@pytest.mark.parametrize("name", ["data", "data.chunk_map"])
def test_a_link_in_the_directory_is_not_followed(tmp_path: Path, blob: Blob, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / f"{blob.info.id}.blob.{name}").symlink_to(victim)
    with pytest.raises(NydusError):
        read(cache_of(tmp_path, blob, FaultyBackend(blob)), 0, 1)
    assert victim.read_bytes() == b"precious"
