"""Every reference image, mounted by nydusd, reads as the reference's own mount does."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from nydusd_process import Nydusd, localfs_config

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
pytestmark = [pytest.mark.root, pytest.mark.vectors]


def names(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(VECTORS)) for path in VECTORS.glob(pattern))


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


def source_of(image: Path, folder: Path) -> Path:
    """What to give to nydusd: a vector's bootstrap, or the blob that holds it."""
    bootstrap = image / "bootstrap"
    return bootstrap if bootstrap.exists() else next((folder / "blobs").iterdir())


def collect_blobs(image: Path, folder: Path) -> Path:
    """A folder of all blobs of an image: its own, and the layers that some images refer to."""
    folder.mkdir(parents=True)
    for blob in (image / "blobs").glob("*"):
        (folder / blob.name).symlink_to(blob)
    if not (image / "bootstrap").exists():
        return folder
    for layer in (VECTORS / "inputs").glob("*.tar*"):
        name = hashlib.sha256(layer.read_bytes()).hexdigest()
        if not (folder / name).exists():
            (folder / name).symlink_to(layer)
    return folder


def check(image: Path, folder: Path, *arguments: str) -> str:
    blobs = collect_blobs(image, folder / "blobs")
    return mount(source_of(image, folder), blobs, image / "expected.jsonl", folder, *arguments)


def mount(bootstrap: Path, blobs: Path, expected: Path, folder: Path, *arguments: str) -> str:
    """Compares the mounted image with what is expected; returns the provider."""
    config = localfs_config(blobs, folder / "cache", enable_xattr=True)
    with Nydusd.of(folder, bootstrap, config, *arguments) as daemon:
        assert compare(daemon.mountpoint, expected) > 1
        instance = daemon.client.info()["backend_collection"]["/"]
        assert daemon.stop() == 0
        assert daemon.mounts() == []
        assert "ERROR" not in daemon.log.read_text()
    return str(instance["provider"])


@pytest.mark.parametrize("name", names("*/command.json"), ids=lambda name: name.partition("/")[0])
def test_an_image_is_mounted_by_the_kernel(name: str, vectors: Path, tmp_path: Path) -> None:
    assert check((vectors / name).parent, tmp_path) == "blobfs"


@pytest.mark.parametrize("name", ["v5-dir-zstd", "v5-inline-meta", "v6-dir-zstd"])
def test_an_image_can_be_mounted_in_user_space(name: str, vectors: Path, tmp_path: Path) -> None:
    assert check(vectors / name, tmp_path, "--provider", "fuse") == "fuse"


def listed(entry: dict[str, Any], path: str = "") -> dict[str, str]:
    """Names and types in what ``tree -J`` printed."""
    found = {path: entry["type"]}
    for child in entry.get("contents", []):
        found |= listed(child, f"{path}/{child['name']}")
    return found


def present(root: Path) -> dict[str, str]:
    """The same of a mounted tree."""
    found = {"": "directory"}
    for path in root.rglob("*"):
        kind = "link" if path.is_symlink() else "directory" if path.is_dir() else "file"
        found[f"/{path.relative_to(root)}"] = kind
    return found


@pytest.mark.parametrize(
    "name", ["repeatable/sha256-nocompress-repeatable", "repeatable/blake3-lz4_block-non_repeatable"]
)
def test_an_image_of_an_early_release(name: str, vectors: Path, tmp_path: Path) -> None:
    bootstrap = vectors / "upstream" / name
    result = bootstrap.with_name(f"{bootstrap.name}.result").read_text()
    tree, end = json.JSONDecoder().raw_decode(result)
    sums = [line.split("  /", 1) for line in result[end:].split("\n") if "  /" in line]
    config = localfs_config(bootstrap.parent / "blobs", tmp_path / "cache")
    with Nydusd.of(tmp_path, bootstrap, config) as daemon:
        assert present(daemon.mountpoint) == listed(tree[0])
        for digest, path in sums:
            assert hashlib.md5((daemon.mountpoint / path).read_bytes()).hexdigest() == digest, path
        assert len(sums) > 20
        assert daemon.stop() == 0


def test_an_image_of_an_early_release_v6(vectors: Path, tmp_path: Path) -> None:
    bootstrap = vectors / "upstream" / "bootstrap" / "rafs-v6-2.2.boot"
    config = localfs_config(vectors / "upstream" / "blobs", tmp_path / "cache")
    with Nydusd.of(tmp_path, bootstrap, config) as daemon:
        files = [path for path in daemon.mountpoint.rglob("*") if path.is_file()]
        assert files
        for path in files:
            assert len(path.read_bytes()) == path.stat().st_size
        assert daemon.stop() == 0


@pytest.mark.parametrize("name", ["v5-dir-zstd", "v5-inline-meta"])
def test_a_successor_serves_an_old_image(name: str, vectors: Path, tmp_path: Path) -> None:
    """Even where what was made of its bootstrap is gone: it is made again, the same."""
    blobs = collect_blobs(vectors / name, tmp_path / "blobs")
    config = localfs_config(blobs, tmp_path / "cache", enable_xattr=True)
    with Nydusd.of(tmp_path, source_of(vectors / name, tmp_path), config) as daemon:
        (made,) = (tmp_path / "cache").glob("*.erofs")
        before = made.read_bytes()
        made.unlink()
        os.kill(daemon.worker or 0, signal.SIGKILL)
        assert compare(daemon.mountpoint, vectors / name / "expected.jsonl") > 1
        assert made.read_bytes() == before
        assert daemon.stop() == 0
        assert daemon.mounts() == []
    kept = {path.name for path in (tmp_path / "cache").glob("*.blob.data")}
    assert kept and not any(f"{blob.name}.blob.data" in kept for blob in blobs.iterdir())
    with Nydusd.of(tmp_path, source_of(vectors / name, tmp_path), config) as daemon:
        assert daemon.client.info()["backend_collection"]["/"]["plain_blobs"] == 1
        assert compare(daemon.mountpoint, vectors / name / "expected.jsonl") > 1
        assert daemon.stop() == 0


def unpack_layout(archive: Path, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The blob folder of an OCI layout, and the layers of its (Nydus) image."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    blobs = folder / "blobs" / "sha256"

    def document(descriptor: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((blobs / descriptor["digest"].partition(":")[2]).read_bytes())
        return found

    manifest = json.loads((folder / "index.json").read_bytes())
    while "layers" not in manifest:
        manifest = document(manifest["manifests"][-1])  # the Nydus half comes last
    return blobs, manifest["layers"]


def prepare(archive: Path, folder: Path) -> tuple[Path, Path]:
    """Bootstrap and blobs as the snapshotter lays them out; chunk tables go into the cache."""
    blobs, layers = unpack_layout(archive, folder / "layout")
    with tarfile.open(blobs / layers[-1]["digest"].partition(":")[2]) as tar:
        tar.extractall(folder, filter="data")
    (folder / "cache").mkdir()
    for table in (folder / "image").glob("*.blob.meta"):
        table.rename(folder / "cache" / table.name)
    if "ref" in archive.name:
        unpack_layout(archive.with_name("source.tar"), folder / "layout")
    return folder / "image" / "image.boot", blobs


CONVERTED = [name for name in names("oci/*.tar") + names("oci/run/*.tar") if "source" not in name]


@pytest.mark.parametrize("name", CONVERTED, ids=lambda name: name.removeprefix("oci/").removesuffix(".tar"))
def test_a_converted_image_is_mounted_by_the_kernel(name: str, vectors: Path, tmp_path: Path) -> None:
    bootstrap, blobs = prepare(vectors / name, tmp_path)
    expected = vectors / "oci" / "expected.jsonl"
    if "/run/" in name:
        expected = unpacked(vectors / "oci" / "run" / "source.tar", tmp_path / "ordinary")
    assert mount(bootstrap, blobs, expected, tmp_path) == "blobfs"


def unpacked(archive: Path, folder: Path) -> Path:
    """Describes an ordinary image (without whiteouts), unpacked by tar."""
    blobs, layers = unpack_layout(archive, folder / "layout")
    root = folder / "root"
    root.mkdir()
    for layer in layers:
        data = gzip.decompress((blobs / layer["digest"].partition(":")[2]).read_bytes())
        subprocess.run(["tar", "-xpf", "-", "--xattrs", "-C", str(root)], input=data, check=True)
    rows = [{"path": "/"}]
    for path in sorted(root.rglob("*")):
        rows.append({"path": f"/{path.relative_to(root)}"} | describe(path))
    result = folder / "expected.jsonl"
    result.write_text("\n".join(map(json.dumps, rows)))
    return result
