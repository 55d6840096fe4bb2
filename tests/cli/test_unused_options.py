"""An option that changes nothing says so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

_BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    ("arguments", "warnings"),
    [
        (
            ["--external-blob", "x"],
            ["--external-blob has no effect without --blob-inline-meta and type dir-rafs"],
        ),
        (["-C", "/nonexistent"], ["--config has no effect: no existing blob is read"]),
        (["--blob-offset", "1"], ["--blob-offset has no effect"]),
        (["--blob-data-size", "1"], ["--blob-data-size has no effect for type dir-rafs"]),
        ([], []),
    ],
)
def test_of_create(tmp_path: Path, arguments: list[str], warnings: list[str]) -> None:
    (tmp_path / "source").mkdir()
    command = [
        _BIN / "nydus-image",
        "create",
        "-t",
        "dir-rafs",
        "-D",
        tmp_path,
        *arguments,
        tmp_path / "source",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert re.findall(r"WARN \[.*?\] (.*)", done.stderr) == warnings
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "warnings"),
    [
        (["--reverse", "--oci-ref"], ["--oci-ref has no effect with --reverse"]),
        (["--all-platforms", "--platform", "linux/amd64"], ["--platform has no effect with --all-platforms"]),
        (["--build-cache-version", "v2"], ["--build-cache-version has no effect without a build cache"]),
        (["--backend-force-push"], ["--backend-force-push has no effect without --backend-type"]),
        (["--chunk-dict-insecure"], ["--chunk-dict-insecure has no effect without --chunk-dict"]),
        (
            ["--target-archive", "x", "--target-insecure"],
            ["--target-insecure has no effect on a target that is not in a registry"],
        ),
        ([], []),
    ],
)
def test_of_convert(tmp_path: Path, arguments: list[str], warnings: list[str]) -> None:
    command = [_BIN / "nydusify", "convert", "--source", "x:1", "--source-archive", "none", "--target", "x:2"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert re.findall(r'level=warning msg="(.*?)"', done.stderr) == warnings
