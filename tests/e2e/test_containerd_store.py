"""Images in containerd's own content store, as source and target of nydusify."""

from __future__ import annotations

import json
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


def test_every_command_with_the_store(node: Node, vectors: Path, tmp_path: Path) -> None:
    """Images of containerd are converted, optimized, shared, checked and mounted as those of registries."""

    def run(*arguments: str) -> dict[str, object]:
        done = nydusify(node, tmp_path, *arguments, "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    def complete(name: str) -> None:
        node.containerd.collect_garbage()
        said = node.containerd.ctr("images", "check", f"name=={name}").stdout
        assert "complete" in said and "incomplete" not in said

    archive, store = f"file://{vectors}/oci/run/source.tar", "containerd://k8s.io/example.com"
    made = run("convert", "--source", archive, "--target", f"{store}/app:nydus")
    assert made["target"] == f"{store}/app:nydus"
    complete("example.com/app:nydus")
    assert run("check", "--source", archive, "--target", f"{store}/app:nydus")["verified"] is True
    (tmp_path / "files").write_text("/app/hello\n")
    options = ("--prefetch-files", "files", "--target", f"{store}/app:fast")
    fast = run("optimize", "--source", f"{store}/app:nydus", *options)
    complete("example.com/app:fast")
    run("check", "--source", archive, "--target", f"{store}/app:fast")
    sources = f"{store}/app:nydus,{store}/app:fast"
    run("chunkdict", "generate", "--sources", sources, "--target", f"{store}/dict:v1", "--work-dir", "made")
    complete("example.com/dict:v1")
    run("convert", "--oci-ref", "--source", archive, "--target", f"{store}/app:ref")
    complete("example.com/app:ref")
    run("check", "--source", archive, "--target", f"{store}/app:ref")
    plain = run("convert", "--reverse", "--source", f"{store}/app:fast", "--target-archive", "back.tar.gz")
    assert plain["target"] == "back.tar.gz"

    command = [Path(sys.executable).with_name("nydusify"), "mount", "--target", f"{store}/app:fast", "--json"]
    variables = {"PATH": "/usr/bin:/bin", "CONTAINERD_ADDR": str(node.containerd.address)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            found = json.loads(process.stdout.readline() or '{"mountpoint": "/none"}')
            assert (Path(found["mountpoint"]) / "app/hello").read_text() == "hello from a lazy image\n"
        finally:
            process.terminate()
            said = process.communicate(timeout=60)[1]
        assert process.returncode == 0, said
    left = {path.name for path in tmp_path.iterdir()}
    assert left - {".cache"} == {"back.tar.gz", "files", "made", "output"}
    node.remove_images()
    assert fast["files"] == 1


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
