"""What happens when processes are killed and bytes are wrong: right bytes or EIO; no zeros, no hang."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from nydusd_process import Nydusd, localfs_config

from conftest import Image
from nydus.daemon.client import DaemonError

pytestmark = pytest.mark.root


# A reader whose page faults find an error gets SIGBUS: it is a process of its own.
MAPPER = """
import mmap, random, sys
truth, mounted, *files = sys.argv[1:]
random.shuffle(files)
for file in files:
    with open(f"{mounted}/{file}", "rb") as stream, open(f"{truth}/{file}", "rb") as expected:
        with mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as pages:
            if pages[:] != expected.read():
                sys.exit(f"{file}: wrong")
"""


class Readers:
    """Threads that read every file of a mount in random order and compare every byte."""

    def __init__(self, image: Image, mountpoint: Path, truth: dict[Path, bytes], count: int = 4) -> None:
        self.wrong: list[Path] = []
        self.errors: list[tuple[Path, OSError]] = []
        self._image, self._mountpoint, self._truth = image, mountpoint, truth
        self._threads = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _read(self, number: int) -> None:
        files = list(self._truth)
        random.Random(number).shuffle(files)
        for file in files:
            try:
                data = (self._mountpoint / file).read_bytes()
            except OSError as error:
                self.errors.append((file, error))
            else:
                if data != self._truth[file]:
                    self.wrong.append(file)

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)


def test_a_hundred_kills_during_cold_reads_lose_nothing(image: Image, tmp_path: Path) -> None:
    truth = {file: (image.source / file).read_bytes() for file in image.files}
    dice = random.Random()
    kills = rounds = 0
    while kills < 100:
        rounds += 1
        limit = kills + 200  # on a busy machine no worker would live long enough to answer
        folder = tmp_path / str(rounds)
        config = localfs_config(image.blobs, folder / "cache")
        with Nydusd.of(folder, image.bootstrap, config) as daemon:
            readers = Readers(image, daemon.mountpoint, truth, count=3)
            mapper = subprocess.Popen(
                [sys.executable, "-S", "-c", MAPPER, image.source, daemon.mountpoint, *truth],
                stderr=subprocess.PIPE,
                text=True,
            )
            end = time.monotonic() + 60
            while readers.running or mapper.poll() is None:
                time.sleep(dice.uniform(0, 0.03))
                worker = daemon.worker
                if worker is not None and kills < limit:
                    with suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)
                        kills += 1
                assert time.monotonic() < end, f"readers hang after {kills} kills: {daemon.log.read_text()}"
            assert (readers.wrong, readers.errors) == ([], []), daemon.log.read_text()
            assert mapper.communicate()[1] == ""
            assert mapper.returncode == 0, daemon.log.read_text()  # -SIGBUS for an error
            assert daemon.stop() == 0
            assert daemon.mounts() == []
        shutil.rmtree(folder)


def test_a_killed_daemon_gives_errors_and_the_same_command_heals(image: Image, tmp_path: Path) -> None:
    config = localfs_config(image.blobs, tmp_path / "cache")
    with Nydusd.of(tmp_path, image.bootstrap, config) as daemon:
        worker = daemon.worker
        daemon.process.kill()
        daemon.process.wait()
        assert worker is not None
        end = time.monotonic() + 5
        while Path(f"/proc/{worker}").exists():
            assert time.monotonic() < end, "the worker outlives its supervisor"
            time.sleep(0.01)
        with pytest.raises(OSError) as caught:
            (daemon.mountpoint / "huge").read_bytes()
        assert caught.value.errno == errno.EIO
        with Nydusd.of(tmp_path, image.bootstrap, config) as again:
            assert (again.mountpoint / "huge").read_bytes() == (image.source / "huge").read_bytes()
            assert len(again.mounts()) == 1
            assert again.stop() == 0
            assert again.mounts() == []


def test_a_complete_blob_is_checked_after_an_unclean_stop(image: Image, tmp_path: Path) -> None:
    config = localfs_config(image.blobs, tmp_path / "cache")
    with Nydusd(tmp_path / "1") as daemon:
        daemon.client.mount("/1", image.bootstrap, config)
        for file in image.files:
            (daemon.mountpoint / "1" / file).read_bytes()
        chunk_map = tmp_path / "cache" / f"{image.blob.name}.blob.data.chunk_map"
        end = time.monotonic() + 20
        while chunk_map.read_bytes()[12:16] != b"PAMM":  # all chunks are on the disk
            assert time.monotonic() < end
            time.sleep(0.05)
    # Killed: nothing says that they were checked.
    with Nydusd(tmp_path / "2") as daemon:
        daemon.client.mount("/1", image.bootstrap, config)
        assert daemon.client.info()["backend_collection"]["/1"]["plain_blobs"] == 0
        end = time.monotonic() + 20
        while "checked after an unclean stop, 0 chunks were wrong" not in daemon.log.read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        daemon.client.mount("/2", image.bootstrap, config)
        assert daemon.client.info()["backend_collection"]["/2"]["plain_blobs"] == 1
        # What was checked is mounted, not what somebody has put in its place.
        data = tmp_path / "cache" / f"{image.blob.name}.blob.data"
        size = data.stat().st_size
        data.unlink()
        data.write_bytes(b"evil" * (size // 4))
        daemon.client.mount("/3", image.bootstrap, config)
        assert daemon.client.info()["backend_collection"]["/3"]["plain_blobs"] == 1
        for file in image.files:
            assert (daemon.mountpoint / "3" / file).read_bytes() == (image.source / file).read_bytes()
        assert daemon.stop() == 0


def test_a_living_mount_is_refused(image: Image, tmp_path: Path) -> None:
    config = localfs_config(image.blobs, tmp_path / "cache")
    with Nydusd.of(tmp_path, image.bootstrap, config) as daemon:
        command = [sys.executable, "-m", "nydus.cli.nydusd", "--mountpoint", str(daemon.mountpoint)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert result.returncode == 1
        assert result.stderr.splitlines() == [
            f"nydusd: {daemon.mountpoint}: is served by another nydusd, process {daemon.process.pid}"
        ]
        assert (daemon.mountpoint / "d1").is_dir()


def test_a_corrupt_blob_is_an_error_with_a_log_line(image: Image, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    shutil.copytree(image.blobs, blobs)
    blob = blobs / image.blob.name
    blob.chmod(0o600)
    with blob.open("r+b") as file:  # the data lies before the tables at the end
        file.seek(blob.stat().st_size // 2)
        file.write(b"\xff" * 64)
    with Nydusd.of(tmp_path, image.bootstrap, localfs_config(blobs, tmp_path / "cache")) as daemon:
        failed = 0
        for file in image.files:
            try:
                assert (daemon.mountpoint / file).read_bytes() == (image.source / file).read_bytes()
            except OSError as error:
                assert error.errno == errno.EIO
                failed += 1
        assert failed
        lines = [line for line in daemon.log.read_text().splitlines() if " ERROR " in line]
        assert any(f"blob {image.blob.name} at offset " in line for line in lines)
        assert daemon.client.request("GET", "/api/v1/daemon/events")["total_errors"] > 0
        assert daemon.stop() == 0


def test_a_missing_blob_is_an_error_and_heals(image: Image, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    with Nydusd.of(tmp_path, image.bootstrap, localfs_config(blobs, tmp_path / "cache")) as daemon:
        with pytest.raises(OSError):
            (daemon.mountpoint / "huge").read_bytes()
        shutil.copy(image.blob, blobs)
        time.sleep(1.1)
        assert (daemon.mountpoint / "huge").read_bytes() == (image.source / "huge").read_bytes()


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "device table"])
def test_a_corrupt_bootstrap_is_refused(image: Image, tmp_path: Path, damage: str) -> None:
    data = bytearray(image.bootstrap.read_bytes())
    if damage == "empty":
        data = bytearray()
    elif damage == "text":
        data = bytearray(b"no bootstrap\n" * 1000)
    elif damage == "cut":
        del data[1200:]
    else:
        data[1024 + 86] ^= 0xFF
    bootstrap = tmp_path / "bootstrap"
    bootstrap.write_bytes(data)
    config = localfs_config(image.blobs, tmp_path / "cache")
    daemon = Nydusd.of(tmp_path, bootstrap, config)
    try:
        assert daemon.process.wait(20) == 1
        lines = [line for line in daemon.log.read_text().splitlines() if line.startswith("nydusd: ")]
        assert len(lines) == 1 and str(bootstrap) in lines[0]
        assert "Traceback" not in daemon.log.read_text()
        assert daemon.mounts() == []
        assert not daemon.socket.exists()
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    finally:
        daemon.clean()
    with Nydusd(tmp_path / "shared") as shared:
        with pytest.raises(DaemonError) as caught:
            shared.client.mount("/1", bootstrap, config)
        assert caught.value.status == 500 and str(bootstrap) in str(caught.value)
        shared.client.mount("/1", image.bootstrap, config)
        assert (shared.mountpoint / "1/d1").is_dir()


def test_the_end_does_not_wait_for_a_silent_backend(image: Image, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        config = localfs_config(image.blobs, tmp_path / "cache")
        device = config["device"]
        assert isinstance(device, dict)
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        device["backend"] = {
            "type": "registry",
            "config": {"host": host, "repo": "a/b", "scheme": "http", "timeout": 60, "connect_timeout": 60},
        }
        with Nydusd.of(tmp_path, image.bootstrap, config) as daemon:
            # Not by mmap: a page fault would hold the interpreter lock of this process.
            readers = Readers(image, daemon.mountpoint, {Path("huge"): b""}, count=3)
            time.sleep(0.3)
            began = time.monotonic()
            assert daemon.client.metrics("inflight")
            assert (daemon.mountpoint / "d1/f1").stat().st_size > 0  # metadata does not wait
            assert daemon.stop() == 0
            assert daemon.mounts() == []
            while readers.running:
                assert time.monotonic() - began < 10, "readers hang"
                time.sleep(0.01)
            assert time.monotonic() - began < 5
            assert [error.errno for _, error in readers.errors] == [errno.EIO] * 3


def test_a_signal_to_a_reader_is_not_an_error(image: Image, tmp_path: Path) -> None:
    """The kernel tells of interrupted requests; a process that gets a harmless signal must not see EIO."""
    program = (
        "import signal, sys; signal.signal(signal.SIGALRM, lambda *_: None);"
        "signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001);"
        "data = open(sys.argv[1], 'rb').read(); signal.setitimer(signal.ITIMER_REAL, 0);"
        "sys.stdout.buffer.write(data)"
    )
    with Nydusd.of(tmp_path, image.bootstrap, localfs_config(image.blobs, tmp_path / "cache")) as daemon:
        command = [sys.executable, "-S", "-c", program, str(daemon.mountpoint / "huge")]
        result = subprocess.run(command, capture_output=True, timeout=60)
        assert result.returncode == 0
        assert result.stdout == (image.source / "huge").read_bytes()


def test_an_unmount_from_outside_ends_a_dedicated_daemon(image: Image, tmp_path: Path) -> None:
    with Nydusd.of(tmp_path, image.bootstrap, localfs_config(image.blobs, tmp_path / "cache")) as daemon:
        subprocess.run(["umount", str(daemon.mountpoint)], check=True)
        assert daemon.process.wait(10) == 0
        assert not daemon.socket.exists()


def test_kills_during_mounts_leave_nothing_half_done(image: Image, tmp_path: Path) -> None:
    """A worker that is killed inside a mount waits for itself, until its successor answers."""
    config = localfs_config(image.blobs, tmp_path / "cache")
    with Nydusd(tmp_path) as daemon:
        stopping = threading.Event()

        def kill() -> None:
            while not stopping.wait(random.uniform(0.01, 0.08)):
                if worker := daemon.worker:
                    os.kill(worker, signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        end = time.monotonic() + 5
        number = 0
        while time.monotonic() < end:
            number += 1
            for call in (
                lambda at=f"/{number}": daemon.client.mount(at, image.bootstrap, config),
                lambda at=f"/{number}": daemon.client.umount(at),
            ):
                with suppress(DaemonError):
                    call()
        stopping.set()
        killer.join()
        daemon.client.wait("RUNNING")  # the last one killed may have taken a request with it
        for mountpoint in daemon.client.info()["backend_collection"]:
            assert (daemon.mountpoint / mountpoint[1:] / "d1").is_dir()
            daemon.client.umount(mountpoint)
        assert daemon.mounts() == [str(daemon.mountpoint)]
        daemon.client.mount("/end", image.bootstrap, config)
        assert (daemon.mountpoint / "end/huge").read_bytes() == (image.source / "huge").read_bytes()
        assert daemon.stop() == 0
        assert daemon.mounts() == []
