"""Under a real containerd: private registries, mounts for virtual machines, restarts at bad moments."""

from __future__ import annotations

import base64
import json
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import containerd_node
import pytest
from containerd_node import Node

from nydus.convert.copy import copy
from nydus.demo.cri import CriError
from nydus.oci.auth import Credentials
from nydus.oci.place import ArchivePlace, RegistryPlace
from nydus.oci.reference import parse

pytestmark = [
    pytest.mark.containerd,
    pytest.mark.vectors,
    pytest.mark.skipif(bool(containerd_node.missing()), reason=f"not installed: {containerd_node.missing()}"),
]
SAYS = "hello from a lazy image\napp/data.bin: OK\n"
# bcrypt of "secret"
HTPASSWD = "user:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"


@pytest.fixture
def private_registry(tmp_path: Path) -> Iterator[str]:
    """The host of a registry that wants a password."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    config = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": host},
        "auth": {"htpasswd": {"realm": "test", "path": str(tmp_path / "htpasswd")}},
    }
    (tmp_path / "registry.yml").write_text(json.dumps(config))
    with open(tmp_path / "registry.log", "wb") as log:
        process = subprocess.Popen([program, "serve", str(tmp_path / "registry.yml")], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", int(host.partition(":")[2]))).close()
                break
            except OSError:
                assert time.monotonic() < end, (tmp_path / "registry.log").read_text()
                time.sleep(0.05)
        yield host
    finally:
        process.terminate()
        process.wait()


def test_a_private_registry(
    private_registry: str, vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = f"{private_registry}/run:1"
    archive = ArchivePlace(vectors / "oci" / "run" / "v6-zstd.tar")
    copy(archive, RegistryPlace(parse(reference), plain_http=True, credentials=Credentials("user", "secret")))
    docker = tmp_path / "docker"
    docker.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(docker))
    with Node() as node:
        # As the kubelet does: the credentials go to containerd, which tells nobody.
        node.cri.pull(reference, username="user", password="secret")
        time.sleep(0.5)
        pod = node.cri.pod()
        with pytest.raises(CriError, match="the registry refuses us"):
            pod.run(reference)
        entry = {"auth": base64.b64encode(b"user:secret").decode()}
        (docker / "config.json").write_text(json.dumps({"auths": {private_registry: entry}}))
        container = pod.run(reference, name="second")
        assert (container.wait(), container.output()) == (0, SAYS)
        config = json.loads(next(node.root.glob("config/*/*/config.json")).read_text())
        assert config["device"]["backend"]["config"]["auth"] == entry["auth"]
        for path in (*node.root.glob("config/*/*/config.json"), node.root / "metadata.db"):
            assert path.stat().st_mode & 0o077 == 0
        assert entry["auth"] not in node.snapshotter.log_file.read_text()


def test_the_mount_helper_is_used(vectors: Path, tmp_path: Path) -> None:
    """As for virtual machines: containerd runs nydus-overlayfs, which drops what is not the kernel's."""
    helper = Path(sys.executable).with_name("nydus-overlayfs")
    config = tmp_path / "config.toml"
    config.write_text(
        f"version = 1\n[snapshot]\nenable_nydus_overlayfs = true\nnydus_overlayfs_path = '{helper}'\n"
    )
    with Node("dedicated", "--config", str(config)) as node:
        reference = node.push(vectors / "oci" / "run" / "v6-zstd.tar", "1")
        assert node.run(reference) == (0, SAYS)
        assert node.run(node.push(vectors / "oci" / "run" / "source.tar", "2")) == (0, SAYS)


@pytest.mark.parametrize("mode", ["dedicated", "shared"])
def test_kills_at_any_moment_leave_nothing_behind(vectors: Path, mode: str) -> None:
    """The snapshotter is killed again and again while images are pulled, run and removed."""
    dice = random.Random(3)
    with Node(mode) as node:
        run = vectors / "oci" / "run"
        references = [
            node.push(run / f"{kind}.tar", kind) for kind in ("source", "v6-zstd", "v6-lz4", "oci-ref")
        ]
        done = threading.Event()
        right: list[str] = []
        wrong: list[str] = []

        def work(reference: str) -> None:
            while not done.is_set():
                pod = None
                try:
                    node.cri.pull(reference)
                    pod = node.cri.pod()
                    container = pod.run(reference)
                    code, output = container.wait(), container.output()
                    (right if (code, output) == (0, SAYS) else wrong).append(f"{reference}: {code} {output}")
                    pod.remove()
                    node.cri.remove_image(reference)
                except CriError:
                    time.sleep(0.1)  # the snapshotter is away
                    if pod is not None and pod in node.cri.pods:
                        with suppress(CriError):
                            pod.remove()

        threads = [threading.Thread(target=work, args=(reference,)) for reference in references]
        for thread in threads:
            thread.start()
        for _ in range(8):
            time.sleep(dice.uniform(0.1, 1.2))
            node.kill_snapshotter()
            node.snapshotter.start()
        time.sleep(4)
        done.set()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert right, "something did run"
        node.wait_for_containerd()
        for pod in list(node.cri.pods):
            pod.remove()
        node.remove_images()
        node.containerd.collect_garbage()
        wait_for(lambda: node.files() == set() and node.image_mounts() == [] and not node.daemon_sockets())
        assert list((node.root / "snapshots").iterdir()) == []


def test_a_daemon_that_was_forgotten_is_ended(vectors: Path) -> None:
    """Killed between forgetting an image and ending its daemon."""
    with Node() as node:
        pod, _ = node.start(node.push(vectors / "oci" / "run" / "v6-zstd.tar", "1"))
        pod.remove()
        node.kill_snapshotter()
        with sqlite3.connect(node.root / "metadata.db") as database:
            database.execute("DELETE FROM uses")
            database.execute("DELETE FROM instances")
        database.close()
        assert node.daemon_sockets()
        node.start_snapshotter()
        wait_for(lambda: not node.daemon_sockets() and not node.image_mounts())
        assert not list((node.root / "mnt").iterdir())


def test_a_second_snapshotter_is_refused(vectors: Path) -> None:
    with Node() as node:
        command = [sys.executable, "-m", "nydus.cli.containerd_nydus_grpc", "--root", str(node.root)]
        done = subprocess.run(
            [*command, "--address", str(node.directory / "other.sock")],
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert f"pid {node.snapshotter.process.pid}" in done.stderr
        done = subprocess.run(
            [*command[:-1], str(node.directory / "o"), "--address", str(node.snapshotter.address)],
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.returncode == 1
        assert "another snapshotter serves there" in done.stderr
        assert node.run(node.push(vectors / "oci" / "run" / "v6-zstd.tar", "1")) == (0, SAYS)


def test_cleanup_on_close(vectors: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("version = 1\ncleanup_on_close = true\n")
    with Node("dedicated", "--config", str(config)) as node:
        reference = node.push(vectors / "oci" / "run" / "v6-zstd.tar", "1")
        assert node.run(reference) == (0, SAYS)
        assert node.image_mounts()
        node.snapshotter.stop()
        assert not node.image_mounts()
        assert not node.daemon_sockets()
        node.start_snapshotter()
        assert node.run(reference) == (0, SAYS)


def wait_for(condition: object, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)
