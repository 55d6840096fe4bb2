"""Every image that the reference implementation wrote reads as its own daemon read it."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from conformance import content
from nydus import rafs
from nydus.rafs import toc

pytestmark = pytest.mark.vectors

NAMES = [
    "v5-dir-none",
    "v5-dir-lz4_block",
    "v5-dir-zstd",
    "v5-dir-sha256",
    "v5-dir-aligned",
    "v5-dir-prefetch-blob",
    "v5-inline-meta",
    "v6-dir-none",
    "v6-dir-lz4_block",
    "v6-dir-zstd",
    "v6-dir-sha256",
    "v6-dir-4k-chunks",
    "v6-dir-batch",
    "v6-dir-encrypted",
    "v6-dir-prefetch",
    "v6-dir-toc",
    "v6-dir-uidgid",
    "v6-inline-meta",
    "v6-tar",
    "v6-targz",
    "v6-targz-ref",
    "v6-tarfs",
    "dict-v5",
    "dict-v6",
    "merge-v5",
    "merge-v6",
]


def bootstrap(folder: Path) -> bytes:
    """The bootstrap of a vector; two of them keep it inside of the blob."""
    if (folder / "bootstrap").exists():
        return (folder / "bootstrap").read_bytes()
    (blob,) = (folder / "blobs").iterdir()
    data = blob.read_bytes()
    return toc.extract_bootstrap(lambda offset, size: data[offset : offset + size], len(data))


@pytest.mark.parametrize("name", NAMES)
def test_vector(name: str, vectors: Path) -> None:
    tree = rafs.read(bootstrap(vectors / name), name)
    if not (vectors / name / "bootstrap").exists():
        tree.blobs[0].id = next((vectors / name / "blobs").iterdir()).name
    blobs = content.open_blobs(tree, vectors / name / "blobs", vectors / "inputs")
    found = {row["path"]: row for row in content.describe(tree, blobs)}
    expected = content.expected(vectors / name / "expected.jsonl")
    for rows in (found, expected):
        del rows["/"]  # its times differ, see the README of the vectors
    assert found.keys() == expected.keys()
    for path, row in expected.items():
        assert found[path] == row


@pytest.mark.parametrize(
    "name", ["v5-zstd", "v6-zstd", "v6-lz4", "v6-batch", "oci-ref", "prefetch", "oci-types"]
)
def test_oci_image(name: str, vectors: Path, tmp_path: Path) -> None:
    with tarfile.open(vectors / "oci" / f"{name}.tar") as archive:
        archive.extractall(tmp_path / "image", filter="data")
    layers = tmp_path / "image" / "blobs" / "sha256"
    data = None
    for layer in layers.iterdir():
        if layer.read_bytes()[:2] == b"\x1f\x8b":
            with tarfile.open(layer) as archive:
                member = next((m for m in archive if m.name == "image/image.boot"), None)
                data = archive.extractfile(member).read() if member else data  # type: ignore[union-attr]
    assert data is not None
    if name == "oci-ref":  # its data are the layers of the image beside it
        with tarfile.open(vectors / "oci" / "source.tar") as archive:
            archive.extractall(tmp_path / "source", filter="data")
        inputs = tmp_path / "source" / "blobs" / "sha256"
    else:
        inputs = layers
    tree = rafs.read(data, name)
    blobs = content.open_blobs(tree, layers, inputs)
    found = {row["path"]: row for row in content.describe(tree, blobs)}
    expected = content.expected(vectors / "oci" / "expected.jsonl")
    for rows in (found, expected):
        del rows["/"]
    assert found == expected
