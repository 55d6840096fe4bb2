"""What a cache holds on disk and gives to readers while processes are killed and disks fill up."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from storage_blobs import SIZES, Blob, FaultyBackend, cache_of, data_file, make_blob, map_file, read

from nydus.rafs import codec
from nydus.storage.flusher import Flusher


@pytest.fixture
def blob() -> Blob:
    return make_blob(SIZES)


_WORKER = """
import random, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from storage_blobs import FaultyBackend, make_blob
from nydus.storage.cache import BlobCache
import nydus.storage.flusher
nydus.storage.flusher.flusher._interval = 0.005
blob = make_blob({sizes!r})
seed = int(sys.argv[2])
rng = random.Random(seed)
print("go", flush=True)
while True:
    amplify = rng.choice((0, 50000))
    cache = BlobCache(Path(sys.argv[1]), blob.info, blob.chunks, FaultyBackend(blob), amplify=amplify)
    for _ in range(rng.randrange(1, 60)):
        offset = rng.randrange(cache.length)
        length = rng.randrange(1, 100000)
        if b"".join(cache.read(offset, length)) != blob.image[offset:offset + length]:
            print("WRONG", offset, length, flush=True)
            sys.exit(3)
    cache.close()
    if rng.random() < 0.2 and not {keep!r}:
        for path in Path(sys.argv[1]).iterdir():
            path.unlink(missing_ok=True)
"""


def _worker(path: Path, seed: int, keep: bool) -> subprocess.Popen[bytes]:
    code = _WORKER.format(tests=str(Path(__file__).parent), sizes=SIZES, keep=keep)
    return subprocess.Popen([sys.executable, "-c", code, str(path), str(seed)], stdout=subprocess.PIPE)


def _check_persisted(path: Path, blob: Blob) -> int:
    """Every bit on the disk tells the truth. Another process may be filling, or deleting, the files."""
    try:
        with map_file(path, blob).open("rb") as chunk_map, data_file(path, blob).open("rb") as data:
            # The bits first: what they say is in the data already.
            raw = chunk_map.read()
            image = data.read()
            for file in (chunk_map, data):
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                    return 0  # deleted in between: the two may not belong together
    except FileNotFoundError:
        return 0
    if len(raw) < 4096:
        return 0
    found = np.unpackbits(np.frombuffer(raw, np.uint8, offset=4096))[: len(blob.chunks)]
    for row in np.flatnonzero(found):
        offset, size = blob.ranges()[row]
        assert blob.chunks.digests is not None
        assert (
            codec.digest(blob.info.digester, image[offset : offset + size])
            == blob.chunks.digests[row].tobytes()
        )
    return int(found.sum())


def test_kill_dash_nine(tmp_path: Path, blob: Blob) -> None:
    """Forked fillers are killed at random moments; every persisted bit and every byte is compared."""
    rng = random.Random(4)
    work = tmp_path / "cache"
    work.mkdir()
    seen = 0
    logging.disable(logging.CRITICAL)
    try:
        for turn in range(120):
            pid = os.fork()
            if pid == 0:
                _filler(work, blob, turn)
            time.sleep(rng.uniform(0.002, 0.06))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert os.WIFSIGNALED(status), "the filler found a wrong byte"
            seen += _check_persisted(work, blob)
            if turn % 10 == 9:
                cache = cache_of(work, blob, FaultyBackend(blob))
                assert read(cache, 0, cache.length) == blob.image
                cache.close()
                for path in work.iterdir():
                    path.unlink()
    finally:
        logging.disable(logging.NOTSET)
    assert seen > 100


def _filler(work: Path, blob: Blob, seed: int) -> None:
    """Runs in a forked child and never returns."""
    status = 3
    try:
        import nydus.storage.cache

        nydus.storage.cache.flusher = Flusher(0.002)
        rng = random.Random(seed)
        while True:
            cache = cache_of(work, blob, FaultyBackend(blob), amplify=rng.choice((0, 50000)))
            for _ in range(rng.randrange(1, 40)):
                offset, length = rng.randrange(cache.length), rng.randrange(1, 100000)
                if read(cache, offset, length) != blob.image[offset : offset + length]:
                    return
            cache.close()
    except BaseException:
        status = 4
    finally:
        os._exit(status)


def test_two_processes_killed_and_started_in_one_directory(tmp_path: Path, blob: Blob) -> None:
    work = tmp_path / "cache"
    work.mkdir()
    workers = [_worker(work, seed, keep=False) for seed in range(2)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"go\n"
        for seed in range(6):
            time.sleep(0.2)
            workers[seed % 2].kill()
            workers[seed % 2].wait()
            _check_persisted(work, blob)
            workers[seed % 2] = _worker(work, 10 + seed, keep=False)
        time.sleep(0.3)
        assert [worker.poll() for worker in workers] == [None, None]
    finally:
        for worker in workers:
            worker.kill()
            output = worker.communicate()[0]
            assert b"WRONG" not in output
    cache = cache_of(work, blob, FaultyBackend(blob))
    assert read(cache, 0, cache.length) == blob.image
    cache.close()


@pytest.mark.root
def test_a_really_full_disk(tmp_path: Path) -> None:
    blob = make_blob([100_000] * 40)
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], check=True)
    try:
        cache = cache_of(mount / "cache", blob, FaultyBackend(blob))
        results: list[bool] = []

        def reader(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(30):
                offset, length = rng.randrange(cache.length), rng.randrange(1, 200000)
                results.append(read(cache, offset, length) == blob.image[offset : offset + length])

        threads = [threading.Thread(target=reader, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 120
        assert not cache.complete
        _check_persisted(mount / "cache", blob)
        cache.close()
        _check_persisted(mount / "cache", blob)
    finally:
        subprocess.run(["umount", mount], check=True)
