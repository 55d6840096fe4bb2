"""What cannot be meant is refused at once: before anything is fetched or converted."""

from __future__ import annotations

from pathlib import Path

import pytest
from faulty import FaultyRegistry
from nydusify_command import Nydusify, one_fatal_line

pytestmark = pytest.mark.vectors


@pytest.mark.parametrize("command", ["convert", "copy", "check", "mount", "optimize", "info"])
def test_a_platform_that_a_single_manifest_is_not_for(
    nydusify: Nydusify, source: str, command: str, tmp_path: Path
) -> None:
    nydus = f"{source}-nydus"
    if command in ("check", "mount", "optimize"):
        assert nydusify("convert", "--source", source, "--target", nydus, "--plain-http").returncode == 0
    (tmp_path / "files").write_text("/etc/x\n")
    images = {
        "convert": ["--source", source, "--target", nydus],
        "copy": ["--source", source, "--target", nydus],
        "check": ["--target", nydus, "--no-mount"],
        "mount": ["--target", nydus],
        "optimize": ["--source", nydus, "--target", f"{nydus}2", "--prefetch-files", str(tmp_path / "files")],
        "info": ["--target", source],
    }[command]
    other = "linux/amd64," if command in ("convert", "copy", "info") else ""
    done = nydusify(command, *images, "--plain-http", "--platform", f"{other}linux/riscv64")
    assert "no image for linux/riscv64; it is one for linux/amd64" in one_fatal_line(done)
    assert nydusify("copy", "--source", source, "--target", f"{source}-2", "--plain-http").returncode == 0


@pytest.mark.parametrize("command", ["convert", "copy"])
def test_an_archive_that_cannot_be_written(
    nydusify: Nydusify, server: FaultyRegistry, source: str, command: str, tmp_path: Path
) -> None:
    def run(path: Path) -> str:
        where = ["--target-archive", str(path), "--target", "x"]
        if command == "copy":
            where = ["--target", f"file://{path}"]
        return one_fatal_line(nydusify(command, "--source", source, "--plain-http", *where))

    assert "is a folder that is no OCI layout" in run(tmp_path)
    assert "its folder does not exist" in run(tmp_path / "none/x.tar")
    assert "cannot be written: " in run(Path("/proc/self/x.tar"))
    assert not server.seen


def test_a_result_that_cannot_be_written(nydusify: Nydusify, server: FaultyRegistry, source: str) -> None:
    options = [
        "--source",
        source,
        "--target",
        f"{source}-n",
        "--plain-http",
        "--output-json",
        "none/out.json",
    ]
    assert "--output-json none/out.json: No such file" in one_fatal_line(nydusify("convert", *options))
    assert not server.seen


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["copy", "--source", "x", "--target", "y", "--source-backend-config", "{}"],
         "--source-backend-config needs --source-backend-type"),
        (["check", "--target", "x", "--target-backend-config-file", "f"],
         "--target-backend-config-file needs --target-backend-type"),
        (["mount", "--target", "x", "--backend-config", "{}"], "--backend-config needs --backend-type"),
        (["convert", "--source", "x", "--target", "y", "--backend-config", "{}"],
         "--backend-config needs --backend-type"),
        (["copy", "--source", "x", "--target", "y", "--source-backend-type", "s3"],
         "--source-backend-type needs exactly one of --source-backend-config and"),
    ],
)  # fmt: skip
def test_half_of_a_storage_backend(nydusify: Nydusify, arguments: list[str], words: str) -> None:
    assert words in one_fatal_line(nydusify(*arguments))


def test_options_of_a_comparison_without_one(nydusify: Nydusify, source: str) -> None:
    done = nydusify("check", "--target", source, "--plain-http", "--nydusd", "x", "--source-insecure")
    for name in ("--nydusd", "--source-insecure"):
        assert f'level=warning msg="{name} has no effect without --source"' in done.stderr


def test_a_copy_has_its_own_words(nydusify: Nydusify, source: str) -> None:
    done = nydusify("copy", "--source", source, "--target", f"{source}-2", "--plain-http")
    assert 'msg="found layer 4/4' in done.stderr and "convert" not in done.stderr
    name = source.replace("small", "other")
    done = nydusify(
        "copy", "--source", source, "--target", f"file://{name.rpartition(':')[2]}.tar", "--plain-http"
    )
    assert 'msg="copied layer 4/4' in done.stderr and "convert" not in done.stderr


def test_a_file_that_is_taken_for_the_name_of_an_image(nydusify: Nydusify, tmp_path: Path) -> None:
    (tmp_path / "cwd" / "127.0.0.1:1").mkdir()
    (tmp_path / "cwd" / "127.0.0.1:1" / "app.tar").touch()
    done = nydusify("info", "127.0.0.1:1/app.tar", "--plain-http", "--quiet")
    one_fatal_line(done)
    hint = (
        "--target 127.0.0.1:1/app.tar is the name of an image; the file would be file://127.0.0.1:1/app.tar"
    )
    assert hint in done.stderr.splitlines()[0]


def test_info_without_an_image(nydusify: Nydusify) -> None:
    assert one_fatal_line(nydusify("info")) == "the REFERENCE of an image is needed, or --target-archive"
