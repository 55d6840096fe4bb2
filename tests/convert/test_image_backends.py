"""Images whose blobs are in a storage backend: convert, check, mount, copy, and back."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from documents import load
from faulty import FaultyRegistry
from nydusify_command import Nydusify, one_fatal_line
from tools import mounted

from nydus.oci import model
from nydus.oci.place import RegistryPlace
from nydus.oci.reference import parse

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from objectstore_server import ObjectStoreServer, rclone_server

pytestmark = pytest.mark.vectors


@pytest.fixture
def bucket() -> Iterator[ObjectStoreServer]:
    with closing(ObjectStoreServer()) as server:
        yield server


@pytest.fixture(params=["s3", "oss", "localfs"])
def backend(request: pytest.FixtureRequest, bucket: ObjectStoreServer, tmp_path: Path) -> tuple[str, str]:
    """Type and configuration."""
    kind: str = request.param
    config = {"dir": str(tmp_path / "blobs")} if kind == "localfs" else bucket.config()
    return kind, json.dumps(config)


def options(backend: tuple[str, str], side: str = "") -> tuple[str, ...]:
    return f"--{side}backend-type", backend[0], f"--{side}backend-config", backend[1]


def of(reference: str) -> RegistryPlace:
    return RegistryPlace(parse(reference), plain_http=True)


def test_all_commands(
    nydusify: Nydusify,
    server: FaultyRegistry,
    source: str,
    bucket: ObjectStoreServer,
    backend: tuple[str, str],
    tmp_path: Path,
) -> None:
    target = f"{server.host}/small:stored"

    def run(*arguments: str) -> str:
        done = nydusify(*arguments, "--plain-http")
        assert done.returncode == 0, done.stderr
        return done.stderr

    run("convert", "--source", source, "--target", target, *options(backend))
    manifest = load(of(target).open(), "stored")
    assert len(manifest["layers"]) == len(manifest["config"]["content"]["rootfs"]["diff_ids"]) == 1
    assert model.NYDUS_BOOTSTRAP in manifest["layers"][0]["annotations"]
    assert len(manifest["config"]["content"]["history"]) == 1
    blobs = list((tmp_path / "blobs").iterdir()) if backend[0] == "localfs" else list(bucket.objects)
    assert len(blobs) == 3
    if backend[0] != "localfs":
        assert all(key.startswith("images/nydus/") for key in blobs) and not bucket.uploads

    run("check", "--source", source, "--target", target, "--no-mount", *options(backend, "target-"))
    done = nydusify("check", "--target", target, "--plain-http")
    assert done.returncode == 1 and "say which with --target-backend-type" in done.stderr

    copied = f"{server.host}/copied:whole"
    run("copy", "--source", target, "--target", copied, *options(backend, "source-"))
    run("check", "--source", source, "--target", copied, "--no-mount")
    stored = options(backend, "source-")
    run("check", "--source", target, "--target", copied, "--no-mount", *stored)

    (tmp_path / "files").write_text("/\n")
    optimized = f"{server.host}/small:optimized"
    files = ("--prefetch-files", str(tmp_path / "files"))
    run("optimize", "--source", target, "--target", optimized, *files, *stored)
    manifest = load(of(optimized).open(), "optimized")
    assert len(manifest["layers"]) == len(manifest["config"]["content"]["rootfs"]["diff_ids"]) == 1
    run("check", "--source", source, "--target", optimized, "--no-mount", *options(backend, "target-"))
    done = nydusify("optimize", "--source", target, "--target", optimized, *files, "--plain-http")
    assert done.returncode == 1 and "say which with --source-backend-type" in done.stderr

    back = f"{server.host}/back:oci"
    told = run("convert", "--reverse", "--source", target, "--target", back, *options(backend))
    assert "converted layer 1/1: " in told and "converted 1 layer, " in told
    assert ": 0 B to" not in told and 'layer=""' not in told
    run("check", "--source", back, "--target", copied, "--no-mount")


@pytest.mark.root
def test_a_mount_reads_the_bucket(
    nydusify: Nydusify, server: FaultyRegistry, source: str, bucket: ObjectStoreServer
) -> None:
    stored = ("s3", json.dumps(bucket.config()))
    target = f"{server.host}/small:stored"
    common = ("--source", source, "--target", target, "--plain-http")
    assert nydusify("convert", *common, *options(stored)).returncode == 0
    done = nydusify("check", *common, *options(stored, "target-"))
    assert done.returncode == 0, done.stderr
    assert "verified image" in done.stderr


@pytest.mark.root
def test_a_mount_needs_to_know_the_backend(
    nydusify: Nydusify, server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    target = f"{server.host}/small:stored"
    stored = options(("localfs", json.dumps({"dir": str(tmp_path / "blobs")})))
    done = nydusify("convert", "--source", source, "--target", target, "--plain-http", *stored)
    assert done.returncode == 0, done.stderr
    message = one_fatal_line(nydusify("mount", "--target", target, "--plain-http"))
    assert message == f"{target}: its blobs are in a storage backend; say which with --backend-type"


@pytest.mark.root
@pytest.mark.slow
def test_a_real_s3_server(
    nydusify: Nydusify, server: FaultyRegistry, source: str, vectors: Path, tmp_path: Path
) -> None:
    """It checks every signature, and has its own idea of ranges and of uploads in parts."""

    def run(*arguments: str) -> None:
        done = nydusify(*arguments, "--plain-http")
        assert done.returncode == 0, done.stderr

    target, optimized, back = (f"{server.host}/small:{tag}" for tag in ("stored", "optimized", "back"))
    with rclone_server(tmp_path / "s3") as config:
        stored = ("s3", json.dumps(config))
        run("convert", "--source", source, "--target", target, *options(stored))
        blobs = list((tmp_path / "s3/root/images/nydus").iterdir())
        assert len(blobs) == 3
        assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in blobs)
        run("check", "--source", source, "--target", target, *options(stored, "target-"))

        lines = (vectors / "oci/expected.jsonl").read_text().splitlines()
        files = {line["path"]: line["sha256"] for line in map(json.loads, lines) if line.get("sha256")}
        with mounted(target, tmp_path / "mount", *options(stored)) as mountpoint:
            for path, digest in files.items():
                assert hashlib.sha256((mountpoint / path.lstrip("/")).read_bytes()).hexdigest() == digest
        assert len(files) > 5

        (tmp_path / "files").write_text("/\n")
        wanted = ("--prefetch-files", str(tmp_path / "files"))
        run("optimize", "--source", target, "--target", optimized, *wanted, *options(stored, "source-"))
        assert len(list((tmp_path / "s3/root/images/nydus").iterdir())) == 4
        run("check", "--source", source, "--target", optimized, *options(stored, "target-"))
        run("convert", "--reverse", "--source", optimized, "--target", back, *options(stored))
        run("check", "--source", back, "--target", target, "--no-mount", *options(stored, "target-"))

        stranger = ("s3", json.dumps({**config, "access_key_secret": "wrong"}))
        done = nydusify("check", "--target", target, "--plain-http", *options(stranger, "target-"))
        assert done.returncode == 1 and "s3 bucket images" in done.stderr.splitlines()[-1]


def test_what_is_there_is_sent_again_only_when_forced(
    nydusify: Nydusify, source: str, bucket: ObjectStoreServer
) -> None:
    stored = ("s3", json.dumps(bucket.config()))
    common = ("convert", "--source", source, "--target-suffix=-n", "--plain-http", *options(stored))

    def writes() -> int:
        return sum(method == "PUT" for method, _ in bucket.seen)

    assert nydusify(*common).returncode == 0
    first = writes()
    assert first == 3
    assert nydusify(*common).returncode == 0
    assert writes() == first
    assert nydusify(*common, "--backend-force-push").returncode == 0
    assert writes() == 2 * first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("s3", ""), "needs exactly one of"),
        (("s3", "{}"), "bucket_name"),
        (("s3", "[]"), "not a JSON object"),
        (("nfs", "{}"), "unknown backend type 'nfs'"),
        (("localfs", '{"folder": "x"}'), "folder"),
    ],
)
def test_wrong_configurations(nydusify: Nydusify, arguments: tuple[str, str], words: str) -> None:
    done = nydusify("convert", "--source", "a", "--target", "b", *options(arguments))
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_bucket_that_refuses_leaves_no_image(
    nydusify: Nydusify, server: FaultyRegistry, source: str, bucket: ObjectStoreServer
) -> None:
    stored = ("s3", json.dumps(bucket.config(access_key_id="STRANGER")))
    done = nydusify("convert", "--source", source, "--target-suffix=-n", "--plain-http", *options(stored))
    assert done.returncode == 1
    assert "s3 bucket images" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not of(f"{server.host}/small:latest-n").open_sink().has_manifest("latest-n")
