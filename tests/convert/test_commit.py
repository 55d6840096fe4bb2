"""``nydusify commit`` without a containerd: an overlay's upper folder becomes layers of an image."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydus.convert.changes import Selection, parse_selection, write_folder, write_upper
from nydus.convert.check import check
from nydus.convert.commit import build_parts, put_committed
from nydus.convert.listing import Listing, compare, of_directory, of_image
from nydus.convert.mounting import backend_of, mounted
from nydus.convert.opened import COMMITTED_BLOBS, Opened, open_nydus, store_blob
from nydus.errors import ConfigError, NydusError
from nydus.image import Image
from nydus.oci import model
from nydus.oci.place import ArchivePlace, LayoutPlace

AMD64 = model.Platform(os="linux", architecture="amd64")


def names(selection: Selection, upper: Path) -> list[str]:
    out = io.BytesIO()
    write_upper(str(upper), selection, out)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        return archive.getnames()


def test_which_paths_are_meant() -> None:
    selection = parse_selection(["/data/", "!/data/cache", "/data", "//x"])
    assert (selection.extra, selection.excluded) == (["/data", "/x"], ["/data/cache"])
    assert selection.leaves_out("/data/cache/a") and not selection.leaves_out("/data/cached")
    for wrong in ("data", "!data", "/", "!", "", "/a/../b", "!/"):
        with pytest.raises(ConfigError, match="with-path"):
            parse_selection([wrong])


def test_names_and_links(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "a/b").mkdir(parents=True)
    (upper / "a/file").write_text("x")
    os.link(upper / "a/file", upper / "a/other")
    (upper / "a/b/deep").symlink_to("/etc")
    os.mkfifo(upper / "fifo")
    (upper / "caf\udce9".encode("utf8", "surrogateescape").decode("utf8", "surrogateescape")).touch()
    found = names(Selection(), upper)
    assert found[0] == "." and found[1:] == ["caf\udce9", "fifo", "a", "a/file", "a/other", "a/b", "a/b/deep"]
    assert names(Selection(excluded=["/a/b", "/fifo"]), upper)[2:] == ["a", "a/file", "a/other"]
    (upper / ".wh.x").touch()
    with pytest.raises(NydusError, match=r"/\.wh\.x: a layer cannot hold"):
        names(Selection(), upper)


def test_links_do_not_lead_out_of_the_container(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "root/link").symlink_to(tmp_path)
    for path in ("/link", "/link/secret", "/nothing"):
        with pytest.raises(NydusError, match=rf"--with-path {path}: "):
            write_folder(str(tmp_path / "root"), path, Selection(), io.BytesIO())


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """The image ``lower`` mounted at ``lower``; ``merged`` is a container's view with ``upper``."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    yield tmp_path
    for name in ("merged", "lower"):
        while os.path.ismount(tmp_path / name):
            subprocess.run(["umount", "-l", tmp_path / name], check=False)


def listing(opened: Opened) -> Listing:
    return of_image(Image(opened.tree, opened.backend))


@pytest.mark.root
@pytest.mark.vectors
@pytest.mark.parametrize("name", ["v6-zstd", "v5-zstd", "docker-schema2", "oci-ref", "v6-batch"])
def test_the_image_is_what_the_container_saw(overlay: Path, vectors: Path, name: str) -> None:
    from nydus.convert.copy import copy

    place = LayoutPlace(overlay / "layout", name)
    if name == "oci-ref":
        copy(ArchivePlace(vectors / "oci/source.tar"), LayoutPlace(overlay / "layout", "source"))
    copy(ArchivePlace(vectors / f"oci/{name}.tar"), place)
    base = open_nydus(place, AMD64)
    bootstrap = overlay / "boot"
    bootstrap.write_bytes(base.files["image/image.boot"])
    merged, upper = overlay / "merged", overlay / "upper"
    with mounted(backend_of(place), bootstrap, overlay / "lower", overlay / "daemon"):
        options = f"lowerdir={overlay}/lower,upperdir={upper},workdir={overlay}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=True)
        change(merged)
        data = overlay / "volume"
        (data / "inner").mkdir(parents=True)
        (data / "inner/file").write_bytes(os.urandom(70_000))
        subprocess.run(["mount", "--bind", data, merged / "mnt-data"], check=True)
        selection = parse_selection(["/mnt-data", "!/scratch"])
        (overlay / "build").mkdir()
        parts = build_parts(base, upper, str(merged), selection, overlay / "build")
        expected = of_directory(str(merged))
        subprocess.run(["umount", merged / "mnt-data"], check=True)
        subprocess.run(["umount", merged], check=True)
    writer = LayoutPlace(overlay / "layout", "new").open_sink()
    layers = {part.what: store_blob(part.path, writer) for part in parts}
    put_committed(base, parts, layers, [], writer, "new")
    made = open_nydus(LayoutPlace(overlay / "layout", "new"), AMD64)
    for path in [path for path in expected if path.startswith("/scratch")]:
        del expected[path]
    compare(expected, listing(made))

    manifest = made.found.manifest
    added = [layer.digest for layer in manifest.layers[-3:-1]]
    assert manifest.layers[-1].annotations[COMMITTED_BLOBS] == ",".join(added)
    assert len(made.found.config.rootfs.diff_ids) == len(manifest.layers)
    changes = next(part for part in parts if part.what == "changes")
    assert changes.known >= 1, "a file that only got another mode is not stored again"
    (overlay / "check").mkdir()
    check(LayoutPlace(overlay / "layout", "new"), None, AMD64, overlay / "check")


def change(merged: Path) -> None:
    """What a container might do, whatever the image."""
    files = sorted(path for path in merged.rglob("*") if path.is_file() and not path.is_symlink())
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.chmod(0o600)
    folders = sorted(path for path in merged.iterdir() if path.is_dir() and not path.is_symlink())
    for path in files:
        if path != largest:
            path.unlink()
            break
    (merged / "new").mkdir()
    (merged / "new/data").write_bytes(os.urandom(3 << 20))
    os.link(merged / "new/data", merged / "new/again")
    (merged / "new/link").symlink_to("data")
    os.setxattr(merged / "new/data", "user.note", b"\xff\x00binary")
    os.mkfifo(merged / "new/fifo")
    os.mknod(merged / "new/null", 0o020666, os.makedev(1, 3))
    os.chown(merged / "new/null", 70_000, 3_000_000)
    os.utime(merged / "new/again", ns=(1, 1_600_000_000_123_456_789))
    (merged / "scratch").mkdir()
    (merged / "scratch/file").write_text("not wanted")
    (merged / "mnt-data").mkdir()
    # A folder that is removed and made again hides what the image has in it.
    again = next(folder for folder in reversed(folders) if not largest.is_relative_to(folder))
    subprocess.run(["rm", "-r", again], check=True)
    again.mkdir()
    (again / "only").write_text("this")
