"""Images that umoci and skopeo write, and ours as these read them.

What they unpack is the truth: a mistake that our reader and our writer of layers share would show here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nydusify_command import Nydusify
from tools import Snapshot, must_be_equal, needs_skopeo, needs_umoci, skopeo, snapshot, umoci

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


@contextmanager
def mounted(reference: str, folder: Path) -> Iterator[Path]:
    folder.mkdir()
    command = [Path(sys.executable).with_name("nydusify"), "mount", "--target", reference, "--plain-http"]
    with subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    ) as process:
        try:
            assert process.stdout
            if not process.stdout.readline():
                raise AssertionError(process.communicate()[1])
            yield folder / "image-fs"
        finally:
            process.terminate()
            process.communicate(timeout=30)


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
    # What we write of layers leaves the root out, as the reference does.
    must_be_equal(truth, unpacked(folder / "back", folder), root=False)


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
