"""blobfs by itself: files read through the detached mount, without EROFS."""

from __future__ import annotations

import errno
import gc
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydus.errors import MountError
from nydus.mount import erofs, probe, syscalls, table
from nydus.mount.blobfs import BlobFs, Buffer, File
from nydus.storage.files import OpenFile

pytestmark = pytest.mark.root

SIZE = 4 << 20


class Fake:
    """Bytes that say where they are; ``ready`` and ``problem`` may be changed."""

    def __init__(self) -> None:
        self.data = b"".join(i.to_bytes(8, "little") for i in range(SIZE // 8))
        self.is_ready = True
        self.problem: Exception | None = None
        self.pause = threading.Event()
        self.pause.set()
        self.reads: list[tuple[int, int]] = []

    @property
    def length(self) -> int:
        return SIZE

    def ready(self, offset: int, length: int) -> bool:
        return self.is_ready

    def read(self, offset: int, length: int) -> list[Buffer]:
        self.pause.wait(60)
        self.reads.append((offset, length))
        if self.problem is not None:
            raise self.problem
        middle = offset + length // 3
        return [self.data[offset:middle], memoryview(self.data)[middle : offset + length]]


@pytest.fixture
def fs() -> Iterator[BlobFs]:
    blobfs = BlobFs.create()
    blobfs.serve()
    yield blobfs
    blobfs.close()


def read(path: str, offset: int, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def test_reads_are_large_and_right(fs: BlobFs) -> None:
    fs.set_readahead(1024)
    source = Fake()
    file = fs.add(2, SIZE, "a", source)
    assert Path(fs.path(file)).read_bytes() == source.data
    assert max(length for _, length in source.reads) == 1 << 20
    assert len(source.reads) <= 10
    assert read(fs.path(file), SIZE - 5, 100) == source.data[-5:]
    assert fs.counters.bytes == SIZE and fs.counters.errors == 0


def test_the_kernel_asks_once_for_each_range(fs: BlobFs) -> None:
    source = Fake()
    file = fs.add(2, SIZE, "a", source)
    for _ in range(3):
        assert Path(fs.path(file)).read_bytes() == source.data
    assert fs.counters.bytes == SIZE


def test_reads_that_wait_do_not_hold_up_the_others() -> None:
    fs = BlobFs.create(threads=1)
    fs.serve()
    try:
        slow, quick = Fake(), Fake()
        slow.is_ready = False
        slow.pause.clear()
        waiting = fs.add(2, SIZE, "slow", slow)
        ready = fs.add(3, SIZE, "quick", quick)
        results: list[bytes] = []
        threads = [
            threading.Thread(target=lambda at=at: results.append(read(fs.path(waiting), at, 8)))
            for at in range(0, SIZE, SIZE // 8)
        ]
        for thread in threads:
            thread.start()
        while not fs.inflight():
            time.sleep(0.001)
        assert read(fs.path(ready), 0, 8) == quick.data[:8]
        slow.pause.set()
        for thread in threads:
            thread.join(10)
        assert len(results) == 8
    finally:
        fs.close()


def test_a_backend_that_does_not_answer_holds_up_its_own_file_only(fs: BlobFs) -> None:
    fs.set_readahead(0)
    dead, alive = Fake(), Fake()
    dead.is_ready = alive.is_ready = False
    dead.pause.clear()
    waiting, other = fs.add(2, SIZE, "dead", dead), fs.add(3, SIZE, "alive", alive)
    threads = [
        threading.Thread(target=read, args=(fs.path(waiting), at, 8)) for at in range(0, SIZE, SIZE // 50)
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30
    while len(fs.inflight()) < len(threads):
        assert time.monotonic() < end
        time.sleep(0.001)
    assert read(fs.path(other), 4096, 8) == alive.data[4096:4104]
    assert len(fs.inflight()) == len(threads)
    dead.pause.set()
    for thread in threads:
        thread.join(10)
    assert not fs.inflight()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_open_that_is_sent_again_is_counted_once() -> None:
    def die(file: File) -> None:  # as a worker that is killed before it answers
        raise SystemExit

    dying = BlobFs.create(threads=1, on_change=die)
    dying.serve()
    known = dying.add(2, SIZE, "a", Fake())
    opened: list[int] = []
    path = dying.path(known)
    opener = threading.Thread(target=lambda: opened.append(os.open(path, os.O_RDONLY)))
    opener.start()
    end = time.monotonic() + 5
    while not known.handles:
        assert time.monotonic() < end
        time.sleep(0.001)
    changes: list[int] = []
    fs = BlobFs(dying.device, dying.mount, on_change=lambda file: changes.append(len(file.handles)))
    file = fs.add(2, SIZE, "a", Fake(), sorted(known.handles))
    fs.serve(resend=True)
    try:
        opener.join(5)
        assert len(file.handles) == 1
        second = os.open(path, os.O_RDONLY)
        os.close(opened[0])
        while len(file.handles) != 1 or len(changes) < 3:
            assert time.monotonic() < end
            time.sleep(0.001)
        os.close(second)
        while file.handles:
            assert time.monotonic() < end
            time.sleep(0.001)
        assert changes == [1, 2, 1, 0]
    finally:
        fs.close()


def test_reads_are_served_when_no_thread_can_be_had(fs: BlobFs, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "blobfs-fetch":
            raise RuntimeError("can't start new thread")
        start(thread)

    source = Fake()
    source.is_ready = False
    file = fs.add(2, SIZE, "a", source)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for offset in range(0, SIZE, SIZE // 64):
            assert read(fs.path(file), offset, 100) == source.data[offset : offset + 100]
    fd = os.open(fs.path(file), os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    assert read(fs.path(file), 0, SIZE) == source.data
    assert not fs.inflight()


def test_a_thread_that_mounts_closes_no_descriptors_of_others(fs: BlobFs) -> None:
    """The garbage collector may run in it, where the number is nobody's, or another file's."""

    class Garbage:
        def __init__(self) -> None:
            self.me = self
            self.file = OpenFile(Path(__file__), os.O_RDONLY)

    garbage = [Garbage()]
    number = garbage[0].file.fd

    def function() -> int:
        garbage.clear()
        return len([[] for _ in range(100_000)])  # enough to start a collection

    assert fs.waiting_for_it(function) == 100_000
    assert gc.isenabled()
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(number)


def test_an_error_is_eio_and_a_log_line(fs: BlobFs, caplog: pytest.LogCaptureFixture) -> None:
    source = Fake()
    source.problem = RuntimeError("the dog ate it")
    file = fs.add(2, SIZE, "abcdef", source)
    with caplog.at_level(logging.ERROR), pytest.raises(OSError) as caught:
        read(fs.path(file), 1 << 20, 8)
    assert caught.value.errno == errno.EIO
    assert [r.getMessage() for r in caplog.records] == [
        f"blob abcdef at offset 1048576, {source.reads[0][1]} bytes: the dog ate it"
    ]
    source.problem = None
    assert read(fs.path(file), 1 << 20, 8) == source.data[1 << 20 : (1 << 20) + 8]


def test_a_short_source_is_an_error(fs: BlobFs) -> None:
    source = Fake()
    file = fs.add(2, SIZE + 4096, "a", source)
    with pytest.raises(OSError):
        read(fs.path(file), SIZE, 8)


def test_files_come_and_go(fs: BlobFs) -> None:
    changes: list[int] = []
    fs._on_change = lambda file: changes.append(len(file.handles))
    file = fs.add(2, SIZE, "a", Fake())
    with pytest.raises(ValueError):
        fs.add(2, SIZE, "b", Fake())
    fd = os.open(fs.path(file), os.O_RDONLY)
    assert len(file.handles) == 1
    os.close(fd)
    end = time.monotonic() + 5
    while file.handles and time.monotonic() < end:
        time.sleep(0.001)
    assert changes == [1, 0]
    fs.remove(2)
    with pytest.raises(FileNotFoundError):
        read(fs.path(file), 0, 1)
    with pytest.raises(OSError):
        os.open(fs.path(file), os.O_RDWR)
    assert list(Path(f"/proc/self/fd/{fs.mount}").iterdir()) == []


def test_nothing_is_left_when_the_descriptors_are_closed() -> None:
    def resources() -> tuple[int, int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), len(table.read())

    before = resources()
    for _ in range(20):
        fs = BlobFs.create()
        fs.serve()
        file = fs.add(2, SIZE, "a", Fake())
        assert read(fs.path(file), 0, 8)
        fs.close()
    end = time.monotonic() + 5
    while resources() != before:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_provider_is_chosen_by_what_works(tmp_path: Path) -> None:
    assert probe.choose(tmp_path).provider == "blobfs"
    memory = probe.choose(Path("/dev/shm"))
    assert memory.provider == "fuse" and "block device" in memory.reason
    assert probe.choose(tmp_path, "fuse") == probe.Choice("fuse", "asked for")
    with pytest.raises(MountError):
        probe.choose(tmp_path, "magic")
    assert list(tmp_path.iterdir()) == []


def test_the_kernel_says_why_it_refuses_an_image(tmp_path: Path) -> None:
    bootstrap = tmp_path / "bootstrap"
    image = bytearray(probe.tiny_image())
    bootstrap.write_bytes(image)
    with pytest.raises(MountError, match="devices"):
        erofs.open_detached(bootstrap, [bootstrap, bootstrap])
    with pytest.raises(MountError, match="nowhere"):
        erofs.open_detached(tmp_path / "nowhere", [])
    image[1024] ^= 1
    bootstrap.write_bytes(image)
    with pytest.raises(MountError, match="cannot find valid erofs superblock"):
        erofs.open_detached(bootstrap, [])
    with pytest.raises(MountError, match="cannot unmount"):
        erofs.umount(tmp_path)


def test_long_names_are_no_problem(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 200) / ("y" * 200)
    folder.mkdir(parents=True)
    (folder / "bootstrap").write_bytes(probe.tiny_image())
    (folder / "device").write_bytes(bytes(range(256)) * 16)
    mountpoint = tmp_path / "mnt with space"
    mountpoint.mkdir()
    erofs.mount(folder / "bootstrap", [folder / "device"], mountpoint)
    try:
        assert (mountpoint / "file").read_bytes() == bytes(range(256)) * 16
        found = table.at(mountpoint)
        assert found is not None and found.kind == "erofs"
    finally:
        erofs.umount(mountpoint)
    assert table.at(mountpoint) is None
    assert syscalls.detach(mountpoint) is False
