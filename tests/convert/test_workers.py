"""The processes that convert layers, when one of them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import FaultyHandler, FaultyRegistry, is_blob

from nydus.convert.image import image
from nydus.convert.options import ConvertOptions
from nydus.convert.progress import Silent
from nydus.errors import NydusError
from nydus.oci.place import RegistryPlace
from nydus.oci.reference import parse

pytestmark = pytest.mark.vectors


def place(reference: str) -> RegistryPlace:
    return RegistryPlace(parse(reference), plain_http=True)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def lives(pid: int) -> bool:
    """Whether a process runs; one that nobody reaps does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def held(server: FaultyRegistry, source: str) -> Iterator[threading.Event]:
    """Set once all layers are being fetched, none of which comes."""
    begun, over = threading.Event(), threading.Event()

    def hold(handler: FaultyHandler) -> bool:
        if is_blob(handler) and len(server.paths("GET")) >= 4:
            begun.set()
            over.wait(20)
        return False

    server.intercepts.append(hold)
    yield begun
    over.set()


def check_all_end(killed: list[int]) -> None:
    end = time.monotonic() + 10
    while any(map(lives, killed)):
        assert time.monotonic() < end, "a process was left behind"
        time.sleep(0.01)


@pytest.mark.parametrize("victim", ["worker", "forker"])
def test_a_killed_process_is_an_error_that_says_so(
    server: FaultyRegistry, source: str, held: threading.Event, victim: str
) -> None:
    before = set(children(os.getpid()))
    killed: list[int] = []

    def kill() -> None:
        held.wait(20)
        (forker,) = set(children(os.getpid())) - before
        killed.extend([forker, *children(forker)])
        os.kill(killed[1 if victim == "worker" else 0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(NydusError, match="process was ended by SIGKILL; was there too little memory"):
        image(place(source), place(f"{server.host}/small:n"), ConvertOptions(workers=2), Silent())
    killer.join()
    assert len(killed) == 3
    assert set(children(os.getpid())) == before
    check_all_end(killed)
    assert not any(path.startswith("/v2/small/manifests") for path in server.paths("PUT"))


@pytest.mark.parametrize("victim", ["worker", "forker"])
def test_so_is_one_that_the_command_forked(
    server: FaultyRegistry, source: str, held: threading.Event, tmp_path: Path, victim: str
) -> None:
    nydusify = Path(sys.executable).with_name("nydusify")
    command = [nydusify, "convert", "--source", source, "--target", f"{server.host}/small:n", "--plain-http"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert held.wait(20)
        (forker,) = children(process.pid)
        killed = [forker, *children(forker)]
        os.kill(killed[1 if victim == "worker" else 0], signal.SIGKILL)
        assert process.stderr
        lines = process.stderr.read().splitlines()
    assert process.returncode == 1
    assert "process was ended by SIGKILL; was there too little memory" in lines[-1]
    assert "Traceback" not in "".join(lines)
    check_all_end(killed)
    assert not any(path.startswith("/v2/small/manifests") for path in server.paths("PUT"))


def test_a_signal_in_between_does_not_end_the_fork_as_the_command() -> None:
    """What the command would do then, as removing its files, is not for the other process to do."""
    code = """
import os, signal, time
from nydus.convert.workers import Workers

def fork(real=os.fork, forks=[]):
    pid = real()
    if not pid and not forks:
        os.kill(os.getpid(), signal.SIGHUP)
    forks.append(pid)
    return pid

def end(*_):
    raise KeyboardInterrupt

os.fork, command = fork, os.getpid()
signal.signal(signal.SIGHUP, end)
try:
    with Workers(1, fork=True):
        time.sleep(0.5)
finally:
    print("command" if os.getpid() == command else "fork")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "command\n" and not done.stderr
