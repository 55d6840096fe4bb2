"""nydus-overlayfs: its options and the mount it makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nydus.cli.nydus_overlayfs import parse_options, shorten

RDONLY, NOSUID, NODEV, NOEXEC, NOATIME = 1, 2, 4, 8, 0x400


@pytest.mark.parametrize(
    ("text", "flags", "data"),
    [
        ("lowerdir=/a:/b,dev,suid", 0, "lowerdir=/a:/b"),
        ("rw,lowerdir=/a", 0, "lowerdir=/a"),
        ("ro,nodev,nosuid,noexec,noatime", RDONLY | NODEV | NOSUID | NOEXEC | NOATIME, ""),
        ("ro,nodev,rw,dev", 0, ""),
        ("extraoption=aGk=,lowerdir=/a,io.katacontainers.volume=eA==,volatile", 0, "lowerdir=/a,volatile"),
        ("lowerdir=/a\\,b:/c,ro", RDONLY, "lowerdir=/a\\,b:/c"),
        ("defaults,,lowerdir=/a", 0, "lowerdir=/a"),
    ],
)
def test_options(text: str, flags: int, data: str) -> None:
    assert parse_options(text) == (flags, data)


def test_long_options_are_made_relative() -> None:
    data = "workdir=/r/s/9/work,upperdir=/r/s/9/fs,volatile,lowerdir=/r/m/1:/r/s/2/fs"
    assert shorten(data) == ("/r", "workdir=s/9/work,upperdir=s/9/fs,volatile,lowerdir=m/1:s/2/fs")
    assert shorten("lowerdir=/a:/b") == (None, "lowerdir=/a:/b")
    assert shorten("lowerdir=/a:/a/b") == (None, "lowerdir=/a:/a/b")


@pytest.mark.parametrize(
    "arguments", [[], ["overlay"], ["ext4", "/m", "-o", "x"], ["overlay", "/m", "x", "-o"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert "usage:" in done.stderr


@pytest.mark.root
def test_mounts_many_layers(tmp_path: Path) -> None:
    layers = []
    for number in range(100):
        layer = tmp_path / "layers" / f"{number:050}"
        layer.mkdir(parents=True)
        (layer / f"f{number}").write_text(str(number))
        layers.append(str(layer))
    (target := tmp_path / "target").mkdir()
    done = run("overlay", str(target), "-o", f"lowerdir={':'.join(layers)},extraoption=eA==,dev,suid")
    assert done.returncode == 0, done.stderr
    try:
        assert len(list(target.iterdir())) == 100
        line = next(
            line for line in Path("/proc/self/mounts").read_text().splitlines() if str(target) in line
        )
        assert "nosuid" not in line
        assert "nodev" not in line
    finally:
        subprocess.run(["umount", str(target)], check=True)


@pytest.mark.root
def test_a_refused_mount_is_one_line(tmp_path: Path) -> None:
    done = run("overlay", str(tmp_path), "-o", "lowerdir=/nowhere-at-all")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from nydus.cli.nydus_overlayfs import main; main()", *arguments],
        capture_output=True,
        text=True,
    )
