"""Images in forms of their own: merged with their source, referring to it, over its layers, elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import DIFFERENT, listing, load, tree_listing, tree_of, without
from faulty import FaultyRegistry
from images import docker_image, place, source_of

from nydus.convert.copy import copy
from nydus.convert.image import image
from nydus.convert.options import ConvertOptions
from nydus.errors import ConfigError
from nydus.oci import model
from nydus.oci.archive import open_archive
from nydus.oci.place import ArchivePlace
from nydus.oci.registry import Registry

BUILDER = model.NYDUS_BUILDER_VERSION
SOURCE_REFERENCE = model.NYDUS_SOURCE_REFERENCE

pytestmark = pytest.mark.vectors


@pytest.mark.parametrize("vector", ["merged-index", "run/merged-index"])
def test_a_merged_index(server: FaultyRegistry, vectors: Path, vector: str) -> None:
    """Also into another repository, where the blobs of the source have to go too."""
    origin, digest = docker_image(source_of(server, vectors, vector))
    target = place(f"{server.host}/elsewhere:merged")
    image(origin, target, ConvertOptions(merge_platform=True))
    theirs, ours = open_archive(vectors / f"oci/{vector}.tar"), target.open()
    expected, found = load(theirs, ""), load(ours, "merged")
    assert found["mediaType"] == model.OCI_INDEX
    expected["mediaType"] = expected["content type"]
    ordinary, nydus = (entry["content"]["annotations"] for entry in found["manifests"])
    assert nydus[SOURCE_REFERENCE] == str(origin)
    assert ordinary[model.NYDUS_SOURCE_DIGEST] == nydus[model.NYDUS_SOURCE_DIGEST] == digest
    assert found["manifests"][0]["annotations"] == {model.NYDUS_SOURCE_DIGEST: digest}
    assert listing(tree_of(ours, found["manifests"][1]["digest"])) == listing(
        tree_of(theirs, expected["manifests"][1]["digest"])
    )
    for document in (expected, found):
        for entry in document["manifests"]:
            for notes in (entry.get("annotations", {}), entry["content"]["annotations"]):
                for key in (BUILDER, SOURCE_REFERENCE, model.NYDUS_SOURCE_DIGEST):
                    if key in notes:
                        notes[key] = "checked above"
        document["manifests"][1]["content"]["config"]["content"]["rootfs"].pop("diff_ids")
    assert without(found, DIFFERENT) == without(expected, DIFFERENT)
    original, reference = (document["manifests"][0]["content"]["layers"] for document in (found, expected))
    assert [layer["digest"] for layer in original] == [layer["digest"] for layer in reference]


@pytest.mark.parametrize("api", [True, False])
def test_referrers(server: FaultyRegistry, source: str, api: bool) -> None:
    from nydus.oci.server import Handler

    if not api:  # as a registry of before the referrers API answers
        from faulty import status

        class Old:
            def __call__(self, handler: Handler) -> bool:
                if "/referrers/" in handler.path:
                    status(404)(handler)  # type: ignore[arg-type]
                    return True
                start = handler._start
                handler._start = lambda s, n, h: start(s, n, {k: h[k] for k in h if k != "OCI-Subject"})  # type: ignore[method-assign]
                return False

        server.intercepts.append(Old())
    target = place(f"{server.host}/small:nydus")
    result = image(place(source), target, ConvertOptions(with_referrer=True))
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        origin = repository.manifest("latest")[0]
        (found,) = repository.referrers(origin.digest)
    assert found.digest == result.descriptor.digest
    subject = load(target.open(), "nydus")["subject"]
    assert subject == {"mediaType": model.OCI_MANIFEST, "digest": origin.digest, "size": origin.size}


@pytest.mark.parametrize(
    ("vector", "repository", "paths"),
    [("oci-ref", "small", 17), ("oci-ref", "elsewhere", 17), ("run/oci-ref", "elsewhere", 24)],
)
def test_oci_ref(
    server: FaultyRegistry, vectors: Path, tmp_path: Path, vector: str, repository: str, paths: int
) -> None:
    """Into another repository too, where the layers with the data have to go as well."""
    from nydus.convert.check import check

    source, target = source_of(server, vectors, vector), place(f"{server.host}/{repository}:ref")
    image(place(source), target, ConvertOptions(oci_ref=True))
    theirs, ours = open_archive(vectors / f"oci/{vector}.tar"), target.open()
    expected, found = load(theirs, ""), load(ours, "ref")
    for document in (expected, found):
        for key in (SOURCE_REFERENCE, BUILDER):
            document["annotations"].pop(key)
        document["mediaType"] = document["content type"]
        document["config"]["content"]["rootfs"].pop("diff_ids")
    assert without(found, DIFFERENT) == without(expected, DIFFERENT)
    assert tree_listing(ours, "ref") == tree_listing(theirs, "")
    amd64 = model.Platform(os="linux", architecture="amd64")
    report = check(target, place(source), amd64, tmp_path)
    assert report.kind == "oci-ref" and report.checks["filesystem"] == paths


def test_oci_ref_of_zstd_layers_is_refused(server: FaultyRegistry, source: str) -> None:
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        changed = repository.manifest("latest")[1].replace(b"v1.tar+gzip", b"v1.tar+zstd")
        repository.put_manifest("zstd", changed, model.OCI_MANIFEST)
    with pytest.raises(ConfigError, match="layer 1 is zstd; oci-ref needs gzip"):
        image(
            place(f"{server.host}/small:zstd"), place(f"{server.host}/small:n"), ConvertOptions(oci_ref=True)
        )


@pytest.mark.parametrize("vector", ["v6-zstd", "v5-zstd", "v6-batch", "merged-index", "oci-ref"])
def test_back_to_an_ordinary_image(server: FaultyRegistry, source: str, vectors: Path, vector: str) -> None:
    """Of what the reference made: the same file system, and no trace of Nydus in layers and config."""
    from nydus.convert.listing import Overlay, compare
    from nydus.convert.reverse import reverse
    from nydus.convert.select import select

    copy(ArchivePlace(vectors / f"oci/{vector}.tar"), place(f"{server.host}/small:n"))
    target = place(f"{server.host}/other:oci")
    reverse(place(f"{server.host}/small:n"), target)
    sides = []
    for reference in (place(source), target):
        reader = reference.open()
        _, (found,) = select(reader, reference.target, str(reference), None)
        assert not found.is_nydus
        overlay = Overlay()
        for layer, diff_id in zip(found.manifest.layers, found.config.rootfs.diff_ids, strict=True):
            overlay.apply(reader.blob(layer.digest, layer.size), diff_id, layer.digest)
        sides.append(overlay.listing())
    assert compare(*sides) == 17
    before, after = load(place(source).open(), "latest"), load(target.open(), "oci")
    assert after["config"]["content"]["history"] == before["config"]["content"]["history"]
    assert not any("annotations" in layer for layer in after["layers"])
    with pytest.raises(ConfigError, match="is not a Nydus image"):
        reverse(place(source), target)


def test_a_storage_backend(server: FaultyRegistry, source: str, tmp_path: Path) -> None:
    from nydus.convert.backend import FolderPlace, backend_place
    from nydus.convert.check import CheckError, check

    target, folder = place(f"{server.host}/small:b"), tmp_path / "blobs"
    image(place(source), target, backend=FolderPlace(folder))
    found = load(target.open(), "b")
    (layer,) = found["layers"]
    assert layer["annotations"] == {model.NYDUS_BOOTSTRAP: "true", model.NYDUS_FS_VERSION: "6"}
    config = found["config"]["content"]
    assert len(config["rootfs"]["diff_ids"]) == 1
    assert config["history"] == [{"created_by": "Nydus Converter", "comment": "Nydus Bootstrap Layer"}]
    assert sorted(p.name for p in folder.iterdir()) == sorted(b.id for b in tree_of(target.open(), "b").blobs)
    amd64 = model.Platform(os="linux", architecture="amd64")
    report = check(target, place(source), amd64, tmp_path, target_blobs=FolderPlace(folder))
    assert report.kind == "storage-backend" and report.checks["filesystem"] == 17
    with pytest.raises(CheckError, match="say which with --target-backend-type"):
        check(target, None, amd64, tmp_path)
    blob = next(folder.iterdir())
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckError, match="corrupted blob"):
        check(target, None, amd64, tmp_path, target_blobs=FolderPlace(folder))
    for kind, config, words in (
        ("localfs", {"folder": "x"}, "dir|folder"),
        ("s3", {}, "bucket_name"),
        ("x", {}, "x"),
    ):
        with pytest.raises(ConfigError, match=words):
            backend_place(kind, config)


def test_a_chunk_dictionary(server: FaultyRegistry, source: str, tmp_path: Path) -> None:
    """An image built against itself stores no chunk again, and needs the blobs of the dictionary."""
    from nydus.convert.check import check

    dictionary, target = place(f"{server.host}/dict:n"), place(f"{server.host}/small:n")
    image(place(source), dictionary)
    image(place(source), target, dictionary=dictionary)
    shared = load(dictionary.open(), "n")["layers"][:-1]
    layers = load(target.open(), "n")["layers"]
    assert [layer["digest"] for layer in layers[3:-1]] == [layer["digest"] for layer in shared]
    # What an upper layer hides is not in the dictionary.
    assert sum(layer["size"] for layer in layers[:3]) < 15_000
    amd64 = model.Platform(os="linux", architecture="amd64")
    assert check(target, place(source), amd64, tmp_path).checks["filesystem"] == 17
    with pytest.raises(ConfigError, match="is not a Nydus image"):
        image(place(source), target, dictionary=place(source))
    with pytest.raises(ConfigError, match="dictionary"):
        image(place(source), target, ConvertOptions(chunk_size=0x80000), dictionary=dictionary)
