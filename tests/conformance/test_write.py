"""For the same input and options, what we write is what the reference wrote, byte for byte.

What differs, and why:

* Compressed bytes depend on the version of the codec (rafs.md 3.1), so the versions of the reference are
  swapped in. One test builds with our own codecs and compares all that does not depend on them.
* The order of several attributes of one inode is random in the reference: it is taken from the vector.
* The key of an encrypted image is random: it is taken from the vector.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_codecs

from nydus import rafs
from nydus.build import bootstrap, directory, layer
from nydus.build import tree as build_tree
from nydus.build.bootstrap import LayerBlob, describe_blob
from nydus.build.layer import BuildOptions, LayerResult, build_layer
from nydus.build.merge import merge
from nydus.build.tarfs import build_tarfs
from nydus.build.zran import build_reference
from nydus.rafs import toc
from nydus.rafs.model import Compression, Digester, Tree

pytestmark = pytest.mark.vectors

LZ4 = Compression.LZ4_BLOCK
NONE = Compression.NONE
PREFETCH = (b"/data/text", b"/sizes", b"/bin")

#: Vector → (source, options, prefetch list).
BUILDS: dict[str, tuple[str, dict[str, Any], tuple[bytes, ...]]] = {
    "v6-dir-none": ("kitchen", {"compression": NONE, "chunk_size": 0x10000}, ()),
    "v6-dir-zstd": ("kitchen", {"chunk_size": 0x10000}, ()),
    "v6-dir-lz4_block": ("kitchen", {"compression": LZ4, "chunk_size": 0x10000}, ()),
    "v6-dir-4k-chunks": ("kitchen", {"chunk_size": 0x1000}, ()),
    "v6-dir-batch": ("kitchen", {"batch_size": 0x40000}, ()),
    "v6-dir-encrypted": ("kitchen", {"encrypt": True}, ()),
    "v6-dir-prefetch": ("kitchen", {"compression": LZ4, "prefetch_table": True}, PREFETCH),
    "v6-dir-sha256": ("big", {"digester": Digester.SHA256}, ()),
    "v6-dir-toc": ("kitchen", {"toc": True}, ()),
    "v6-dir-uidgid": ("kitchen", {"owners": False}, ()),
    "v6-inline-meta": ("kitchen", {"toc": True, "inline_meta": True}, ()),
    "v6-tar": ("kitchen.tar", {}, ()),
    "v6-targz": ("big.tar.gz", {}, ()),
    "v5-dir-none": ("kitchen", {"version": 5, "compression": NONE, "chunk_size": 0x10000}, ()),
    "v5-dir-zstd": ("kitchen", {"version": 5, "chunk_size": 0x10000}, ()),
    "v5-dir-lz4_block": ("kitchen", {"version": 5, "compression": LZ4, "chunk_size": 0x10000}, ()),
    "v5-dir-aligned": ("kitchen", {"version": 5, "compression": LZ4, "aligned": True}, ()),
    "v5-dir-prefetch-blob": ("kitchen", {"version": 5, "prefetch_blob": True}, PREFETCH),
    "v5-dir-sha256": ("big", {"version": 5, "digester": Digester.SHA256}, ()),
    "v5-inline-meta": ("kitchen", {"version": 5, "inline_meta": True}, ()),
    "v6-tarfs": ("kitchen.tar", {"compression": NONE, "digester": Digester.SHA256}, ()),
    "v6-targz-ref": ("big.tar.gz", {"compression": Compression.GZIP, "digester": Digester.SHA256}, ()),
    "dict-v5": ("big", {"version": 5, "chunk_size": 0x10000, "dictionary": "v5-dir-zstd"}, ()),
    "dict-v6": ("big", {"chunk_size": 0x10000, "dictionary": "v6-dir-zstd"}, ()),
}


@pytest.fixture(scope="session")
def extracted(vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs as directories, with owners, devices and attributes as they were."""
    root = tmp_path_factory.mktemp("inputs")
    for name in ("kitchen", "big"):
        (root / name).mkdir()
        archive = vectors / "inputs" / f"{name}.tar.gz"
        subprocess.run(
            ["tar", "--xattrs", "--xattrs-include=*", "-xpf", archive, "-C", root / name], check=True
        )
    return root


def reference_tree(vector: Path) -> Tree:
    if (vector / "bootstrap").exists():
        return bootstrap.load(str(vector / "bootstrap"))
    return bootstrap.load(str(next((vector / "blobs").iterdir())))


def take_randomness_from(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the order of attributes, and the key, of an image of the reference."""
    order = {frozenset(xattrs): xattrs for xattrs in tree.xattrs}
    ours = build_tree.known_xattrs

    def known(xattrs: tuple[tuple[bytes, bytes], ...]) -> tuple[tuple[bytes, bytes], ...]:
        kept = ours(xattrs)
        return order.get(frozenset(kept), kept)

    monkeypatch.setattr(build_tree, "known_xattrs", known)
    if tree.blobs and tree.blobs[-1].cipher:
        secrets = {32: tree.blobs[-1].key, 16: tree.blobs[-1].iv}
        monkeypatch.setattr(os, "urandom", lambda size: secrets[size])


def build(
    name: str, vectors: Path, extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[LayerResult, bytes, Tree]:
    """Build what a vector was built from; returns it, its blob and the reference's tree."""
    source, options, prefetch = BUILDS[name]
    reference = reference_tree(vectors / name)
    take_randomness_from(reference, monkeypatch)
    if dictionary := options.get("dictionary"):
        options = options | {"dictionary": bootstrap.load(str(vectors / dictionary / "bootstrap"))}
    written: list[bytes] = []
    if source.endswith((".tar", ".gz")):
        with open(vectors / "inputs" / source, "rb") as stream:
            if name == "v6-tarfs":
                result = build_tarfs(stream, BuildOptions(**options))
            else:
                make = build_reference if name == "v6-targz-ref" else build_layer
                result = make(stream, written.append, BuildOptions(**options), prefetch, source)
    else:
        result = directory.build_directory(
            str(extracted / source), written.append, BuildOptions(**options), prefetch
        )
    return result, b"".join(written), reference


@pytest.mark.root
@pytest.mark.parametrize("name", BUILDS)
def test_build(name: str, vectors: Path, extracted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference_codecs.install(monkeypatch)
    result, blob, _ = build(name, vectors, extracted, monkeypatch)
    dictionary = BUILDS[name][1].get("dictionary")
    shared = {path.name for path in (vectors / dictionary / "blobs").iterdir()} if dictionary else set()
    if name == "v6-tarfs":  # the archive is the blob
        assert blob == b""
    else:
        blobs = [path for path in (vectors / name / "blobs").iterdir() if path.name not in shared]
        assert [path.name for path in blobs] == [result.blob_id]
        assert blob == blobs[0].read_bytes()
    if (vectors / name / "bootstrap").exists():
        assert result.bootstrap == (vectors / name / "bootstrap").read_bytes()


@pytest.mark.root
@pytest.mark.parametrize("name", BUILDS)
def test_build_with_our_codecs(
    name: str, vectors: Path, extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only stored sizes and offsets, ids of compressed blobs, and what follows from them, may differ."""
    result, _, reference = build(name, vectors, extracted, monkeypatch)
    ours = rafs.read(result.bootstrap)
    assert len(result.bootstrap) == len(
        rafs.v6.write(reference) if reference.version == 6 else rafs.v5.write(reference)
    )
    assert np.array_equal(ours.nodes, reference.nodes)
    assert (ours.names, ours.targets, ours.xattrs) == (reference.names, reference.targets, reference.xattrs)
    assert (ours.flags, ours.chunk_size, ours.prefetch) == (
        reference.flags,
        reference.chunk_size,
        reference.prefetch,
    )
    for column in ("digest", "blob_index", "usize", "uoffset", "file_offset", "index", "crc"):
        assert np.array_equal(ours.chunks[column], reference.chunks[column]), column
    for mine, theirs in zip(ours.blobs, reference.blobs, strict=True):
        assert (mine.chunk_count, mine.uncompressed_size, mine.features) == (
            theirs.chunk_count,
            theirs.uncompressed_size,
            theirs.features,
        )
        assert (mine.compression, mine.digester, mine.cipher) == (
            theirs.compression,
            theirs.digester,
            theirs.cipher,
        )


@pytest.mark.parametrize("version", [5, 6])
def test_merge(version: int, vectors: Path) -> None:
    vector = vectors / f"merge-v{version}"
    sources = [
        vector / "layers" / argument.rsplit("/", 1)[1]
        for argument in json.loads((vector / "command.json").read_text())["arguments"][3:]
    ]
    layers = [describe_blob(bootstrap.load(str(s)), LayerBlob(), s.name) for s in sources]
    assert layer.write_bootstrap(merge(layers)) == (vector / "bootstrap").read_bytes()


class Image:
    """An OCI layout in a tar archive."""

    def __init__(self, path: Path) -> None:
        with tarfile.open(path) as archive:
            self._files = {
                member.name.removeprefix("./"): data.read()
                for member in archive
                if (data := archive.extractfile(member)) is not None
            }
        index = json.loads(self._files["index.json"])
        self.manifest = json.loads(self.blob(index["manifests"][0]["digest"]))
        self.layers = [self.blob(descriptor["digest"]) for descriptor in self.manifest["layers"]]

    def blob(self, digest: str) -> bytes:
        return self._files["blobs/sha256/" + digest.removeprefix("sha256:")]


#: Conversions of ``source.tar`` → options of the builder, prefetch list.
CONVERSIONS: dict[str, tuple[dict[str, Any], bytes]] = {
    "v6-zstd": ({}, b"/"),
    "v6-lz4": ({"compression": LZ4}, b"/"),
    "v6-batch": ({"batch_size": 0x100000}, b"/"),
    "oci-types": ({}, b"/"),
    "docker-schema2": ({}, b"/"),
    "prefetch": ({}, b"/a"),
    "v5-zstd": ({"version": 5, "toc": False}, b"/"),
    "oci-ref": ({"compression": Compression.GZIP, "digester": Digester.SHA256}, b"/"),
}


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        *(("oci", name) for name in CONVERSIONS),
        *(("oci/run", name) for name in ("v6-zstd", "v6-lz4", "docker-schema2", "v5-zstd", "oci-ref")),
    ],
)
def test_convert(folder: str, name: str, vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer, and the merged bootstrap, of an image converted by the reference."""
    reference_codecs.install(monkeypatch)
    source = Image(vectors / folder / "source.tar")
    converted = Image(vectors / folder / f"{name}.tar")
    given, prefetch = CONVERSIONS[name]
    # The converter gives no prefetch list to the builder of layers that stay as they are.
    table = name != "oci-ref"
    options = BuildOptions(**{"inline_meta": True, "toc": True, "prefetch_table": table} | given)
    trees = []
    for plain, expected in zip(source.layers, converted.layers, strict=False):
        written: list[bytes] = []
        make = build_reference if name == "oci-ref" else build_layer
        result = make(io.BytesIO(plain), written.append, options, [prefetch])
        assert b"".join(written) == expected
        trees.append(result.tree)
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(converted.layers[-1]))) as archive:
        expected_files = {
            member.name: data.read()
            for member in archive
            if (data := archive.extractfile(member)) is not None
        }
    merged = merge(trees)
    merged.prefetch = layer.prefetch_rows(merged, [prefetch])
    assert layer.write_bootstrap(merged) == expected_files["image/image.boot"]


def test_inline_bootstrap_is_found(vectors: Path) -> None:
    blob = next((vectors / "v6-inline-meta" / "blobs").iterdir()).read_bytes()
    data = toc.extract_bootstrap(lambda offset, size: blob[offset : offset + size], len(blob))
    assert rafs.detect(data) == 6


@pytest.mark.parametrize("folder", ["oci", "oci/run"])
def test_merge_layers_that_stay_as_they_are(folder: str, vectors: Path, tmp_path: Path) -> None:
    """As the converter does it: files named by the layers, and lists that describe the tables."""
    source = Image(vectors / folder / "source.tar")
    converted = Image(vectors / folder / "oci-ref.tar")
    layers = []
    for original, tables in zip(source.manifest["layers"], converted.layers, strict=False):
        path = tmp_path / original["digest"].removeprefix("sha256:")
        path.write_bytes(tables)
        contents = toc.read_toc(lambda offset, size, t=tables: t[offset : offset + size], len(tables))
        assert contents is not None
        entries = tables[contents.offset : -toc.HEADER_SIZE]
        known = LayerBlob(
            digest=hashlib.sha256(tables).hexdigest(),
            size=len(tables),
            toc_digest=hashlib.sha256(entries).hexdigest(),
        )
        layers.append(describe_blob(bootstrap.load(str(path)), known, path.name))
    merged = merge(layers)
    merged.prefetch = [0]
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(converted.layers[-1]))) as archive:
        member = archive.extractfile("image/image.boot")
        assert member is not None
        assert layer.write_bootstrap(merged) == member.read()
