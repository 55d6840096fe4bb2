"""eStargz layers as stargz-snapshotter writes them, by their table of contents and as ordinary archives."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

import nydus
from nydus.build.bootstrap import load
from nydus.errors import FormatError
from nydus.rafs.model import BlobFeature

BIN = Path(sys.executable).parent
CHUNK = 0x4000
RANDOM = random.Random(3)
FILES = {
    "a": RANDOM.randbytes(10),
    "b": RANDOM.randbytes(3 * CHUNK + 7),
    "c": b"",
    "d/e": RANDOM.randbytes(CHUNK),
    **{f"d/many{n:03}": RANDOM.randbytes(n * 11) for n in range(120)},
    "z": bytes(5 * CHUNK),
}


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Layer:
    """Writes members as stargz-snapshotter does: a payload first, then padding and the next headers.

    Args:
        least: compressed bytes that a member must have before a payload begins a new one
            (``--estargz-min-chunk-size``); until then it stands inside, at an ``innerOffset``.
    """

    def __init__(self, files: dict[str, bytes], least: int) -> None:
        self.entries: list[dict[str, Any]] = []
        self.data = b""
        self._member = io.BytesIO()
        self._offset = self._inner = 0
        self._least = least
        self._open()
        self._directory("d/")
        for name, data in files.items():
            self._file(name, data)
        self.entries.append({"name": "link", "type": "symlink", "linkName": "a"})
        self.entries.append({"name": "hard", "type": "hardlink", "linkName": "b"})
        self._put(self._header("link", tarfile.SYMTYPE, linkname="a"))
        self._put(self._header("hard", tarfile.LNKTYPE, linkname="b"))
        self._close()
        self.toc = json.dumps({"version": 1, "entries": self.entries}).encode()
        self._open()
        self._put(
            self._header("stargz.index.json", size=len(self.toc)) + self.toc + bytes(-len(self.toc) % 512)
        )
        self._put(bytes(1024))
        self._close()
        self.id = hashlib.sha256(self.data).hexdigest()

    def _header(self, name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, linkname: str = "") -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname, info.mode = kind, size, linkname, 0o751
        return info.tobuf(tarfile.USTAR_FORMAT)

    def _open(self) -> None:
        self._member = io.BytesIO()
        self._stream = gzip.GzipFile("", "wb", 6, self._member, 0)
        self._offset, self._inner = len(self.data), 0

    def _close(self) -> None:
        self._stream.close()
        self.data += self._member.getvalue()

    def _put(self, data: bytes) -> None:
        self._stream.write(data)
        self._inner += len(data)

    def _directory(self, name: str) -> None:
        self.entries.append({"name": name, "type": "dir", "mode": 0o751})
        self._put(self._header(name, tarfile.DIRTYPE))

    def _file(self, name: str, data: bytes) -> None:
        self._put(self._header(name, size=len(data)))
        entry: dict[str, Any] = {
            "name": name, "type": "reg", "size": len(data), "mode": 0o751, "digest": digest(data),
            "xattrs": {},
        }  # fmt: skip
        for start in range(0, len(data), CHUNK):
            piece = data[start : start + CHUNK]
            self._stream.flush()
            if len(self._member.getvalue()) >= self._least:
                self._close()
                self._open()
            entry |= {"offset": self._offset, "chunkDigest": digest(piece)}
            if self._inner:
                entry["innerOffset"] = self._inner
            if start:
                entry["chunkOffset"] = start
            if start + CHUNK < len(data):
                entry["chunkSize"] = CHUNK
            self.entries.append(entry)
            entry = {"name": name, "type": "chunk"}
            self._put(piece)
        if not data:
            self.entries.append(entry)
        self._put(bytes(-len(data) % 512))


def create(folder: Path, kind: str, layer: Layer, *more: str) -> Path:
    """Build from a layer; blobs and the layer itself lie in ``folder/blobs``."""
    blobs = folder / "blobs"
    blobs.mkdir(exist_ok=True)
    (blobs / layer.id).write_bytes(layer.data)
    source = blobs / layer.id
    if kind == "estargztoc-ref":
        source = folder / "toc"
        source.write_bytes(layer.toc)
        more += ("--blob-id", layer.id, "--blob-data-size", f"{len(layer.data):x}")
        more += ("--chunk-size", str(CHUNK))
    boot = folder / f"{kind}.boot"
    subprocess.run(
        [BIN / "nydus-image", "-l", "warn", "create", "-t", kind, "-B", boot, "-D", blobs, *more, source],
        check=True, timeout=60,
    )  # fmt: skip
    return boot


@pytest.mark.parametrize("kind", ["estargztoc-ref", "stargz_index", "estargz-ref", "estargz-rafs"])
@pytest.mark.parametrize("least", [0, 1000, 1 << 30], ids=["each apart", "some together", "all in one"])
def test_every_way_of_reading(tmp_path: Path, kind: str, least: int) -> None:
    layer = Layer(FILES, least)
    assert any("innerOffset" in entry for entry in layer.entries) == (least > 0)
    with tarfile.open(fileobj=io.BytesIO(layer.data)) as tar:
        assert tar.extractfile("b").read() == FILES["b"], "it is an ordinary archive, too"  # type: ignore[union-attr]
    boot = create(tmp_path, kind.replace("stargz_index", "estargztoc-ref"), layer)
    with nydus.open(boot, tmp_path / "blobs") as image:
        for name, data in FILES.items():
            assert image.read(f"/{name}") == data
        assert image.stat("/a").mode == 0o100751
        assert image.readlink("/link") == "a"
        assert image.stat("/hard").inode == image.stat("/b").inode
        assert not image.exists("/stargz.index.json")
    done = subprocess.run(
        [BIN / "nydus-image", "-l", "warn", "check", boot, "-D", tmp_path / "blobs"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_members_with_several_chunks_are_batches(tmp_path: Path) -> None:
    apart, together = (load(str(create(tmp_path, "estargztoc-ref", Layer(FILES, n)))) for n in (0, 1000))
    assert not apart.blobs[0].features & BlobFeature.BATCH
    assert together.blobs[0].features & BlobFeature.BATCH
    assert apart.blobs[0].chunk_count == together.blobs[0].chunk_count


def test_wrong_inner_offset_is_no_wrong_byte(tmp_path: Path) -> None:
    layer = Layer(FILES, 1 << 30)
    document = json.loads(layer.toc)
    entry = next(entry for entry in document["entries"] if entry["name"] == "d/many050")
    entry["innerOffset"] += 1
    layer.toc = json.dumps(document).encode()
    with nydus.open(create(tmp_path, "estargztoc-ref", layer), tmp_path / "blobs") as image:
        with pytest.raises(FormatError, match="wrong digest"):
            image.read("/d/many050")


def test_merged(tmp_path: Path) -> None:
    layer = Layer(FILES, 1000)
    boot = create(tmp_path, "estargztoc-ref", layer).rename(tmp_path / layer.id)
    subprocess.run([BIN / "nydus-image", "merge", "-B", tmp_path / "merged", boot], check=True, timeout=60)
    with nydus.open(tmp_path / "merged", tmp_path / "blobs") as image:
        assert image.read("/b") == FILES["b"]


def test_extended_attributes(tmp_path: Path) -> None:
    layer = Layer({"a": b"data", "b": b"target of the hard link"}, 0)
    document = json.loads(layer.toc)
    document["entries"][1]["xattrs"] = {"user.x": base64.b64encode(b"\0\xff").decode()}
    layer.toc = json.dumps(document).encode()
    with nydus.open(create(tmp_path, "estargztoc-ref", layer), tmp_path / "blobs") as image:
        assert image.stat("/a").xattrs == {"user.x": b"\0\xff"}
