"""A controller that holds a daemon's descriptors replaces the daemon, alive or dead, under its readers."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from nydusd_process import Nydusd, localfs_config

from conftest import Image
from nydus.daemon.client import DaemonClient, DaemonError
from nydus.daemon.spawn import WarmParent
from nydus.mount import table
from nydus.oci.registry import Registry

sys.path.insert(0, str(Path(__file__).parents[1] / "oci"))

from faulty import FaultyHandler, FaultyRegistry

pytestmark = pytest.mark.root


class Controller:
    """The snapshotter's side of nydusd.md §4.1: receives state and descriptors, and gives them back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = b""
        self.descriptors: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(10)

    def receive(self, daemon: Nydusd) -> None:
        call = threading.Thread(target=daemon.client.send_state)
        call.start()
        connection, _ = self._listener.accept()
        with connection:
            data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 4)
            while more := connection.recv(1 << 20):
                data += more
        call.join()
        self.close_descriptors()
        self.state, self.descriptors = data, descriptors

    def give(self, daemon: Nydusd) -> None:
        def serve() -> None:
            connection, _ = self._listener.accept()
            with connection:
                packed = array.array("i", self.descriptors)
                connection.sendmsg([self.state[:100]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)])
                connection.sendall(self.state[100:])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            daemon.client.take_over()
        finally:
            thread.join()

    def close_descriptors(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []

    def close(self) -> None:
        self.close_descriptors()
        self._listener.close()


class Reader(threading.Thread):
    """Reads an image over and over."""

    def __init__(self, image: Image, mountpoint: Path) -> None:
        super().__init__(daemon=True)
        self.image, self.mountpoint = image, mountpoint
        self.problems: list[object] = []
        self.rounds = 0
        self.stopping = False

    def run(self) -> None:
        while not self.stopping:
            for file in self.image.files:
                try:
                    if (self.mountpoint / file).read_bytes() != (self.image.source / file).read_bytes():
                        self.problems.append(file)
                except OSError as error:
                    self.problems.append((file, error))
            self.rounds += 1


def test_upgrade(image: Image, tmp_path: Path) -> None:
    controller = Controller(tmp_path / "supervisor.sock")
    naming = ["--id", "d1", "--supervisor", str(controller.path)]
    config = localfs_config(image.blobs, tmp_path / "cache")
    with Nydusd.of(tmp_path, image.bootstrap, config, *naming) as old:
        controller.receive(old)
        assert len(controller.descriptors) == 2
        reader = Reader(image, old.mountpoint)
        reader.start()
        arguments = ["--bootstrap", str(image.bootstrap), "--config", str(tmp_path / "config.json")]
        with Nydusd(tmp_path, *arguments, *naming, "--upgrade", name="2") as new:
            new.started("INIT")
            controller.give(new)
            assert new.client.wait("READY") == "READY"
            with pytest.raises(DaemonError):
                new.client.take_over()
            old.client.exit()
            assert old.process.wait(10) == 0
            new.client.start()
            assert new.client.wait("RUNNING") == "RUNNING"
            controller.close()
            assert list(new.client.info()["backend_collection"]) == ["/"]
            seen = reader.rounds
            end = time.monotonic() + 30
            while reader.rounds < seen + 2 and not reader.problems:
                assert time.monotonic() < end
                time.sleep(0.01)
            os.kill(new.worker or 0, 9)
            reader.stopping = True
            reader.join(30)
            assert reader.problems == []
            assert len(new.mounts()) == 1
            assert new.stop() == 0
            assert new.mounts() == []


def test_what_a_leaving_daemon_takes_is_answered(image: Image, tmp_path: Path) -> None:
    """Its threads go on to take requests while its last reads wait for the registry, and it ends."""
    answers = threading.Event()
    answers.set()

    def wait(handler: FaultyHandler) -> bool:
        if "/blobs/" in handler.path and handler.command == "GET":
            answers.wait()
        return False

    controller = Controller(tmp_path / "supervisor.sock")
    naming = ["--id", "d1", "--supervisor", str(controller.path)]
    data = (image.source / "huge").read_bytes()
    program = "import os, sys; f = os.open(sys.argv[1], 0); print(os.pread(f, 9, int(sys.argv[2])).hex())"
    with FaultyRegistry(tmp_path / "registry") as server:
        with Registry(server.host, plain_http=True) as registry:
            registry.repository("a/b").put_blob(image.blob.read_bytes(), "application/octet-stream")
        config = localfs_config(image.blobs, tmp_path / "cache")
        place = {"host": server.host, "repo": "a/b", "scheme": "http", "timeout": 30}
        config["device"] |= {"backend": {"type": "registry", "config": place}}  # type: ignore[operator]
        with Nydusd.of(tmp_path, image.bootstrap, config, *naming) as old:
            assert (old.mountpoint / "d1/f1").read_bytes() == (image.source / "d1/f1").read_bytes()
            controller.receive(old)
            arguments = ["--bootstrap", str(image.bootstrap), "--config", str(tmp_path / "config.json")]
            with Nydusd(tmp_path, *arguments, *naming, "--upgrade", name="2") as new:
                new.started("INIT")
                server.intercepts.append(wait)
                answers.clear()
                readers: list[tuple[int, subprocess.Popen[bytes]]] = []

                def read(offset: int) -> None:
                    command = [sys.executable, "-c", program, str(old.mountpoint / "huge"), str(offset)]
                    readers.append((offset, subprocess.Popen(command, stdout=subprocess.PIPE)))

                read(0)
                while not old.client.metrics("inflight"):
                    time.sleep(0.01)
                controller.give(new)
                old.client.exit()
                new.client.start()
                for number in range(1, 7):
                    read(number << 20)
                assert old.process.wait(15) == 0
                answers.set()
                controller.close()
                for offset, process in readers:
                    output, _ = process.communicate(timeout=30)
                    assert bytes.fromhex(output.decode()) == data[offset : offset + 9]
                assert new.stop() == 0


def test_failover(image: Image, tmp_path: Path) -> None:
    """The whole daemon is killed; the same command waits for the takeover instead of mounting."""
    controller = Controller(tmp_path / "supervisor.sock")
    naming = ["--id", "d1", "--supervisor", str(controller.path)]
    config = localfs_config(image.blobs, tmp_path / "cache")
    with Nydusd(tmp_path, *naming) as old:
        old.client.mount("/1", image.bootstrap, config)
        old.client.mount("/2", image.bootstrap, config)
        controller.receive(old)
        old.process.kill()
        old.process.wait()
        reader = Reader(image, old.mountpoint / "1")
        reader.start()
        with Nydusd(tmp_path, *naming) as new:
            assert new.client.state() == "INIT"
            controller.give(new)
            new.client.start()
            assert sorted(new.client.info()["backend_collection"]) == ["/1", "/2"]
            new.client.mount("/3", image.bootstrap, config)
            new.client.umount("/2")
            reader.stopping = True
            reader.join(30)
            assert not reader.is_alive() and reader.problems == []
            controller.close()
            assert (new.mountpoint / "3/huge").read_bytes() == (image.source / "huge").read_bytes()
            assert new.stop() == 0
            assert new.mounts() == []


def test_a_wrong_state_is_refused(image: Image, tmp_path: Path) -> None:
    controller = Controller(tmp_path / "supervisor.sock")
    naming = ["--id", "d1", "--supervisor", str(controller.path), "--upgrade"]
    with Nydusd(tmp_path, *naming) as daemon:
        controller.descriptors = []
        controller.state = b"nonsense"
        with pytest.raises(DaemonError) as caught:
            controller.give(daemon)
        assert caught.value.status == 500
        assert daemon.client.state() == "INIT"
    controller.close()


def test_a_warm_parent_starts_daemons(image: Image, tmp_path: Path) -> None:
    config = localfs_config(image.blobs, tmp_path / "cache")
    with WarmParent() as parent:
        pids = []
        for number in range(3):
            folder = tmp_path / str(number)
            (folder / "mnt").mkdir(parents=True)
            arguments = ["fuse", "--mountpoint", str(folder / "mnt"), "--apisock", str(folder / "api.sock")]
            pids.append(parent.spawn(arguments, log=folder / "log"))
        for number, pid in enumerate(pids):
            client = DaemonClient(tmp_path / str(number) / "api.sock")
            client.wait("RUNNING")
            client.mount("/1", image.bootstrap, config)
            assert (tmp_path / str(number) / "mnt/1/d1").is_dir()
            assert parent.exit_status(pid) is None
            client.exit()
            end = time.monotonic() + 10
            while parent.exit_status(pid) is None:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert parent.exit_status(pid) == 0
            assert table.at(tmp_path / str(number) / "mnt") is None
        bad = parent.spawn(["--mountpoint", str(tmp_path / "nowhere")], log=tmp_path / "bad.log")
        end = time.monotonic() + 10
        while parent.exit_status(bad) is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert parent.exit_status(bad) == 1
        assert "nowhere" in (tmp_path / "bad.log").read_text()
