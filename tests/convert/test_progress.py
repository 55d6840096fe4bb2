"""What a person sees while images are converted and checked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from broken import BOOT, Rebuilt
from documents import load
from faulty import FaultyHandler, FaultyRegistry, is_blob
from images import layer_of, place, put_image
from nydusify_command import Nydusify, one_fatal_line
from terminal import OnTerminal

from nydus.oci.place import ArchivePlace

pytestmark = pytest.mark.vectors


@contextmanager
def held(server: FaultyRegistry, digest: str) -> Iterator[None]:
    """Has nobody get a blob meanwhile."""
    free = threading.Event()

    def hold(handler: FaultyHandler) -> bool:
        if is_blob(handler) and handler.path.endswith(digest):
            free.wait(40)
        return False

    server.intercepts.append(hold)
    try:
        yield
    finally:
        free.set()


def layers_of(server: FaultyRegistry, tag: str) -> list[str]:
    found = load(place(f"{server.host}/small:{tag}").open(), tag)
    return [layer["digest"] for layer in found["layers"]]


def test_the_layer_that_all_wait_for_is_on_the_screen(server: FaultyRegistry, tmp_path: Path) -> None:
    source = put_image(server, "many", *(layer_of(f"d{number}/") for number in range(127)))
    last = layers_of(server, "many")[-1]
    with held(server, last):
        command = OnTerminal(
            tmp_path, "convert", "--source", str(source), "--target-suffix", "-n", "--plain-http"
        )
        shown = command.wait_for("126 of 127 layers", f"layer 127 {last[7:15]}")
    assert command.end() == 0, command.text
    assert shown, command.text
    assert "converted 127 layers" in command.text


def test_a_check_on_a_terminal(
    nydusify: Nydusify, server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    done = nydusify("convert", "--source", source, "--target", f"{source}-n", "--plain-http")
    assert done.returncode == 0, done.stderr
    blobs, layers = layers_of(server, "latest-n")[:-1], layers_of(server, "latest")
    with held(server, layers[1]):
        command = OnTerminal(
            tmp_path, "check", "--source", source, "--target", f"{source}-n", "--plain-http", "--no-mount"
        )
        done_until_then = len(blobs) + 1
        shown = command.wait_for(
            f"{done_until_then} of {len(blobs) + len(layers)} layers", f"layer  2 {layers[1][7:15]}"
        )
    assert command.end() == 0, command.text
    assert shown, command.text
    assert "sent" not in command.text and "verified" in command.text


def test_a_check_in_lines(nydusify: Nydusify, server: FaultyRegistry, source: str) -> None:
    arguments = ("--source", source, "--target", f"{source}-n", "--plain-http")
    assert nydusify("convert", *arguments).returncode == 0
    done = nydusify("check", *arguments, "--no-mount")
    assert done.returncode == 0, done.stderr
    count = len(layers_of(server, "latest-n")) - 1 + len(layers_of(server, "latest"))
    for number in range(1, count + 1):
        assert f"read layer {number}/{count}: " in done.stderr


@pytest.mark.parametrize("option", ["--oci-ref", "--merge-platform"])
def test_layers_that_are_copied_are_told(
    nydusify: Nydusify, server: FaultyRegistry, source: str, tmp_path: Path, option: str
) -> None:
    count = len(layers_of(server, "latest"))
    with FaultyRegistry(tmp_path / "other") as other:
        for target, word in ((f"{other.host}/a:n", "copied"), (f"{other.host}/a:m", "found")):
            done = nydusify("convert", "--source", source, "--target", target, "--plain-http", option)
            assert done.returncode == 0, done.stderr
            for number in range(1, count + 1):
                assert f"{word} layer {number}/{count}: " in done.stderr
    done = nydusify("convert", "--source", source, "--target", f"{source}-n", "--plain-http", option)
    assert done.returncode == 0 and "found layer" not in done.stderr


def test_several_blobs_are_checked_at_the_same_time(
    nydusify: Nydusify, server: FaultyRegistry, source: str
) -> None:
    arguments = ("--source", source, "--target", f"{source}-n", "--plain-http")
    assert nydusify("convert", *arguments).returncode == 0
    blobs = set(layers_of(server, "latest-n")[:-1])
    assert len(blobs) >= 2
    together = threading.Barrier(2)

    def meet(handler: FaultyHandler) -> bool:
        if is_blob(handler) and handler.path.rpartition("/")[2] in blobs and not together.broken:
            try:
                together.wait(15)
                passed.set()
            except threading.BrokenBarrierError:
                pass
        return False

    passed = threading.Event()
    server.intercepts.append(meet)
    assert nydusify("check", *arguments[2:], "--no-mount").returncode == 0
    assert passed.is_set()


def test_a_check_that_fails_leaves_what_it_found(nydusify: Nydusify, vectors: Path, tmp_path: Path) -> None:
    rebuilt = Rebuilt(ArchivePlace(vectors / "oci/v6-zstd.tar"), tmp_path / "image")
    blob = rebuilt.layout.root / "blobs/sha256" / rebuilt.manifest["layers"][0]["digest"][7:]
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    message = one_fatal_line(
        nydusify(
            "check", "--target-archive", str(tmp_path / "image"), "--no-mount", "--output-json", "r.json"
        )
    )
    assert "validate blob failed" in message
    report = json.loads((tmp_path / "cwd/r.json").read_text())
    assert report["error"] == message and not report["verified"] and report["checks"]["manifest"]
    found = json.loads((tmp_path / "cwd/output/target/nydus_output.json").read_text())
    assert found["fs_version"] == "6" and found["blobs"]
    assert (tmp_path / "cwd/output/nydus_bootstrap").exists()


def test_so_does_one_of_a_damaged_bootstrap(nydusify: Nydusify, vectors: Path, tmp_path: Path) -> None:
    rebuilt = Rebuilt(ArchivePlace(vectors / "oci/v6-zstd.tar"), tmp_path / "image")
    rebuilt.set_files(rebuilt.files() | {BOOT: bytes(4096)})
    message = one_fatal_line(nydusify("check", "--target-archive", str(tmp_path / "image"), "--no-mount"))
    assert "validate bootstrap failed" in message
    found = json.loads((tmp_path / "cwd/output/target/nydus_output.json").read_text())
    assert set(found) == {"error"} and found["error"]
