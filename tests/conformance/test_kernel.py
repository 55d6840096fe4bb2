"""Bootstraps that we write mount in the kernel and show what the reference's daemon showed."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from conformance import content
from conformance.test_read import bootstrap
from nydus import rafs
from nydus.mount import erofs
from nydus.rafs import device, v6

pytestmark = [pytest.mark.vectors, pytest.mark.root]


@pytest.mark.parametrize(
    "name", ["v5-dir-zstd", "v5-dir-aligned", "merge-v5", "v6-dir-batch", "v6-dir-4k-chunks", "v6-targz-ref"]
)
def test_mount(name: str, vectors: Path, tmp_path: Path) -> None:
    """v5 images too, as EROFS metadata with devices of their own layout."""
    tree = rafs.read(bootstrap(vectors / name), name)
    view = device.as_erofs(tree)
    devices = []
    for index, blob in enumerate(content.open_blobs(tree, vectors / name / "blobs", vectors / "inputs")):
        path = tmp_path / f"device-{index}"
        with path.open("wb") as file:
            for chunk in view.chunks[view.chunks["blob_index"] == index]:
                file.seek(int(chunk["uoffset"]))
                file.write(blob.chunk(int(chunk["index"])))
            file.truncate(-(-view.blobs[index].uncompressed_size // 4096) * 4096)
        devices.append(path)
    (tmp_path / "boot").write_bytes(v6.write(view))
    root = tmp_path / "mnt"
    root.mkdir()
    erofs.mount(tmp_path / "boot", devices, root)
    try:
        found = {path: _describe(path, root) for path in _paths(root)}
        expected = content.expected(vectors / name / "expected.jsonl")
        del expected["/"]
        assert found.keys() == expected.keys()
        for path, row in expected.items():
            row.pop("link_of", None)
            if not stat.S_ISLNK(row["mode"]) and "size" in row and not stat.S_ISREG(row["mode"]):
                row["size"] = 0
            assert found[path] == row
    finally:
        erofs.umount(root)


def _paths(root: Path) -> list[str]:
    prefix = len(os.fspath(root))
    return [
        os.path.join(folder, name)[prefix:]
        for folder, directories, files in os.walk(root)
        for name in directories + files
    ]


def _describe(path: str, root: Path) -> dict[str, object]:
    full = f"{root}{path}"
    found = os.lstat(full)
    row: dict[str, object] = {
        "path": path,
        "mode": found.st_mode,
        "uid": found.st_uid,
        "gid": found.st_gid,
        "mtime": int(found.st_mtime_ns // 1_000_000_000),
    }
    if not stat.S_ISDIR(found.st_mode):
        row["nlink"], row["size"] = found.st_nlink, found.st_size
    if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        row["rdev"] = [os.major(found.st_rdev), os.minor(found.st_rdev)]
    if stat.S_ISLNK(found.st_mode):
        row["target"] = os.readlink(full)
    if stat.S_ISREG(found.st_mode):
        row["sha256"] = hashlib.sha256(Path(full).read_bytes()).hexdigest()
    xattrs = {
        name: os.getxattr(full, name, follow_symlinks=False)
        for name in os.listxattr(full, follow_symlinks=False)
    }
    if xattrs:
        row["xattrs"] = {name: value.hex() for name, value in xattrs.items()}
    return row
