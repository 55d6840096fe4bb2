"""Images in containerd's own content store, as source and target of nydusify."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import containerd_node
import pytest
from containerd_node import Node

pytestmark = [
    pytest.mark.containerd,
    pytest.mark.vectors,
    pytest.mark.skipif(bool(containerd_node.missing()), reason=f"not installed: {containerd_node.missing()}"),
]
SAYS = "hello from a lazy image\napp/data.bin: OK\n"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        yield made


def nydusify(node: Node, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("nydusify"), *arguments],
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "CONTAINERD_ADDRESS": str(node.containerd.address),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_from_and_to_the_store(node: Node, vectors: Path, tmp_path: Path) -> None:
    archive = vectors / "oci/run/source.tar"
    stored = "containerd://k8s.io/example.com/app:v1"
    done = nydusify(node, tmp_path, "copy", "--source", f"file://{archive}", "--target", stored)
    assert done.returncode == 0, done.stderr
    assert "example.com/app:v1" in node.containerd.ctr("images", "ls", "-q").stdout
    node.containerd.collect_garbage()
    checked = node.containerd.ctr("images", "check", "name==example.com/app:v1").stdout
    assert "complete" in checked and "incomplete" not in checked

    target = f"{node.host}/run:from-store"
    done = nydusify(node, tmp_path, "convert", "--source", stored, "--target", target, "--plain-http")
    assert done.returncode == 0, done.stderr
    done = nydusify(node, tmp_path, "check", "--source", stored, "--target", target, "--plain-http")
    assert done.returncode == 0, done.stderr
    assert node.run(target) == (0, SAYS)
    node.remove_images()

    # An ordinary image that was stored runs like one that was pulled.
    done = nydusify(node, tmp_path, "copy", "--source", f"file://{archive}", "--target", stored)
    assert done.returncode == 0, done.stderr
    ran = node.containerd.ctr(
        *("run", "--rm", "--snapshotter", "native", "example.com/app:v1", "stored", "/bin/cat", "/app/hello")
    )
    assert ran.stdout == "hello from a lazy image\n"
    node.remove_images()


def test_what_is_not_there(node: Node, tmp_path: Path) -> None:
    def said(source: str) -> str:
        done = nydusify(
            node, tmp_path, "copy", "--source", source, "--target", f"{node.host}/x:y", "--plain-http"
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert "there is no image docker.io/library/nothing:latest" in said("containerd://default/nothing")
    assert "expected containerd://NAMESPACE/REFERENCE" in said("containerd://nothing")
    node_less = nydusify(node, tmp_path, "info", "containerd://default/a")
    assert node_less.returncode == 1 and "there is no image" in node_less.stderr
