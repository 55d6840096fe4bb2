"""Model artifacts: mounted without being unpacked, and without another copy of their data."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import pytest
from documents import load
from faulty import FaultyRegistry
from images import place
from nydusify_command import Nydusify, one_fatal_line

from nydus.convert.opened import open_nydus
from nydus.oci import model

TYPE = "application/vnd.cnai.model.{}.v1.{}"
FILES = {
    "weights/model.safetensors": random.Random(1).randbytes(9_000_000),
    "config.json": b'{"layers": 3}',
    "README.md": b"A model\n" * 1000,
    "empty": b"",
    "code/run.py": b"print('hello')\n",
}


def packed(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.uid, entry.mode = len(FILES[name]), 1_700_000_000, 1000, 0o640
            archive.addfile(entry, io.BytesIO(FILES[name]))
    return buffer.getvalue()


def push(
    server: FaultyRegistry, *, weight: str = TYPE.format("weight", "tar"), code: str = "code/run.py"
) -> str:
    """A model as modctl pushes it."""
    reference = f"{server.host}/models/small:v1"
    repository = place(reference).repository()
    layers = []
    for kind, names in (
        (weight, ["weights/model.safetensors"]),
        ("weight.config", ["config.json"]),
        ("doc", ["README.md", "empty"]),
    ):
        media_type = kind if "/" in kind else TYPE.format(kind, "tar")
        annotations = {"org.cnai.model.filepath": names[0]}
        layers.append(repository.put_blob(packed(*names), media_type, annotations=annotations))
    raw = {"org.cnai.model.filepath": code}
    layers.append(repository.put_blob(FILES["code/run.py"], TYPE.format("code", "raw"), annotations=raw))
    config = {
        "descriptor": {"name": "small"},
        "modelfs": {"type": "layers", "diffIds": [x.digest for x in layers]},
    }
    manifest = model.Manifest(
        schema_version=2,
        media_type=model.OCI_MANIFEST,
        artifact_type="application/vnd.cnai.model.manifest.v1+json",
        config=repository.put_blob(model.encode(config), "application/vnd.cnai.model.config.v1+json"),
        layers=tuple(layers),
    )
    repository.put_manifest("v1", model.encode(manifest), model.OCI_MANIFEST)
    return reference


@pytest.fixture
def artifact(server: FaultyRegistry) -> str:
    return push(server)


def convert(nydusify: Nydusify, source: str, target: str, *more: str) -> None:
    options = ("--source-backend-type", "model-artifact", "--plain-http", *more)
    done = nydusify("convert", "--source", source, "--target", target, *options)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("repository", ["models/small", "elsewhere"])
def test_its_documents_and_files(
    server: FaultyRegistry, nydusify: Nydusify, artifact: str, repository: str
) -> None:
    target = f"{server.host}/{repository}:nydus"
    convert(nydusify, artifact, target)
    before, after = load(place(artifact).open(), "v1"), load(place(target).open(), "nydus")
    assert after["artifactType"] == before["artifactType"] and after["config"] == before["config"]
    assert after["layers"][:-1] == before["layers"], "the layers stay as they are"
    last = after["layers"][-1]["annotations"]
    assert last["containerd.io/snapshot/nydus-artifact-type"] == before["artifactType"]
    assert after["subject"]["mediaType"] == model.OCI_MANIFEST
    opened = open_nydus(place(target))
    described = json.loads(opened.files["image/backend.json"])
    assert [blob["config"]["chunk_size"] for blob in described["blobs"]] == ["64MiB", "4MiB", "4MiB", "4MiB"]
    assert [f"sha256:{blob.id}" for blob in opened.tree.blobs] == [
        layer["digest"] for layer in before["layers"]
    ]
    for more in ((), ("--source", artifact)):
        done = nydusify("check", "--target", target, "--plain-http", "--no-mount", *more)
        assert done.returncode == 0, done.stderr
    assert "a model artifact with a Nydus bootstrap" in nydusify("info", target, "--plain-http").stdout
    assert "a model artifact\n" in nydusify("info", artifact, "--plain-http").stdout


@pytest.mark.root
@pytest.mark.parametrize("chunk_size", ["", "0x100000", "0x400000"])
def test_it_can_be_mounted(
    server: FaultyRegistry, nydusify: Nydusify, artifact: str, chunk_size: str
) -> None:
    target = f"{server.host}/models/small:nydus"
    convert(nydusify, artifact, target, *(("--chunk-size", chunk_size) if chunk_size else ()))
    done = nydusify("check", "--source", artifact, "--target", target, "--plain-http")
    assert done.returncode == 0 and "the same as" in done.stderr, done.stderr


def test_what_cannot_be_used(
    server: FaultyRegistry, nydusify: Nydusify, artifact: str, tmp_path: Path
) -> None:
    options = ["--target", f"{artifact}-n", "--plain-http"]

    def refused(source: str, kind: str = "model-artifact") -> str:
        return one_fatal_line(
            nydusify("convert", "--source", source, "--source-backend-type", kind, *options)
        )

    assert "there is model-artifact" in refused(artifact, "modelfile")
    convert(nydusify, artifact, f"{artifact}-done")
    assert "a bootstrap already" in refused(f"{artifact}-done")
    assert "layer 1 is compressed (gzip)" in refused(push(server, weight=TYPE.format("weight", "tar+gzip")))
    for path in ("a/../../b", "a\0b", "", "."):
        assert "layer 4" in refused(push(server, code=path))
    assert "layer 1 is of an unknown type" in refused(push(server, weight="text/plain"))
    for size in ("0x8000000", "0x200000000", "0x1001", "-4096"):
        done = nydusify(
            *("convert", "--source", artifact, "--source-backend-type", "model-artifact", *options),
            *("--chunk-size", size),
        )
        assert "chunk-size must be a power of two from 0x1000 to 0x4000000" in one_fatal_line(done)
    done = nydusify("convert", "--source", artifact, *options)
    assert done.returncode == 1 and "--source-backend-type model-artifact" in one_fatal_line(done)


def test_a_damaged_layer(server: FaultyRegistry, nydusify: Nydusify, artifact: str) -> None:
    target = f"{artifact}-nydus"
    convert(nydusify, artifact, target)
    digest = load(place(artifact).open(), "v1")["layers"][0]["digest"].partition(":")[2]
    path = server.store.blobs / digest
    data = bytearray(path.read_bytes())
    data[5_000_000] ^= 1
    path.write_bytes(data)
    done = nydusify("check", "--target", target, "--plain-http", "--no-mount")
    assert "corrupted blob" in one_fatal_line(done)
