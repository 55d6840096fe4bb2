"""A short, fixed number of executions of every fuzz target; ``scripts/fuzz`` runs for longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.targets import TARGETS

_COUNTS = {"image": 60, "blob": 60, "tar": 150, "zran": 100, "bootstrap-v5": 150, "bootstrap-v6": 150}


@pytest.mark.parametrize("name", TARGETS)
def test_only_our_errors_escape(name: str, tmp_path: Path) -> None:
    """In a process of its own, whose address space is limited."""
    script = Path(__file__).with_name("run.py")
    count = str(_COUNTS.get(name, 300))
    done = subprocess.run(
        [sys.executable, script, name, "--count", count, "--finds", tmp_path / "finds"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
