"""Every reference image read through the cache gives the recorded content."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from nydus import rafs
from nydus.rafs import blobmeta, toc
from nydus.rafs.model import BlobFeature, Tree
from nydus.storage.backends.localfs import LocalFs
from nydus.storage.cache import BlobCache

pytestmark = pytest.mark.vectors

_PLAIN = [
    "dict-v5", "dict-v6", "merge-v5", "merge-v6", "v5-dir-aligned", "v5-dir-lz4_block", "v5-dir-none",
    "v5-dir-prefetch-blob", "v5-dir-sha256", "v5-dir-zstd", "v6-dir-4k-chunks", "v6-dir-batch",
    "v6-dir-encrypted", "v6-dir-lz4_block", "v6-dir-none", "v6-dir-prefetch", "v6-dir-sha256", "v6-dir-toc",
    "v6-dir-uidgid", "v6-dir-zstd", "v6-tar", "v6-tarfs", "v6-targz", "v6-targz-ref",
    "v5-inline-meta", "v6-inline-meta",
]  # fmt: skip
_IMAGES = ["oci-ref", "v5-zstd", "v6-batch", "v6-lz4", "v6-zstd", "prefetch"]


def open_cache(work: Path, tree: Tree, number: int, backend: LocalFs) -> BlobCache:
    info = tree.blobs[number]
    if tree.version == 5 or info.features & BlobFeature.TARFS:
        return BlobCache(work, info, lambda: blobmeta.from_tree(tree, number), backend)
    return BlobCache(work, info, None, backend, digests=lambda m: m.set_digests(tree.chunks, number))


def compare(tree: Tree, expected: Path, work: Path, backend: LocalFs) -> None:
    """Every regular file by single chunk reads, then again out of the cache alone, reopened."""
    wanted = {}
    for line in expected.read_text().splitlines():
        item = json.loads(line)
        if "sha256" in item:
            wanted[item["path"].encode("utf-8", "surrogateescape")] = item["sha256"]
    assert wanted
    for turn in range(2):
        caches = [open_cache(work, tree, i, backend) for i in range(len(tree.blobs))]
        found = {}
        for row, path in tree.walk():
            if path in wanted:
                content = hashlib.sha256()
                for chunk in tree.node_chunks(row):
                    cache = caches[int(chunk["blob_index"])]
                    for part in cache.read(int(chunk["uoffset"]), int(chunk["usize"])):
                        content.update(part)
                found[path] = content.hexdigest()
        assert found == wanted
        for cache in caches:
            cache.fill(0, cache.length)  # chunks that no file of a merged image uses
            if not cache.blob.features & BlobFeature.TARFS:
                assert cache.verified_file() is not None
            cache.close()
        assert turn or backend.metrics.json()["read_count"]
        backend = LocalFs(dir=str(work / "nowhere"))


@pytest.mark.parametrize("name", _PLAIN)
def test_vector(vectors: Path, tmp_path: Path, name: str) -> None:
    folder = vectors / name
    places = tmp_path / "blobs"
    places.mkdir()
    for path in (vectors / "inputs").iterdir():
        (places / hashlib.sha256(path.read_bytes()).hexdigest()).symlink_to(path)
    blobs = [folder / "blobs", vectors / "v6-dir-zstd/blobs", vectors / "v5-dir-zstd/blobs"]
    backend = LocalFs(dir=str(places), alt_dirs=tuple(map(str, blobs)))
    tree = rafs.read(_vector_bootstrap(folder))
    if not (folder / "bootstrap").exists():
        tree.blobs[0].id = next((folder / "blobs").iterdir()).name
    compare(tree, folder / "expected.jsonl", tmp_path / "cache", backend)


def _vector_bootstrap(folder: Path) -> bytes:
    if (folder / "bootstrap").exists():
        return (folder / "bootstrap").read_bytes()
    (blob,) = (folder / "blobs").iterdir()
    data = blob.read_bytes()
    return toc.extract_bootstrap(lambda offset, size: data[offset : offset + size], len(data))


@pytest.mark.parametrize("name", _IMAGES)
def test_image(vectors: Path, tmp_path: Path, name: str) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    manifests = []
    archives = [f"{name}.tar", "source.tar"] if name == "oci-ref" else [f"{name}.tar"]
    for archive in archives:
        with tarfile.open(vectors / "oci" / archive) as tar:
            for member in tar:
                if member.isfile() and "blobs/sha256/" in member.name:
                    (blobs / Path(member.name).name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
                elif member.name.endswith("index.json") and archive != "source.tar":
                    manifests = json.load(tar.extractfile(member))["manifests"]  # type: ignore[arg-type]
    bootstrap = _bootstrap(blobs, manifests)
    compare(rafs.read(bootstrap), vectors / "oci/expected.jsonl", tmp_path / "cache", LocalFs(dir=str(blobs)))


def _bootstrap(blobs: Path, manifests: list[dict[str, str]]) -> bytes:
    while manifests:
        document = json.loads((blobs / manifests.pop()["digest"].removeprefix("sha256:")).read_text())
        manifests += document.get("manifests", [])
        for layer in document.get("layers", []):
            if "containerd.io/snapshot/nydus-bootstrap" in layer.get("annotations", {}):
                data = (blobs / layer["digest"].removeprefix("sha256:")).read_bytes()
                with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                    return tar.extractfile("image/image.boot").read()  # type: ignore[union-attr]
    raise AssertionError("no bootstrap layer")
