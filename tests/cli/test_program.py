"""How programs begin and end, whatever they do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.executable).parent


def run(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", f"{FOLDER}/{command}"], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("program", ["nydusify", "nydus-image", "nydus"])
def test_closed_streams_are_nothing_special(program: str) -> None:
    done = run(f"{program} --version 2>&- <&-")
    assert done.returncode == 0
    assert "0.1.0" in done.stdout
    assert run(f"{program} --version >&- 2>&-").returncode == 0


def test_a_status_stays_whatever_is_closed(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for command, status in (
        (f"nydusify info file://{missing}", 1),
        (f"nydus-image check --bootstrap {missing}", 1),
        ("nydus-image no-such-command", 2),
    ):
        assert run(command).returncode == status
        assert run(f"{command} 2>&-").returncode == status
        assert run(f"{command} >&- 2>&- <&-").returncode == status


def test_output_that_cannot_be_written_is_an_error() -> None:
    assert run("nydus-image --version >/dev/full").returncode != 0


def test_what_is_to_be_done_at_the_end_is_done() -> None:
    code = """
import atexit, sys, threading, time, click
from nydus.cli.lazy import run
def late():
    time.sleep(0.2)
    print("thread")
@click.command()
def command():
    atexit.register(print, "exit")
    threading.Thread(target=late).start()
    sys.exit(7)
run(command, "it")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (7, ["thread", "exit"])
