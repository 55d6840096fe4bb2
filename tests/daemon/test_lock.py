"""The lock of a mountpoint, without any mount."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nydus.daemon import lock
from nydus.daemon.lock import MountLock
from nydus.errors import NydusError


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "locks"
    monkeypatch.setattr(lock, "_DIRECTORIES", (path,))
    return path


def test_one_at_a_time(tmp_path: Path, directory: Path) -> None:
    first, second = MountLock(tmp_path / "a"), MountLock(tmp_path / "a")
    assert first.acquire() is False
    with pytest.raises(NydusError, match=f"process {os.getpid()}"):
        second.acquire()
    second.adopt()
    first.release()
    assert second.acquire() is False
    second.release()
    assert list(directory.iterdir()) == []


def test_files_of_killed_daemons_are_swept(tmp_path: Path, directory: Path) -> None:
    dead, living, mine = (MountLock(tmp_path / name) for name in "abc")
    assert not dead.acquire() and not living.acquire()
    dead._forget()
    assert mine.acquire() is False
    assert len(list(directory.iterdir())) == 2
    mine.release()
    living.release()


@pytest.mark.root
def test_a_foreign_mount_is_refused_and_kept(tmp_path: Path) -> None:
    place = tmp_path / "mnt"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "mine", str(place)], check=True)
    try:
        for _ in range(2):
            with pytest.raises(NydusError, match="tmpfs is mounted here already"):
                MountLock(place).acquire()
    finally:
        subprocess.run(["umount", str(place)], check=True)
