"""``nydusify check``: passes on what is right, and names what is wrong."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nydusify_command import Nydusify

from nydus.convert.check import CheckError, Report, check
from nydus.convert.copy import copy
from nydus.convert.documents import bootstrap_layer, unpack_bootstrap_layer
from nydus.convert.image import image
from nydus.convert.options import ConvertOptions
from nydus.errors import NydusError
from nydus.oci import model
from nydus.oci.layout import Layout, blob_path
from nydus.oci.place import ArchivePlace, LayoutPlace
from nydus.oci.reference import parse

pytestmark = pytest.mark.vectors
AMD64 = model.Platform(os="linux", architecture="amd64")
VECTORS = [
    "v6-zstd",
    "v6-lz4",
    "v6-batch",
    "v5-zstd",
    "oci-types",
    "docker-schema2",
    "prefetch",
    "merged-index",
]


def run(target: ArchivePlace | LayoutPlace, source: ArchivePlace | LayoutPlace | None, work: Path) -> Report:
    work.mkdir(exist_ok=True)
    return check(target, source, AMD64, work)


@pytest.mark.parametrize("name", [*VECTORS, "run/v6-zstd", "run/v5-zstd", "run/merged-index"])
def test_images_of_the_reference(vectors: Path, tmp_path: Path, name: str) -> None:
    source = ArchivePlace(vectors / "oci" / Path(name).parent / "source.tar")
    report = run(ArchivePlace(vectors / f"oci/{name}.tar"), source, tmp_path)
    assert report.checks["filesystem"] == report.checks["files"] > 10
    assert report.fs_version == (5 if "v5" in name else 6)
    assert (tmp_path / "target/nydus_bootstrap/image/image.boot").stat().st_size > 4096
    for side, kind in (("source", "oci"), ("target", "nydus")):
        assert "layers" in json.loads((tmp_path / side / f"{kind}_manifest.json").read_text())
        assert "rootfs" in json.loads((tmp_path / side / f"{kind}_config.json").read_text())


@pytest.mark.parametrize("name", ["", "run/"])
def test_oci_ref_images_need_their_source_layers(vectors: Path, tmp_path: Path, name: str) -> None:
    index, source = (
        ArchivePlace(vectors / f"oci/{name}oci-ref.tar"),
        ArchivePlace(vectors / f"oci/{name}source.tar"),
    )
    with pytest.raises(CheckError, match="which the image refers to, is not in its repository"):
        run(index, source, tmp_path)
    together = LayoutPlace(tmp_path / "layout", "ref")
    copy(source, LayoutPlace(tmp_path / "layout", "source"))
    copy(index, together)
    report = run(together, source, tmp_path)
    assert report.kind == "oci-ref" and report.checks["filesystem"] > 10


@pytest.mark.parametrize(
    "options", [ConvertOptions(), ConvertOptions(fs_version=5), ConvertOptions(merge_platform=True)]
)
def test_our_own_images(vectors: Path, tmp_path: Path, options: ConvertOptions) -> None:
    source, target = ArchivePlace(vectors / "oci/source.tar"), LayoutPlace(tmp_path / "layout")
    image(source, target, options)
    report = run(target, source, tmp_path)
    assert report.checks["filesystem"] > 10


# Broken images


class Broken:
    """A copy of a reference image in a layout, to be broken."""

    def __init__(self, vectors: Path, folder: Path, name: str = "v6-zstd") -> None:
        self.place = LayoutPlace(folder / "layout", "latest")
        copy(ArchivePlace(vectors / f"oci/{name}.tar"), self.place)
        self.layout = Layout(folder / "layout")
        self.manifest: dict[str, Any] = json.loads(self.layout.manifest("latest")[1])
        self.config: dict[str, Any] = json.loads(self.path(self.manifest["config"]["digest"]).read_bytes())

    def path(self, digest: str) -> Path:
        return self.layout.root / blob_path(digest)

    def save(self) -> None:
        """Stores manifest and config as they are now."""
        config = self.layout.put_blob(model.encode(self.config), model.OCI_CONFIG)
        self.manifest["config"] = json.loads(model.encode(config))
        self.layout.put_manifest("latest", model.encode(self.manifest), model.OCI_MANIFEST)

    def replace_layer(self, number: int, data: bytes, diff_id: str = "") -> None:
        """Puts other bytes in place of a layer, with descriptor and diff id to match."""
        stored = self.layout.put_blob(data, "")
        self.manifest["layers"][number] |= {"digest": stored.digest, "size": stored.size}
        self.config["rootfs"]["diff_ids"][number] = diff_id or stored.digest
        self.save()

    def files(self) -> dict[str, bytes]:
        """Of the bootstrap layer."""
        data = self.path(self.manifest["layers"][-1]["digest"]).read_bytes()
        return unpack_bootstrap_layer(data, "x")[0]

    def replace_bootstrap(self, files: dict[str, bytes]) -> None:
        metas = {name[6:-10]: data for name, data in files.items() if name.endswith(".blob.meta")}
        self.replace_layer(-1, *bootstrap_layer(files["image/image.boot"], metas))


def flip(path: Path, offset: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= bit
    path.write_bytes(data)


def bit_of_a_blob(b: Broken) -> None:
    flip(b.path(b.manifest["layers"][0]["digest"]), 100)


def bit_at_the_end_of_a_blob(b: Broken) -> None:
    flip(b.path(b.manifest["layers"][1]["digest"]), -1)


def blob_cut_short(b: Broken) -> None:
    path = b.path(b.manifest["layers"][1]["digest"])
    path.write_bytes(path.read_bytes()[:-10])


def blob_missing(b: Broken) -> None:
    b.path(b.manifest["layers"][2]["digest"]).unlink()


def bit_of_the_bootstrap_layer(b: Broken) -> None:
    flip(b.path(b.manifest["layers"][-1]["digest"]), 200)


def bit_of_the_super_block(b: Broken) -> None:
    files = b.files()
    data = bytearray(files["image/image.boot"])
    data[1024] ^= 1
    b.replace_bootstrap({**files, "image/image.boot": bytes(data)})


def bootstrap_cut_short(b: Broken) -> None:
    files = b.files()
    b.replace_bootstrap({**files, "image/image.boot": files["image/image.boot"][:8192]})


def no_bootstrap_file(b: Broken) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("image/other"))
    b.replace_layer(-1, gzip.compress(buffer.getvalue()), model.digest(buffer.getvalue()))


def wrong_bootstrap_diff_id(b: Broken) -> None:
    b.config["rootfs"]["diff_ids"][-1] = model.digest(b"")
    b.save()


def wrong_blob_diff_id(b: Broken) -> None:
    b.config["rootfs"]["diff_ids"][0] = model.digest(b"")
    b.save()


def swapped_layers(b: Broken) -> None:
    layers = b.manifest["layers"]
    layers[0], layers[1] = layers[1], layers[0]
    b.save()


def one_diff_id_too_few(b: Broken) -> None:
    del b.config["rootfs"]["diff_ids"][0]
    b.save()


def one_layer_too_few(b: Broken) -> None:
    del b.config["rootfs"]["diff_ids"][0], b.manifest["layers"][0]
    b.save()


def no_blob_annotation(b: Broken) -> None:
    del b.manifest["layers"][1]["annotations"]
    b.save()


def no_bootstrap_annotation(b: Broken) -> None:
    del b.manifest["layers"][-1]["annotations"][model.NYDUS_BOOTSTRAP]
    b.save()


def wrong_fs_version(b: Broken) -> None:
    b.manifest["layers"][-1]["annotations"][model.NYDUS_FS_VERSION] = "5"
    b.save()


def wrong_blob_type(b: Broken) -> None:
    b.manifest["layers"][0]["mediaType"] = model.OCI_LAYER_GZIP
    b.save()


def wrong_bootstrap_type(b: Broken) -> None:
    b.manifest["layers"][-1]["mediaType"] = model.NYDUS_BLOB
    b.save()


def other_command(b: Broken) -> None:
    b.config["config"]["Cmd"] = ["/bin/false"]
    b.save()


def no_architecture(b: Broken) -> None:
    del b.config["architecture"]
    b.save()


def chunk_table_of_another_blob(b: Broken) -> None:
    files = b.files()
    first, second, *_ = [name for name in files if name.endswith(".blob.meta")]
    files[first], files[second] = files[second], files[first]
    b.replace_bootstrap(files)


def chunk_table_changed(b: Broken) -> None:
    files = b.files()
    name = next(name for name in files if name.endswith(".blob.meta"))
    data = bytearray(files[name])
    data[0] ^= 8
    b.replace_bootstrap({**files, name: bytes(data)})


def chunk_table_of_no_blob(b: Broken) -> None:
    files = b.files()
    name = next(name for name in files if name.endswith(".blob.meta"))
    b.replace_bootstrap({**files, f"image/{'0' * 64}.blob.meta": files[name]})


def size_of_a_descriptor(b: Broken) -> None:
    b.manifest["layers"][0]["size"] += 1
    b.save()


def no_config(b: Broken) -> None:
    b.path(b.manifest["config"]["digest"]).unlink()


def manifest_no_json(b: Broken) -> None:
    b.layout.put_manifest("latest", b"{", model.OCI_MANIFEST)


def mode_of_a_file(b: Broken) -> None:
    change_inode(b, 4, "<H", lambda mode: mode ^ 0o011)


def owner_of_a_file(b: Broken) -> None:
    change_inode(b, 24, "<I", lambda uid: uid + 1)


def time_of_a_file(b: Broken) -> None:
    change_inode(b, 32, "<Q", lambda time: time + 1)


def change_inode(b: Broken, offset: int, form: str, change: Callable[[int], int]) -> None:
    """Changes a field of the first extended inode of a regular file, wherever it lies."""
    files = b.files()
    data = bytearray(files["image/image.boot"])
    for at in range(8192, len(data) - 64, 32):
        head, _, mode = struct.unpack_from("<HHH", data, at)
        if head & 1 and head >> 1 <= 4 and mode >> 12 == 8 and mode & 0o777:
            (value,) = struct.unpack_from(form, data, at + offset)
            struct.pack_into(form, data, at + offset, change(value))
            b.replace_bootstrap({**files, "image/image.boot": bytes(data)})
            return
    raise AssertionError("no regular file found")


CASES = {
    bit_of_a_blob: "validate blob failed: target image: .*corrupted blob: expected sha256",
    bit_at_the_end_of_a_blob: "validate blob failed.*corrupted blob",
    blob_cut_short: r"validate blob failed.*expected \d+ bytes, found",
    blob_missing: "validate blob failed.*no blob",
    bit_of_the_bootstrap_layer: "validate bootstrap failed.*corrupted blob",
    bit_of_the_super_block: "validate bootstrap failed",
    bootstrap_cut_short: "validate bootstrap failed",
    no_bootstrap_file: "validate bootstrap failed.*has no image/image.boot",
    wrong_bootstrap_diff_id: "validate bootstrap failed.*wrong diff id of the bootstrap layer",
    wrong_blob_diff_id: "validate manifest failed.*layer 1: its diff id",
    swapped_layers: "validate manifest failed.*layer 1: its diff id",
    one_diff_id_too_few: r"invalid diff ids in image config: 3 \(diff ids\) != 4 \(layers\)",
    one_layer_too_few: "validate bootstrap failed.*blob .* of the bootstrap is not in the manifest",
    no_blob_annotation: "validate manifest failed.*layer 2 has no annotation",
    no_bootstrap_annotation: "validate manifest failed.*is not a Nydus image",
    wrong_fs_version: "the annotation says RAFS version '5', the bootstrap is 6",
    wrong_blob_type: "validate manifest failed.*layer 1 has the media type",
    wrong_bootstrap_type: "validate manifest failed.*the bootstrap layer has the media type",
    other_command: "the config differs from the source's in Cmd",
    no_architecture: "no os or no architecture",
    chunk_table_of_another_blob: r"validate bootstrap failed.*\.blob\.meta",
    chunk_table_changed: r"validate bootstrap failed.*\.blob\.meta",
    chunk_table_of_no_blob: "belongs to no layer",
    size_of_a_descriptor: r"validate blob failed.*expected \d+ bytes, found",
    no_config: "no blob",
    manifest_no_json: "validate manifest failed.*not a valid",
    mode_of_a_file: "validate filesystem failed: file not match in target image: .*its mode",
    owner_of_a_file: "validate filesystem failed: file not match in target image: .*its uid",
    time_of_a_file: "validate filesystem failed: file not match in target image: .*its mtime",
}


@pytest.mark.parametrize("damage", CASES, ids=lambda damage: damage.__name__)
def test_broken_images(vectors: Path, tmp_path: Path, damage: Callable[[Broken], None]) -> None:
    broken = Broken(vectors, tmp_path)
    damage(broken)
    with pytest.raises(NydusError, match=CASES[damage]) as caught:
        run(broken.place, ArchivePlace(vectors / "oci/source.tar"), tmp_path / "work")
    assert "\n" not in str(caught.value)


def test_another_image_is_not_the_same(vectors: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"validate (manifest|filesystem) failed"):
        run(ArchivePlace(vectors / "oci/run/v6-zstd.tar"), ArchivePlace(vectors / "oci/source.tar"), tmp_path)
    with pytest.raises(CheckError, match="is not a Nydus image"):
        run(ArchivePlace(vectors / "oci/source.tar"), None, tmp_path)


def test_both_halves_of_a_merged_index_count(vectors: Path, tmp_path: Path) -> None:
    source = ArchivePlace(vectors / "oci/source.tar")
    broken = LayoutPlace(tmp_path / "layout", "latest")
    copy(ArchivePlace(vectors / "oci/merged-index.tar"), broken)
    layout = Layout(broken.path)
    index = json.loads(layout.manifest("latest")[1])
    entry = index["manifests"][0]
    manifest = json.loads((broken.path / blob_path(entry["digest"])).read_bytes())
    manifest["layers"][1:] = manifest["layers"][:0:-1]
    changed = layout.put_blob(model.encode(manifest), "")
    entry |= {"digest": changed.digest, "size": changed.size}
    layout.put_manifest("latest", model.encode(index), model.OCI_INDEX)
    with pytest.raises(CheckError, match="the OCI half of the index has other layers"):
        run(broken, source, tmp_path)


# The command


def test_the_command(nydusify: Nydusify, vectors: Path, tmp_path: Path) -> None:
    archives = (
        "--target-archive",
        str(vectors / "oci/v6-zstd.tar"),
        "--source-archive",
        str(vectors / "oci/source.tar"),
    )
    done = nydusify("check", *archives, "--no-mount", "--output-json", "report.json")
    assert done.returncode == 0, done.stderr
    words = [
        "parsing image",
        "dumping manifest",
        "pulling bootstrap",
        "checking manifest",
        "checking bootstrap",
    ]
    words += ["comparing filesystem", "verified image"]
    positions = [done.stderr.index(f'level=info msg="{word}"') for word in words]
    assert positions == sorted(positions)
    report = json.loads((tmp_path / "cwd/report.json").read_text())
    assert report["verified"] and report["checks"]["filesystem"] == 17
    keep = tmp_path / "cwd/output/mine"
    keep.write_text("")
    done = nydusify(
        "check", *archives[:2], "--source-archive", str(vectors / "oci/run/source.tar"), "--no-mount"
    )
    assert done.returncode == 1
    assert "validate" in done.stderr.splitlines()[-1] and "level=fatal" in done.stderr.splitlines()[-1]
    assert keep.exists()


@pytest.mark.root
@pytest.mark.parametrize(
    "name",
    [
        "v6-zstd",
        "v5-zstd",
        "v6-lz4",
        "v6-batch",
        "merged-index",
        "oci-ref",
        "run/merged-index",
        "run/oci-ref",
    ],
)
def test_the_command_with_a_mount(nydusify: Nydusify, vectors: Path, tmp_path: Path, name: str) -> None:
    source = vectors / "oci" / Path(name).parent / "source.tar"
    target = f"{tmp_path}/t.tar"
    shutil.copy(vectors / f"oci/{name}.tar", target)
    if "oci-ref" in name:  # its data are the layers of the source
        target = f"{tmp_path}/layout:ref"
        copy(ArchivePlace(source), LayoutPlace(tmp_path / "layout", "source"))
        copy(ArchivePlace(tmp_path / "t.tar"), LayoutPlace(tmp_path / "layout", "ref"))
    done = nydusify("check", "--target-archive", target, "--source-archive", str(source), "--json")
    assert done.returncode == 0, done.stderr
    assert 'msg="mounting image"' in done.stderr
    assert json.loads(done.stdout)["checks"]["filesystem"] > 16
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_info(nydusify: Nydusify, vectors: Path) -> None:
    done = nydusify("info", "--target-archive", str(vectors / "oci/v6-zstd.tar"), "--json")
    found = json.loads(done.stdout)
    assert (found["kind"], found["fs_version"], found["compressor"], found["files"]) == (
        "nydus",
        6,
        "zstd",
        found["files"],
    )
    assert [layer["role"] for layer in found["layers"]] == ["blob", "blob", "blob", "bootstrap"]
    done = nydusify("info", "--target-archive", str(vectors / "oci/source.tar"))
    assert "an ordinary OCI image" in done.stdout
    assert (
        "a Nydus image" in nydusify("info", "--target-archive", str(vectors / "oci/merged-index.tar")).stdout
    )


def test_copying_to_and_from_files(nydusify: Nydusify, vectors: Path, tmp_path: Path) -> None:
    done = nydusify("copy", "--source", f"file://{vectors}/oci/v6-zstd.tar", "--target", "file://copy.tar")
    assert done.returncode == 0, done.stderr
    copied = ArchivePlace(tmp_path / "cwd/copy.tar")
    assert copied.open().manifest("")[1] == ArchivePlace(vectors / "oci/v6-zstd.tar").open().manifest("")[1]
    assert parse("localhost/image").tag == "latest"
