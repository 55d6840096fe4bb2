"""Every reference image, mounted by nydusd, reads as the reference's own mount does."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from nydusd_process import Nydusd, localfs_config

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
pytestmark = [pytest.mark.root, pytest.mark.vectors]


def images(version: int) -> list[Path]:
    if not VECTORS.exists():
        return []
    # Vectors with an inlined bootstrap have to be extracted first.
    return sorted(p.parent for p in VECTORS.glob(f"*v{version}*/bootstrap"))


def describe(path: Path) -> dict[str, Any]:
    """What expected.jsonl says of a name."""
    info = path.lstat()
    found: dict[str, Any] = {
        "mode": info.st_mode,
        "uid": info.st_uid,
        "gid": info.st_gid,
        "mtime": int(info.st_mtime),
    }
    if not stat.S_ISDIR(info.st_mode):
        found["nlink"] = info.st_nlink
    if stat.S_ISREG(info.st_mode):
        data = path.read_bytes()
        found |= {"size": info.st_size, "sha256": hashlib.sha256(data).hexdigest()}
        assert len(data) == info.st_size
    elif stat.S_ISLNK(info.st_mode):
        found["target"] = str(path.readlink())
    elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
        found["rdev"] = [os.major(info.st_rdev), os.minor(info.st_rdev)]
    xattrs = {
        name: os.getxattr(path, name, follow_symlinks=False).hex()
        for name in os.listxattr(path, follow_symlinks=False)
    }
    if xattrs:
        found["xattrs"] = xattrs
    return found


def compare(mountpoint: Path, expected: Path) -> int:
    """Compares a mounted tree with its description; returns the number of names."""
    wanted = {entry["path"]: entry for entry in map(json.loads, expected.read_text().splitlines())}
    inodes = {}
    for path, entry in wanted.items():
        if path == "/":
            continue
        here = mountpoint / path.lstrip("/")
        found = describe(here)
        common = {key: entry[key] for key in found if key in entry}
        assert {key: found[key] for key in common} == common, path
        assert found.get("xattrs", {}) == entry.get("xattrs", {}), path
        inodes[path] = here.lstat().st_ino
        if "link_of" in entry:
            assert inodes[path] == inodes[entry["link_of"]], path
    present = {"/"}
    for parent, directories, files in os.walk(mountpoint):
        relative = "/" + os.path.relpath(parent, mountpoint) if parent != str(mountpoint) else ""
        present |= {f"{relative}/{name}" for name in directories + files}
    assert present == set(wanted)
    return len(wanted)


def collect_blobs(image: Path, folder: Path) -> Path:
    """A folder of all blobs of an image: its own, and the layers that some images refer to."""
    folder.mkdir()
    for blob in (image / "blobs").glob("*"):
        (folder / blob.name).symlink_to(blob)
    for layer in (VECTORS / "inputs").glob("*.tar*"):
        name = hashlib.sha256(layer.read_bytes()).hexdigest()
        if not (folder / name).exists():
            (folder / name).symlink_to(layer)
    return folder


def check(image: Path, folder: Path, *arguments: str) -> str:
    blobs = collect_blobs(image, folder / "blobs")
    config = localfs_config(blobs, folder / "cache", enable_xattr=True)
    with Nydusd.of(folder, image / "bootstrap", config, *arguments) as daemon:
        assert compare(daemon.mountpoint, image / "expected.jsonl") > 1
        instance = daemon.client.info()["backend_collection"]["/"]
        assert daemon.stop() == 0
        assert daemon.mounts() == []
        assert "ERROR" not in daemon.log.read_text()
    return str(instance["provider"])


@pytest.mark.parametrize("image", images(6), ids=lambda image: image.name)
def test_a_v6_image_is_mounted_by_the_kernel(image: Path, tmp_path: Path) -> None:
    assert check(image, tmp_path) == "blobfs"


@pytest.mark.parametrize("image", images(5), ids=lambda image: image.name)
def test_a_v5_image_is_mounted_in_user_space(image: Path, tmp_path: Path) -> None:
    assert check(image, tmp_path) == "fuse"


def test_a_v6_image_can_be_mounted_in_user_space(vectors: Path, tmp_path: Path) -> None:
    assert check(vectors / "v6-dir-zstd", tmp_path, "--provider", "fuse") == "fuse"
