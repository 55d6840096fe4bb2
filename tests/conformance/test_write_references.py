"""Layers that stay as they are: every chunk is found in them through the tables alone."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from content import Blob
from isal import isal_zlib

from nydus.build.layer import BuildOptions, LayerResult, build_layer
from nydus.build.stargz import build_stargz
from nydus.build.tarfs import build_tarfs
from nydus.build.zran import build_reference
from nydus.errors import FormatError
from nydus.rafs import blobmeta
from nydus.rafs.model import Compression, Digester

GZIP = BuildOptions(compression=Compression.GZIP, digester=Digester.SHA256, chunk_size=0x10000)


def content(seed: int, size: int) -> bytes:
    """Bytes that shrink to about a half, so that there are many deflate blocks."""
    return random.Random(seed).randbytes(-(-size // 2)).hex().encode()[:size]


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


FILES = {
    "large": content(1, 3_000_000),
    "same": content(1, 3_000_000),
    "empty": b"",
    **{f"small{i}": content(i, 10 * i) for i in range(300)},
    "zeros": bytes(2_000_000),
    "last": content(9, 700_000),
}


def plain_gzip(data: bytes) -> bytes:
    return gzip.compress(data, 6)


def named(data: bytes) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile("a name", "wb", 9, out) as stream:
        stream.write(data)
    return out.getvalue()


def members(data: bytes) -> bytes:
    """As pigz -i or bgzip write: independent members, cut anywhere."""
    return b"".join(gzip.compress(data[i : i + 99_000], 1) for i in range(0, len(data), 99_000))


def stored(data: bytes) -> bytes:
    return gzip.compress(data, 0)


def igzip(data: bytes) -> bytes:
    member = isal_zlib.compressobj(0, isal_zlib.DEFLATED, 31)
    return bytes(member.compress(data) + member.flush()) + bytes(1000)


class _CachingBlob(Blob):
    """Inflates a context once: some compressors make blocks of many megabytes."""

    def _inflate(self, context: int) -> bytes:
        if self._last[0] != context:
            self._last = (context, super()._inflate(context))
        return self._last[1]

    _last = (-1, b"")


def check(result: LayerResult, layer: bytes, tables: bytes, files: dict[str, bytes]) -> None:
    """Read all files through what a runtime has: bootstrap, tables, layer."""
    blob = result.blob
    assert blob is not None
    chunks = blobmeta.load(blob, lambda offset, size: tables[offset : offset + size], size=len(tables))
    reader = _CachingBlob(blob, layer, chunks)
    tree = result.tree
    for name, expected in files.items():
        row = tree.find(b"/" + name.encode())
        assert row is not None
        assert b"".join(reader.chunk(int(i)) for i in tree.node_chunks(row)["index"]) == expected


def reference(layer: bytes, **options: Any) -> tuple[LayerResult, bytes]:
    out: list[bytes] = []
    given = {"compression": Compression.GZIP, "digester": Digester.SHA256, "chunk_size": 0x10000} | options
    result = build_reference(io.BytesIO(layer), out.append, BuildOptions(**given), where="layer")
    return result, b"".join(out)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("pack", [plain_gzip, named, members, stored, igzip])
def test_gzip_layers(pack: Any, inline: bool) -> None:
    layer = pack(archive(FILES))
    result, tables = reference(layer, inline_meta=inline, toc=inline)
    assert result.blob is not None
    assert result.blob.id == hashlib.sha256(layer).hexdigest()
    assert result.duplicates >= 46
    check(result, layer, tables, FILES)


def test_contexts_are_not_too_far_apart() -> None:
    layer = plain_gzip(archive(FILES))
    result, _ = reference(layer)
    assert result.chunks is not None
    contexts = result.chunks.zran
    assert len(contexts) > 3
    assert contexts["in_size"].max() < 1_000_000
    assert contexts["out_size"].max() < 3_000_000


def test_plain_archive() -> None:
    layer = archive(FILES)
    result, tables = reference(layer)
    check(result, layer, tables, FILES)


@pytest.mark.parametrize("where", [5, 1000, 100_000, -9, -4])
def test_damaged_gzip(where: int) -> None:
    layer = bytearray(plain_gzip(archive({"a": content(1, 500_000)})))
    layer[where] ^= 0x55
    with pytest.raises(FormatError, match="layer: "):
        result, _ = reference(bytes(layer))
        # A changed modification time in the header is no damage.
        raise FormatError("ok", where="layer") if where == 5 and result.blob else AssertionError


@pytest.mark.parametrize("cut", [5, 12, 1000, 200_000])
def test_gzip_cut_short(cut: int) -> None:
    layer = plain_gzip(archive({"a": content(1, 500_000)}))
    with pytest.raises(FormatError):
        reference(layer[:cut])


def test_tarfs_positions() -> None:
    layer = archive(FILES)
    options = BuildOptions(compression=Compression.NONE, digester=Digester.SHA256, chunk_size=0x10000)
    tree = build_tarfs(io.BytesIO(layer), options).tree
    for name, expected in FILES.items():
        row = tree.find(b"/" + name.encode())
        assert row is not None
        chunks = tree.node_chunks(row)
        assert (chunks["coffset"] % 512 == 0).all()
        data = [layer[int(c["coffset"]) : int(c["coffset"] + c["csize"])] for c in chunks]
        assert b"".join(data) == expected


def estargz(files: dict[str, bytes], chunk: int) -> tuple[bytes, bytes]:
    """A layer of one gzip member a chunk, and its table of contents."""
    layer = gzip.compress(b"")
    entries: list[dict[str, Any]] = [
        {"name": "d/", "type": "dir", "mode": 0o755, "modtime": "2020-01-02T03:04:05Z"},
        {"name": "d/link", "type": "symlink", "linkName": "../large"},
        {"name": "d/hard", "type": "hardlink", "linkName": "large"},
        {"name": "d/dev", "type": "char", "devMajor": 1, "devMinor": 3},
        {"name": ".prefetch.landmark", "type": "reg", "size": 1, "offset": 0},
    ]
    for name, data in files.items():
        for start in range(0, max(1, len(data)), chunk):
            piece = data[start : start + chunk]
            entry: dict[str, Any] = {"name": name, "type": "chunk" if start else "reg", "offset": len(layer)}
            if not start:
                entry |= {
                    "size": len(data), "mode": 0o640, "uid": 5, "gid": 6,
                    "digest": "sha256:" + hashlib.sha256(data).hexdigest(),
                    "xattrs": {"user.x": base64.b64encode(b"\xff").decode()},
                }  # fmt: skip
            if len(data) > chunk:
                entry |= {"chunkOffset": start, "chunkSize": len(piece)}
            entry["chunkDigest"] = "sha256:" + hashlib.sha256(piece).hexdigest()
            entries.append(entry)
            layer += gzip.compress(piece)
    return layer, json.dumps({"version": 1, "entries": entries}).encode()


def build_contents(toc: bytes, layer: bytes = b"", **options: Any) -> tuple[LayerResult, bytes]:
    out: list[bytes] = []
    given = {"blob_id": hashlib.sha256(layer).hexdigest(), "chunk_size": 0x10000} | options
    built = BuildOptions(compression=Compression.GZIP, digester=Digester.SHA256, **given)
    return build_stargz(io.BytesIO(toc), out.append, built, len(layer), where="toc"), b"".join(out)


def test_estargz() -> None:
    layer, toc = estargz(FILES, 0x10000)
    result, tables = build_contents(toc, layer)
    check(result, layer, tables, FILES)
    tree = result.tree
    row = tree.find(b"/d")
    assert row is not None
    assert int(tree.nodes[row]["mtime"]) == 1577934245
    large, hard = tree.find(b"/large"), tree.find(b"/d/hard")
    assert large is not None and hard is not None
    assert tree.nodes[large]["link"] == tree.nodes[hard]["link"]
    assert tree.node_xattrs(large) == ((b"user.x", b"\xff"),)
    assert tree.find(b"/.prefetch.landmark") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunkSize": 0x8000}, "build with --chunk-size 0x8000"),
        ({"innerOffset": 1 << 30}, "too far"),
        ({"chunkDigest": "md5:00"}, "no sha256 digest"),
        ({"chunkOffset": 7}, "not where the chunk before it ends"),
        ({"offset": -1}, "impossible offset"),
        ({"offset": 1 << 39}, "beyond the layer"),
        ({"type": "socket"}, "unknown type"),
        ({"uid": -1}, "impossible owner"),
        ({"modtime": "yesterday"}, "RFC 3339"),
        ({"name": 7}, "name"),
        ({"size": 1 << 20}, "has 0xd40 bytes"),
    ],
)
def test_estargz_that_cannot_be(change: dict[str, Any], message: str) -> None:
    layer, toc = estargz({"large": content(1, 200_000)}, 0x10000)
    document = json.loads(toc)
    document["entries"][5] |= change
    with pytest.raises(FormatError, match=message):
        build_contents(json.dumps(document).encode(), layer)


@pytest.mark.parametrize("text", [b"", b"[]", b'{"version":2,"entries":[]}', b"{", b'{"version":1}', b"\xff"])
def test_no_contents(text: bytes) -> None:
    with pytest.raises(FormatError, match="toc: "):
        build_contents(text)


@pytest.mark.vectors
def test_contents_of_the_reference(vectors: Path) -> None:
    path = vectors / "upstream" / "snapshotter" / "stargz.index.json"
    result, _ = build_contents(path.read_bytes(), chunk_size=0x400000)
    assert len(result.tree) > 2000


@pytest.mark.vectors
def test_gzip_of_the_reference(vectors: Path) -> None:
    for name in (
        "bgzip.tar.gz",
        "zran-single-stream.tar.gz",
        "zran-two-streams.tar.gz",
        "zran-zero-file.tar.gz",
    ):
        layer = (vectors / "upstream" / "zran" / name).read_bytes()
        result, tables = reference(layer, chunk_size=0x100000)
        blob: list[bytes] = []
        options = BuildOptions(compression=Compression.NONE, digester=Digester.SHA256)
        plain = build_layer(io.BytesIO(layer), blob.append, options)
        data = b"".join(blob)
        files = {}
        for row, path in plain.tree.walk():
            if plain.tree.nodes[row]["chunk_count"]:
                files[os.fsdecode(path)[1:]] = b"".join(
                    data[int(c["coffset"]) : int(c["coffset"] + c["csize"])]
                    for c in plain.tree.node_chunks(row)
                )
        if files:
            check(result, layer, tables, files)
