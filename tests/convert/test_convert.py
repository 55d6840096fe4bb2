from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from documents import DIFFERENT, bootstrap_files, listing, load, tree_of, without
from faulty import FaultyRegistry

from nydus.convert.copy import copy
from nydus.convert.documents import bootstrap_layer
from nydus.convert.image import image
from nydus.convert.options import ConvertOptions
from nydus.errors import ConfigError, FormatError, NydusError
from nydus.oci import model
from nydus.oci.archive import open_archive
from nydus.oci.layout import Layout
from nydus.oci.place import ArchivePlace, LayoutPlace, RegistryPlace
from nydus.oci.reference import parse
from nydus.oci.registry import Registry

BUILDER = model.NYDUS_BUILDER_VERSION
SOURCE_REFERENCE = model.NYDUS_SOURCE_REFERENCE


def place(reference: str) -> RegistryPlace:
    return RegistryPlace(parse(reference), plain_http=True)


pytestmark = pytest.mark.vectors


@pytest.mark.parametrize(
    ("vector", "options"),
    [
        ("v6-zstd", ConvertOptions()),
        ("v6-lz4", ConvertOptions(compressor="lz4_block")),
        ("v5-zstd", ConvertOptions(fs_version=5)),
        ("v6-batch", ConvertOptions(batch_size=0x10000)),
        ("oci-types", ConvertOptions(oci=True)),
    ],
)
def test_documents_and_trees_are_those_of_the_reference(
    server: FaultyRegistry, source: str, vectors: Path, vector: str, options: ConvertOptions
) -> None:
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
    assert listing(tree_of(ours, "nydus")) == listing(tree_of(theirs, ""))
    files, diff_id = bootstrap_files(ours, "nydus")
    config = load(ours, "nydus")["config"]["content"]
    assert config["rootfs"]["diff_ids"][-1] == diff_id
    metas = [f"image/{layer['digest'][7:]}.blob.meta" for layer in found["layers"][:-1]]
    assert [name for name in files if name != "image/image.boot"] == (
        metas if options.fs_version == 6 else []
    )
    assert result.target_size == found["config"]["size"] + sum(layer["size"] for layer in found["layers"])


def test_conversion_is_reproducible(server: FaultyRegistry, source: str) -> None:
    digests = {image(place(source), place(f"{server.host}/small:{n}")).descriptor.digest for n in "ab"}
    assert len(digests) == 1


def test_the_bootstrap_layer_is_that_of_the_reference(vectors: Path) -> None:
    files, diff_id = bootstrap_files(open_archive(vectors / "oci/v6-zstd.tar"), "")
    metas = {name[6:-10]: data for name, data in files.items() if name.endswith(".blob.meta")}
    assert len(metas) == 3
    assert bootstrap_layer(files["image/image.boot"], metas)[1] == diff_id


def docker_image(server: FaultyRegistry, source: str) -> RegistryPlace:
    """The source as Docker's schema 2."""
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        text = repository.manifest("latest")[1].decode()
        text = text.replace(model.OCI_LAYER_GZIP, model.DOCKER_LAYER_GZIP).replace(
            model.OCI_CONFIG, model.DOCKER_CONFIG
        )
        document = {"schemaVersion": 2, "mediaType": model.DOCKER_MANIFEST, **json.loads(text)}
        repository.put_manifest("docker", model.encode(document), model.DOCKER_MANIFEST)
    return place(f"{server.host}/small:docker")


@pytest.mark.parametrize("oci", [False, True])
def test_docker_schema_2(server: FaultyRegistry, source: str, vectors: Path, oci: bool) -> None:
    target = place(f"{server.host}/small:nydus")
    image(docker_image(server, source), target, ConvertOptions(oci=oci))
    found = load(target.open(), "nydus")
    if oci:
        assert found["content type"] == found["mediaType"] == model.OCI_MANIFEST
        assert found["config"]["mediaType"] == model.OCI_CONFIG
        assert found["layers"][-1]["mediaType"] == model.OCI_LAYER_GZIP
        return
    expected = load(open_archive(vectors / "oci/docker-schema2.tar"), "")
    for document in (expected, found):
        for key in (SOURCE_REFERENCE, BUILDER, model.NYDUS_SOURCE_DIGEST):
            document["annotations"].pop(key)
        document["config"]["content"]["rootfs"].pop("diff_ids")
    assert without(found, DIFFERENT) == without(expected, DIFFERENT)


def two_platforms(server: FaultyRegistry, source: str) -> RegistryPlace:
    """An index of the source image for two platforms, with an attestation as BuildKit adds them."""
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        manifest = json.loads(repository.manifest("latest")[1])
        entries = []
        for architecture in ("amd64", "arm64"):
            config = repository.document(
                model.Descriptor(**{k: manifest["config"][k] for k in ("digest", "size")})
            )
            changed = repository.put_blob(config.replace(b"amd64", architecture.encode()), model.OCI_CONFIG)
            manifest["config"] = json.loads(model.encode(changed))
            stored = repository.put_manifest(
                model.digest(model.encode(manifest)), model.encode(manifest), model.OCI_MANIFEST
            )
            entries.append(
                {
                    **json.loads(model.encode(stored)),
                    "platform": {"architecture": architecture, "os": "linux"},
                }
            )
        note = {
            **entries[0],
            "platform": {"architecture": "unknown", "os": "unknown"},
            "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
        }
        index = {"schemaVersion": 2, "mediaType": model.OCI_INDEX, "manifests": [*entries, note]}
        repository.put_manifest("two", model.encode(index), model.OCI_INDEX)
    return place(f"{server.host}/small:two")


def test_platforms(server: FaultyRegistry, source: str) -> None:
    both = two_platforms(server, source)
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
    both = two_platforms(server, source)
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


# Bad input: one clear error, and no tag


def no_tag(server: FaultyRegistry) -> bool:
    with Registry(server.host, plain_http=True) as registry:
        if registry.repository("small").has_manifest("nydus"):
            return False
    deadline = time.monotonic() + 3  # the last request of a worker that was ended may still be answered
    while list(server.store.uploads.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not list(server.store.uploads.iterdir())


def source_layer(server: FaultyRegistry, number: int = 1) -> Path:
    with Registry(server.host, plain_http=True) as registry:
        manifest = json.loads(registry.repository("small").manifest("latest")[1])
    return server.store.blobs / manifest["layers"][number]["digest"].partition(":")[2]


@pytest.mark.parametrize("damage", ["bit", "cut", "other"])
def test_damaged_layers(server: FaultyRegistry, source: str, damage: str) -> None:
    path = source_layer(server)
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 4
    elif damage == "cut":
        del data[-100:]
    else:
        data[:] = bytes(len(data))
    path.write_bytes(data)
    with pytest.raises(
        NydusError, match=r"^layer 2.*(corrupted blob: expected sha256|truncated: \d+ of)"
    ) as caught:
        image(place(source), place(f"{server.host}/small:nydus"))
    assert "\n" not in str(caught.value)
    assert no_tag(server)


def test_a_layer_that_is_no_archive(server: FaultyRegistry, source: str) -> None:
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        manifest = json.loads(repository.manifest("latest")[1])
        layer = repository.put_blob(b"no tar at all" * 1000, model.OCI_LAYER_GZIP)
        manifest["layers"][1] = json.loads(model.encode(layer))
        repository.put_manifest("broken", model.encode(manifest), model.OCI_MANIFEST)
    with pytest.raises(FormatError, match=r"layer 2 .*small:broken"):
        image(place(f"{server.host}/small:broken"), place(f"{server.host}/small:nydus"))
    assert no_tag(server)


def test_what_cannot_be_converted_is_refused_before_anything_is_pushed(
    server: FaultyRegistry, source: str, vectors: Path
) -> None:
    copy(ArchivePlace(vectors / "oci/v6-zstd.tar"), place(f"{server.host}/small:done"))
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        text = repository.manifest("latest")[1]
        changed = text.replace(b"v1.tar+gzip", b"v1.tar+gzip+encrypted")
        repository.put_manifest("encrypted", changed, model.OCI_MANIFEST)
        manifest = json.loads(text)
        del manifest["layers"][0]
        repository.put_manifest("fewer", model.encode(manifest), model.OCI_MANIFEST)
    server.seen.clear()
    for tag, words in (
        ("done", "is a Nydus image already"),
        ("encrypted", "layer 1 is encrypted"),
        ("fewer", "wrong number of layers"),
        ("unknown", "404 manifest unknown"),
    ):
        with pytest.raises(NydusError, match=words):
            image(place(f"{server.host}/small:{tag}"), place(f"{server.host}/small:nydus"))
    assert not server.paths("POST")


def test_a_network_that_fails_for_a_while(server: FaultyRegistry, source: str) -> None:
    from faulty import Times, hang_up

    server.intercepts.append(Times(1, lambda h: h.command == "PUT" and "/blobs/" in h.path, hang_up))
    image(place(source), place(f"{server.host}/small:nydus"), ConvertOptions(retry_delay=0.1))
    assert not no_tag(server)


# Variants


def test_a_merged_index(server: FaultyRegistry, source: str, vectors: Path) -> None:
    """Also into another repository, where the blobs of the source have to go too."""
    target = place(f"{server.host}/elsewhere:merged")
    image(docker_image(server, source), target, ConvertOptions(merge_platform=True))
    expected, found = load(open_archive(vectors / "oci/merged-index.tar"), ""), load(target.open(), "merged")
    assert found["mediaType"] == model.OCI_INDEX
    expected["mediaType"] = expected["content type"]
    for document in (expected, found):
        for entry in document["manifests"]:
            entry.get("annotations", {}).pop(model.NYDUS_SOURCE_DIGEST, None)
            for key in (BUILDER, SOURCE_REFERENCE, model.NYDUS_SOURCE_DIGEST):
                entry["content"]["annotations"].pop(key, None)
        document["manifests"][1]["content"]["config"]["content"]["rootfs"].pop("diff_ids")
    assert without(found, DIFFERENT) == without(expected, DIFFERENT)
    original, theirs = (document["manifests"][0]["content"]["layers"] for document in (found, expected))
    assert [layer["digest"] for layer in original] == [layer["digest"] for layer in theirs]


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


@pytest.mark.parametrize("version", [5, 6])
def test_layers_are_not_converted_again(
    server: FaultyRegistry, source: str, tmp_path: Path, version: int
) -> None:
    options = ConvertOptions(fs_version=version, record=tmp_path / "record")
    first = image(place(source), place(f"{server.host}/small:nydus"), options)
    for target in ("small:again", "linked:v1"):
        server.seen.clear()
        again = image(place(source), place(f"{server.host}/{target}"), options)
        assert [layer.reused for layer in again.layers] == [True] * 3
        assert again.descriptor.digest == first.descriptor.digest
        assert not server.paths("PATCH")
    with FaultyRegistry(tmp_path / "other") as other:  # where the blobs are not
        moved = image(place(source), place(f"{other.host}/small:nydus"), options)
        assert not any(layer.reused for layer in moved.layers)
        assert moved.descriptor.digest == first.descriptor.digest
    changed = ConvertOptions(fs_version=version, record=tmp_path / "record", compressor="none")
    assert not any(
        layer.reused for layer in image(place(source), place(f"{server.host}/s:t"), changed).layers
    )


def test_a_record_that_is_not_true_is_not_believed(
    server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    options = ConvertOptions(record=tmp_path / "record")
    first = image(place(source), place(f"{server.host}/small:nydus"), options)
    files = sorted(path for path in (tmp_path / "record").rglob("*") if path.is_file())
    contents = [path.read_bytes() for path in files]
    for path, other in zip(files, [*contents[1:], b"garbage"], strict=True):
        path.write_bytes(other)
    again = image(place(source), place(f"{server.host}/small:again"), options)
    assert not any(layer.reused for layer in again.layers)
    assert again.descriptor.digest == first.descriptor.digest
    shutil.rmtree(tmp_path / "record/images")  # what it says of the whole image is true now
    for path in (path for path in files if path.exists()):
        path.write_bytes(path.read_bytes().replace(b'"bootstrap":"', b'"bootstrap":"00'))
    again = image(place(source), place(f"{server.host}/small:again"), options)
    assert not any(layer.reused for layer in again.layers)
    assert again.descriptor.digest == first.descriptor.digest


def test_a_build_cache(server: FaultyRegistry, source: str, tmp_path: Path) -> None:
    from nydus.convert.cache import BuildCache

    def convert(tag: str, options: ConvertOptions, version: str = "v1", most: int = 200) -> list[bool]:
        cache = BuildCache(place(f"{server.host}/cache:c"), version, most)
        result = image(place(source), place(f"{server.host}/{tag}"), options, cache=cache)
        return [layer.reused for layer in result.layers]

    def cached() -> list[dict[str, object]]:
        return list(load(place(f"{server.host}/cache:c").open(), "c")["layers"])

    assert convert("small:a", ConvertOptions()) == [False] * 3
    document = load(place(f"{server.host}/cache:c").open(), "c")
    assert document["config"]["content"] == {} and document["annotations"] == {
        model.NYDUS_CACHE_VERSION: "v1"
    }
    assert convert("other:b", ConvertOptions()) == [True] * 3
    assert len(cached()) == 3
    # Keyed by all parameters
    assert convert("small:c", ConvertOptions(fs_version=5)) == [False] * 3
    assert len(cached()) == 6
    assert convert("small:d", ConvertOptions()) == [True] * 3
    assert convert("small:e", ConvertOptions(), "v2") == [False] * 3
    assert len(cached()) == 3
    assert convert("small:f", ConvertOptions(batch_size=0x10000), "v2", most=4) == [False] * 3
    assert len(cached()) == 4
    with pytest.raises(NydusError, match="is not a build cache"):
        image(place(source), place(f"{server.host}/x:y"), cache=BuildCache(place(f"{server.host}/small:a")))


def test_a_build_cache_with_everything_else(server: FaultyRegistry, source: str, tmp_path: Path) -> None:
    """Each kind of conversion has its own entries, and gives with them what it gives without."""
    from nydus.convert.backend import FolderPlace
    from nydus.convert.cache import BuildCache

    dictionary = place(f"{server.host}/dictionary:v1")
    image(place(source), dictionary, ConvertOptions(prefetch=()))

    with FaultyRegistry(tmp_path / "caches") as other:  # nothing can be linked from there
        kinds: dict[str, tuple[ConvertOptions, dict[str, Any]]] = {
            "plain": (ConvertOptions(), {}),
            "ref": (ConvertOptions(oci_ref=True), {}),
            "dictionary": (ConvertOptions(), {"dictionary": dictionary}),
            "backend": (ConvertOptions(), {}),
            "v5": (ConvertOptions(fs_version=5), {}),
        }
        for kind, (options, more) in kinds.items():
            digests, sizes = [], []
            for run, reused in (("one", False), ("two", True)):
                target = place(f"{server.host}/{kind}-{run}:nydus")
                if kind == "backend":
                    more = {"backend": FolderPlace(tmp_path / kind / run)}
                cache = BuildCache(place(f"{other.host}/cache:c"))
                result = image(place(source), target, options, cache=cache, **more)
                # The blobs of the plain conversion serve those into a backend, too.
                expected = [reused or kind == "backend"] * 3
                assert [layer.reused for layer in result.layers] == expected, kind
                digests.append(result.descriptor.digest)
                if kind == "backend":
                    sizes.append(sorted(path.stat().st_size for path in (tmp_path / kind / run).iterdir()))
                else:
                    for layer in load(target.open(), "nydus")["layers"]:
                        assert target.open().has_blob(layer["digest"])
            assert digests[0] == digests[1], kind
            assert len(sizes) in (0, 2) and len(set(map(str, sizes))) < 2
        image(place(source), place(f"{server.host}/ref-fresh:nydus"), ConvertOptions(oci_ref=True))
        fresh, cached = (
            place(f"{server.host}/ref-{name}:nydus").open().manifest("nydus")[0] for name in ("fresh", "two")
        )
        assert fresh == cached


def layer_of(*names: str, mode: int = 0o755) -> bytes:
    """A gzip tar of empty files and (with a slash at the end) directories."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in names:
            entry = tarfile.TarInfo(name.rstrip("/"))
            entry.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            entry.mode, entry.uid, entry.mtime = mode, 7, 1234567
            archive.addfile(entry)
    return buffer.getvalue()


def put_image(server: FaultyRegistry, tag: str, *layers: bytes) -> RegistryPlace:
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        diff_ids = [model.digest(gzip.decompress(layer)) for layer in layers]
        config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        manifest = model.Manifest(
            schema_version=2,
            media_type=model.OCI_MANIFEST,
            config=repository.put_blob(model.encode(config), model.OCI_CONFIG),
            layers=tuple(repository.put_blob(layer, model.OCI_LAYER_GZIP) for layer in layers),
        )
        repository.put_manifest(tag, model.encode(manifest), model.OCI_MANIFEST)
    return place(f"{server.host}/small:{tag}")


def test_a_directory_that_a_layer_only_implies_keeps_its_attributes(
    server: FaultyRegistry, tmp_path: Path
) -> None:
    """Otherwise /secret of the lower layer would become readable by everybody."""
    lower, upper = layer_of("secret/", "secret/a", mode=0o700), layer_of("secret/b", "new/c")
    source = put_image(server, "implied", lower, upper)
    options = ConvertOptions(record=tmp_path / "record")
    for tag in ("n1", "n2"):  # the second from the record
        result = image(source, place(f"{server.host}/small:{tag}"), options)
        found = listing(tree_of(place(f"{server.host}/small:{tag}").open(), tag))
        assert found["/secret"][:2] == (0o40700, 7) and found["/secret"][4] == 1234567
        assert found["/new"][:2] == (0o40755, 0)
    assert [layer.reused for layer in result.layers] == [True, True]


def test_many_layers(server: FaultyRegistry) -> None:
    layers = [layer_of(f"d{number}/", f"d{number}/f") for number in range(127)]
    image(put_image(server, "many", *layers), place(f"{server.host}/small:nydus"))
    assert len(listing(tree_of(place(f"{server.host}/small:nydus").open(), "nydus"))) == 255


@pytest.mark.parametrize("repository", ["small", "elsewhere"])
def test_oci_ref(server: FaultyRegistry, source: str, vectors: Path, tmp_path: Path, repository: str) -> None:
    """Into another repository too, where the layers with the data have to go as well."""
    from nydus.convert.check import check

    target = place(f"{server.host}/{repository}:ref")
    image(place(source), target, ConvertOptions(oci_ref=True))
    theirs, ours = open_archive(vectors / "oci/oci-ref.tar"), target.open()
    expected, found = load(theirs, ""), load(ours, "ref")
    for document in (expected, found):
        for key in (SOURCE_REFERENCE, BUILDER):
            document["annotations"].pop(key)
        document["mediaType"] = document["content type"]
        document["config"]["content"]["rootfs"].pop("diff_ids")
    assert without(found, DIFFERENT) == without(expected, DIFFERENT)
    assert listing(tree_of(ours, "ref")) == listing(tree_of(theirs, ""))
    amd64 = model.Platform(os="linux", architecture="amd64")
    report = check(target, place(source), amd64, tmp_path)
    assert report.kind == "oci-ref" and report.checks["filesystem"] == 17


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
def test_back_to_an_ordinary_image(
    server: FaultyRegistry, source: str, vectors: Path, tmp_path: Path, vector: str
) -> None:
    """Of what the reference made: the same file system, and no trace of Nydus in layers and config."""
    from nydus.convert.check import Side, _listing
    from nydus.convert.listing import compare
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
        sides.append(_listing(Side("source", reference, reader, oci=found), tmp_path))
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
