"""Images for tests of whole programs."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Image:
    """An image made here, and the folder it was made from."""

    source: Path
    bootstrap: Path
    blobs: Path

    @property
    def files(self) -> list[Path]:
        return sorted(p.relative_to(self.source) for p in self.source.rglob("*") if p.is_file())

    @property
    def blob(self) -> Path:
        return next(self.blobs.iterdir())


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """About 40 MB in 200 files, half of it compressible."""
    folder = tmp_path_factory.mktemp("image")
    source, blobs, bootstrap = folder / "source", folder / "blobs", folder / "bootstrap"
    blobs.mkdir()
    dice = random.Random(7)
    for number in range(200):
        path = source / f"d{number % 10}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = dice.choice([100, 5_000, 40_000, 400_000])
        path.write_bytes(dice.randbytes(size // 2) + dice.randbytes(16) * (size // 32))
    (source / "huge").write_bytes(dice.randbytes(10 << 20) + b"abc" * (4 << 20))
    program = "from nydus.cli.nydus_image import main; main()"
    command = [sys.executable, "-c", program, "create", str(source)]
    command += ["--bootstrap", str(bootstrap), "--blob-dir", str(blobs)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return Image(source, bootstrap, blobs)
