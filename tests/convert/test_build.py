"""``nydusify build``: directories become images, on disk and in buckets."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from nydusify_command import Nydusify

import nydus

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from objectstore_server import ObjectStoreServer

DATA = os.urandom(3 << 20)


@pytest.fixture
def server() -> Iterator[ObjectStoreServer]:
    with closing(ObjectStoreServer()) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "rootfs"
    (folder / "etc").mkdir(parents=True)
    (folder / "etc/big").write_bytes(DATA)
    (folder / "etc/name").write_text("one")
    return folder


def ids(image: nydus.image.Image) -> list[str]:
    return [blob.id for blob in image.blobs]


@pytest.mark.parametrize("version", ["5", "6"])
@pytest.mark.parametrize("name", ["app", "app.boot"])
def test_an_image_on_disk(nydusify: Nydusify, folder: Path, tmp_path: Path, version: str, name: str) -> None:
    done = nydusify(
        "pack",
        "--source-dir",
        str(folder),
        "--name",
        name,
        "--fs-version",
        version,
        "--chunk-size",
        "0x10000",
    )
    assert done.returncode == 0, done.stderr
    bootstrap = "app.boot" if "." in name else "app.meta"
    assert "successfully built Nydus image (bootstrap:'" in done.stderr
    output = tmp_path / "cwd/.nydus-build-output"
    assert sorted(path.name for path in output.iterdir()) == sorted(["app.blob", bootstrap, "output.json"])
    result = json.loads((output / "output.json").read_text())
    assert result["fs_version"] == version and result["compressor"] == "zstd"
    with nydus.open(output / bootstrap, output / "app.blob") as image:
        assert image.read("/etc/big") == DATA
        assert ids(image) == result["blobs"]


def test_parents_and_dictionaries(nydusify: Nydusify, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "cwd/out"
    assert nydusify("build", "--source-dir", str(folder), "--name", "base", "-o", "out").returncode == 0
    base = hashlib.sha256((output / "base.blob").read_bytes()).hexdigest()
    upper = tmp_path / "upper"
    (upper / "etc").mkdir(parents=True)
    (upper / "etc/.wh.name").touch()
    (upper / "etc/copy").write_bytes(DATA)
    (upper / "etc/more").write_text("more")
    common = ("build", "--source-dir", str(upper), "-o", "out")
    done = nydusify(*common, "--name", "child", "--parent-bootstrap", "out/base.meta")
    assert done.returncode == 0, done.stderr
    done = nydusify(*common, "--name", "with", "--chunk-dict", "bootstrap=out/base.meta")
    assert done.returncode == 0, done.stderr
    (output / base).write_bytes((output / "base.blob").read_bytes())
    with nydus.open(output / "child.meta", output) as image:
        assert image.listdir("/etc") == ["big", "copy", "more"]
        assert image.read("/etc/copy") == image.read("/etc/big") == DATA
        assert ids(image)[0] == base and (output / ids(image)[1]).stat().st_size < 10_000
    assert (output / "with.blob").stat().st_size < 10_000
    own = json.loads((output / "output.json").read_text())["blobs"][-1]
    (output / own).write_bytes((output / "with.blob").read_bytes())
    with nydus.open(output / "with.meta", output) as image:
        assert image.read("/etc/copy") == DATA
        assert image.read("/etc/more") == b"more"


def test_pushing_and_compacting(
    nydusify: Nydusify, server: ObjectStoreServer, folder: Path, tmp_path: Path
) -> None:
    config = server.config(meta_prefix="meta/", blob_prefix="data/")
    (tmp_path / "backend.json").write_text(json.dumps(config))
    backend = ("--backend-type", "s3", "--backend-config-file", str(tmp_path / "backend.json"))
    parent: tuple[str, ...] = ()
    for number in range(4):
        (folder / "etc" / f"file{number}").write_bytes(os.urandom(100_000))
        name = f"image{number}"
        done = nydusify(
            "build",
            "--source-dir",
            str(folder),
            "--name",
            name,
            "-o",
            "out",
            "--backend-push",
            *backend,
            *parent,
        )
        assert done.returncode == 0, done.stderr
        parent = ("--parent-bootstrap", f"out/{name}.meta")
    output = tmp_path / "cwd/out"
    blobs = {key.rpartition("/")[2] for key in server.objects if key.startswith("images/data/")}
    assert {key for key in server.objects if "/data/" not in key} == {
        f"images/meta/image{number}.meta" for number in range(4)
    }
    assert len(blobs) == 4
    (tmp_path / "compact.json").write_text('{"LayersToCompact": "2", "min_used_ratio": 5}')
    done = nydusify(
        "build", "--source-dir", str(folder), "--name", "last", "-o", "out", "--backend-push",
        *backend, *parent, "--compact", "--compact-config-file", str(tmp_path / "compact.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    backend_of_blobs = {"type": "s3", "config": {**server.config(), "object_prefix": "data/"}}
    with nydus.open(output / "last.meta", backend_of_blobs) as image:
        assert len(image.blobs) == 1 and not set(ids(image)) & blobs
        assert image.read("/etc/big") == DATA
        assert image.read("/etc/file3") == (folder / "etc/file3").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend-push"], "--backend-push and --compact need"),
        (["--compact", "--backend-type", "s3", "--backend-config", "{}"], "needs a parent bootstrap"),
        (["--backend-config", "{}", "--backend-push"], "bucket_name"),
        (["--backend-config", "[]"], "not a JSON object"),
        (["--backend-type", "localfs", "--backend-config", "{}"], "there are oss and s3"),
        (["--chunk-size", "5000"], "power of two"),
        (["--name", "a/b"], "is not a name"),
        (["--source-dir", "none"], "none is not a directory"),
        (["--parent-bootstrap", "none"], "none: cannot be read"),
    ],
)
def test_wrong_options(nydusify: Nydusify, folder: Path, arguments: list[str], words: str) -> None:
    done = nydusify("build", "--source-dir", str(folder), "--name", "x", *arguments)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
