"""``nydus-image create`` and ``merge`` as converters and people call them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

import nydus
from nydus import rafs
from nydus.build import bootstrap
from nydus.rafs import blobmeta
from nydus.rafs.model import BlobFeature, SuperFlag

COMMAND = [sys.executable, "-c", "from nydus.cli.nydus_image import main; main()"]


def run(
    *arguments: str | Path, stdin: bytes = b"", code: int = 0, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, timeout=60, cwd=cwd
    )
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "layer.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (("a/x", os.urandom(5000)), ("a/y", b"y" * 100_000), ("z", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "file").write_bytes(b"content")
    (path / "zero").write_bytes(b"")
    return path


def blobs(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def test_help_has_the_words_that_converters_look_for() -> None:
    text = run("create", "-h").stdout.decode()
    for word in ("--type", "tar-rafs", "--batch-size", "--encrypt", "targz-ref", "--features", "blob-toc"):
        assert word in text


def test_version() -> None:
    start = time.monotonic()
    text = run("--version").stdout.decode()
    assert time.monotonic() - start < 1.5
    assert re.search(r"Version:\s*(v.*)", text)
    assert "unknown" not in text


def test_commit(tmp_path: Path) -> None:
    """That of the checkout the program runs from, however git stores it; none where there is no checkout."""
    checkout = tmp_path / "checkout"
    package = checkout / "src" / "nydus"
    package.mkdir(parents=True)
    for name in ("__init__", "version"):
        (package / f"{name}.py").write_bytes((Path(nydus.__file__).parent / f"{name}.py").read_bytes())

    def ask() -> str:
        command = [sys.executable, "-c", "from nydus import version; print(version.full())"]
        environment = {**os.environ, "PYTHONPATH": str(package.parent)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return done.stdout.strip()

    assert ask() == f"v{nydus.__version__}"
    git = ["git", "-C", str(checkout), "-c", "user.name=x", "-c", "user.email=x@localhost"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert ask() == f"v{nydus.__version__}"
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    expected = f"v{nydus.__version__}-{head.stdout.strip()}"
    assert ask() == expected
    subprocess.run([*git, "pack-refs", "--all"], check=True)
    assert ask() == expected
    subprocess.run([*git, "checkout", "-q", "--detach"], check=True)
    assert ask() == expected


def test_version_imports_little() -> None:
    code = "import sys; from nydus.cli import nydus_image as n; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_command() -> None:
    assert run().stdout == b"Usage: [OPTIONS] [COMMAND]\n"
    run("frobnicate", code=2)


def test_converter_chain(archive: Path, tmp_path: Path) -> None:
    """FIFOs in and out, prefetch list on standard input, then a merge of files named by digest."""
    source, out = tmp_path / "source", tmp_path / "out"
    os.mkfifo(source)
    os.mkfifo(out)
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: source.write_bytes(archive.read_bytes())),
        threading.Thread(target=lambda: found.append(out.read_bytes())),
    ]
    for thread in threads:
        thread.start()
    options = "--log-level warn --prefetch-policy fs --whiteout-spec none --fs-version 6 --type tar-rafs"
    done = run(
        "create", *options.split(), "--blob", out, "--blob-inline-meta", "--features", "blob-toc", source,
        stdin=b"/\n",
    )  # fmt: skip
    for thread in threads:
        thread.join()
    assert (done.stdout, done.stderr) == (b"", b"")
    import hashlib

    layer = tmp_path / hashlib.sha256(found[0]).hexdigest()
    layer.write_bytes(found[0])
    run(
        "merge", "--log-level", "warn", "--prefetch-policy", "fs", "--output-json", tmp_path / "json",
        "--bootstrap", tmp_path / "boot", layer, stdin=b"/\n",
    )  # fmt: skip
    result = json.loads((tmp_path / "json").read_text())
    assert (result["blobs"], result["fs_version"], result["compressor"]) == ([layer.name], "6", "zstd")
    tree = rafs.read((tmp_path / "boot").read_bytes())
    assert (tree.prefetch, tree.blobs[0].id) == ([0], layer.name)
    assert not tree.blobs[0].features & BlobFeature.INLINED_FS_META
    assert tree.find(b"/a/y") is not None


def test_directory_into_blob_dir(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "blobs"
    target.mkdir()
    run("-l", "warn", "create", "-D", target, "-J", tmp_path / "json", folder)
    result = json.loads((tmp_path / "json").read_text())
    names = {path.name for path in blobs(target)}
    assert names == {result["blobs"][0], Path(result["bootstrap"]).name}
    assert (target / result["blobs"][0]).stat().st_mode & 0o777 == 0o600
    assert " ".join(result) == (
        "version bootstrap blobs external_bootstrap external_blobs trace fs_version compressor"
    )


def test_bootstrap_and_blob_without_a_type(folder: Path, tmp_path: Path) -> None:
    run("create", "-B", tmp_path / "boot", "-b", tmp_path / "blob", folder)
    assert not (tmp_path / "boot.external").exists()
    assert rafs.detect((tmp_path / "boot").read_bytes()) == 6


@pytest.mark.parametrize("kind", ["targz-ref", "estargz-ref"])
def test_reference(kind: str, archive: Path, tmp_path: Path) -> None:
    done = run("create", "-t", kind, "--compressor", "zstd", "-B", tmp_path / "boot", "-D", tmp_path, archive)
    assert b"INFO compressor is gzip for this type" in done.stderr
    (blob,) = bootstrap.load(str(tmp_path / "boot")).blobs
    assert blob.features & BlobFeature.ZRAN
    assert (tmp_path / blob.rafs_digest.hex()).stat().st_size == blob.rafs_size


def test_tarfs(archive: Path, tmp_path: Path) -> None:
    plain = tmp_path / "layer.tar"
    subprocess.run(f"gzip -dc {archive} > {plain}", shell=True, check=True)
    name = "ab" * 32
    run("create", "-t", "tar-tarfs", "-B", tmp_path / "boot", "--blob-id", name, "-D", tmp_path, plain)
    tree = bootstrap.load(str(tmp_path / "boot"))
    assert tree.flags & SuperFlag.TARFS
    assert [blob.id for blob in tree.blobs] == [name]
    run("create", "-t", "tar-tarfs", "-B", tmp_path / "boot2", archive, code=1)
    assert not (tmp_path / "boot2").exists()


def test_ready_made_cache(archive: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    run("create", "-t", "tar-rafs", "-B", tmp_path / "b", "--blob-cache-dir", cache, archive)
    run("create", "-t", "tar-rafs", "--compressor", "none", "-B", tmp_path / "b2", "-D", tmp_path, archive)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "b2").read_bytes()
    tree = bootstrap.load(str(tmp_path / "b"))
    (blob,) = tree.blobs
    assert [path.name for path in blobs(cache)] == [f"{blob.id}.blob.data", f"{blob.id}.blob.meta"]
    image = (cache / f"{blob.id}.blob.data").read_bytes()
    assert len(image) == blob.uncompressed_size
    chunks = blobmeta.from_cache_file(blob, (cache / f"{blob.id}.blob.meta").read_bytes())
    row = tree.find(b"/a/y")
    assert row is not None
    (index,) = tree.node_chunks(row)["index"]
    assert image[int(chunks.uoffset[index]) :][:100_000] == b"y" * 100_000


def test_prefetch_list(folder: Path, tmp_path: Path) -> None:
    lines = b"/sub\n  /sub/file  \nrelative\n\n/zero\n/nowhere\n"
    done = run("create", "--prefetch-policy", "fs", "-B", tmp_path / "b", "-D", tmp_path, folder, stdin=lines)
    tree = bootstrap.load(str(tmp_path / "b"))
    assert [tree.path(row) for row in tree.prefetch] == [b"/sub", b"/zero"]
    assert b"relative is not absolute" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "create -B b -b x",  # no source
        "create -b x SOURCE",
        "create -B b SOURCE",
        "create -B b --blob-inline-meta -b x SOURCE",
        "create --blob-inline-meta --blob-id x -b x SOURCE",
        "create -t targz-ref --fs-version 5 -B b -b x SOURCE",
        "create -t targz-ref -E -B b -b x SOURCE",
        "create -t targz-ref --prefetch-policy blob -B b -b x SOURCE",
        "create -t estargztoc-ref -B b -b x SOURCE",
        "create -t nonsense -B b -b x SOURCE",
        "create --compressor gzip -B b -b x SOURCE",
        "create --fs-version 4 -B b -b x SOURCE",
        "create --chunk-size many -B b -b x SOURCE",
        "create --frobnicate SOURCE",
        "merge SOURCE",
        "merge -B b",
        "merge -B b -D d SOURCE",
    ],
)
def test_wrong_usage(arguments: str, folder: Path, tmp_path: Path) -> None:
    words = [str(folder) if word == "SOURCE" else word for word in arguments.split()]
    before = blobs(tmp_path)
    done = run(*words, code=2, cwd=tmp_path)
    assert b"Error: " in done.stderr
    assert blobs(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("create -t tar-rafs -B b -D . folder", "folder is not a file"),
        ("create -B b -D . layer.tar.gz", "layer.tar.gz is not a directory"),
        ("create -B b -D . nowhere", "nowhere: cannot read the source"),
        ("create -t tar-rafs -B b -D . bad.tar", "bad.tar: not a tar header"),
        ("create -B b -D . --chunk-size 0x1001 folder", "chunk size 0x1001 is not a power of two"),
        ("create -B b -D . --chunk-size 0x2000000 folder", "chunk size 0x2000000"),
        ("create -B b -D . --batch-size 0x200000 folder", "batch size"),
        ("create -v 5 -B b -D . --features blob-toc folder", "version 5 has no table of contents"),
        ("create -v 5 -B b -D . -E folder", "version 5 has no encryption"),
        ("create -B b -D nowhere folder", "nowhere: cannot be written"),
        ("create -B b -D . --attributes a folder", "a: cannot be read"),
        ("create -B nowhere/b -D . folder", "nowhere/b: cannot be written"),
        ("create -B b -D . --chunk-dict redis=x folder", "kind 'redis'"),
        ("create -B b -D . --chunk-dict bad.tar folder", "bad.tar"),
        ("merge -B b bad.tar", "bad.tar: not a RAFS bootstrap"),
        ("merge -B b nowhere", "nowhere: cannot be read"),
        ("merge -B b --blob-sizes 1,2 bad.tar", "--blob-sizes has 2 items for 1 sources"),
        ("merge -B b --blob-sizes x bad.tar", "decimal numbers"),
    ],
)
def test_bad_input(arguments: str, message: str, folder: Path, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"not an archive " * 200)
    before = blobs(tmp_path)
    done = run("-l", "warn", *arguments.split(), code=1, cwd=tmp_path)
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("Error: ")
    assert message in line
    assert blobs(tmp_path) == before


def test_layers_that_do_not_fit_together(folder: Path, tmp_path: Path) -> None:
    run("create", "-B", tmp_path / "b1", "-D", tmp_path, folder)
    run("create", "-v", "5", "-B", tmp_path / "b2", "-D", tmp_path, folder)
    done = run("merge", "-B", tmp_path / "m", tmp_path / "b1", tmp_path / "b2", code=2)
    assert b"Inconsistent RAFS Filesystem" in done.stderr


def test_merge_names_blobs_by_files(folder: Path, tmp_path: Path) -> None:
    run("create", "-B", tmp_path / "b1.boot.x", "-D", tmp_path, folder)
    run("merge", "-B", tmp_path / "m", tmp_path / "b1.boot.x")
    assert [blob.id for blob in bootstrap.load(str(tmp_path / "m")).blobs] == ["b1"]
    run("merge", "-B", tmp_path / "m", "--original-blob-ids", "other", tmp_path / "b1.boot.x")
    assert [blob.id for blob in bootstrap.load(str(tmp_path / "m")).blobs] == ["other"]


def test_merge_into_a_folder(folder: Path, tmp_path: Path) -> None:
    run("create", "-B", tmp_path / "b1", "-D", tmp_path, folder)
    target = tmp_path / "out"
    target.mkdir()
    run("merge", "-D", target, tmp_path / "b1")
    import hashlib

    (path,) = blobs(target)
    assert path.name == hashlib.sha256(path.read_bytes()).hexdigest()


def test_log_file_and_options_anywhere(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "build"
    first = run("-L", log, "create", "-B", tmp_path / "b", "-D", tmp_path, folder)
    second = run(
        "create", "-B", tmp_path / "b", "-D", tmp_path, "--log-file", log, folder, "--log-level=info"
    )
    assert (first.stderr, second.stderr) == (b"", b"")
    lines = log.with_suffix(".log").read_text().splitlines()
    pattern = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} \+00:00\] INFO successfully built RAFS filesystem:"
    assert sum(bool(re.match(pattern, line)) for line in lines) == 2


def test_half_a_build_leaves_nothing(archive: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[:-2000])
    target = tmp_path / "out"
    target.mkdir()
    run("create", "-t", "targz-rafs", "-B", target / "boot", "-D", target, cut, code=1)
    assert blobs(target) == []


@pytest.mark.parametrize("features", [(), ("--features", "blob-toc")])
@pytest.mark.parametrize("kind", ["targz-ref", "estargz-ref"])
def test_tables_of_a_reference_are_found(
    archive: Path, tmp_path: Path, kind: str, features: tuple[str, ...]
) -> None:
    """The bootstrap names the file that lies in the directory."""
    layer = tmp_path / hashlib.sha256(archive.read_bytes()).hexdigest()
    layer.write_bytes(archive.read_bytes())
    run("create", "-t", kind, "-B", tmp_path / "boot", "-D", tmp_path, *features, archive)
    run("check", tmp_path / "boot", "-D", tmp_path)


@pytest.mark.parametrize("features", [(), ("--features", "blob-toc")])
def test_a_converted_image_is_sound_with_its_blobs(
    archive: Path, folder: Path, tmp_path: Path, features: tuple[str, ...]
) -> None:
    """As converters make it: layers with their bootstraps inline, then merged."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    layers = []
    for kind, source in (("tar-rafs", archive), ("dir-rafs", folder)):
        blob = tmp_path / "blob"
        run("create", "-t", kind, "--blob-inline-meta", *features, "-b", blob, source)
        layers.append(blob.rename(blobs / hashlib.sha256(blob.read_bytes()).hexdigest()))
    run("merge", "-B", tmp_path / "boot", *layers)
    done = run("check", tmp_path / "boot", "-D", blobs)
    assert done.stdout.count(b"compressed size") == 4
    layers[0].write_bytes(layers[0].read_bytes()[:100])
    assert b"wrong size of the blob" in run("check", tmp_path / "boot", "-D", blobs, code=1).stderr
