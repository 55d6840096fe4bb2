"""``nydusify chunkdict generate``: an image of the chunks that several images share."""

from __future__ import annotations

import gzip
import io
import json
import random
import sqlite3
import tarfile
from pathlib import Path

import pytest
from faulty import FaultyRegistry
from nydusify_command import Nydusify

from nydus.convert.backend import FolderPlace
from nydus.convert.check import check
from nydus.convert.copy import copy
from nydus.convert.opened import Opened, open_nydus
from nydus.convert.select import host_platform
from nydus.oci import model
from nydus.oci.place import ArchivePlace, RegistryPlace
from nydus.oci.reference import parse

FILES = {name: random.Random(name).randbytes(300_000) for name in "abcdef"}


def place(reference: str) -> RegistryPlace:
    return RegistryPlace(parse(reference), plain_http=True)


def push(server: FaultyRegistry, name: str, *layers: str) -> str:
    """Pushes an ordinary image whose layers have the files that their texts name."""
    reference = f"{server.host}/{name}:v1"
    repository = place(reference).repository()
    described, diff_ids = [], []
    for layer in layers:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for file in layer:
                entry = tarfile.TarInfo(file)
                entry.size = len(FILES[file])
                archive.addfile(entry, io.BytesIO(FILES[file]))
        diff_ids.append(model.digest(buffer.getvalue()))
        described.append(
            repository.put_blob(gzip.compress(buffer.getvalue(), 1, mtime=0), model.OCI_LAYER_GZIP)
        )
    platform = host_platform()
    config = {
        "architecture": platform.architecture,
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created_by": f"layer {layer}"} for layer in layers],
    }
    manifest = model.Manifest(
        schema_version=2,
        media_type=model.OCI_MANIFEST,
        config=repository.put_blob(model.encode(config), model.OCI_CONFIG),
        layers=tuple(described),
    )
    repository.put_manifest("v1", model.encode(manifest), model.OCI_MANIFEST)
    return reference


def convert(nydusify: Nydusify, source: str, target: str, *options: str) -> Opened:
    done = nydusify(
        *("convert", "--source", source, "--target", target, "--plain-http", "--no-reuse", *options)
    )
    assert done.returncode == 0, done.stderr
    return open_nydus(place(target), host_platform())


@pytest.mark.parametrize("version", ["6", "5"])
def test_later_conversions_refer_to_it(
    server: FaultyRegistry, nydusify: Nydusify, tmp_path: Path, version: str
) -> None:
    one, two = push(server, "one", "abc"), push(server, "two", "d", "cb")
    images = []
    for source in (one, two):
        images.append(source.replace(":v1", ":nydus"))
        convert(nydusify, source, images[-1], "--fs-version", version)
    target = f"{server.host}/dictionaries/base:v1"
    done = nydusify(
        *("chunkdict", "generate", "--sources", ",".join(images), "--target", target, "--plain-http")
    )
    assert done.returncode == 0, done.stderr
    assert "2 chunks" in done.stderr and "(67 %)" in done.stderr

    made = open_nydus(place(target), host_platform())
    manifest, config = made.found.manifest, made.found.config
    last = manifest.layers[-1]
    assert last.annotations[model.NYDUS_FS_VERSION] == version
    assert last.media_type == model.OCI_LAYER_GZIP
    assert model.NYDUS_SOURCE_DIGEST not in (manifest.annotations or {})
    assert [layer.digest for layer in manifest.layers[:-1]] == [f"sha256:{b.id}" for b in made.tree.blobs]
    assert len(config.history or ()) == len(config.rootfs.diff_ids) == len(manifest.layers) == 2
    assert len(made.tree.chunks) == 2
    (tmp_path / "check").mkdir()
    check(place(target), None, host_platform(), tmp_path / "check")

    # The third image has a file of its own, and two that the dictionary knows.
    third = push(server, "three", "be", "c")
    alone = convert(nydusify, third, f"{server.host}/three:alone", "--fs-version", version)
    shared = convert(
        *(nydusify, third, f"{server.host}/three:shared", "--fs-version", version),
        *("--chunk-dict", f"bootstrap:registry:{target}"),
    )
    told = nydusify(
        *(
            "convert",
            "--source",
            third,
            "--target",
            f"{server.host}/three:told",
            "--plain-http",
            "--no-reuse",
        ),
        *("--fs-version", version, "--chunk-dict", f"bootstrap:registry:{target}"),
    )
    assert "; 2 chunks did not have to be stored again" in told.stderr
    own = [sum(layer.size for layer in each.found.manifest.layers[:2]) for each in (alone, shared)]
    assert own[0] - own[1] > 590_000, "two of its three files are not stored again"
    listed = {layer.digest for layer in shared.found.manifest.layers}
    assert {f"sha256:{blob.id}" for blob in shared.tree.blobs} <= listed
    check(place(f"{server.host}/three:shared"), place(third), host_platform(), tmp_path / "check")

    output = tmp_path / "cwd" / "output"
    report = json.loads((output / "nydus_bootstrap_output.json").read_text())
    assert report["chunks"] == 2 and report["stored"] - report["needed"] >= 600_000
    assert [share["shared_chunks"] for share in report["images"]] == [2, 2]
    folder = output / images[0].replace("/", ":")
    assert {path.name for path in folder.iterdir()} >= {"nydus_manifest.json", "nydus_config.json"}
    assert (folder / "nydus_bootstrap" / "image.boot").exists()
    database = sqlite3.connect(output / "database.db")
    assert database.execute("SELECT count(*) FROM chunks WHERE version = 'nydus'").fetchone() == (6,)
    database.close()


def test_an_index_over_ordinary_layers(server: FaultyRegistry, nydusify: Nydusify, tmp_path: Path) -> None:
    """Its chunks are in the ordinary layers, which have to be where the dictionary is, and what is built."""
    images = []
    for name, *layers in (("one", "abc"), ("two", "d", "cb")):
        images.append(f"{server.host}/{name}:index")
        convert(nydusify, push(server, name, *layers), images[-1], "--oci-ref")
    target = f"{server.host}/dictionary:v1"
    done = nydusify(
        "chunkdict", "generate", "--sources", ",".join(images), "--target", target, "--plain-http"
    )
    assert done.returncode == 0, done.stderr
    third = push(server, "three", "be", "c")
    built = f"{server.host}/three:shared"
    shared = convert(nydusify, third, built, "--chunk-dict", f"bootstrap:registry:{target}")
    assert sum(layer.size for layer in shared.found.manifest.layers[:2]) < 310_000
    check(place(built), place(third), host_platform(), tmp_path)
    mixed = nydusify("info", built, "--plain-http").stdout
    assert "Kind:        a Nydus image\n" in mixed


def test_for_images_in_a_storage_backend(server: FaultyRegistry, nydusify: Nydusify, tmp_path: Path) -> None:
    folder = tmp_path / "blobs"
    where = ["--backend-type", "localfs", "--backend-config", json.dumps({"dir": str(folder)})]
    listed, third = f"{server.host}/one:nydus", push(server, "three", "be")
    convert(nydusify, push(server, "one", "abc"), listed)
    built, dictionary = f"{server.host}/three:built", f"bootstrap:registry:{listed}"
    convert(nydusify, third, built, "--chunk-dict", dictionary, *where)
    assert {len(path.name) for path in folder.iterdir()} == {64} and len(list(folder.iterdir())) == 2
    check(place(built), place(third), None, tmp_path, target_blobs=FolderPlace(folder))

    # The same where the dictionary itself does not list its blobs.
    stored = f"{server.host}/one:stored"
    convert(nydusify, f"{server.host}/one:v1", stored, *where)
    again = ["convert", "--source", third, "--target", built, "--plain-http", "--no-reuse"]
    again += ["--chunk-dict", f"bootstrap:registry:{stored}"]
    refused = nydusify(*again)
    assert refused.returncode == 1 and "its blobs are in a storage backend" in refused.stderr
    assert nydusify(*again, *where).returncode == 0
    check(place(built), place(third), None, tmp_path, target_blobs=FolderPlace(folder))
    for path in folder.iterdir():
        path.unlink()
    refused = nydusify(*again, *where)
    assert refused.returncode == 1 and f"is not in {folder}" in refused.stderr


def test_of_images_in_a_storage_backend(server: FaultyRegistry, nydusify: Nydusify, tmp_path: Path) -> None:
    """The dictionary has its blobs there, too, and is of use for images that go there."""
    folder = tmp_path / "blobs"
    where = ["--backend-type", "localfs", "--backend-config", json.dumps({"dir": str(folder)})]
    stored, listed, target = (f"{server.host}/{name}" for name in ("one:nydus", "two:nydus", "dictionary:v1"))
    convert(nydusify, push(server, "one", "abc"), stored, *where)
    convert(nydusify, push(server, "two", "d", "cb"), listed)
    command = ["chunkdict", "generate", "--sources", f"{listed},{stored}", "--plain-http", "--target", target]

    refused = nydusify(*command)
    assert refused.returncode == 1 and "say which with --backend-type" in refused.stderr
    done = nydusify(*command, *where)
    assert done.returncode == 0, done.stderr
    made = open_nydus(place(target), host_platform())
    assert made.elsewhere and len(made.tree.chunks) == 2
    assert len(made.found.config.history or ()) == len(made.found.config.rootfs.diff_ids) == 1
    ids = {blob.id for blob in made.tree.blobs}
    assert ids and ids <= {path.name for path in folder.iterdir()}
    assert set(made.metas) == ids
    check(place(target), None, host_platform(), tmp_path, target_blobs=FolderPlace(folder))

    third, built = push(server, "three", "be", "c"), f"{server.host}/three:shared"
    before = set(folder.iterdir())
    convert(nydusify, third, built, "--chunk-dict", f"bootstrap:registry:{target}", *where)
    added = sum(path.stat().st_size for path in set(folder.iterdir()) - before)
    assert 300_000 < added < 310_000, "two of its three files are not stored again"
    check(place(built), place(third), None, tmp_path, target_blobs=FolderPlace(folder))

    for path in folder.iterdir():
        path.unlink()
    lost = nydusify(*command[:3], f"{stored},{stored}", *command[4:], *where)
    assert lost.returncode == 1 and f"is not in {folder}" in lost.stderr


def test_identical_images_share_everything(server: FaultyRegistry, nydusify: Nydusify) -> None:
    source = push(server, "one", "ab")
    images = [f"{server.host}/{name}:nydus" for name in ("one", "copy")]
    for image in images:
        convert(nydusify, source, image)
    target = f"{server.host}/one:dict"
    done = nydusify(
        *("chunkdict", "generate", "--sources", images[0], "--sources", images[1]),
        *("--target", target, "--plain-http", "--platform", str(host_platform())),
    )
    assert done.returncode == 0, done.stderr
    assert len(open_nydus(place(target), host_platform()).tree.chunks) == 2


def test_nothing_in_common(server: FaultyRegistry, nydusify: Nydusify, tmp_path: Path) -> None:
    images = []
    for name in ("ab", "cd"):
        images.append(f"{server.host}/{name}:nydus")
        convert(nydusify, push(server, name, name), images[-1])
    done = nydusify("chunkdict", "generate", "--sources", ",".join(images), "--plain-http")
    assert done.returncode == 0 and "the dictionary is empty" in done.stderr, done.stderr
    assert (tmp_path / "cwd/output/chunkdict_bootstrap").exists()
    assert not [path for path in server.paths("PUT") if "dictionar" in path]


@pytest.mark.vectors
def test_what_cannot_be_used(
    server: FaultyRegistry, nydusify: Nydusify, vectors: Path, tmp_path: Path
) -> None:
    def refused(*images: str, platform: str = "linux/amd64") -> str:
        command = ("chunkdict", "generate", "--sources", ",".join(images), "--plain-http")
        done = nydusify(*command, "--platform", platform, "--target", f"{server.host}/new:dict")
        assert done.returncode == 1 and done.stderr.count("level=fatal") == 1, done.stderr
        return done.stderr

    for name in ("v6-zstd", "v5-zstd", "source", "oci-ref"):
        copy(ArchivePlace(vectors / f"oci/{name}.tar"), place(f"{server.host}/app:{name}"))
    app = f"{server.host}/app"
    assert "at least two" in refused(f"{app}:v6-zstd")
    versions = refused(f"{app}:v6-zstd", f"{app}:v5-zstd")
    assert "version of app:v5-zstd is 5, of the first image 6; build both with the same" in versions
    assert "is not a Nydus image" in refused(f"{app}:v6-zstd", f"{app}:source")
    digesters = refused(f"{app}:v6-zstd", f"{app}:oci-ref")
    assert "digester of app:oci-ref is sha256, of the first image blake3; use either" in digesters
    assert "nothing" in refused(f"{app}:v6-zstd", f"{app}:nothing")
    assert not any("/new/manifests" in path for path in server.paths("PUT"))
