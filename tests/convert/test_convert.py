"""Images become what the reference makes of them, whatever they are and wherever they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from documents import DIFFERENT, bootstrap_files, listing, load, tree_listing, tree_of, without
from faulty import FaultyRegistry
from images import docker_image, layer_of, place, put_image, source_of, two_platforms

from nydus.convert.copy import copy
from nydus.convert.documents import bootstrap_layer
from nydus.convert.image import image
from nydus.convert.options import ConvertOptions
from nydus.errors import ConfigError
from nydus.oci import model
from nydus.oci.archive import open_archive
from nydus.oci.layout import Layout
from nydus.oci.place import ArchivePlace, LayoutPlace
from nydus.oci.registry import Registry

BUILDER = model.NYDUS_BUILDER_VERSION
SOURCE_REFERENCE = model.NYDUS_SOURCE_REFERENCE

pytestmark = pytest.mark.vectors


@pytest.mark.parametrize(
    ("vector", "options"),
    [
        ("v6-zstd", ConvertOptions()),
        ("v6-lz4", ConvertOptions(compressor="lz4_block")),
        ("v5-zstd", ConvertOptions(fs_version=5)),
        ("v6-batch", ConvertOptions(batch_size=0x10000)),
        ("oci-types", ConvertOptions(oci=True)),
        ("prefetch", ConvertOptions(prefetch=(b"/a",))),
        ("run/v6-zstd", ConvertOptions()),
        ("run/v6-lz4", ConvertOptions(compressor="lz4_block")),
        ("run/v5-zstd", ConvertOptions(fs_version=5)),
    ],
)
def test_documents_and_trees_are_those_of_the_reference(
    server: FaultyRegistry, vectors: Path, vector: str, options: ConvertOptions
) -> None:
    source = source_of(server, vectors, vector)
    target = place(f"{server.host}/small:nydus")
    result = image(place(source), target, options)
    theirs = open_archive(vectors / f"oci/{vector}.tar")
    ours = target.open()
    expected, found = load(theirs, ""), load(ours, "nydus")
    assert found["annotations"].pop(SOURCE_REFERENCE) == source
    for document in (expected, found):
        document["annotations"].pop(SOURCE_REFERENCE, None)
        document["annotations"].pop(BUILDER)
        # The reference leaves the type out where the source has none; writers should give it.
        document["mediaType"] = document["content type"]
        # These are digests of blobs, checked below.
        diff_ids = document["config"]["content"]["rootfs"].pop("diff_ids")
        assert diff_ids[:-1] == [layer["digest"] for layer in document["layers"][:-1]]
    assert without(found, DIFFERENT) == without(expected, DIFFERENT)
    assert tree_listing(ours, "nydus") == tree_listing(theirs, "")
    files, diff_id = bootstrap_files(ours, "nydus")
    config = load(ours, "nydus")["config"]["content"]
    assert config["rootfs"]["diff_ids"][-1] == diff_id
    metas = [f"image/{layer['digest'][7:]}.blob.meta" for layer in found["layers"][:-1]]
    assert [name for name in files if name != "image/image.boot"] == (
        metas if options.fs_version == 6 else []
    )
    assert result.sizes.target == found["config"]["size"] + sum(layer["size"] for layer in found["layers"])


def test_conversion_is_reproducible(server: FaultyRegistry, source: str) -> None:
    digests = {image(place(source), place(f"{server.host}/small:{n}")).descriptor.digest for n in "ab"}
    assert len(digests) == 1


def test_the_bootstrap_layer_is_that_of_the_reference(vectors: Path) -> None:
    files, diff_id = bootstrap_files(open_archive(vectors / "oci/v6-zstd.tar"), "")
    metas = {name[6:-10]: data for name, data in files.items() if name.endswith(".blob.meta")}
    assert len(metas) == 3
    assert bootstrap_layer(files["image/image.boot"], metas)[1] == diff_id


@pytest.mark.parametrize("vector", ["docker-schema2", "run/docker-schema2"])
def test_docker_schema_2(server: FaultyRegistry, vectors: Path, vector: str) -> None:
    origin, digest = docker_image(source_of(server, vectors, vector))
    target = place(f"{server.host}/small:nydus")
    image(origin, target)
    theirs, ours = open_archive(vectors / f"oci/{vector}.tar"), target.open()
    expected, found = load(theirs, ""), load(ours, "nydus")
    assert found["annotations"][SOURCE_REFERENCE] == str(origin)
    assert found["annotations"][model.NYDUS_SOURCE_DIGEST] == digest
    for document in (expected, found):
        for key in (SOURCE_REFERENCE, BUILDER, model.NYDUS_SOURCE_DIGEST):
            document["annotations"].pop(key)
        document["config"]["content"]["rootfs"].pop("diff_ids")
    assert without(found, DIFFERENT) == without(expected, DIFFERENT)
    assert tree_listing(ours, "nydus") == tree_listing(theirs, "")


def test_docker_schema_2_as_oci(server: FaultyRegistry, source: str) -> None:
    target = place(f"{server.host}/small:nydus")
    image(docker_image(source)[0], target, ConvertOptions(oci=True))
    found = load(target.open(), "nydus")
    assert found["content type"] == found["mediaType"] == model.OCI_MANIFEST
    assert found["config"]["mediaType"] == model.OCI_CONFIG
    assert found["layers"][-1]["mediaType"] == model.OCI_LAYER_GZIP


def test_platforms(server: FaultyRegistry, source: str) -> None:
    both = two_platforms(server.host)
    target = place(f"{server.host}/small:nydus")
    image(both, target, platforms=[model.Platform(os="linux", architecture="arm64")])
    assert load(target.open(), "nydus")["config"]["content"]["architecture"] == "arm64"
    image(both, target, platforms=None)
    index = load(target.open(), "nydus")
    assert index["mediaType"] == model.OCI_INDEX
    assert [entry["platform"]["architecture"] for entry in index["manifests"]] == ["amd64", "arm64"]
    for entry in index["manifests"]:
        assert entry["content"]["config"]["content"]["architecture"] == entry["platform"]["architecture"]
    with pytest.raises(ConfigError, match="no image for windows/amd64; there are: linux/amd64, linux/arm64"):
        image(both, target, platforms=[model.Platform(os="windows", architecture="amd64")])


def test_a_layer_that_occurs_twice_is_converted_once(server: FaultyRegistry, source: str) -> None:
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        manifest = json.loads(repository.manifest("latest")[1])
        config = repository.document(
            model.Descriptor(**{k: manifest["config"][k] for k in ("digest", "size")})
        )
        document = json.loads(config)
        document["rootfs"]["diff_ids"] += document["rootfs"]["diff_ids"]
        manifest["layers"] += manifest["layers"]
        manifest["config"] = json.loads(
            model.encode(repository.put_blob(model.encode(document), model.OCI_CONFIG))
        )
        repository.put_manifest("twice", model.encode(manifest), model.OCI_MANIFEST)
    server.seen.clear()
    result = image(place(f"{server.host}/small:twice"), place(f"{server.host}/small:nydus"))
    assert len(result.layers) == 3
    layers = load(place(f"{server.host}/small:nydus").open(), "nydus")["layers"]
    assert len(layers) == 7 and layers[:3] == layers[3:6]


def test_layouts_and_archives(tmp_path: Path, vectors: Path) -> None:
    source = ArchivePlace(vectors / "oci/source.tar", name="r.io/small:latest")
    result = image(source, LayoutPlace(tmp_path / "out"))
    assert Layout(tmp_path / "out").manifest("")[0].digest == result.descriptor.digest


def test_copies_keep_every_digest(server: FaultyRegistry, source: str, tmp_path: Path) -> None:
    both = two_platforms(server.host)
    copied = copy(both, LayoutPlace(tmp_path / "out"))
    assert copied.present == 0
    assert Layout(tmp_path / "out").manifest("")[1] == both.open().manifest("two")[1]
    server.seen.clear()
    linked = copy(both, place(f"{server.host}/other:two"))
    assert linked.sent == 0 and linked.descriptor.digest == copied.descriptor.digest
    assert not [path for path in server.paths("GET") if "/blobs/" in path and "small" not in path]
    one = copy(
        both, place(f"{server.host}/one:v1"), platforms=[model.Platform(os="linux", architecture="arm64")]
    )
    assert one.descriptor.media_type == model.OCI_MANIFEST


def test_a_directory_that_a_layer_only_implies_keeps_its_attributes(
    server: FaultyRegistry, tmp_path: Path
) -> None:
    """Otherwise /secret of the lower layer would become readable by everybody."""
    lower, upper = layer_of("./", "secret/", "secret/a", mode=0o700), layer_of("secret/b", "new/c")
    source = put_image(server, "implied", lower, upper)
    options = ConvertOptions(record=tmp_path / "record")
    for tag in ("n1", "n2"):  # the second from the record
        result = image(source, place(f"{server.host}/small:{tag}"), options)
        found = listing(tree_of(place(f"{server.host}/small:{tag}").open(), tag))
        assert found["/"][:2] == (0o40700, 7)
        assert found["/secret"][:2] == (0o40700, 7) and found["/secret"][4] == 1234567
        assert found["/new"][:2] == (0o40755, 0)
    assert [layer.reused for layer in result.layers] == [True, True]


def test_many_layers(server: FaultyRegistry, tmp_path: Path) -> None:
    layers = [layer_of(f"d{number}/", f"d{number}/f") for number in range(127)]
    options, target = ConvertOptions(record=tmp_path / "record"), place(f"{server.host}/small:nydus")
    first = image(put_image(server, "many", *layers), target, options)
    assert len(listing(tree_of(target.open(), "nydus"))) == 255
    shutil.rmtree(tmp_path / "record/images")  # so that each layer has to be found for itself
    again = image(put_image(server, "many", *layers), target, options)
    assert [layer.reused for layer in again.layers] == [True] * 127
    assert again.descriptor.digest == first.descriptor.digest
