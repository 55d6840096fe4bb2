"""Exported disk images: mounted through a loop device, and verified by the kernel's own tool."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nydus
from api.test_image import blobs_of, open_vector
from api.test_image import describe as image_rows
from build.test_archive import FILES, random_image, run
from conformance.content import expected
from nydus.build import verity
from nydus.build.bootstrap import read_bytes
from nydus.build.compact import CompactOptions, compact
from nydus.build.disk import write_disk
from nydus.build.optimize import PrefetchFile, optimize
from nydus.build.verity import Verity
from nydus.mount import erofs

IMAGES = [
    "v5-dir-zstd", "v5-dir-none", "v5-inline-meta", "v6-dir-zstd", "v6-dir-4k-chunks", "v6-dir-batch",
    "v6-dir-encrypted", "v6-inline-meta", "v6-targz-ref", "v6-tarfs", "dict-v6", "merge-v6",
]  # fmt: skip


@contextmanager
def loop_mounted(disk: Path, mountpoint: Path) -> Iterator[None]:
    # The device is given back by the kernel when it is unmounted.
    mountpoint.mkdir()
    subprocess.run(["mount", "-t", "erofs", "-o", "loop,ro", disk, mountpoint], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", mountpoint], check=True)
    for _ in range(50):  # which takes a moment where somebody else looks at devices
        if str(disk) not in subprocess.run(["losetup", "-a"], capture_output=True, text=True).stdout:
            return
        time.sleep(0.1)
    raise AssertionError("a loop device was left")


def describe(root: Path) -> dict[str, dict[str, Any]]:
    """The rows of ``expected.jsonl`` as the kernel shows them."""
    found: dict[str, dict[str, Any]] = {}
    inodes: dict[int, str] = {}
    for directory, directories, files in os.walk(os.fsencode(root)):
        for name in (*directories, *files):
            full = os.path.join(directory, name)
            path = os.fsdecode(full[len(os.fsencode(root)) :])
            status = os.lstat(full)
            row: dict[str, Any] = {
                "path": path,
                "mode": status.st_mode,
                "uid": status.st_uid,
                "gid": status.st_gid,
                "mtime": int(status.st_mtime_ns // 10**9),
            }
            if not stat.S_ISDIR(status.st_mode):
                row |= {"nlink": status.st_nlink, "size": status.st_size}
                if status.st_nlink > 1:
                    inodes[status.st_ino] = min(inodes.get(status.st_ino, path), path)
                    row["link_of"] = status.st_ino
            if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                row["rdev"] = [os.major(status.st_rdev), os.minor(status.st_rdev)]
            if stat.S_ISLNK(status.st_mode):
                row["target"] = os.fsdecode(os.readlink(full))
            if stat.S_ISREG(status.st_mode):
                with open(full, "rb") as file:
                    row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            names = os.listxattr(full, follow_symlinks=False)
            if names:
                row["xattrs"] = {n: os.getxattr(full, n, follow_symlinks=False).hex() for n in names}
            found[path] = row
    for row in found.values():
        if "link_of" in row:
            row["link_of"] = inodes[row["link_of"]]
    return found


@pytest.mark.root
@pytest.mark.vectors
@pytest.mark.parametrize("name", IMAGES)
def test_exported_vector_mounts(name: str, vectors: Path, tmp_path: Path) -> None:
    folder = blobs_of(vectors, name, tmp_path)
    bootstrap = vectors / name / "bootstrap"
    if not bootstrap.exists():
        (bootstrap,) = (vectors / name / "blobs").iterdir()
    disk = tmp_path / "disk"
    done = run("export", "--block", "-B", bootstrap, "-D", folder, "-O", disk, "--verity")
    assert done.returncode == 0, done.stderr
    line, end = done.stdout.split("\n")
    assert line.startswith("dm-verity options: ") and end == ""
    *options, blocks, _, offset, root = line.removeprefix("dm-verity options: ").replace('""', "-").split()
    unit = 512 if name == "v6-tarfs" else 4096
    assert f"--data-block-size={unit}" in options
    assert int(offset) == -(-int(blocks) * unit // 4096) * 4096
    assert len(root) == 64 and disk.stat().st_size > int(offset)
    with loop_mounted(disk, tmp_path / "mnt"):
        found = describe(tmp_path / "mnt")
    rows = expected(vectors / name / "expected.jsonl")
    del rows["/"]
    assert found.keys() == rows.keys()
    for path, row in rows.items():
        assert found[path] == row


@pytest.mark.root
@pytest.mark.vectors
@pytest.mark.parametrize(
    "name", ["v5-dir-zstd", "v6-dir-batch", "v6-dir-encrypted", "merge-v6", "v6-targz-ref"]
)
def test_rewritten_images_mount(name: str, vectors: Path, tmp_path: Path) -> None:
    """The kernel finds the chunks of compacted and optimized images where they are said to be."""
    rows = expected(vectors / name / "expected.jsonl")
    del rows["/"]
    wanted = [PrefetchFile(path) for path, row in rows.items() if row.get("sha256") and row["size"]][::2]
    folder = str(tmp_path / "blobs")
    with open_vector(vectors, name, tmp_path) as image, (tmp_path / "disk").open("wb") as file:
        optimized = image.with_tree(optimize(image, wanted, folder).tree)
        tree = compact(optimized, folder, CompactOptions(min_used_ratio=99)) or optimized.tree
        assert name == "v6-targz-ref" or tree is not optimized.tree
        write_disk(image.with_tree(tree), file.write)
    with loop_mounted(tmp_path / "disk", tmp_path / "mnt"):
        assert describe(tmp_path / "mnt") == rows


@pytest.mark.root
@given(entries=st.lists(FILES, max_size=12), version=st.sampled_from([5, 6]))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_trees_in_the_kernel(
    entries: list[Any], version: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """build → mount is the same tree."""
    folder = tmp_path_factory.mktemp("random")
    image = random_image(entries, version, str(folder))
    if image is None:
        return
    with image, (folder / "disk").open("wb") as file:
        expected_rows = image_rows(image)
        write_disk(image, file.write)
    (folder / "mnt").mkdir()
    erofs.mount(folder / "disk", [], folder / "mnt")
    try:
        assert describe(folder / "mnt") == expected_rows
    finally:
        erofs.umount(folder / "mnt")


@pytest.mark.vectors
@pytest.mark.parametrize("name", ["v6-dir-zstd", "v6-tarfs"])
def test_veritysetup_agrees(
    name: str, vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all but the filler of hash pages, which that tool wants to be zeros."""
    if not shutil.which("veritysetup"):
        pytest.skip("veritysetup is not installed")
    monkeypatch.setattr(verity, "FILLER", bytes(32))
    path = tmp_path / "disk"
    with open_vector(vectors, name, tmp_path) as image, path.open("wb") as file:
        disk = write_disk(image, file.write, bootstrap=image.bootstrap(), verity=True)
    options = disk.verity_options().removeprefix("dm-verity options: ").replace('""', "-").split()
    *options, root = options
    command = ["veritysetup", "verify", *options, path, path, root]
    assert subprocess.run(command, capture_output=True).returncode == 0
    with path.open("r+b") as file:
        file.seek(2000)
        file.write(b"?")
    assert subprocess.run(command, capture_output=True).returncode != 0


@pytest.mark.vectors
def test_addresses_are_those_of_the_builder(vectors: Path, tmp_path: Path) -> None:
    """The bootstrap goes out as it is; wrong addresses are put right."""
    with open_vector(vectors, "merge-v6", tmp_path) as image:
        boot = read_bytes(str(vectors / "merge-v6" / "bootstrap"))
        out, again = bytearray(), bytearray()
        disk = write_disk(image, out.extend, bootstrap=boot)
        assert disk.size == len(out) and out.startswith(boot) and not disk.root_hash
        wrong = bytearray(boot)
        wrong[1408 + 68 : 1408 + 72] = bytes(4)
        write_disk(image, again.extend, bootstrap=bytes(wrong))
    assert again == out


def test_hash_tree() -> None:
    """Against the definition: every page of a level is hashed into the level above."""
    data = os.urandom(4096 * 300)
    hashed = Verity(4096)
    for at in range(0, len(data), 10_000):
        hashed.update(data[at : at + 10_000])
    tree, root = hashed.tree()
    assert hashed.blocks == 300 and len(tree) == 4096 * 4
    filler = hashlib.sha256(bytes(4096)).digest()
    leaves = [hashlib.sha256(data[at : at + 4096]).digest() for at in range(0, len(data), 4096)]
    assert tree[4096:] == b"".join(leaves) + filler * (3 * 128 - 300)
    above = [hashlib.sha256(tree[at : at + 4096]).digest() for at in (4096, 8192, 12288)]
    assert tree[:4096] == b"".join(above) + filler * 125
    assert root == hashlib.sha256(tree[:4096]).digest()


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "rootfs" / "file").write_bytes(b"x" * 10_000)
    (tmp_path / "blobs").mkdir()
    nydus.create(tmp_path / "rootfs", tmp_path / "blobs").save(tmp_path / "boot")
    assert run("export", "-B", tmp_path / "boot", "-D", tmp_path / "blobs").returncode == 2
    done = run("export", "--block", "-B", tmp_path / "boot", "-D", tmp_path / "blobs")
    assert done.returncode == 0 and done.stdout == ""
    made = tmp_path / "blobs" / "boot.disk"
    config = tmp_path / "config"
    config.write_text(
        '{"type": "bootstrap", "id": "1", "config": {"id": "1", "backend_type": "localfs", "backend_config": '
        f'{{"dir": "{tmp_path}/blobs"}}, "cache_type": "fscache", "metadata_path": "{tmp_path}/boot"}}}}'
    )
    assert run("export", "--block", "-C", config, "-O", tmp_path / "disk").returncode == 0
    assert (tmp_path / "disk").read_bytes() == made.read_bytes()
    (blob,) = [path for path in (tmp_path / "blobs").iterdir() if path != made]
    blob.write_bytes(b"\xff" * blob.stat().st_size)
    done = run("export", "--block", "-B", tmp_path / "boot", "-D", tmp_path / "blobs", "-O", tmp_path / "bad")
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "bad").exists()
