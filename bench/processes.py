"""Timing and weighing processes."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nydus.errors import NydusError


@dataclass(frozen=True)
class Cost:
    """What a command took: wall and CPU seconds, its largest process's peak in MB, its standard output."""

    wall: float
    cpu: float
    peak: float
    output: str


def timed(command: Sequence[str | Path]) -> Cost:
    """Run a command to its end; CPU and memory include its children that it waited for."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        said, complaints = output.read(), errors.read()
    if process.returncode:
        last = complaints.decode(errors="replace").strip()[-500:]
        raise NydusError(f"{' '.join(map(str, command))} failed with {process.returncode}: {last}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, said.decode(errors="replace"))


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def memory(pid: int) -> float:
    """MB of memory that a process and its descendants hold, shared pages counted once (PSS)."""
    total = 0
    for process in family(pid):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024
