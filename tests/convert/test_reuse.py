"""What was converted before is not converted again."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from documents import load
from faulty import FaultyHandler, FaultyRegistry, is_blob
from images import layer_with, place, put_image, two_platforms

from nydus.convert.check import check
from nydus.convert.image import image
from nydus.convert.options import ConvertOptions
from nydus.convert.reuse import note
from nydus.errors import FormatError, NydusError
from nydus.oci import model

pytestmark = pytest.mark.vectors


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
    assert len(cached()) == 4  # three layers, one image
    # Keyed by all parameters
    assert convert("small:c", ConvertOptions(fs_version=5)) == [False] * 3
    assert len(cached()) == 8
    assert convert("small:d", ConvertOptions()) == [True] * 3
    assert convert("small:e", ConvertOptions(), "v2") == [False] * 3
    assert len(cached()) == 4
    assert convert("small:f", ConvertOptions(batch_size=0x10000), "v2", most=4) == [False] * 3
    assert len(cached()) == 4
    with pytest.raises(NydusError, match="is not a build cache"):
        image(place(source), place(f"{server.host}/x:y"), cache=BuildCache(place(f"{server.host}/small:a")))
    server.intercepts.append(lambda handler: "/cache/" in handler.path and (handler.send_error(403) or True))
    with pytest.raises(NydusError, match=f"^build cache {server.host}/cache:c: "):
        convert("small:g", ConvertOptions())


@pytest.mark.parametrize("lost", [None, "bootstrap", "layer"])
def test_a_build_cache_has_whole_images(
    server: FaultyRegistry, source: str, tmp_path: Path, lost: str | None
) -> None:
    """Nothing is read and merged that the cache has as a whole, on whatever machine."""
    from nydus.convert.cache import BuildCache

    cache = place(f"{server.host}/cache:c")
    first = image(place(source), place(f"{server.host}/small:n"), cache=BuildCache(cache))
    records = load(cache.open(), "c")["layers"]
    assert [record["mediaType"] for record in records] == [model.NYDUS_BLOB] * 3 + [model.OCI_LAYER_GZIP]
    if lost:
        gone = records[-1 if lost == "bootstrap" else 0]["digest"].partition(":")[2]
        for path in (tmp_path / "registry").rglob(f"*{gone}*"):
            path.unlink()
    with FaultyRegistry(tmp_path / "other") as other:
        server.seen.clear()
        again = image(place(source), place(f"{other.host}/small:n"), cache=BuildCache(cache))
        assert again.descriptor.digest == first.descriptor.digest
        assert [layer.reused for layer in again.layers] == [lost != "layer", True, True]
        manifest = load(place(f"{other.host}/small:n").open(), "n")
        assert all(place(f"{other.host}/small:n").open().has_blob(it["digest"]) for it in manifest["layers"])
    if lost is None:
        asked = [path for path in server.paths("GET") if "/blobs/" in path]
        # The source's config, and each blob once: no tables are read.
        assert len(asked) == 1 + 4
        assert not server.paths("PUT"), "the cache is written though nothing is new"


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
                server.seen.clear()
                result = image(place(source), target, options, cache=cache, **more)
                if reused and kind != "dictionary":
                    ranges = [path for verb, path, head in server.seen if "Range" in head]
                    assert not ranges, "what is cached as a whole is read and merged"
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


def test_a_build_cache_and_a_dictionary_after_a_conversion_without_the_cache(
    server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    from nydus.convert.cache import BuildCache

    dictionary, target = place(f"{server.host}/small:dictionary"), place(f"{server.host}/small:n")
    image(place(source), dictionary, ConvertOptions(prefetch=()))
    options = ConvertOptions(record=tmp_path / "record")
    first = image(place(source), target, options, dictionary=dictionary)
    cache = place(f"{server.host}/cache:c")
    again = image(place(source), target, options, cache=BuildCache(cache), dictionary=dictionary)
    assert again.descriptor == first.descriptor
    assert [layer.reused for layer in again.layers] == [True] * 3
    assert len(load(cache.open(), "c")["layers"]) == 3


def test_a_cached_image_is_not_used_with_other_blobs_than_it_was_made_of(
    server: FaultyRegistry, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of a codec gives a layer other bytes; its entry is replaced, those of images stay."""
    from nydus.convert.cache import BuildCache

    # Other options stand for that other version.
    monkeypatch.setattr("nydus.convert.image.options_key", lambda *_: "key")
    cache, part = place(f"{server.host}/cache:c"), place(f"{server.host}/small:part")
    image(place(source), place(f"{server.host}/small:n"), cache=BuildCache(cache))
    store, raw = part.open_sink(), place(source).open().manifest("latest")[1]
    manifest = model.decode(raw, model.Manifest, "")
    config = json.loads(part.open().document(manifest.config))
    config["rootfs"]["diff_ids"] = config["rootfs"]["diff_ids"][:1]
    stored = store.put_blob(model.encode(config), manifest.config.media_type)
    changed = msgspec.structs.replace(manifest, config=stored, layers=manifest.layers[:1])
    store.put_manifest("part", model.encode(changed), manifest.media_type)
    lost = load(cache.open(), "c")["layers"][0]["digest"].partition(":")[2]
    for path in (tmp_path / "registry").rglob(f"*{lost}*"):
        path.unlink()
    image(part, place(f"{server.host}/other:n"), ConvertOptions(compressor="none"), cache=BuildCache(cache))

    with FaultyRegistry(tmp_path / "elsewhere") as other:
        target = place(f"{other.host}/small:n")
        image(place(source), target, cache=BuildCache(cache))
        check(target, place(source), None, tmp_path)


def test_a_record_keeps_what_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nydus.convert.reuse._MOST", 8)
    for number in range(20):
        note(tmp_path, str(number), b"")
        os.utime(tmp_path / str(number), (number, number))
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {str(each) for each in range(number + 1 - len(names), number + 1)}
        assert min(number + 1, 4) <= len(names) <= 8


@pytest.mark.parametrize(
    "wrong", [{"toc": "zz"}, {"toc": "00"}, {"implied": ["/\u0416"]}, {"toc_size": -1}, {"diff_id": "x"}]
)
def test_a_build_cache_with_nonsense(server: FaultyRegistry, source: str, wrong: dict[str, object]) -> None:
    from nydus.convert.cache import ENTRY, BuildCache

    cache = place(f"{server.host}/cache:c")
    first = image(place(source), place(f"{server.host}/small:n"), cache=BuildCache(cache))
    descriptor, data = cache.open().manifest("c")
    document = json.loads(data)
    of_image = "diff_id" in wrong
    document["layers"] = document["layers"] if of_image else document["layers"][:3]
    for record in document["layers"][3:] if of_image else document["layers"]:
        record["annotations"][ENTRY] = json.dumps({**json.loads(record["annotations"][ENTRY]), **wrong})
    cache.open_sink().put_manifest("c", json.dumps(document).encode(), descriptor.media_type)
    again = image(place(source), place(f"{server.host}/other:n"), cache=BuildCache(cache))
    assert again.descriptor.digest == first.descriptor.digest
    assert [layer.reused for layer in again.layers] == [of_image] * 3


def test_a_build_cache_has_an_image_of_two_platforms_once(server: FaultyRegistry, source: str) -> None:
    """The two differ in their configs alone."""
    from nydus.convert.cache import BuildCache

    cache, both = place(f"{server.host}/cache:c"), two_platforms(server.host)
    for target in ("small:one", "small:two"):
        result = image(both, place(f"{server.host}/{target}"), platforms=None, cache=BuildCache(cache))
    assert all(layer.reused for layer in result.layers)
    assert len(load(cache.open(), "c")["layers"]) == 4


def test_a_build_cache_that_has_lost_a_blob_begins_anew(server: FaultyRegistry, tmp_path: Path) -> None:
    from nydus.convert.cache import BuildCache

    cache = place(f"{server.host}/cache:c")
    for tag in ("one", "two"):
        made_of = put_image(server, tag, layer_with(tag, tag.encode()))
        image(made_of, place(f"{server.host}/small:n-{tag}"), cache=BuildCache(cache))
        if tag == "one":
            lost = load(cache.open(), "c")["layers"][0]["digest"].partition(":")[2]
            for path in (tmp_path / "registry").rglob(f"*{lost}*"):
                path.unlink()
    records = load(cache.open(), "c")["layers"]
    assert len(records) == 2
    assert all(cache.open().has_blob(record["digest"]) for record in records)


def test_what_is_cached_is_not_waited_for_once_a_layer_has_failed(
    server: FaultyRegistry, tmp_path: Path
) -> None:
    from nydus.convert.cache import BuildCache

    layers = [layer_with("f", bytes([number]) * 100) for number in range(40)]
    sound = put_image(server, "sound", *layers)
    broken = put_image(server, "broken", *layers, gzip.compress(b"no tar archive" * 99))

    def slow(handler: FaultyHandler) -> bool:
        time.sleep(1 if is_blob(handler) else 0)
        return False

    with FaultyRegistry(tmp_path / "caches") as caches, FaultyRegistry(tmp_path / "other") as other:
        cache = place(f"{caches.host}/cache:c")
        image(sound, place(f"{server.host}/small:n"), cache=BuildCache(cache))
        caches.intercepts.append(slow)
        caches.seen.clear()
        with pytest.raises(FormatError, match=r"layer 41 .* not a tar header"):
            image(broken, place(f"{other.host}/small:n"), cache=BuildCache(cache))
        assert len([path for path in caches.paths("GET") if "/blobs/" in path]) < 40
