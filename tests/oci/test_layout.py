from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import zstandard

from nydus.errors import BackendError, FormatError, NydusError
from nydus.oci import model
from nydus.oci.archive import open_archive, write_archive
from nydus.oci.layout import Layout
from nydus.oci.reference import parse


def fill(layout: Layout, name: str = "latest") -> tuple[model.Manifest, bytes]:
    config = layout.put_blob(b'{"rootfs":{"type":"layers","diff_ids":[]}}', model.OCI_CONFIG)
    layer = layout.put_blob(b"a layer" * 1000, model.OCI_LAYER)
    manifest = model.Manifest(schema_version=2, media_type=model.OCI_MANIFEST, config=config, layers=(layer,))
    data = model.encode(manifest)
    layout.put_manifest(name, data, model.OCI_MANIFEST)
    return manifest, data


def test_a_layout_gives_back_what_was_put_in(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "a").create()
    manifest, data = fill(layout)
    again = Layout(tmp_path / "a").create()
    assert again.manifest("")[1] == again.manifest("latest")[1] == data
    layer = manifest.layers[0]
    assert again.blob(layer.digest, layer.size).read() == b"a layer" * 1000
    assert again.read_range(layer.digest, 7, 7) == b"a layer"
    with pytest.raises(BackendError, match="expected 8 bytes"):
        again.read_range(layer.digest, layer.size - 7, 8)
    fill(layout, "other")
    with pytest.raises(BackendError, match="'nope'"):
        layout.manifest("nope")


def test_damage_in_a_layout_is_found(tmp_path: Path) -> None:
    layout = Layout(tmp_path).create()
    manifest, _ = fill(layout)
    path = tmp_path / "blobs" / manifest.layers[0].digest.replace(":", "/")
    path.write_bytes(b"b layer" * 1000)
    with pytest.raises(BackendError, match="corrupted blob"):
        layout.blob(manifest.layers[0].digest).read()
    with pytest.raises(BackendError, match="no OCI layout"):
        Layout(tmp_path / "none").manifest("")
    with layout.upload() as upload:
        upload.write(b"x")
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == ["sha256"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Such as those of another user; a folder is one that nobody can read, not even root."""
    layout = Layout(tmp_path).create()
    manifest, _ = fill(layout)
    layer = manifest.layers[0]
    stream = layout.blob(layer.digest)
    path = tmp_path / "blobs" / layer.digest.replace(":", "/")
    path.unlink()
    with pytest.raises(BackendError, match=f"no blob {layer.digest}"):
        stream.read()
    path.mkdir()
    for read in (lambda: layout.blob(layer.digest).read(), lambda: layout.read_range(layer.digest, 0, 1)):
        with pytest.raises(BackendError, match=f"{path}: Is a directory") as caught:
            read()
        assert caught.value.status != 404


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_archives(tmp_path: Path, pack: object) -> None:
    layout = Layout(tmp_path / "l").create()
    manifest, data = fill(layout)
    path = tmp_path / "a.tar"
    write_archive(layout, path, parse("r.io/app:v1"))
    path.write_bytes(pack(path.read_bytes()))  # type: ignore[operator]
    found = open_archive(path)
    assert found.manifest("v1")[1] == found.manifest("r.io/app:v1")[1] == data
    assert found.blob(manifest.layers[0].digest).read() == b"a layer" * 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "l"]


def test_what_docker_save_writes(tmp_path: Path) -> None:
    layer = b"plain tar" * 500
    config = model.encode(
        {"os": "linux", "rootfs": {"type": "layers", "diff_ids": [model.digest(layer)] * 2}}
    )
    saved = [{"Config": "c.json", "RepoTags": ["r.io/app:v1"], "Layers": ["x/layer.tar", "y/layer.tar"]}]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in {
            "c.json": config,
            "manifest.json": json.dumps(saved).encode(),
            "x/layer.tar": layer,
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("y/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../x/layer.tar"
        archive.addfile(link)
    found = open_archive(path)
    descriptor, data = found.manifest("")
    manifest = model.decode_image(data, descriptor.media_type, "x")
    assert isinstance(manifest, model.Manifest)
    assert found.document(manifest.config) == config
    assert [found.blob(each.digest, each.size).read() for each in manifest.layers] == [layer, layer]


@pytest.mark.parametrize("damage", ["garbage", "cut", "gzip", "empty", "other"])
def test_broken_archives_are_one_clear_error(tmp_path: Path, damage: str) -> None:
    layout = Layout(tmp_path / "l").create()
    fill(layout)
    path = tmp_path / "a.tar"
    write_archive(layout, path, parse("r.io/app:v1"))
    data = path.read_bytes()
    if damage == "garbage":
        data = b"\x01" * 5000
    elif damage == "cut":
        data = data[: len(data) - 12000]
    elif damage == "gzip":
        data = gzip.compress(data)[:-50]
    elif damage == "empty":
        data = b""
    else:
        buffer = io.BytesIO()
        tarfile.open(fileobj=buffer, mode="w").close()
        data = buffer.getvalue()
    path.write_bytes(data)
    with pytest.raises((FormatError, BackendError), match=r"a\.tar") as caught:
        open_archive(path).manifest("")
    assert "\n" not in str(caught.value)
    with pytest.raises(NydusError, match="No such file"):
        open_archive(tmp_path / "none.tar")
