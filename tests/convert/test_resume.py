"""What was interrupted goes on where it was: layers that are done are not converted again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from documents import load
from faulty import FaultyHandler, FaultyRegistry, is_blob
from nydusify_command import Nydusify

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from objectstore_server import ObjectStoreServer

from nydus.oci import model
from nydus.oci.place import RegistryPlace
from nydus.oci.reference import parse

pytestmark = pytest.mark.vectors

COMMANDS = {
    "plain": ["--target", "{new}"],
    "oci-ref": ["--target", "{new}", "--oci-ref"],
    "merged": ["--target", "{new}", "--merge-platform"],
    "backend": ["--target", "{new}", "--backend-type", "localfs", "--backend-config", '{{"dir": "blobs"}}'],
    "bucket": ["--target", "{new}", "--backend-type", "s3", "--backend-config", "{bucket}"],
    "dictionary": ["--target", "{new}", "--chunk-dict", "bootstrap:registry:{nydus}"],
    "archive": ["--target-archive", "x.tar"],
    "archive-ref": ["--target-archive", "x.tar", "--oci-ref"],
    "layout": ["--target-archive", "layout/"],
    "reverse": ["--target", "{new}", "--reverse"],
    "reverse-ref": ["--target", "{new}", "--reverse"],
    "reverse-archive": ["--target-archive", "x.tar", "--reverse"],
}


class Gate:
    """Lets the layer that is fetched first through; the others wait until it is opened."""

    def __init__(self, layers: list[str]) -> None:
        self._layers, self._open, self._lock = layers, threading.Event(), threading.Lock()
        self.first = ""

    def __call__(self, handler: FaultyHandler) -> bool:
        digest = handler.path.rpartition("/")[2]
        if digest not in self._layers or not is_whole(handler):
            return False
        with self._lock:
            self.first = self.first or digest
        if digest != self.first:
            self._open.wait(60)
        return False

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def bucket() -> Iterator[ObjectStoreServer]:
    with closing(ObjectStoreServer()) as server:
        yield server


def is_whole(handler: FaultyHandler) -> bool:
    return is_blob(handler) and "Range" not in handler.headers


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


class Interrupted:
    """A command that is ended by a signal after its first layer.

    Attributes:
        layers: digests of what it reads -> of the layers that it converts.
        done: of the layer that it had done.
    """

    def __init__(
        self,
        server: FaultyRegistry,
        command: list[str],
        source: str,
        home: Path,
        number: signal.Signals,
        *,
        group: bool = False,
    ) -> None:
        found = load(RegistryPlace(parse(source), plain_http=True).open(), source.rpartition(":")[2])
        self.layers = {
            layer.get("annotations", {}).get(model.NYDUS_REF, layer["digest"]): layer["digest"]
            for layer in found["layers"]
            if model.NYDUS_BOOTSTRAP not in layer.get("annotations", {})
        }
        gate = Gate(list(self.layers))
        server.intercepts.append(gate)
        record = home / ".cache/pynydus/layers"
        before = set(record.rglob("*"))

        def noted() -> bool:
            return any(path.is_file() and path.name[0] != "." for path in set(record.rglob("*")) - before)

        process = subprocess.Popen(
            command, cwd=home / "cwd", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={"PATH": "/usr/bin:/bin", "HOME": str(home)}, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(noted)
            (os.killpg if group else os.kill)(process.pid, number)
            _, self.stderr = process.communicate(timeout=30)
        finally:
            process.kill()
        self.status, self.done = process.returncode, gate.first
        if number == signal.SIGKILL:  # before the registry answers
            wait_for(lambda: not lives(process.pid))
        gate.open()
        assert not lives(process.pid)
        server.intercepts.remove(gate)
        server.seen.clear()


def lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def fetched(server: FaultyRegistry, layers: dict[str, str]) -> set[str]:
    """Which of the layers were downloaded whole."""
    found = (
        path.rpartition("/")[2] for verb, path, head in server.seen if verb == "GET" and "Range" not in head
    )
    return {digest for digest in found if digest in layers}


@pytest.mark.parametrize("how", COMMANDS)
def test_a_conversion_goes_on(
    server: FaultyRegistry,
    source: str,
    nydusify: Nydusify,
    tmp_path: Path,
    bucket: ObjectStoreServer,
    how: str,
) -> None:
    folder = tmp_path / "cwd"
    nydus, new = f"{source}-nydus", f"{server.host}/other:new"
    names = {"nydus": nydus, "new": new, "bucket": json.dumps(bucket.config())}
    options = [word.format(**names) for word in COMMANDS[how]]
    made_of = source
    if how.startswith("reverse") or how == "dictionary":
        ref = ["--oci-ref"] if how == "reverse-ref" else []
        done = nydusify("convert", "--source", source, "--target", nydus, "--plain-http", *ref)
        assert done.returncode == 0, done.stderr
        if how != "dictionary":
            made_of = nydus
    arguments = ["convert", "--source", made_of, "--plain-http", "--json", *options]
    command = [str(Path(sys.executable).with_name("nydusify")), *arguments]
    stopped = Interrupted(server, command, made_of, tmp_path, signal.SIGINT)
    assert stopped.status == 130, stopped.stderr
    assert "interrupted" in stopped.stderr.splitlines()[-1]
    archive = "archive" in " ".join(options)
    kept = [path for path in folder.iterdir() if path.name != "blobs"]
    assert len(kept) == archive

    again = nydusify(*arguments)
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)
    assert [layer["source"] for layer in told["layers"] if layer["reused"]] == [stopped.layers[stopped.done]]
    if how != "archive-ref":  # for which all layers are copied, once they have their indexes
        assert fetched(server, stopped.layers) == set(stopped.layers) - {stopped.done}
    left = {path.name for path in folder.iterdir() if path.name != "tmp" or any(path.iterdir())}
    assert left == ({"blobs"} if how == "backend" else {options[1].strip("/")} if archive else set())
    where = ["--target-archive", options[1].strip("/")] if archive else ["--target", new]
    if how in ("backend", "bucket"):
        where += ["--target-backend-type", options[-3], "--target-backend-config", options[-1]]
    if how.startswith("reverse"):
        where = [*where[:-2], *("--source-archive" if archive else "--source", where[-1]), "--target", nydus]
    checked = nydusify("check", *where, "--no-mount", "--plain-http")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("how", ["plain", "backend", "reverse", "archive"])
@pytest.mark.parametrize("group", [False, True])
def test_a_command_that_is_killed(
    server: FaultyRegistry, source: str, nydusify: Nydusify, tmp_path: Path, how: str, group: bool
) -> None:
    """No process stays, though the registry hangs; there is no image, and the next run goes on.

    Args:
        group: all of its processes are killed at the same time.
    """
    nydus, new = f"{source}-nydus", f"{server.host}/other:new"
    options = [word.format(nydus=nydus, new=new) for word in COMMANDS[how]]
    if how == "reverse":
        assert nydusify("convert", "--source", source, "--target", nydus, "--plain-http").returncode == 0
        shutil.rmtree(tmp_path / ".cache/pynydus/layers")
    made_of = nydus if how == "reverse" else source
    arguments = ["convert", "--source", made_of, "--plain-http", "--json", *options]
    command = [str(Path(sys.executable).with_name("nydusify")), *arguments]
    server.seen.clear()
    stopped = Interrupted(server, command, made_of, tmp_path, signal.SIGKILL, group=group)
    assert stopped.status == -signal.SIGKILL
    assert not (tmp_path / "cwd/x.tar").exists()
    if how != "archive":
        assert not RegistryPlace(parse(new), plain_http=True).repository().has_manifest("new")
    again = nydusify(*arguments)
    assert again.returncode == 0, again.stderr
    reused = [layer["source"] for layer in json.loads(again.stdout)["layers"] if layer["reused"]]
    assert reused == [stopped.layers[stopped.done]]
    assert fetched(server, stopped.layers) == set(stopped.layers) - {stopped.done}
    left = {path.name for path in (tmp_path / "cwd").iterdir() if path.name != "tmp" or any(path.iterdir())}
    assert left == {"backend": {"blobs"}, "archive": {"x.tar"}}.get(how, set())
    assert (group and how == "backend") or not list((tmp_path / "cwd").rglob(".*"))
