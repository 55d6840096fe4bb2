"""Shells complete the command lines of ``nydusify``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("nydusify")


def complete(*words: str) -> list[str]:
    """What bash would offer for the last word."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "_NYDUSIFY_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["nydusify", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_commands_and_options() -> None:
    assert {"check", "chunkdict", "commit", "convert", "copy", "mount", "optimize"} <= set(complete(""))
    assert complete("conv") == ["convert"]
    assert complete("chunkdict", "") == ["generate"]
    assert "--prefetch-dir" in complete("convert", "--prefetch")
    assert "--target" in complete("convert", "--source", "example.com/app", "--ta")
    assert complete("--log-level", "wa") == ["warn", "warning"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str, tmp_path: Path) -> None:
    done = subprocess.run([PROGRAM, "completion", shell], capture_output=True, text=True)
    assert done.returncode == 0 and f"{shell}_complete" in done.stdout
    if shell == "bash":
        (tmp_path / "script").write_text(done.stdout)
        assert subprocess.run(["bash", "-n", tmp_path / "script"]).returncode == 0
    done = subprocess.run([PROGRAM, "completion", "tcsh"], capture_output=True, text=True)
    assert done.returncode == 1


def test_a_bash_completes(tmp_path: Path) -> None:
    script = (
        f'PATH={PROGRAM.parent}:$PATH; eval "$(nydusify completion bash)"; '
        "COMP_WORDS=(nydusify conv); COMP_CWORD=1; "
        '_nydusify_completion nydusify; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["convert"], done.stderr
