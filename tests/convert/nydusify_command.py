from __future__ import annotations

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
