"""Timing and weighing processes."""

from __future__ import annotations

import ctypes
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
    """What a command took: wall and CPU seconds, MB at its largest process's peak and written to files,
    and its standard output."""

    wall: float
    cpu: float
    peak: float
    written: float
    output: str


def timed(command: Sequence[str | Path]) -> Cost:
    """Run a command, and what it leaves running, to the end; CPU and memory include its descendants."""
    adopt_orphans()
    before = set(children(os.getpid()))
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        usages = [usage, *(os.wait4(orphan, 0)[2] for orphan in set(children(os.getpid())) - before)]
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        said, complaints = output.read(), errors.read()
    if process.returncode:
        last = complaints.decode(errors="replace").strip()[-500:]
        raise NydusError(f"{' '.join(map(str, command))} failed with {process.returncode}: {last}")
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    peak = max(usage.ru_maxrss for usage in usages) / 1024
    written = sum(usage.ru_oublock for usage in usages) * 512 / 1e6
    return Cost(wall, cpu, peak, written, said.decode(errors="replace"))


def adopt_orphans() -> None:
    """Become the parent of descendants whose parents end, so that they can be waited for."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for process in found:
        found += children(process)
    return found


def memory(pid: int) -> float:
    """MB of memory that a process and its descendants hold, shared pages counted once (PSS)."""
    total = 0
    for process in family(pid):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024
