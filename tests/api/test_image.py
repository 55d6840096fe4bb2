"""The Python API: every image that the reference wrote, looked at and read through ``nydus.open``."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

import nydus
from conformance.content import expected
from conformance.test_read import NAMES
from nydus.errors import BackendError, ConfigError, FormatError, NydusError
from nydus.oci import model
from nydus.oci.archive import open_archive
from nydus.oci.registry import Registry
from nydus.oci.server import RegistryServer
from nydus.rafs.model import BlobFeature
from nydus.storage.backends.localfs import LocalFs


def blobs_of(vectors: Path, name: str, tmp_path: Path) -> Path:
    """A directory with the blobs of a vector; two of them use an input file as their blob."""
    folder = tmp_path / "blobs"
    folder.mkdir(exist_ok=True)
    inputs = {hashlib.sha256(p.read_bytes()).hexdigest(): p for p in (vectors / "inputs").iterdir()}
    for blob, path in inputs.items():
        (folder / blob).symlink_to(path)
    for path in (vectors / name).glob("blobs/*"):
        (folder / path.name).symlink_to(path)
    return folder


def open_vector(vectors: Path, name: str, tmp_path: Path) -> nydus.Image:
    folder = blobs_of(vectors, name, tmp_path)
    bootstrap = vectors / name / "bootstrap"
    return nydus.open(bootstrap if bootstrap.exists() else next((vectors / name / "blobs").iterdir()), folder)


def describe(image: nydus.Image) -> dict[str, dict[str, Any]]:
    """What ``expected.jsonl`` says, through the API only."""
    paths: dict[int, list[str]] = {}
    entries = {}
    for directory, directories, others in image.walk():
        for name in (*directories, *others):
            path = f"{directory.rstrip('/')}/{name}"
            entry = entries[path] = image.stat(path, follow_symlinks=False)
            assert entry.path == path and entry.name == name
            paths.setdefault(entry.inode, []).append(path)
    result = {}
    for path, entry in entries.items():
        row: dict[str, Any] = {
            "path": path,
            "mode": entry.mode,
            "uid": entry.uid,
            "gid": entry.gid,
            "mtime": entry.mtime,
        }
        if not entry.is_dir:
            row |= {"nlink": entry.nlink, "size": entry.size}
        if entry.device is not None:
            row["rdev"] = list(entry.device)
        if entry.is_symlink:
            row["target"] = image.readlink(path)
        if entry.xattrs:
            row["xattrs"] = {name: value.hex() for name, value in entry.xattrs.items()}
        if len(paths[entry.inode]) > 1:
            row["link_of"] = min(paths[entry.inode])
        if entry.is_file:
            content = hashlib.sha256()
            for data in image.stream(path):
                content.update(data)
            row["sha256"] = content.hexdigest()
        result[path] = row
    return result


@pytest.mark.vectors
@pytest.mark.parametrize("name", NAMES)
def test_every_vector_reads_the_same(name: str, vectors: Path, tmp_path: Path) -> None:
    with open_vector(vectors, name, tmp_path) as image:
        found = describe(image)
    rows = expected(vectors / name / "expected.jsonl")
    del rows["/"]
    assert found.keys() == rows.keys()
    for path, row in rows.items():
        assert found[path] == row


@pytest.mark.vectors
@pytest.mark.parametrize("name", ["v5-zstd", "v6-zstd", "v6-lz4", "v6-batch", "prefetch", "oci-types"])
def test_archived_images(name: str, vectors: Path, tmp_path: Path) -> None:
    with nydus.open(f"oci-archive:{vectors}/oci/{name}.tar") as image:
        found = describe(image)
    rows = expected(vectors / "oci" / "expected.jsonl")
    del rows["/"]
    assert found == rows
    with tarfile.open(vectors / "oci" / f"{name}.tar") as archive:
        archive.extractall(tmp_path / "layout", filter="data")
    with nydus.open(f"oci:{tmp_path}/layout") as image:
        path = next(path for path, row in rows.items() if row.get("sha256"))
        assert hashlib.sha256(image.read(path)).hexdigest() == rows[path]["sha256"]


@pytest.mark.vectors
def test_image_in_a_registry(vectors: Path, tmp_path: Path) -> None:
    with RegistryServer(tmp_path / "registry") as server:
        source = open_archive(vectors / "oci" / "v6-zstd.tar")
        descriptor, raw = source.manifest("")
        manifest = model.decode(raw, model.Manifest, "manifest")
        target = Registry(server.host, plain_http=True).repository("demo/app")
        for blob in (manifest.config, *manifest.layers):
            target.put_blob(source.document(blob), blob.media_type)
        target.put_manifest("latest", raw, descriptor.media_type)
        with nydus.open(f"docker://{server.host}/demo/app", plain_http=True) as image:
            found = describe(image)
    rows = expected(vectors / "oci" / "expected.jsonl")
    del rows["/"]
    assert found == rows


@pytest.mark.vectors
@pytest.mark.parametrize(
    "name", ["v5-dir-zstd", "v6-dir-4k-chunks", "v6-dir-batch", "v6-targz-ref", "v6-tarfs"]
)
def test_many_files_at_once(name: str, vectors: Path, tmp_path: Path) -> None:
    with open_vector(vectors, name, tmp_path) as image:
        rows = [row for row, _ in image.tree.walk() if stat.S_ISREG(int(image.tree.nodes["mode"][row]))]
        whole = hashlib.sha256(b"".join(image.stream_rows(rows))).digest()
        single = hashlib.sha256(b"".join(b"".join(image.stream_row(row)) for row in rows)).digest()
    assert whole == single


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "hello").write_bytes(b"hello\n")
    (root / "etc" / "big").write_bytes(os.urandom(300_000))
    os.link(root / "etc" / "hello", root / "etc" / "link")
    (root / "soft").symlink_to("/etc/hello")
    (root / "up").symlink_to("../../etc")
    (root / "loop").symlink_to("loop")
    (root / "empty").touch()
    (root / os.fsdecode(b"\xff\xfe")).write_bytes(b"odd name")
    return root


@pytest.fixture
def image(rootfs: Path, tmp_path: Path) -> nydus.Image:
    (tmp_path / "blobs").mkdir()
    return nydus.create(rootfs, tmp_path / "blobs", chunk_size=0x1000)


def test_create_open_and_look(image: nydus.Image, rootfs: Path, tmp_path: Path) -> None:
    image.save(tmp_path / "boot")
    for source in (tmp_path / "boot", (tmp_path / "boot").read_bytes(), image.tree):
        with nydus.open(source, tmp_path / "blobs") as again:
            assert again.listdir() == sorted((path.name for path in rootfs.iterdir()), key=os.fsencode)
            assert again.read("/soft") == b"hello\n" == again.read(b"up/link")
            assert again.stat("/soft").path == "/etc/hello"
            assert again.stat("/soft", follow_symlinks=False).is_symlink
            assert again.stat("/etc/hello").inode == again.stat("/etc/link").inode
            assert [entry.size for entry in again.scandir("/etc")] == [300_000, 6, 6]
            assert again.read("/empty") == b""
            assert again.read("/\udcff\udcfe") == b"odd name"
            assert again.exists("/up/big") and not again.exists("/nothing")


def test_ranges_and_file_objects(image: nydus.Image, rootfs: Path) -> None:
    data = (rootfs / "etc/big").read_bytes()
    for offset, size in (
        (0, 1),
        (4095, 2),
        (4096, 4096),
        (100_000, 123_456),
        (299_999, 10),
        (300_000, 1),
        (0, 0),
    ):
        assert image.read("/etc/big", offset, size) == data[offset : offset + size]
    with image.open("/etc/big") as file:
        assert file.read(10) == data[:10]
        assert file.seek(-5, io.SEEK_END) == 299_995
        assert file.read() == data[-5:]
        file.seek(70_000)
        assert file.read() == data[70_000:]
    chunks = image.chunks("/etc/big")
    assert len(chunks) == 74 and int(chunks["usize"].sum()) == 300_000 and chunks["csize"].all()


def test_names_that_are_not_there(image: nydus.Image) -> None:
    with pytest.raises(FileNotFoundError):
        image.stat("/nothing")
    with pytest.raises(NotADirectoryError):
        image.stat("/etc/hello/x")
    with pytest.raises(NotADirectoryError):
        image.listdir("/etc/hello")
    with pytest.raises(IsADirectoryError):
        image.read("/etc")
    with pytest.raises(OSError, match="symbolic links"):
        image.read("/loop")


def test_wrong_blobs_are_errors(image: nydus.Image, tmp_path: Path) -> None:
    (blob,) = (tmp_path / "blobs").iterdir()
    data = bytearray(blob.read_bytes())
    data[1000] ^= 1
    other = tmp_path / "other"
    other.mkdir()
    (other / blob.name).write_bytes(data)
    with nydus.open(image.tree, other) as broken, pytest.raises(FormatError):
        broken.read("/etc/big")
    (tmp_path / "none").mkdir()
    with nydus.open(image.tree, tmp_path / "none") as broken, pytest.raises(BackendError):
        broken.read("/etc/big")
    with nydus.open(image.tree) as broken, pytest.raises(NydusError, match="without a source"):
        broken.read("/etc/big")
    with pytest.raises(ConfigError):
        nydus.open(image.tree, {"type": "localfs"})
    with pytest.raises(ConfigError):
        nydus.create(tmp_path, tmp_path, colour="blue")


def test_sources_of_blobs(image: nydus.Image, tmp_path: Path) -> None:
    folder = tmp_path / "blobs"
    (blob,) = folder.iterdir()
    config = {"type": "localfs", "config": {"dir": str(folder)}}
    backend = LocalFs(dir=str(folder))
    for source in (folder, blob, backend, config, {"device": {"backend": config}}):
        with nydus.open(image.tree, source) as again:
            assert again.read("/etc/hello") == b"hello\n"
    assert backend.size(blob.name)  # still open
    backend.close()


def test_create_from_tar_and_merge(rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    upper = tmp_path / "upper"
    (upper / "etc").mkdir(parents=True)
    (upper / "etc" / ".wh.big").touch()
    (upper / "new").write_bytes(b"new")
    archive = tmp_path / "upper.tar.gz"
    subprocess.run(["tar", "-C", upper, "-czf", archive, "."], check=True)
    with archive.open("rb") as stream:
        second = nydus.create(stream, tmp_path / "blobs", inline_meta=True)
    assert second.bootstrap() == nydus.create(archive, tmp_path / "blobs", inline_meta=True).bootstrap()
    first = nydus.create(rootfs, tmp_path / "blobs", inline_meta=True)
    paths = [tmp_path / "blobs" / layer.blobs[0].id for layer in (first, second)]
    assert first.blobs[0].features & BlobFeature.INLINED_FS_META
    for layers in ((first, second), paths):
        with nydus.merge(layers, tmp_path / "blobs") as merged:
            assert merged.listdir("/etc") == ["hello", "link"]
            assert merged.read("/new") == b"new" and merged.read("/soft") == b"hello\n"


def test_importing_nydus_imports_nothing() -> None:
    code = "import sys, nydus; assert 'numpy' not in sys.modules; nydus.open; assert 'numpy' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"open", "create", "merge", "Image"} <= set(dir(nydus))
    with pytest.raises(AttributeError):
        nydus.nothing  # noqa: B018
