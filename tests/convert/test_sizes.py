"""The figures that a conversion and ``nydusify info`` give are those of what is there."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from documents import load
from faulty import FaultyRegistry
from images import place, put_image, two_platforms
from nydusify_command import Nydusify

pytestmark = pytest.mark.vectors


def layer(name: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        data = os.urandom(3 << 18)
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


@pytest.fixture
def source(server: FaultyRegistry) -> str:
    """An image of several layers, one of which it has twice."""
    first, second = layer("a"), layer("b")
    return str(put_image(server, "latest", first, second, first))


def convert(
    nydusify: Nydusify, tmp_path: Path, source: str, *more: str
) -> tuple[dict[str, Any], dict[str, int], str]:
    """``--json``, ``--output-json``, and what is said at the end."""
    output = tmp_path / "out.json"
    files = ("--plain-http", "--output-json", str(output), "--json")
    done = nydusify("convert", "--source", source, "--target", f"{source}-n", *files, *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), json.loads(output.read_text()), done.stderr.splitlines()[-1]


def blobs_of(document: dict[str, Any]) -> dict[str, int]:
    """Digest -> size of all configs and layers."""
    if "manifests" in document:
        return {k: v for entry in document["manifests"] for k, v in blobs_of(entry["content"]).items()}
    return {each["digest"]: each["size"] for each in (document["config"], *document["layers"])}


def listed(manifest: dict[str, Any]) -> int:
    """What a manifest lists, as often as it does."""
    return sum(each["size"] for each in (manifest["config"], *manifest["layers"]))


def stored(server: FaultyRegistry, tag: str) -> Any:
    return load(place(f"{server.host}/small:{tag}").open(), tag)


def test_a_plain_conversion(nydusify: Nydusify, server: FaultyRegistry, source: str, tmp_path: Path) -> None:
    found, figures, text = convert(nydusify, tmp_path, source)
    before, after = stored(server, "latest"), stored(server, "latest-n")
    assert found["source_size"] == sum(blobs_of(before).values())
    assert figures["SourceImageSize"] == listed(before) > found["source_size"]
    assert found["target_size"] == sum(blobs_of(after).values()) == figures["TargetTotalSize"]
    assert found["kept_size"] == found["backend_size"] == 0
    assert figures["TargetImageSize"] == listed(after) > found["target_size"]
    start = after["config"]["size"] + after["layers"][-1]["size"]
    assert found["start_size"] == start == figures["StartSize"]
    assert found["start_image_size"] == found["target_size"]
    assert found["start_source_size"] == found["source_size"]
    assert f"{100 * start / found['target_size']:.3g} % of the Nydus image" in text
    assert "(at 100 Mbit/s 0.0 s, 0.1 s for the whole source)" in text
    assert "layers of the source" not in text


def test_an_index_over_layers_needs_these(
    nydusify: Nydusify, server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    found, figures, text = convert(nydusify, tmp_path, source, "--oci-ref")
    layers = {layer["digest"]: layer["size"] for layer in stored(server, "latest")["layers"]}
    manifest = stored(server, "latest-n")
    index = sum(blobs_of(manifest).values())
    assert found["kept_size"] == sum(layers.values()) == figures["KeptSize"]
    assert found["target_size"] == index + found["kept_size"] == found["start_image_size"]
    assert figures["TargetImageSize"] == listed(manifest)
    assert " layers of the source)" in text
    shown = json.loads(nydusify("info", f"{source}-n", "--plain-http", "--json").stdout)
    assert shown["total_size"] == shown["size"] + shown["elsewhere"]
    assert shown["elsewhere"] == found["kept_size"] and shown["start_size"] == found["start_size"]
    lines = nydusify("info", f"{source}-n", "--plain-http").stdout
    assert "in the layers of the source: " in lines and " % of the image; the rest follows" in lines


def test_both_halves_of_an_index_count(
    nydusify: Nydusify, server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    found, figures, _ = convert(nydusify, tmp_path, source, "--merge-platform")
    index = stored(server, "latest-n")
    layers = {layer["digest"]: layer["size"] for layer in stored(server, "latest")["layers"]}
    assert found["target_size"] == sum(blobs_of(index).values()) == figures["TargetTotalSize"]
    assert found["kept_size"] == sum(layers.values())
    half = index["manifests"][1]["content"]
    assert found["start_image_size"] == sum(blobs_of(half).values())
    assert figures["TargetImageSize"] == listed(half)


def test_a_storage_backend_counts(
    nydusify: Nydusify, server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    (tmp_path / "blobs").mkdir()
    backend = ("--backend-type", "localfs", "--backend-config", json.dumps({"dir": str(tmp_path / "blobs")}))
    found, figures, text = convert(nydusify, tmp_path, source, *backend)
    there = sum(path.stat().st_size for path in (tmp_path / "blobs").iterdir())
    listed = sum(blobs_of(stored(server, "latest-n")).values())
    assert found["backend_size"] == there == figures["BackendSize"]
    assert found["target_size"] == listed + there == found["start_image_size"]
    assert figures["TargetImageSize"] == listed == found["start_size"]
    assert " in the storage backend)" in text
    assert "in a storage backend: " in nydusify("info", f"{source}-n", "--plain-http").stdout


def test_a_start_is_that_of_one_platform(
    nydusify: Nydusify, server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    index = two_platforms(server.host)
    found, _, _ = convert(nydusify, tmp_path, str(index), "--all-platforms")
    halves = [entry["content"] for entry in stored(server, f"{index.target}-n")["manifests"]]
    starts = [half["config"]["size"] + half["layers"][-1]["size"] for half in halves]
    assert len(starts) == 2 and found["start_size"] == max(starts)
    assert found["start_image_size"] in [sum(blobs_of(half).values()) for half in halves]


def test_back_to_an_ordinary_image(
    nydusify: Nydusify, server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    convert(nydusify, tmp_path, source)
    found, _, text = convert(nydusify, tmp_path, f"{source}-n", "--reverse")
    assert found["target_size"] == sum(blobs_of(stored(server, "latest-n-n")).values())
    assert found["source_size"] == sum(blobs_of(stored(server, "latest-n")).values())
    assert found["start_size"] == 0 and "containers start" not in text
