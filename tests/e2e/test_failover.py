"""A daemon that is killed as a whole, under readers: its successor takes over, and they see nothing of it."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import containerd_node
import pytest
from containerd_node import Node
from nydusd_process import localfs_config

import nydus
from conftest import Image
from nydus.daemon.client import DaemonClient
from nydus.daemon.spawn import WarmParent
from nydus.oci.registry import Registry
from nydus.snapshotter import daemons, images
from nydus.snapshotter import labels as label
from nydus.snapshotter.config import load
from nydus.snapshotter.database import Database
from nydus.snapshotter.errors import SnapshotError
from nydus.snapshotter.images import Images
from nydus.snapshotter.snapshotter import Snapshotter
from nydus.snapshotter.store import Store
from nydus.snapshotter.template import Template

pytestmark = pytest.mark.root

READER = """
import random, sys
truth, mounted, seed, *files = sys.argv[1:]
random.Random(int(seed)).shuffle(files)
for file in files:
    with open(f"{mounted}/{file}", "rb") as stream, open(f"{truth}/{file}", "rb") as expected:
        if stream.read() != expected.read():
            sys.exit(f"{file}: wrong")
"""


class Host:
    """Our snapshotter in this process, with real daemons, and blobs in a directory."""

    def __init__(self, root: Path, blobs: Path, mode: str) -> None:
        self.root = root
        root.mkdir()
        config, _ = load(None, {"root": str(root), "daemon_mode": mode})
        template = root / "template.json"
        template.write_text(json.dumps(localfs_config(blobs, root / "cache")))
        self.database = Database(root / "metadata.db")
        self.store = Store(self.database, root / "snapshots")
        self.parent = WarmParent()
        self.images = Images(
            config, self.database, self.store, self.parent, Template(template, config.cache_dir)
        )
        self.snapshotter = Snapshotter(config, self.store, self.images)
        self.kills = 0

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.images.close(unmount=True)
        self.parent.close()
        self.database.close()
        assert daemons.mounts_below(self.root) == []

    def pull(self, name: str, bootstrap: Path) -> None:
        """An image of a repository of its own."""
        labels = {label.IMAGE_REF: f"127.0.0.1:5/{name}:1", label.BOOTSTRAP: "true"}
        self.snapshotter.prepare(f"layer-{name}", "", labels)
        layer = self.store.directory(self.store.get(f"layer-{name}").id) / "fs" / "image"
        layer.mkdir()
        shutil.copy(bootstrap, layer / "image.boot")
        self.snapshotter.commit(f"image-{name}", f"layer-{name}", labels)

    def run(self, name: str, key: str) -> Path:
        """The root of a container."""
        options = self.snapshotter.prepare(key, f"image-{name}", {})[0].options
        lower = next(option for option in options if option.startswith("lowerdir="))
        return Path(lower.removeprefix("lowerdir="))

    def remove(self, name: str, key: str) -> None:
        for snapshot in (key, f"image-{name}"):
            self.snapshotter.remove(snapshot)
        self.snapshotter.cleanup()

    def kill(self) -> None:
        """Kill every daemon as a whole."""
        for socket in self.root.glob("socket/*/api.sock"):
            with suppress(OSError):
                if pid := daemon_pid(socket):
                    os.kill(pid, signal.SIGKILL)
                    self.kills += 1


def reader(image: Image, mounted: Path, seed: int = 0) -> subprocess.Popen[str]:
    """Reads every file, and says on standard error what is wrong."""
    command = [sys.executable, "-S", "-c", READER, str(image.source), str(mounted), str(seed)]
    return subprocess.Popen([*command, *map(str, image.files)], stderr=subprocess.PIPE, text=True)


def daemon_pid(socket: Path) -> int | None:
    descriptor = daemons.Daemon(socket, socket.parent, socket.parent).process()
    if descriptor is None:
        return None
    try:
        (line,) = [
            line
            for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
            if line.startswith("Pid:")
        ]
        return int(line.split()[1])
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("mode", ["dedicated", "shared"])
def test_many_kills_lose_nothing(
    image: Image, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_MAX_RESTARTS", 1000)
    kills = 0
    while kills < 20:
        with Host(tmp_path / str(kills), image.blobs, mode) as host:
            host.pull("one", image.bootstrap)
            mounted = host.run("one", "container")
            readers = [reader(image, mounted, seed) for seed in range(3)]
            end = time.monotonic() + 120
            while any(process.poll() is None for process in readers):
                assert time.monotonic() < end, f"readers hang after {kills} kills"
                time.sleep(random.uniform(0.02, 0.25))
                host.kill()
            assert [(process.communicate()[1], process.returncode) for process in readers] == [("", 0)] * 3
            host.remove("one", "container")
            kills += host.kills
        shutil.rmtree(host.root)


@pytest.mark.parametrize("mode", ["dedicated", "shared"])
def test_a_daemon_that_is_told_to_exit_has_a_successor(image: Image, tmp_path: Path, mode: str) -> None:
    """That is how a running daemon gets newer code; no reader notices."""
    with Host(tmp_path / "host", image.blobs, mode) as host:
        host.pull("one", image.bootstrap)
        mounted = host.run("one", "container")
        readers = [reader(image, mounted, seed) for seed in range(3)]
        (socket,) = host.root.glob("socket/*/api.sock")
        known: set[int | None] = {None}
        for _ in range(4):
            wait_for(lambda: daemon_pid(socket) not in known)
            known.add(daemon_pid(socket))
            client = DaemonClient(socket)
            client.wait("RUNNING")
            client.exit()
        assert [(process.communicate()[1], process.returncode) for process in readers] == [("", 0)] * 3
        wait_for(lambda: daemon_pid(socket) not in known)
        host.remove("one", "container")


@pytest.mark.parametrize("mode", ["dedicated", "shared"])
def test_kills_while_images_come_and_go(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may fail to be created, with an error; one that was created reads right bytes."""
    monkeypatch.setattr(images, "_MAX_RESTARTS", 1000)
    (tmp_path / "blobs").mkdir()
    made = []
    for number in range(3):
        source = tmp_path / f"source{number}"
        source.mkdir()
        for name in "abcdef":
            (source / name).write_bytes(os.urandom(200_000))
        nydus.create(str(source), str(tmp_path / "blobs")).save(tmp_path / f"boot{number}")
        made.append(Image(source, tmp_path / f"boot{number}", tmp_path / "blobs"))
    wrong: list[object] = []
    right = failed = 0
    done = threading.Event()

    def work(number: int) -> None:
        nonlocal right, failed
        for turn in itertools.count():
            if done.is_set():
                return
            name, image = f"n{number}-{turn}", made[(number + turn) % len(made)]
            host.pull(name, image.bootstrap)
            try:
                mounted = host.run(name, f"container-{name}")
            except SnapshotError:
                failed += 1
                host.snapshotter.remove(f"image-{name}")
                continue
            process = reader(image, mounted)
            try:
                said = process.communicate(timeout=60)[1]
            except subprocess.TimeoutExpired:
                process.kill()
                said = "hangs"
            if said:
                wrong.append(said)
            right += not said
            host.remove(name, f"container-{name}")

    with Host(tmp_path / "host", tmp_path / "blobs", mode) as host:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 10
        while (time.monotonic() < end or right < 10) and not wrong:
            time.sleep(random.uniform(0.05, 0.5))
            host.kill()
        done.set()
        for thread in threads:
            thread.join()
        host.snapshotter.cleanup()
        assert wrong == []
        assert host.kills > 5
        assert daemons.mounts_below(host.root) == []


@pytest.mark.containerd
@pytest.mark.skipif(bool(containerd_node.missing()), reason=f"not installed: {containerd_node.missing()}")
@pytest.mark.parametrize("mode", ["dedicated", "shared"])
def test_a_running_container_goes_on(image: Image, tmp_path: Path, mode: str) -> None:
    sums = "".join(
        f"{hashlib.sha256((image.source / file).read_bytes()).hexdigest()}  data/{file}\n"
        for file in image.files
    )
    with Node(mode) as node:
        push_ordinary_image(node, image, sums)
        target = f"{node.host}/failover:nydus"
        program = str(Path(sys.executable).with_name("nydusify"))
        convert = [program, "convert", "--source", f"{node.host}/failover:source", "--target", target]
        subprocess.run([*convert, "--plain-http"], check=True, capture_output=True)
        read = 'while ! [ -e /go ]; do sleep 0.01; done; sha256sum -c /sums && echo "all is right"'
        _, container = node.start(target, "/bin/sh", "-c", read)
        assert container.execute("/bin/touch", "/go") == (0, b"")
        (socket,) = node.daemon_sockets()
        known: set[int | None] = {None}
        for _ in range(4):
            wait_for(lambda: daemon_pid(socket) not in known)
            pid = daemon_pid(socket)
            assert pid is not None
            known.add(pid)
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        code, output = container.wait(), container.output()
        assert (code, output[-13:]) == (0, "all is right\n"), node.snapshotter.log_file.read_text()
        # It is served on, and cleaned up, by the successor.
        again = node.start(target, "/bin/sh", "-c", "sha256sum -c /sums >/dev/null && echo fine")[1]
        assert (again.wait(), again.output()) == (0, "fine\n")
        for pod in list(node.cri.pods):
            pod.remove()
        node.remove_images()
        wait_for(lambda: node.image_mounts() == [] and not node.daemon_sockets())


def push_ordinary_image(node: Node, image: Image, sums: str) -> None:
    """busybox, the files of ``image`` below ``/data``, and their digests."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("sh", "sha256sum", "sleep", "touch"):
            archive.add(busybox, f"bin/{name}")
        archive.add(image.source, "data")
        info = tarfile.TarInfo("sums")
        info.size = len(sums)
        archive.addfile(info, io.BytesIO(sums.encode()))
    layer = stream.getvalue()
    with Registry(node.host, plain_http=True) as registry:
        repository = registry.repository("failover")
        stored = repository.put_blob(layer, "application/vnd.oci.image.layer.v1.tar")
        config = {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
        described = repository.put_blob(
            json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"
        )
        media_type = "application/vnd.oci.image.manifest.v1+json"
        parts = [
            {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}
            for blob in (described, stored)
        ]
        manifest = {"schemaVersion": 2, "mediaType": media_type, "config": parts[0], "layers": parts[1:]}
        repository.put_manifest("source", json.dumps(manifest).encode(), media_type)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)
