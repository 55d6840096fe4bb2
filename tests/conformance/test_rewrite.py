"""Writing the tree that was read gives the bytes of the reference implementation again."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.test_read import NAMES, bootstrap
from nydus import rafs
from nydus.rafs import blobmeta, toc
from nydus.rafs.model import BlobFeature

pytestmark = pytest.mark.vectors


@pytest.mark.parametrize("name", NAMES)
def test_bootstrap(name: str, vectors: Path) -> None:
    data = bootstrap(vectors / name)
    assert rafs.write(rafs.read(data, name)) == data


@pytest.mark.parametrize("name", ["merge-v5", "merge-v6"])
def test_layers_of_a_merge(name: str, vectors: Path) -> None:
    for layer in (vectors / name / "layers").iterdir():
        data = layer.read_bytes()
        assert rafs.write(rafs.read(data, layer.name)) == data


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("v6", "dict-v6", "merge-v6"))])
def test_blob_meta(name: str, vectors: Path) -> None:
    """The plain section and the header; their compressed form depends on the version of the codec."""
    head = rafs.superblock(bootstrap(vectors / name), name)
    for blob in head.blobs:
        if blob.features & BlobFeature.TARFS:
            continue
        named = blob.rafs_digest.hex() if blob.features & BlobFeature.SEPARATE else blob.id
        path = vectors / name / "blobs" / named
        if not path.exists():  # the blob of an inlined bootstrap does not know its name
            (path,) = (vectors / name / "blobs").iterdir()
        data = path.read_bytes()
        chunks = blobmeta.load(
            blob, lambda offset, size, data=data: data[offset : offset + size], size=len(data)
        )  # type: ignore[misc]
        section, header = blobmeta.encode(chunks)
        end = blob.meta_offset + blob.meta_compressed_size
        stored = data[end : end + blobmeta.HEADER_SIZE]
        if not blob.cipher and not blob.features & BlobFeature.INLINED_FS_META:
            assert header == stored
        again = blobmeta.from_cache_file(blob, blobmeta.to_cache_file(chunks))
        assert blobmeta.encode(again) == (section, header)


@pytest.mark.parametrize("name", ["v6-dir-toc", "v6-inline-meta"])
def test_toc(name: str, vectors: Path) -> None:
    (path,) = (vectors / name / "blobs").iterdir()
    data = path.read_bytes()
    contents = toc.read_toc(lambda offset, size: data[offset : offset + size], len(data))
    assert contents is not None
    assert toc.write_toc(list(contents.entries)) == data[contents.offset :]
