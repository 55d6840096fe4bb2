"""Images that umoci and skopeo write, and ours as these read them.

What they unpack is the truth: a mistake that our reader and our writer of layers share would show here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from documents import load
from faulty import FaultyRegistry
from images import place, two_platforms
from nydusify_command import Nydusify, one_fatal_line
from tools import Snapshot, mounted, must_be_equal, needs_skopeo, needs_umoci, skopeo, snapshot, umoci

from nydus.oci import model

pytestmark = [needs_skopeo, pytest.mark.vectors]

#: A real image, larger than those that tests make: an OCI layout (tag: latest).
REAL_IMAGE = Path(os.environ.get("NYDUS_TEST_IMAGE", "/var/tmp/nydus-bench-images/python"))


def lower(root: Path) -> None:
    """Files of all types and, where Debian's package manager is, the real files of some packages."""
    for name in ("opaque/deep", "replaced", "emptied", "kept/below", "private"):
        (root / name).mkdir(parents=True)
    for name in ("one", "opaque/old", "opaque/deep/old", "replaced/x", "emptied/a", "emptied/b", "kept/f"):
        (root / name).write_text(f"lower {name}")
    (root / "big").write_bytes(os.urandom(2_500_000))
    os.link(root / "one", root / "kept/two")
    os.link(root / "one", root / "kept/below/three")
    os.link(root / "big", root / "opaque/big")
    (root / "kept/link").symlink_to("../one")
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", 0o20666, os.makedev(1, 3))
    os.mknod(root / "disk", 0o60600, os.makedev(259, 70_000))
    (root / ("n" * 200 + "ü")).write_text("")
    os.setxattr(root / "one", "user.note", b"\0\xff any bytes")
    os.setxattr(root / "kept", "user.of-a-folder", b"")
    os.setxattr(root / "kept/link", "trusted.of-a-link", b"x", follow_symlinks=False)
    os.chown(root / "kept/f", 7, 3_000_000)
    (root / "kept/f").chmod(0o4755)
    os.setxattr(root / "kept/f", "security.capability", bytes.fromhex("0100000200200000" + "00" * 12))
    (root / "private").chmod(0o2770)
    root.chmod(0o750)
    if shutil.which("dpkg"):
        listed = subprocess.run(["dpkg", "-L", "passwd"], capture_output=True, text=True).stdout
        names = [
            name[1:] for name in listed.splitlines() if name.startswith("/usr/") and os.path.lexists(name)
        ]
        pack = ["tar", "-C", "/", "--no-recursion", "-c", "--", *names]
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
            subprocess.run(["tar", "-C", str(root), "-xp"], stdin=packing.stdout, check=True)


def middle(root: Path) -> None:
    """What was there goes, changes its type, its attributes, its other names."""
    shutil.rmtree(root / "replaced")
    (root / "replaced").write_text("a file now")
    (root / "one").unlink()
    (root / "one").mkdir()
    (root / "one/inside").write_text("middle")
    for name in ("emptied/a", "emptied/b", "null"):
        (root / name).unlink()
    (root / "kept/below/three").chmod(0o400)  # and two, which is the same file
    os.link(root / "kept/two", root / "four")
    os.setxattr(root / "private", "user.new", b"y")
    os.utime(root / "fifo", (1, 981_173_106))
    for folder in ("usr/share/doc", "usr/share/man"):
        shutil.rmtree(root / folder, ignore_errors=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout whose tag latest umoci wrote, in five layers."""
    folder = tmp_path_factory.mktemp("umoci")
    layout, bundle, upper = folder / "layout", folder / "bundle", folder / "upper"
    umoci("init", "--layout", str(layout))
    umoci("new", "--image", f"{layout}:latest")
    umoci("unpack", "--image", f"{layout}:latest", str(bundle))
    for change in (lower, middle):
        change(bundle / "rootfs")
        umoci("repack", "--refresh-bundle", "--image", f"{layout}:latest", str(bundle))
    upper.mkdir()
    (upper / "young").write_text("upper")
    upper.chmod(0o711)
    umoci("insert", "--opaque", "--image", f"{layout}:latest", str(upper), "/opaque")
    umoci("insert", "--whiteout", "--image", f"{layout}:latest", "/disk")
    umoci("insert", "--image", f"{layout}:latest", str(upper), "/disk")
    umoci("config", "--image", f"{layout}:latest", "--config.cmd", "/bin/true", "--config.env", "A=b")
    return layout


@pytest.fixture(scope="module")
def truth(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """What umoci unpacks of it."""
    return unpacked(made, tmp_path_factory.mktemp("truth"))


def unpacked(layout: Path, folder: Path) -> Snapshot:
    umoci("unpack", "--image", f"{layout}:latest", str(folder / "bundle"))
    try:
        return snapshot(folder / "bundle/rootfs")
    finally:
        shutil.rmtree(folder / "bundle")


def run(nydusify: Nydusify, *arguments: str) -> None:
    done = nydusify(*arguments, "--plain-http")
    assert done.returncode == 0, done.stderr


def to_and_fro(
    nydusify: Nydusify,
    host: str,
    layout: Path,
    folder: Path,
    truth: Snapshot,
    *options: str,
    forms: tuple[str, ...] = (),
) -> None:
    """skopeo pushes, we convert and convert back, skopeo pulls, umoci unpacks."""
    source, target, back = (f"{host}/real/image:{tag}" for tag in ("oci", "nydus", "back"))
    skopeo("copy", *forms, f"oci:{layout}:latest", f"docker://{source}")
    run(nydusify, "convert", "--source", source, "--target", target, *options)
    run(nydusify, "convert", "--reverse", "--source", target, "--target", back)
    skopeo("copy", f"docker://{back}", f"oci:{folder}/back:latest")
    run(nydusify, "check", "--source", source, "--target", target)
    with mounted(target, folder / "mount") as mountpoint:
        must_be_equal(truth, snapshot(mountpoint))
    must_be_equal(truth, unpacked(folder / "back", folder))


@needs_umoci
@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "forms"),
    [
        ((), ()),
        (("--fs-version", "5", "--compressor", "lz4_block"), ("--format", "v2s2")),
        (("--batch-size", "0x10000"), ("--dest-compress-format", "zstd")),
        (("--oci-ref",), ()),
        (("--merge-platform",), ("--format", "v2s2")),
    ],
    ids=["v6", "v5-lz4-of-docker", "batch-of-zstd", "oci-ref", "merged-docker"],
)
def test_what_umoci_unpacks_stays_the_same(
    nydusify: Nydusify,
    docker_registry: str,
    made: Path,
    truth: Snapshot,
    tmp_path: Path,
    options: tuple[str, ...],
    forms: tuple[str, ...],
) -> None:
    assert len(truth) > 20 and "disk/young" in truth and "opaque/old" not in truth
    to_and_fro(nydusify, docker_registry, made, tmp_path, truth, *options, forms=forms)


@needs_umoci
@pytest.mark.root
@pytest.mark.slow
def test_a_real_image(
    nydusify: Nydusify, docker_registry: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not (REAL_IMAGE / "index.json").exists():
        pytest.skip(f"{REAL_IMAGE} is no OCI layout; name one with NYDUS_TEST_IMAGE")
    truth = unpacked(REAL_IMAGE, tmp_path_factory.mktemp("truth"))
    assert len(truth) > 5000
    to_and_fro(nydusify, docker_registry, REAL_IMAGE, tmp_path, truth)


def test_skopeo_pushes_and_we_pull(nydusify: Nydusify, docker_registry: str, vectors: Path) -> None:
    archive = f"oci-archive:{vectors}/oci/source.tar"
    skopeo("copy", archive, f"docker://{docker_registry}/small:latest")
    target = f"{docker_registry}/a/b:nydus"
    run(nydusify, "convert", "--source", f"{docker_registry}/small", "--target", target)
    chunked = f"{docker_registry}/chunked:v1"
    run(nydusify, "copy", "--source", target, "--target", chunked, "--push-chunk-size", "7kB")
    missing = ("--source", f"{docker_registry}/small:none", "--target", target, "--plain-http")
    assert "404" in one_fatal_line(nydusify("convert", *missing))


def test_skopeo_reads_and_writes_the_embedded_registry(
    server: FaultyRegistry, vectors: Path, tmp_path: Path
) -> None:
    skopeo("copy", f"oci-archive:{vectors}/oci/v6-zstd.tar", f"docker://{server.host}/x/y:v1")
    skopeo("copy", f"docker://{server.host}/x/y:v1", f"dir:{tmp_path}/dir")
    assert json.loads(skopeo("list-tags", f"docker://{server.host}/x/y"))["Tags"] == ["v1"]


class Reader:
    """skopeo, which checks every digest of what it copies."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def __call__(self, name: str, *options: str) -> dict[str, Any]:
        """The manifest or index, after all of it has been read."""
        self._count += 1
        folder = self._folder / f"copy{self._count}"
        skopeo("copy", "--all", *options, name, f"dir:{folder}")
        raw = skopeo("inspect", "--raw", name)
        document: dict[str, Any] = json.loads(raw)
        if "manifests" in document:  # which old versions write anew, without the type of artifacts
            for entry in document["manifests"]:
                data = (folder / f"{entry['digest'][7:]}.manifest.json").read_bytes()
                assert model.digest(data) == entry["digest"]
        else:
            assert (folder / "manifest.json").read_text() == raw
        return document


def test_skopeo_reads_all_that_we_write(
    nydusify: Nydusify, docker_registry: str, vectors: Path, tmp_path: Path
) -> None:
    read, here = Reader(tmp_path), f"{docker_registry}/small"
    archive = f"oci-archive:{vectors}/oci/source.tar"
    skopeo("copy", archive, f"docker://{here}:latest")
    skopeo("copy", "--format", "v2s2", archive, f"docker://{here}:docker")

    run(nydusify, "convert", "--source", f"{here}:docker", "--target", f"{here}:schema2")
    # A form of the reference that skopeo does not copy: no such layers are in Docker's schema.
    found = json.loads(skopeo("inspect", "--raw", f"docker://{here}:schema2"))
    assert found["mediaType"] == model.DOCKER_MANIFEST and len(found["layers"]) == 4
    digest = json.loads(skopeo("inspect", f"docker://{here}:docker"))["Digest"]
    assert found["annotations"][model.NYDUS_SOURCE_DIGEST] == digest

    run(nydusify, "convert", "--source", f"{here}:docker", "--target", f"{here}:oci", "--oci")
    assert len(read(f"docker://{here}:oci")["layers"]) == 4

    two_platforms(docker_registry)
    options = ("--all-platforms", "--merge-platform", "--with-referrer")
    run(nydusify, "convert", "--source", f"{here}:two", "--target", f"{here}:merged", *options)
    index = read(f"docker://{here}:merged")
    kinds = [entry.get("artifactType") for entry in index["manifests"]]
    assert kinds == [None, None, *[model.NYDUS_MANIFEST] * 2]
    for number, architecture in enumerate(("amd64", "arm64")):
        # What knows nothing of Nydus gets the ordinary image of its platform.
        wanted = ("--override-os", "linux", "--override-arch", architecture)
        skopeo("copy", *wanted, f"docker://{here}:merged", f"dir:{tmp_path}/{architecture}")
        data = (tmp_path / architecture / "manifest.json").read_bytes()
        assert model.digest(data) == index["manifests"][number]["digest"]
        origin = load(place(f"{here}:two").open(), "two")["manifests"][number]["content"]
        layers = json.loads(data)["layers"]
        assert [layer["digest"] for layer in layers[1:]] == [x["digest"] for x in origin["layers"]]

    run(
        nydusify, "copy", "--source", f"{here}:merged", "--target", f"{here}-copied:merged", "--all-platforms"
    )
    assert read(f"docker://{here}-copied:merged") == index

    written = tmp_path / "cwd/written.tar"
    run(nydusify, "convert", "--source", f"{here}:latest", "--target-archive", str(written))
    found = read(f"oci-archive:{written}")
    assert found["layers"][-1]["annotations"][model.NYDUS_BOOTSTRAP] == "true"

    reversed_ = tmp_path / "cwd/back.tar"
    reverse = ("--reverse", "--source", f"{here}:merged", "--target-archive", str(reversed_))
    run(nydusify, "convert", *reverse, "--platform", "linux/amd64")
    found = read(f"oci-archive:{reversed_}")
    assert {layer["mediaType"] for layer in found["layers"]} == {model.OCI_LAYER_GZIP}
    described = json.loads(skopeo("inspect", f"oci-archive:{reversed_}"))
    assert described["Architecture"] == "amd64" and len(described["Layers"]) == 3
