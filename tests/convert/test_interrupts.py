"""Ctrl-C ends every command soon, even if the registry hangs, and leaves nothing broken."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty import FaultyHandler, FaultyRegistry, is_blob
from nydusify_command import Nydusify

pytestmark = pytest.mark.vectors

#: Well below the time limits of a request, let alone of its attempts.
SOON = 8.0


class Hang:
    """Never answers the requests that ``wanted`` picks."""

    def __init__(self, wanted: Callable[[FaultyHandler], bool]) -> None:
        self._wanted, self._over = wanted, threading.Event()
        self.reached = threading.Event()

    def __call__(self, handler: FaultyHandler) -> bool:
        if not self._wanted(handler):
            return False
        self.reached.set()
        self._over.wait(60)
        handler.close_connection = True
        return True

    def end(self) -> None:
        self._over.set()


def is_upload(handler: FaultyHandler) -> bool:
    return handler.command in ("POST", "PATCH", "PUT") and "/blobs/" in handler.path


def is_body(handler: FaultyHandler) -> bool:
    """The upload itself: what is sent waits in the sockets' buffers."""
    return handler.command in ("PATCH", "PUT") and "/blobs/" in handler.path


PLACES: dict[str, Callable[[FaultyHandler], bool]] = {
    "first": lambda handler: True,
    "blob": is_blob,
    "upload": is_upload,
    "body": is_body,
    "range": lambda handler: is_blob(handler) and "Range" in handler.headers,
}
COMMANDS = {
    "convert": (
        ["convert", "--source", "{source}", "--target", "{new}"],
        ("first", "blob", "upload", "body"),
    ),
    "archive": (["convert", "--source", "{source}", "--target", "x", "--target-archive", "x.tar"], ("blob",)),
    "again": (["convert", "--source", "{source}", "--target", "{nydus}"], ("first",)),
    "reverse": (
        ["convert", "--reverse", "--source", "{nydus}", "--target", "{new}"],
        ("first", "blob", "upload"),
    ),
    "copy": (["copy", "--source", "{nydus}", "--target", "{new}"], ("first", "upload")),
    "push": (["copy", "--source", "file://{archive}", "--target", "{new}"], ("first", "upload", "body")),
    "check": (["check", "--target", "{nydus}", "--no-mount", "--source", "{source}"], ("first", "blob")),
    "optimize": (
        ["optimize", "--source", "{nydus}", "--target", "{new}", "--prefetch-files", "{files}"],
        ("first", "blob", "upload"),
    ),
    "info": (["info", "{nydus}"], ("first", "blob")),
}


@pytest.fixture
def hang(server: FaultyRegistry) -> Iterator[Callable[[str], Hang]]:
    made = []

    def begin(place: str) -> Hang:
        made.append(Hang(PLACES[place]))
        server.intercepts.append(made[-1])
        return made[-1]

    yield begin
    for each in made:
        each.end()


@pytest.mark.parametrize(
    ("command", "place", "number"),
    [
        (name, place, number)
        for name, (_, places) in COMMANDS.items()
        for place in places
        for number in (signal.SIGINT, *([signal.SIGTERM] if name in ("convert", "copy") else []))
    ],
)
def test_a_registry_that_hangs(
    server: FaultyRegistry,
    source: str,
    nydusify: Nydusify,
    hang: Callable[[str], Hang],
    command: str,
    place: str,
    number: signal.Signals,
    tmp_path: Path,
    vectors: Path,
) -> None:
    names = {
        "source": source,
        "nydus": f"{source}-nydus",
        "new": f"{server.host}/other:new",
        "files": str(tmp_path / "files"),
        "archive": str(vectors / "oci/v6-zstd.tar"),
    }
    if command not in ("convert", "archive", "push"):
        done = nydusify("convert", "--source", source, "--target", names["nydus"], "--plain-http")
        assert done.returncode == 0, done.stderr
    (tmp_path / "files").write_text("/\n")
    stuck = hang(place)
    folder = tmp_path / "cwd"
    process = subprocess.Popen(
        [Path(sys.executable).with_name("nydusify"), *(word.format(**names) for word in COMMANDS[command][0]),
         "--plain-http"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, start_new_session=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert stuck.reached.wait(30)
    time.sleep(0.3)
    os.killpg(process.pid, number)
    begun = time.monotonic()
    stdout, stderr = process.communicate(timeout=SOON)
    assert time.monotonic() - begun < SOON
    assert process.returncode == 128 + number
    assert stdout == "" and "Traceback" not in stderr
    words = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    lines = [line for line in stderr.splitlines() if "level=info" not in line]
    assert len(lines) == 1 and "level=fatal" in lines[0] and words in lines[0], stderr
    left = {path.name for path in folder.iterdir()} - {"output"}
    assert not left, left
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.root
def test_a_registry_that_hangs_while_files_are_compared(
    server: FaultyRegistry, source: str, nydusify: Nydusify, hang: Callable[[str], Hang], tmp_path: Path
) -> None:
    """The read of a file that waits for the daemon ends with the daemon."""
    nydus = f"{source}-nydus"
    assert nydusify("convert", "--source", source, "--target", nydus, "--plain-http").returncode == 0
    stuck = hang("range")
    process = subprocess.Popen(
        [Path(sys.executable).with_name("nydusify"), "check", "--plain-http", "--target", nydus,
         "--source", source],
        stderr=subprocess.PIPE, text=True, cwd=tmp_path / "cwd", start_new_session=True,
    )  # fmt: skip
    assert stuck.reached.wait(30)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=SOON)
    assert process.returncode == 130 and "interrupted" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_a_storage_backend_that_hangs(
    server: FaultyRegistry, source: str, nydusify: Nydusify, tmp_path: Path
) -> None:
    """The client library of object stores hears no signal; the command ends nevertheless."""
    folder = json.dumps({"dir": str(tmp_path / "blobs")})
    where = ("--backend-type", "localfs", "--backend-config", folder)
    stored = f"{source}-stored"
    assert nydusify("convert", "--source", source, "--target", stored, "--plain-http", *where).returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as silent:
        bucket = {
            "bucket_name": "b", "region": "r", "scheme": "http",
            "access_key_id": "a", "access_key_secret": "s",
            "endpoint": f"127.0.0.1:{silent.getsockname()[1]}",
        }  # fmt: skip
        process = subprocess.Popen(
            [Path(sys.executable).with_name("nydusify"), "check", "--plain-http", "--target", stored,
             "--target-backend-type", "s3", "--target-backend-config", json.dumps(bucket)],
            stderr=subprocess.PIPE, text=True, cwd=tmp_path / "cwd", start_new_session=True,
        )  # fmt: skip
        connection, _ = silent.accept()
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=2 * SOON)
        connection.close()
    assert process.returncode == 130 and "interrupted" in stderr.splitlines()[-1]
