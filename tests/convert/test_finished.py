"""Images that were converted before, as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from documents import load
from faulty import FaultyRegistry
from nydusify_command import Nydusify

from nydus.convert.backend import FolderPlace
from nydus.convert.image import Result, image
from nydus.convert.options import ConvertOptions
from nydus.oci import model
from nydus.oci.place import RegistryPlace
from nydus.oci.reference import parse
from nydus.oci.registry import Registry

pytestmark = pytest.mark.vectors


def place(reference: str) -> RegistryPlace:
    return RegistryPlace(parse(reference), plain_http=True)


@pytest.mark.parametrize("kind", ["plain", "oci-ref", "backend", "dictionary", "index as dictionary"])
def test_an_image_is_not_even_merged_again(
    server: FaultyRegistry, source: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ConvertOptions(record=tmp_path / "record", oci_ref=kind == "oci-ref")
    backend = FolderPlace(tmp_path / "blobs") if kind == "backend" else None
    dictionary = place(f"{server.host}/dictionary:v1") if "dictionary" in kind else None
    if dictionary:
        image(place(source), dictionary, ConvertOptions(oci_ref="index" in kind))

    def convert(tag: str) -> Result:
        target = place(f"{server.host}/small:{tag}")
        return image(place(source), target, options, backend=backend, dictionary=dictionary)

    first = convert("one")
    server.seen.clear()
    monkeypatch.setattr("nydus.convert.image.assemble", None)
    second = convert("two")
    assert second.descriptor.digest == first.descriptor.digest
    assert [(layer.state, layer.reused) for layer in second.layers] == [("done", True)] * 3
    assert [layer.size for layer in second.layers] == [layer.size for layer in first.layers]
    assert second.sizes == first.sizes
    assert not server.paths("POST") and not server.paths("PATCH")
    assert server.paths("PUT") == ["/v2/small/manifests/two"]


@pytest.mark.parametrize("kind", ["plain", "oci-ref", "backend", "dictionary"])
def test_nothing_is_imported_that_only_a_conversion_needs(
    server: FaultyRegistry, source: str, nydusify: Nydusify, tmp_path: Path, kind: str
) -> None:
    dictionary, folder = f"{server.host}/small:dictionary", json.dumps({"dir": "blobs"})
    more = {
        "oci-ref": ["--oci-ref"],
        "backend": ["--backend-type", "localfs", "--backend-config", folder],
        "dictionary": ["--chunk-dict", f"bootstrap:registry:{dictionary}"],
    }.get(kind, [])
    command = ["convert", "--source", source, "--plain-http", "--target"]
    assert nydusify(*command, dictionary).returncode == 0
    assert nydusify(*command, f"{source}-one", *more).returncode == 0
    again = nydusify(*command, f"{source}-two", *more, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert again.returncode == 0, again.stderr
    imported = {line.rpartition("|")[2].strip() for line in again.stderr.splitlines()}
    assert "nydus.convert.finished" in imported
    assert not imported & {"numpy", "nydus.rafs", "nydus.convert.workers", "opendal"}


def test_other_options_or_another_source_make_another_image(
    server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    def convert(**options: bool) -> Result:
        target = place(f"{server.host}/small:nydus")
        return image(place(source), target, ConvertOptions(record=tmp_path / "record", **options))

    results = [
        convert(),
        convert(oci=True),
        convert(merge_platform=True),
        convert(with_referrer=True),
        convert(),
    ]
    assert results[0].descriptor.digest == results[-1].descriptor.digest
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        descriptor, data = repository.manifest("latest")
        repository.put_manifest("other", data, descriptor.media_type)
    other = image(
        place(f"{server.host}/small:other"),
        place(f"{server.host}/small:nydus"),
        ConvertOptions(record=tmp_path / "record"),
    )
    # The source's name is in the manifest.
    assert other.descriptor.digest != results[0].descriptor.digest
    assert [layer.reused for layer in other.layers] == [True] * 3


def test_an_image_of_the_same_layers_is_found_whatever_its_name_and_config(
    server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    options = ConvertOptions(record=tmp_path / "record")
    first = image(place(source), place(f"{server.host}/small:one"), options)
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        descriptor, raw = repository.manifest("latest")
        manifest = json.loads(raw)
        config = json.loads(repository.document(model.decode(raw, model.Manifest, "").config))
        config["config"]["Env"] = ["COLOUR=blue"]
        stored = repository.put_blob(json.dumps(config).encode(), manifest["config"]["mediaType"])
        manifest["config"].update(digest=stored.digest, size=stored.size)
        repository.put_manifest("blue", json.dumps(manifest).encode(), descriptor.media_type)
    server.seen.clear()
    second = image(place(f"{server.host}/small:blue"), place(f"{server.host}/linked:two"), options)
    assert [layer.reused for layer in second.layers] == [True] * 3
    assert not server.paths("PATCH")
    documents = [
        load(place(f"{server.host}/{name}").open(), name.partition(":")[2])
        for name in ("small:one", "linked:two")
    ]
    assert [it["digest"] for it in documents[0]["layers"]] == [it["digest"] for it in documents[1]["layers"]]
    assert documents[1]["config"]["content"]["config"]["Env"] == ["COLOUR=blue"]
    assert documents[0]["config"]["content"]["rootfs"] == documents[1]["config"]["content"]["rootfs"]
    assert first.descriptor.digest != second.descriptor.digest


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("kind", ["backend", "dictionary"])
def test_blobs_that_are_not_of_the_target_are_looked_for_where_they_are(
    server: FaultyRegistry, source: str, tmp_path: Path, kind: str, gone: bool
) -> None:
    options = ConvertOptions(record=tmp_path / "record")
    folder = FolderPlace(tmp_path / "blobs")
    more: dict[str, Any] = {"backend": folder}
    if kind == "dictionary":
        more = {"dictionary": place(f"{server.host}/small:dictionary")}
        image(place(source), more["dictionary"], ConvertOptions(prefetch=()))
    first = image(place(source), place(f"{server.host}/small:one"), options, **more)
    blobs = list((tmp_path / "blobs").iterdir()) if kind == "backend" else []
    if gone and kind == "backend":
        for blob in blobs:
            blob.unlink()
    elif gone:  # another dictionary, under the same name
        image(place(source), more["dictionary"], ConvertOptions(compressor="none"))
    second = image(place(source), place(f"{server.host}/small:one"), options, **more)
    assert [layer.reused for layer in second.layers] == [not gone] * 3
    assert all(blob.exists() for blob in blobs)
    assert (second.descriptor.digest == first.descriptor.digest) == (kind == "backend" or not gone)


@pytest.mark.parametrize("gone", ["manifest", "blob", "record"])
def test_what_the_target_has_lost_is_made_again(
    server: FaultyRegistry, source: str, tmp_path: Path, gone: str
) -> None:
    options = ConvertOptions(record=tmp_path / "record")
    target = place(f"{server.host}/small:nydus")
    first = image(place(source), target, options)
    with Registry(server.host, plain_http=True) as registry:
        _, data = registry.repository("small").manifest("nydus")
    manifest = model.decode(data, model.Manifest, "")
    if gone == "record":
        for path in (tmp_path / "record/images").iterdir():
            path.write_bytes(b"nonsense")
    else:
        digest = manifest.layers[0].digest if gone == "blob" else first.descriptor.digest
        for path in (tmp_path / "registry").rglob(f"*{digest.partition(':')[2]}*"):
            path.unlink()
    again = image(place(source), target, options)
    assert again.descriptor.digest == first.descriptor.digest
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        assert repository.manifest("nydus")[1] == data
        assert all(repository.has_blob(layer.digest) for layer in manifest.layers)
