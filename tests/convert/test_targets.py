"""Every kind of place that images are written to, read back by skopeo and umoci."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from faulty import FaultyRegistry, is_blob
from nydusify_command import Nydusify, one_fatal_line

from nydus.convert.copy import copy
from nydus.oci.layout import IMAGE_NAME, REF_NAME, Layout
from nydus.oci.place import ArchivePlace, LayoutPlace, RegistryPlace
from nydus.oci.reference import parse

pytestmark = pytest.mark.vectors
needs_skopeo = pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")


def done(process: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """The JSON that a command printed."""
    assert process.returncode == 0, process.stderr
    found: dict[str, object] = json.loads(process.stdout)
    return found


def skopeo_digest(name: str) -> str:
    """The digest of what skopeo finds there."""
    command = ["skopeo", "inspect", "--raw", name]
    raw = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    command = ["skopeo", "manifest-digest", "/dev/stdin"]
    return subprocess.run(command, input=raw, capture_output=True, check=True).stdout.decode().strip()


def skopeo_reads(name: str, folder: Path) -> None:
    """Has skopeo copy an image, which verifies all its blobs."""
    command = ["skopeo", "copy", "--quiet", name, f"dir:{folder}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


@needs_skopeo
@pytest.mark.parametrize(
    ("archive", "magic", "reads"),
    [
        ("x.tar", b"", "oci-archive"),
        ("x.tar.gz", b"\x1f\x8b", "oci-archive"),
        ("x.tgz", b"\x1f\x8b", "oci-archive"),
        ("x.tar.zst", b"\x28\xb5\x2f\xfd", "oci-archive"),
        ("layout/", None, "oci"),
        ("layout:mine", None, "oci"),
    ],
)
def test_conversion_into_every_kind_of_file(
    nydusify: Nydusify, source: str, tmp_path: Path, archive: str, magic: bytes | None, reads: str
) -> None:
    folder = tmp_path / "cwd"
    if ":" in archive:
        (folder / "layout").mkdir()
    made = done(
        nydusify("convert", "--source", source, "--target-archive", archive, "--plain-http", "--json")
    )
    path, _, name = archive.partition(":")
    assert made["target"] == path.rstrip("/")
    assert [entry.name for entry in folder.iterdir()] == [path.rstrip("/")]
    if magic is not None:
        assert (folder / archive).read_bytes().startswith(magic)
    name = name or "latest"
    assert skopeo_digest(f"{reads}:{folder / path}:{name}") == made["digest"]
    skopeo_reads(f"{reads}:{folder / path}:{name}", tmp_path / "read")
    again = done(nydusify("check", "--target-archive", f"{path.rstrip('/')}", "--json"))
    assert again["verified"] is True


def test_the_same_data_give_the_same_archive(nydusify: Nydusify, vectors: Path, tmp_path: Path) -> None:
    for ending in ("tar", "tar.gz", "tar.zst"):
        for name in ("a", "b"):
            target = f"file://{name}.{ending}"
            done(
                nydusify(
                    "copy", "--source", f"file://{vectors}/oci/v6-zstd.tar", "--target", target, "--json"
                )
            )
        folder = tmp_path / "cwd"
        assert (folder / f"a.{ending}").read_bytes() == (folder / f"b.{ending}").read_bytes()


@needs_skopeo
def test_a_layout_keeps_its_other_images(nydusify: Nydusify, source: str, tmp_path: Path) -> None:
    layout = tmp_path / "cwd/layout"
    plain = source.replace("127.0.0.1", "docker://127.0.0.1")
    command = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", plain, f"oci:{layout}:first"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    index = json.loads((layout / "index.json").read_bytes())
    index["manifests"][0]["x-unknown"] = {"kept": True}
    index["annotations"] = {"of": "somebody"}
    (layout / "index.json").write_text(json.dumps(index))
    first = skopeo_digest(f"oci:{layout}:first")

    made = done(
        nydusify("convert", "--source", source, "--target", "r.io/app:v2", "--target-archive", "layout",
                 "--plain-http", "--json")
    )  # fmt: skip
    assert skopeo_digest(f"oci:{layout}:first") == first
    assert skopeo_digest(f"oci:{layout}:v2") == made["digest"]
    index = json.loads((layout / "index.json").read_bytes())
    assert index["manifests"][0]["x-unknown"] == {"kept": True} and index["annotations"] == {"of": "somebody"}
    assert index["manifests"][1]["annotations"] == {REF_NAME: "v2", IMAGE_NAME: "r.io/app:v2"}

    # The same again, of another name that would hide it, and the way out.
    options = ("copy", "--source", "file://layout:first", "--json", "--target-archive")
    done(nydusify(*options, "layout", "--target", "r.io/app:v2"))
    assert skopeo_digest(f"oci:{layout}:v2") == first
    refused = nydusify(*options[:3], "--target-archive", "layout", "--target", "r.io/other:v2")
    assert "has an image 'v2' already, which is r.io/app:v2; say layout:NAME" in one_fatal_line(refused)
    done(nydusify(*options, "layout:other", "--target", "r.io/other:v2"))
    assert skopeo_digest(f"oci:{layout}:other") == first
    assert len(json.loads((layout / "index.json").read_bytes())["manifests"]) == 3


@pytest.mark.skipif(not shutil.which("umoci"), reason="umoci is not installed")
def test_umoci_reads_and_extends_a_layout(nydusify: Nydusify, source: str, tmp_path: Path) -> None:
    layout = tmp_path / "cwd/layout"
    done(nydusify("copy", "--source", source, "--target", "file://layout/", "--plain-http", "--json"))
    command = ["umoci", "stat", "--image", f"{layout}:latest", "--json"]
    told = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert len(told["history"]) >= 3
    command = ["umoci", "tag", "--image", f"{layout}:latest", "more"]
    subprocess.run(command, capture_output=True, check=True, timeout=60)
    done(nydusify("convert", "--source", "file://layout:more", "--target-archive", "layout:n", "--json"))
    names = {entry.annotations[REF_NAME] for entry in Layout(layout).index().manifests}
    assert names == {"latest", "more", "n"}


def test_a_layout_after_an_interruption(
    nydusify: Nydusify, server: FaultyRegistry, source: str, vectors: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cwd"
    copy(ArchivePlace(vectors / "oci/v6-zstd.tar"), LayoutPlace(folder / "old", "kept"))
    before = (folder / "old/index.json").read_bytes()
    server.intercepts.append(lambda handler: bool(is_blob(handler) and time.sleep(0.5)))
    for name in ("old", "new/"):
        process = subprocess.Popen(
            [Path(sys.executable).with_name("nydusify"), "convert", "--source", source, "--plain-http",
             "--target-archive", name],
            cwd=folder, stderr=subprocess.PIPE, env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip
        assert process.stderr
        for line in process.stderr:
            if b"converting image" in line:
                break
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 143
    assert [entry.name for entry in folder.iterdir()] == ["old"]
    assert (folder / "old/index.json").read_bytes() == before
    assert not list(folder.rglob(".*"))
    done(nydusify("check", "--target-archive", "old:kept", "--json"))
    server.intercepts.clear()
    done(nydusify("convert", "--source", source, "--plain-http", "--target-archive", "old", "--json"))


def test_names_of_archives(nydusify: Nydusify, vectors: Path, tmp_path: Path) -> None:
    """Without a name, an image is called what the archive says, and else what the archive is called."""
    folder = tmp_path / "cwd"
    shutil.copy(vectors / "oci/source.tar", folder / "My source.tar")
    command = ("convert", "--source-archive", "My source.tar", "--target-archive")
    done(nydusify(*command, "a.tar", "--json"))
    found = Layout(folder / "l").create()
    with tarfile.open(folder / "a.tar") as archive:
        archive.extractall(folder / "l", filter="data")
    assert found.called() == "localhost/my-source:latest"
    index = json.loads((folder / "l/manifest.json").read_bytes())
    assert index[0]["RepoTags"] == ["localhost/my-source:latest"]
    named = ("--source", "r.io/app:v1", "--source-archive", "My source.tar", "--json")
    done(nydusify("copy", *named, "--target", "file://named.tar.gz"))
    done(nydusify("convert", "--source", "file://named.tar.gz", "--target-archive", "l2/", "--json"))
    (entry,) = Layout(folder / "l2").index().manifests
    assert entry.annotations == {REF_NAME: "v1", IMAGE_NAME: "r.io/app:v1"}


def test_optimized_images_and_dictionaries_in_files(
    nydusify: Nydusify, vectors: Path, server: FaultyRegistry, tmp_path: Path
) -> None:
    (tmp_path / "cwd/files").write_text("/a\n")
    one = f"file://{vectors}/oci/v6-zstd.tar"
    done(
        nydusify("optimize", "--source", one, "--prefetch-files", "files", "--target", "file://o/", "--json")
    )
    assert done(nydusify("check", "--target-archive", "o", "--json"))["verified"] is True
    place = RegistryPlace(parse(f"{server.host}/small:v6"), plain_http=True)
    copy(ArchivePlace(vectors / "oci/v6-zstd.tar"), place)
    done(nydusify("chunkdict", "generate", "--sources", f"{one},{place}", "--target-archive", "dict.tar.zst",
                  "--plain-http", "--json"))  # fmt: skip
    done(nydusify("check", "--target-archive", "dict.tar.zst", "--json"))
    convert = (
        "convert",
        "--source",
        f"file://{vectors}/oci/source.tar",
        "--chunk-dict",
        "file://dict.tar.zst",
    )
    done(nydusify(*convert, "--target-archive", "n/", "--json"))
    blobs = {path.name for path in (tmp_path / "cwd/n/blobs/sha256").iterdir()}
    theirs = json.loads(nydusify("info", one, "--json").stdout)["layers"]
    assert blobs & {layer["digest"].removeprefix("sha256:") for layer in theirs if layer["role"] == "blob"}
    done(nydusify("check", "--target-archive", "n", "--json"))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (["--target-archive", "x.tar.xz"], "archives are written as .tar, .tar.gz or .tar.zst"),
        (["--target-archive", "x.tar", "--target", "file://y.tar"], "cannot be used together"),
        (["--target-archive", "none/x/"], "its folder does not exist"),
        (["--target-archive", "/dev/null"], "is no regular file"),
        (["--target-archive", "new/:sha256:0"], "must not be a digest"),
        (["--target", "containerd://x"], "expected containerd://NAMESPACE/REFERENCE"),
        ([], "target"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "copy", "optimize"])
def test_targets_that_cannot_be(
    nydusify: Nydusify, vectors: Path, tmp_path: Path, command: str, target: list[str], words: str
) -> None:
    (tmp_path / "files").write_text("/a\n")
    more = ["--prefetch-files", str(tmp_path / "files")] if command == "optimize" else []
    image = "source.tar" if command == "convert" else "v6-zstd.tar"
    refused = nydusify(command, "--source", f"file://{vectors}/oci/{image}", *target, *more)
    assert words in one_fatal_line(refused)
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.mark.root
def test_large_temporary_files_are_in_the_work_folder(
    nydusify: Nydusify, vectors: Path, tmp_path: Path
) -> None:
    """TMPDIR may be a small file system in memory."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(small)], check=True)
    try:
        variables = {"TMPDIR": str(small)}
        image = ("--source", f"file://{vectors}/oci/run/v6-zstd.tar")
        done(nydusify("copy", *image, "--target", "file://a.tar.gz", "--json", env=variables))
        source = ("--source", "file://a.tar.gz")
        done(
            nydusify("convert", "--reverse", *source, "--target", "file://b.tar.zst", "--json", env=variables)
        )
        done(
            nydusify("copy", "--source", "file://b.tar.zst", "--target", "file://c/", "--json", env=variables)
        )
        done(nydusify("check", "--target", "file://a.tar.gz", "--no-mount", "--json", env=variables))
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert {each.name for each in (tmp_path / "cwd").iterdir()} == {"a.tar.gz", "b.tar.zst", "c", "output"}


@pytest.mark.parametrize("merged", [(), ("--merge-platform",)])
def test_an_index_over_layers_goes_with_its_layers(
    nydusify: Nydusify, source: str, tmp_path: Path, merged: tuple[str, ...]
) -> None:
    """From a registry into an archive, a layout, another repository: the data are always there."""
    http = ("--plain-http", "--json")
    done(nydusify("convert", "--oci-ref", *merged, "--source", source, "--target-archive", "a.tar.gz", *http))
    done(nydusify("check", "--target-archive", "a.tar.gz", "--no-mount", "--source", source, *http))
    other = source.replace("small", "other/one")
    done(nydusify("copy", "--source", "file://a.tar.gz", "--target", other, *http))
    done(nydusify("copy", "--source", other, "--target", "file://l/", *http))
    done(nydusify("check", "--target-archive", "l", "--no-mount", "--json"))
    done(nydusify("copy", "--source", "file://l", "--target", "file://b.tar", *http))
    done(nydusify("check", "--target-archive", "b.tar", "--no-mount", "--json"))
