"""What is left of a command that is told to end: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

_BIN = Path(sys.executable).parent
_ENDS = (signal.SIGTERM, signal.SIGHUP)


def _await(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _start(*arguments: str | Path, **more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [_BIN / arguments[0], *arguments[1:]],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **more,
    )


def _create(tmp_path: Path, **more: object) -> tuple[subprocess.Popen[str], int, Path]:
    """A build that waits for more of its source, the writing end of that, and where its output goes."""
    source, out = tmp_path / "source", tmp_path / "out"
    os.mkfifo(source)
    out.mkdir()
    process = _start("nydus-image", "create", "-t", "tar-rafs", "-D", out, source, **more)
    writer = os.open(source, os.O_WRONLY)
    _await(lambda: list(out.iterdir()))
    return process, writer, out


@pytest.mark.parametrize("number", (*_ENDS, signal.SIGINT), ids=lambda number: number.name)
def test_no_half_written_file_is_left(tmp_path: Path, number: signal.Signals) -> None:
    process, writer, out = _create(tmp_path)
    # As ``timeout`` does: to the program, and to its group.
    process.send_signal(number)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=15)
    os.close(writer)
    assert process.returncode == 128 + number
    said = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert stderr == f"Error: {said}\n"
    assert list(out.iterdir()) == []


def test_nohup_is_respected(tmp_path: Path) -> None:
    process, writer, out = _create(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    os.write(writer, bytes(10240))
    os.close(writer)
    _, stderr = process.communicate(timeout=15)
    assert process.returncode == 0, stderr
    assert len(list(out.iterdir())) == 1


@pytest.mark.root
@pytest.mark.vectors
@pytest.mark.parametrize("number", (*_ENDS, signal.SIGINT), ids=lambda number: number.name)
def test_no_daemon_is_left(vectors: Path, tmp_path: Path, number: signal.Signals) -> None:
    started, daemon = tmp_path / "started", tmp_path / "daemon"
    daemon.write_text(f"#!/bin/sh\necho $$ > {started}.new && mv {started}.new {started}\nexec sleep 60\n")
    daemon.chmod(0o755)
    process = _start(
        "nydusify", "check", "--target-archive", vectors / "oci/v6-zstd.tar", "--source-archive",
        vectors / "oci/source.tar", "--nydusd", daemon, "--json", cwd=tmp_path, stdout=subprocess.PIPE,
    )  # fmt: skip
    _await(started.exists)
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=15)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    said = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert said in stderr and json.loads(stdout) == {"error": said}
    assert not Path(f"/proc/{started.read_text().strip()}").exists()
    assert not list((tmp_path / "output").glob(".*"))
