"""Every image that the reference implementation wrote reads as its own daemon read it."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from conformance import content
from nydus import rafs
from nydus.errors import FormatError
from nydus.rafs import blobmeta, toc
from nydus.rafs.model import BlobFeature, BlobInfo, Compression

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


@pytest.mark.parametrize("name", ["v6-bootstrap-chunk-pos-438272", "v5-bootstrap-file-size-736032"])
def test_old_bootstraps(name: str, vectors: Path) -> None:
    with tarfile.open(vectors / "upstream" / "snapshotter" / f"{name}.tar.gz") as archive:
        member = next(m for m in archive if m.isfile())
        data = archive.extractfile(member).read()  # type: ignore[union-attr]
    tree = rafs.read(data, name)
    assert len(tree) > 1000 and len(tree.blobs) >= 1
    # Layout differs from today's, content does not.
    again = rafs.read(rafs.write(tree), name)
    assert [path for _, path in again.walk()] == [path for _, path in tree.walk()]
    assert (again.chunks["digest"] == tree.chunks["digest"]).all()


@pytest.mark.parametrize(
    ("bootstrap_path", "blobs"),
    [
        ("bootstrap/rafs-v6-2.2.boot", "blobs"),
        ("repeatable/blake3-lz4_block-non_repeatable", "repeatable/blobs"),
        ("repeatable/sha256-nocompress-repeatable", "repeatable/blobs"),
    ],
)
def test_old_images(bootstrap_path: str, blobs: str, vectors: Path) -> None:
    """Every chunk has the digest that the image names; the fixtures say no more about content."""
    folder = vectors / "upstream"
    tree = rafs.read((folder / bootstrap_path).read_bytes(), bootstrap_path)
    for blob in content.open_blobs(tree, folder / blobs, vectors / "inputs"):
        assert blob.chunks.digests is not None and blob.chunks.digests.any()
        for index in range(len(blob.chunks)):
            blob.chunk(index)


def test_old_gzip_index(vectors: Path) -> None:
    (path,) = (vectors / "upstream" / "zran").glob("*.blob.meta")
    data = path.read_bytes()
    head = [int.from_bytes(data[-4096:][at : at + size], "little") for at, size in ((4, 4), (8, 4), (12, 4))]
    sizes = [int.from_bytes(data[-4096:][at : at + 8], "little") for at in (16, 24, 32)]
    blob = BlobInfo(
        id=path.name.split(".")[0],
        chunk_size=1 << 24,
        chunk_count=head[2],
        features=BlobFeature(head[0]),
        meta_compression=Compression(head[1]),
        meta_offset=sizes[0],
        meta_compressed_size=sizes[1],
        meta_uncompressed_size=sizes[2],
        compressed_size=1 << 32,
        uncompressed_size=1 << 40,
    )
    chunks = blobmeta.from_cache_file(blob, data)
    assert len(chunks.zran) and (chunks.context < len(chunks.zran)).all()
    assert blobmeta.to_cache_file(chunks) == data


def test_images_before_1_0_are_refused(vectors: Path) -> None:
    data = (vectors / "upstream" / "bootstrap" / "nydusd_daemon_test_bootstrap").read_bytes()
    with pytest.raises(FormatError, match=r"before RAFS 1\.0"):
        rafs.read(data)
