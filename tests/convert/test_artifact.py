"""Model artifacts: mounted without being unpacked, and without another copy of their data."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from documents import load
from faulty import FaultyRegistry
from images import place
from nydusify_command import Nydusify, one_fatal_line

from nydus.convert.opened import open_nydus
from nydus.errors import NydusError
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
    return push_to(f"{server.host}/models/small:v1", weight, code)


def push_to(reference: str, weight: str = TYPE.format("weight", "tar"), code: str = "code/run.py") -> str:
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

    assert "there is model-artifact" in refused(artifact, "oss")
    convert(nydusify, artifact, f"{artifact}-done")
    assert "a bootstrap already" in refused(f"{artifact}-done")
    for kind in ("tar+br", "raw+gzip"):
        message = refused(push(server, weight=TYPE.format("weight", kind)))
        assert "layer 1 cannot be used: " in message and "tar (plain, +gzip or +zstd)" in message
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


PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstandard.compress, "": bytes}


def push_layers(server: FaultyRegistry, *layers: tuple[str, bytes]) -> str:
    """A model of weights; for each the compression and the archive."""
    reference = f"{server.host}/models/weights:v1"
    repository = place(reference).repository()
    stored = []
    for how, data in layers:
        kind = TYPE.format("weight", f"tar+{how}" if how else "tar")
        stored.append(repository.put_blob(PACK[how](data), kind, annotations={}))
    diff_ids = [model.digest(data) for _, data in layers]
    config = {"descriptor": {"name": "x"}, "modelfs": {"type": "layers", "diffIds": diff_ids}}
    manifest = model.Manifest(
        schema_version=2,
        media_type=model.OCI_MANIFEST,
        artifact_type="application/vnd.cnai.model.manifest.v1+json",
        config=repository.put_blob(model.encode(config), "application/vnd.cnai.model.config.v1+json"),
        layers=tuple(stored),
    )
    repository.put_manifest("v1", model.encode(manifest), model.OCI_MANIFEST)
    return reference


def archive(**members: bytes | str | None) -> bytes:
    """A tar archive of files, links (text) and folders (None); ``__`` is a slash, ``wh_`` is ``.wh.``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, what in members.items():
            entry = tarfile.TarInfo(name.replace("__", "/").replace("wh_", ".wh."))
            entry.mode = 0o755
            if isinstance(what, bytes):
                entry.size = len(what)
                tar.addfile(entry, io.BytesIO(what))
            else:
                entry.type = tarfile.DIRTYPE if what is None else tarfile.SYMTYPE
                entry.linkname = what or ""
                tar.addfile(entry)
    return buffer.getvalue()


def weights(seed: int) -> bytes:
    return random.Random(seed).randbytes(3_000_000) + bytes(2_000_000)


MIXED = [
    ("", archive(first=weights(1), d=None)),
    ("gzip", archive(d=None, d__second=weights(2), d__wh_first=b"a file like any other")),
    ("zstd", archive(third=weights(3), link="d")),
    ("", archive(fourth=weights(4))),
]


@pytest.mark.parametrize(
    ("layers", "added"),
    [(MIXED[1:2], 1), (MIXED[2:3], 1), (MIXED, 2), ([MIXED[0], *MIXED[2:]], 1)],
    ids=["gzip", "zstd", "all", "zstd between"],
)
@pytest.mark.parametrize("mounted", [False, pytest.param(True, marks=pytest.mark.root)])
def test_compressed_layers(
    server: FaultyRegistry, nydusify: Nydusify, layers: list[tuple[str, bytes]], added: int, mounted: bool
) -> None:
    """gzip gets an index over it, zstd a copy that can be read in parts."""
    source = push_layers(server, *layers)
    target = f"{server.host}/elsewhere:nydus"
    convert(nydusify, source, target)
    before, after = load(place(source).open(), "v1"), load(place(target).open(), "nydus")
    assert after["layers"][: len(layers)] == before["layers"], "the layers stay as they are"
    more = after["layers"][len(layers) : -1]
    assert len(more) == added and all(layer["mediaType"] == model.NYDUS_BLOB for layer in more)
    indexed = [
        layer["digest"] for layer, (how, _) in zip(before["layers"], layers, strict=True) if how == "gzip"
    ]
    found = [layer["annotations"].get(model.NYDUS_REF) for layer in more]
    assert [digest for digest in found if digest] == indexed
    assert all(layer["size"] < 300_000 for layer in more if model.NYDUS_REF in layer["annotations"])
    opened = open_nydus(place(target))
    described = json.loads(opened.files["image/backend.json"])["blobs"]
    assert [blob["config"]["digest"] for blob in described] == [
        layer["digest"] for layer, (how, _) in zip(before["layers"], layers, strict=True) if not how
    ]
    options = ("--source", source, "--target", target, "--plain-http", *(() if mounted else ("--no-mount",)))
    done = nydusify("check", *options)
    assert done.returncode == 0 and "the same as" in done.stderr, done.stderr
    assert "a model artifact with a Nydus bootstrap" in nydusify("info", target, "--plain-http").stdout


@pytest.mark.parametrize(
    ("layers", "paths"),
    [
        ([archive(wh_gone=b"x", gone=b"1")], ["/.wh.gone", "/gone"]),
        ([archive(gone=b"1"), archive(wh_gone=b"x")], ["/.wh.gone", "/gone"]),
        ([archive(d=None, d__f=b"1"), archive(**{"d__wh_wh_.opq": b""})], ["/d", "/d/.wh..wh..opq", "/d/f"]),
        ([archive(real=None, link="real", link__f=b"1")], ["/link", "/real", "/real/f"]),
        ([archive(real=None, link="real"), archive(link__f=b"1")], ["/link", "/real", "/real/f"]),
        ([archive(real=None, link="../../real"), archive(link__f=b"1")], ["/link", "/real", "/real/f"]),
    ],
)
def test_unusual_names(
    server: FaultyRegistry, nydusify: Nydusify, layers: list[bytes], paths: list[str]
) -> None:
    """The layers of a model hide nothing of each other, and links to folders are followed."""
    source = push_layers(server, *(("", data) for data in layers))
    target = f"{source}-nydus"
    convert(nydusify, source, target)
    assert [path.decode() for _, path in open_nydus(place(target)).tree.walk()] == ["/", *paths]
    done = nydusify("check", "--source", source, "--target", target, "--plain-http", "--no-mount")
    assert done.returncode == 0 and "the same as" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([MIXED[0], ("gzip", archive(first=b"2"))], "several layers have this file (found /first)"),
        ([("zstd", archive(d=b"2")), MIXED[0]], "several layers have this file (found /d)"),
        (
            [("gzip", archive(link="d")), ("", archive(link__f=b"1"))],
            "several layers have this file (found /link)",
        ),
    ],
)
def test_layers_that_overlap(
    server: FaultyRegistry, nydusify: Nydusify, layers: list[tuple[str, bytes]], words: str
) -> None:
    source = push_layers(server, *layers)
    options = ("--source", source, "--target", f"{source}-n", "--plain-http")
    done = nydusify("convert", *options, "--source-backend-type", "model-artifact")
    assert words in one_fatal_line(done)


def test_a_damaged_compressed_layer(server: FaultyRegistry, nydusify: Nydusify) -> None:
    for how in ("gzip", "zstd"):
        source = push_layers(server, (how, archive(a=weights(5))))
        digest = load(place(source).open(), "v1")["layers"][0]["digest"]
        path = server.store.blobs / digest.partition(":")[2]
        data = bytearray(path.read_bytes())
        data[1_000_000] ^= 1
        path.write_bytes(data)
        options = ("--source", source, "--target", f"{source}-n", "--plain-http")
        done = nydusify("convert", *options, "--source-backend-type", "model-artifact")
        assert "corrupted blob" in one_fatal_line(done)
        with pytest.raises(NydusError):
            open_nydus(place(f"{source}-n"))


def test_a_model_that_was_not_pushed(
    server: FaultyRegistry, nydusify: Nydusify, docker_registry: str, tmp_path: Path
) -> None:
    """modctl keeps models as a registry does: docker-registry writes the same folders."""
    push_to(f"{docker_registry}/example.org/models/small:v1")
    (tmp_path / "modctl").mkdir()
    (tmp_path / "modctl/content.v1").symlink_to(tmp_path / "data")
    config = json.dumps({"context": "/nowhere", "work_dir": str(tmp_path / "modctl")})
    target, options = f"{server.host}/models/kept:v1", ("--source-backend-type", "modelfile", "--plain-http")
    done = nydusify(
        *("convert", "--source", "example.org/models/small:v1", "--target", target, *options),
        *("--source-backend-config", config),
    )
    assert done.returncode == 0, done.stderr
    pushed = push(server)
    done = nydusify("check", "--source", pushed, "--target", target, "--plain-http", "--no-mount")
    assert done.returncode == 0 and "the same as" in done.stderr, done.stderr
    for source, text, words in (
        ("example.org/models/small:v2", config, "no model example.org/models/small:v2 (no file "),
        ("example.org/models/other:v1", config, "no model example.org/models/other:v1"),
        ("example.org/models/small:v1", "{}", "needs --source REFERENCE"),
        ("example.org/models/small:v1", "x", "not JSON"),
    ):
        done = nydusify(
            *("convert", "--source", source, "--target", target, *options, "--source-backend-config", text)
        )
        assert words in one_fatal_line(done)
    for path in (tmp_path / "data/docker/registry/v2/blobs").rglob("data"):
        if path.stat().st_size > 5_000_000:
            path.write_bytes(path.read_bytes()[:-1] + b"x")
    done = nydusify(
        *("convert", "--source", "example.org/models/small:v1", "--target", target, *options),
        *("--source-backend-config", config),
    )
    assert "corrupted blob" in one_fatal_line(done)
