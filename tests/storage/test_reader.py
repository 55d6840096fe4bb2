"""Chunks straight from a backend: order, large requests, repetition, errors."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

import nydus
from nydus.errors import BackendError, FormatError
from nydus.storage.backends.localfs import LocalFs
from nydus.storage.reader import ChunkReader


class Counting(LocalFs):
    """Counts requests; the first ``failures`` of them fail, after those that open a blob."""

    def __init__(self, folder: Path, failures: int = 0, permanent: bool = False) -> None:
        super().__init__(dir=str(folder))
        self.requests: list[int] = []
        self.failures, self.permanent = failures, permanent

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        self.requests.append(size)
        if self.failures:
            self.failures -= 1
            raise BackendError("not now", permanent=self.permanent)
        return super().read(blob_id, offset, size)


@pytest.fixture(scope="module", params=[{}, {"batch_size": 0x10000}, {"version": 5}], ids=str)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nydus.Image:
    """A few large files and many small ones, about 20 MB."""
    root = tmp_path_factory.mktemp("root")
    for number in range(300):
        (root / f"small{number:03}").write_bytes(os.urandom(2000))
    for number in range(4):
        (root / f"large{number}").write_bytes(os.urandom(5 << 20))
    folder = tmp_path_factory.mktemp("blobs")
    return nydus.create(root, folder, chunk_size=0x10000, **request.param)


def folder_of(image: nydus.Image) -> Path:
    assert image._backend is not None
    return image._backend._dirs[0]  # type: ignore[attr-defined, no-any-return]


def test_any_order(image: nydus.Image) -> None:
    reader = image.reader
    table = reader.chunk_map(0)
    rows = np.random.default_rng(1).permutation(len(table))
    rows = np.concatenate([rows, rows[:50], rows[:1]])
    got = [bytes(data) for data in reader.stream(np.zeros(len(rows), int), rows)]
    assert [len(data) for data in got] == table.usize[rows].tolist()
    alone = [bytes(next(iter(reader.stream(np.zeros(1, int), rows[at : at + 1])))) for at in range(40)]
    assert got[:40] == alone and got[-1] == got[0]


def test_large_requests(image: nydus.Image) -> None:
    backend = Counting(folder_of(image))
    reader = ChunkReader(image.tree, backend)
    count = len(reader.chunk_map(0))
    backend.requests.clear()
    total = sum(len(data) for data in reader.stream(np.zeros(count, int), np.arange(count)))
    assert total > 20 << 20
    assert len(backend.requests) < 20 and max(backend.requests) <= 4 << 20


def test_failures_that_pass_and_those_that_do_not(image: nydus.Image) -> None:
    reader = ChunkReader(image.tree, Counting(folder_of(image), failures=2))
    assert len(list(reader.stream(np.zeros(3, int), np.arange(3)))) == 3
    for failures, permanent, tried in ((9, False, 3), (9, True, 1)):
        backend = Counting(folder_of(image), failures, permanent)
        with pytest.raises(BackendError, match="not now"):
            list(ChunkReader(image.tree, backend).stream(np.zeros(1, int), np.zeros(1, int)))
        assert len(backend.requests) == tried
    with pytest.raises(FormatError):
        list(reader.stream(np.zeros(1, int), np.array([10**6])))


def test_threads_end_with_the_stream(image: nydus.Image) -> None:
    before = threading.active_count()
    count = len(image.reader.chunk_map(0))
    stream = image.reader.stream(np.zeros(count, int), np.arange(count))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert not list(image.reader.stream(np.zeros(0, int), np.zeros(0, int)))


def test_stored_bytes(image: nydus.Image) -> None:
    rows = np.array([5, 1, 3])
    taken = list(image.reader.stored(0, rows))
    assert {1, 3, 5} <= {row for chunks, _ in taken for row in chunks}
    assert sum(len(data) for _, data in taken) == image.reader.stored_size(0, rows)
