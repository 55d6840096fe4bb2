"""A daemon that is killed as a whole, under readers: its successor takes over, and they see nothing of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import containerd_node
import pytest
from containerd_node import Node
from nydusd_process import localfs_config

from conftest import Image
from nydus.daemon.spawn import WarmParent
from nydus.oci.registry import Registry
from nydus.snapshotter import daemons, images
from nydus.snapshotter import labels as label
from nydus.snapshotter.config import load
from nydus.snapshotter.database import Database
from nydus.snapshotter.errors import AlreadyExists
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
    dice = random.Random()
    kills = 0
    while kills < 20:
        root = tmp_path / str(kills)
        root.mkdir()
        config, _ = load(None, {"root": str(root), "daemon_mode": mode})
        template = root / "template.json"
        template.write_text(json.dumps(localfs_config(image.blobs, root / "cache")))
        database = Database(root / "metadata.db")
        store = Store(database, root / "snapshots")
        with WarmParent() as parent:
            made = Images(config, database, store, parent, Template(template, config.cache_dir))
            try:
                snapshotter = Snapshotter(config, store, made)
                with pytest.raises(AlreadyExists):
                    snapshotter.prepare("1", "", {label.TARGET: "data", label.BLOB: "true"})
                snapshotter.prepare("2", "data", {label.BOOTSTRAP: "true"})
                layer = store.directory(store.get("2").id) / "fs" / "image"
                layer.mkdir()
                shutil.copy(image.bootstrap, layer / "image.boot")
                snapshotter.commit("meta", "2", {label.BOOTSTRAP: "true"})
                options = snapshotter.prepare("container", "meta", {})[0].options
                lower = next(option for option in options if option.startswith("lowerdir="))
                mounted = Path(lower.removeprefix("lowerdir="))
                (socket,) = root.glob("socket/*/api.sock")
                command = [sys.executable, "-S", "-c", READER, str(image.source), str(mounted)]
                readers = [
                    subprocess.Popen(
                        [*command, str(seed), *map(str, image.files)], stderr=subprocess.PIPE, text=True
                    )
                    for seed in range(3)
                ]
                end = time.monotonic() + 120
                while any(reader.poll() is None for reader in readers):
                    assert time.monotonic() < end, f"readers hang after {kills} kills"
                    time.sleep(dice.uniform(0.02, 0.25))
                    pid = daemon_pid(socket)
                    if pid is not None:
                        os.kill(pid, signal.SIGKILL)
                        kills += 1
                assert [(reader.communicate()[1], reader.returncode) for reader in readers] == [("", 0)] * 3
                for key in ("container", "meta", "data"):
                    snapshotter.remove(key)
                snapshotter.cleanup()
            finally:
                made.close(unmount=True)
                database.close()
        assert daemons.mounts_below(root) == []
        shutil.rmtree(root)


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
