"""``nydusify commit`` of real containers, and running what came of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import containerd_node
import pytest
from containerd_node import Node

from nydus.containerd.containers import Containers
from nydus.containerd.store import containerd_place
from nydus.convert.check import check
from nydus.convert.opened import COMMITTED_BLOBS, Opened, open_nydus
from nydus.convert.select import host_platform
from nydus.oci.place import LayoutPlace, SourcePlace, registry_place
from nydus.oci.reference import parse

pytestmark = [
    pytest.mark.containerd,
    pytest.mark.vectors,
    pytest.mark.skipif(bool(containerd_node.missing()), reason=f"not installed: {containerd_node.missing()}"),
]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        yield made


@pytest.fixture
def image(node: Node, vectors: Path) -> Iterator[str]:
    yield node.push(vectors / "oci/run/v6-zstd.tar", "v6-zstd")
    for pod in list(node.cri.pods):
        pod.remove()
    node.remove_images()


def commit(node: Node, tmp_path: Path, container: str, target: str, *options: str) -> str:
    """Runs the command; returns what it wrote, which must say what went wrong if it did."""
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("nydusify"), "commit", "--container", container),
            *("--target", target, "--plain-http", "--namespace", "k8s.io"),
            *("--containerd-address", node.containerd.address, "--work-dir", tmp_path / "work", *options),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode == 0) != ("level=fatal" in done.stderr), done.stderr
    assert not (tmp_path / "work").exists()
    return done.stderr


def opened(reference: str) -> Opened:
    return open_nydus(registry_place(parse(reference), plain_http=True), host_platform())


def test_a_committed_container_runs_again(node: Node, image: str, tmp_path: Path) -> None:
    _, container = node.start(image)
    script = (
        "echo changed > /app/hello && mkdir /app/more && echo kept > /app/more/file && rm /app/data.sha256"
        " && chmod 600 /app/data.bin && mkdir /cache && echo big > /cache/file"
    )
    assert container.execute("/bin/sh", "-c", script) == (0, b"")
    first = f"{node.host}/committed/app:first"
    said = commit(node, tmp_path, container.id[:10], first, "--with-path", "!/cache")
    assert "held still for" in said and "are in the image already" in said
    assert container.running() and container.execute("/bin/cat", "/app/hello") == (0, b"changed\n")

    show = "cat /app/hello /app/more/file; ls /app/data.sha256 /cache; stat -c %a /app/data.bin"
    assert node.run(first, "/bin/sh", "-c", f"{show}; wc -c < /app/data.bin")[1].splitlines()[:2] == [
        "changed",
        "kept",
    ]
    made = opened(first)
    paths = {path.decode() for _, path in made.tree.walk()}
    assert "/app/more/file" in paths and not paths & {"/app/data.sha256", "/cache", "/cache/file"}
    added = made.found.manifest.layers[-2]
    assert added.size < 50_000, "the file that only got another mode is not stored again"
    assert made.found.manifest.layers[-1].annotations[COMMITTED_BLOBS] == added.digest

    # A container of the committed image is committed in its turn, until there are enough.
    _, second = node.start(first)
    assert second.execute("/bin/sh", "-c", "echo again > /app/hello; cat /app/more/file") == (0, b"kept\n")
    target = f"{node.host}/committed/app:second"
    assert "commits have added 1 layers already" in commit(
        node, tmp_path, second.id, target, "--maximum-times", "1"
    )
    commit(node, tmp_path, second.id, target, "--maximum-times", "2")
    assert node.run(target, "/bin/cat", "/app/hello", "/app/more/file") == (0, "again\nkept\n")
    assert opened(target).found.manifest.layers[-1].annotations[COMMITTED_BLOBS].count("sha256:") == 2


def test_mounts_are_taken_when_asked(node: Node, image: str, tmp_path: Path) -> None:
    node.cri.pull(image)
    volume = tmp_path / "volume"
    (volume / "deep").mkdir(parents=True)
    (volume / "deep/file").write_text("from a volume\n")
    (volume / "link").symlink_to("/etc")
    node.containerd.ctr(
        *("run", "--detach", "--snapshotter", "nydus"),
        *("--mount", f"type=bind,src={volume},dst=/volume,options=rbind:rw", image, "by-hand"),
        *("/bin/sh", "-c", "while :; do sleep 1; done"),
    )
    try:
        without, target = f"{node.host}/run:without", f"{node.host}/run:with"
        commit(node, tmp_path, "by-h", without)
        commit(node, tmp_path, "by-hand", target, "--with-path", "/volume")
        show = ("/bin/sh", "-c", "cat /volume/deep/file; readlink /volume/link")
        assert node.run(target, *show) == (0, "from a volume\n/etc\n")
        assert node.run(without, *show)[0] != 0
        assert len(opened(target).found.manifest.layers) == len(opened(without).found.manifest.layers) + 1
        assert "/volume/link of the container is a symbolic link" in commit(
            node, tmp_path, "by-hand", target, "--with-path", "/volume/link"
        )
        assert "there are: by-hand" in commit(node, tmp_path, "nobody", target)
    finally:
        node.containerd.ctr("task", "kill", "--signal", "KILL", "by-hand")
        time.sleep(0.5)
        node.containerd.ctr("task", "delete", "by-hand", check=False)
        node.containerd.ctr("container", "delete", "by-hand", check=False)


def test_the_container_is_held_still_meanwhile(node: Node, image: str, tmp_path: Path) -> None:
    """Two files that a container writes one after the other are never seen apart."""
    write = "echo $i > /new; mv /new"
    script = f"i=0; while :; do i=$((i+1)); {write} /a; {write} /b; done"
    _, container = node.start(image, "/bin/sh", "-c", script)
    end = time.monotonic() + 20
    while container.execute("/bin/cat", "/b")[0] != 0:
        assert time.monotonic() < end
        time.sleep(0.05)
    seen: set[bool] = set()
    done = threading.Event()

    def watch() -> None:
        with Containers(node.containerd.address, "k8s.io") as containers:
            while not done.wait(0.002):
                seen.add(containers.find(container.id).paused)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for number in range(3):
            target = f"{node.host}/run:still{number}"
            commit(node, tmp_path, container.id, target)
            code, output = node.run(target, "/bin/cat", "/a", "/b")
            a, b = (int(line) for line in output.split())
            assert code == 0 and a - b in (0, 1)
    finally:
        done.set()
        watcher.join()
    assert seen == {False, True}
    assert container.running()


def test_what_cannot_be_committed(node: Node, image: str, vectors: Path, tmp_path: Path) -> None:
    plain = node.push(vectors / "oci/run/source.tar", "source")
    _, container = node.start(plain)
    target = f"{node.host}/run:not"
    assert "is not a Nydus image" in commit(node, tmp_path, container.id, target)
    assert "not an absolute path" in commit(node, tmp_path, container.id, target, "--with-path", "x")
    _, fine = node.start(image)
    failed = commit(node, tmp_path, fine.id, "127.0.0.1:1/no/registry:x")
    assert "127.0.0.1:1" in failed
    assert fine.execute("/bin/cat", "/app/hello")[0] == 0, "it goes on"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_commit_lets_the_container_go_on(
    node: Node, image: str, tmp_path: Path, number: signal.Signals
) -> None:
    _, container = node.start(image)
    fill = "i=0; while [ $i -lt 40 ]; do cat /app/data.bin; i=$((i+1)); done > /big; cat /big /big > /bigger"
    assert container.execute("/bin/sh", "-c", fill) == (0, b"")
    process = subprocess.Popen(
        [
            *(Path(sys.executable).with_name("nydusify"), "commit", "--container", container.id),
            *("--target", f"{node.host}/run:never", "--plain-http", "--namespace", "k8s.io"),
            *("--containerd-address", node.containerd.address, "--work-dir", tmp_path / "work"),
        ],
        stderr=subprocess.PIPE,
    )
    with Containers(node.containerd.address, "k8s.io") as containers:
        while not containers.find(container.id).paused:
            assert process.poll() is None
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 128 + number and b"level=fatal" in said
        assert not containers.find(container.id).paused
    assert container.execute("/bin/cat", "/app/hello")[0] == 0
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("kind", ["containerd", "layout"])
def test_a_commit_into_other_places(node: Node, image: str, tmp_path: Path, kind: str) -> None:
    _, container = node.start(image)
    assert container.execute("/bin/sh", "-c", "echo changed > /app/hello") == (0, b"")
    target = {
        "containerd": "containerd://k8s.io/example.com/app:committed",
        "layout": f"file://{tmp_path}/layout/",
    }[kind]
    commit(node, tmp_path, container.id[:10], target)
    if kind == "layout":
        place: SourcePlace = LayoutPlace(tmp_path / "layout")
    else:
        place = containerd_place(target, node.containerd.address)
    report = check(place, None, None, tmp_path / "check")
    assert report.checks["blobs"] > 1
    assert open_nydus(place).tree.find(b"/app/hello") is not None
