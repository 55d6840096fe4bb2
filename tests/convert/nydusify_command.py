from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path


class Nydusify:
    """Runs the command as users do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(
        self, *arguments: str, env: dict[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("nydusify"), *arguments],
            capture_output=True,
            text=True,
            input=stdin,
            cwd=self._folder,
            env={"PATH": "/usr/bin:/bin", "HOME": str(self._folder.parent), **(env or {})},
            timeout=60,
            check=False,
        )


def one_fatal_line(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a failed run, after checking its form."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert "level=fatal" in lines[-1] and "Traceback" not in done.stderr
    assert sum("level=fatal" in line for line in lines) == 1
    found = re.search(r'msg=("(?:[^"\\]|\\.)*"|\S+)', lines[-1])
    assert found
    return str(json.loads(found[1])) if found[1].startswith('"') else found[1]
