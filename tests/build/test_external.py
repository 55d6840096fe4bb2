"""Images of files that lie in blobs of others (``create --attributes``)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import stat
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import google_crc32c
import pytest

import nydus
from nydus import rafs
from nydus.build import external
from nydus.build.bootstrap import load, read_bytes
from nydus.build.layer import BuildOptions
from nydus.errors import FormatError, NydusError
from nydus.rafs.model import BlobFeature

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))
from nydusd_process import Nydusd, localfs_config

BIN = Path(sys.executable).parent
SIZE = 12 << 20
CHUNK = 2 << 20
#: Name, offset in the blob and size: out of order, not aligned to blocks, and one range twice.
FILES = {
    "models/large": (512 * 7, (7 << 20) + 5),
    "models/deep/small": ((10 << 20) + 512, 100),
    "only/exact": (512, 2 * CHUNK),
    "only/again": (512, 300),
}
STAND_IN = "only/stand in"


def image_command(*arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        [BIN / "nydus-image", "-l", "warn", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


class Source:
    """A directory, the blob that holds most of it, and the attributes that say so."""

    def __init__(self, folder: Path) -> None:
        self.root, self.blobs = folder / "root", folder / "blobs"
        self.blobs.mkdir()
        self.data = random.Random(7).randbytes(SIZE)
        self.id = hashlib.sha256(self.data).hexdigest()
        (self.blobs / self.id).write_bytes(self.data)
        self.expected = {name: self.data[at : at + size] for name, (at, size) in FILES.items()}
        for name, data in self.expected.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(data)
        (self.root / STAND_IN).write_bytes(b"")
        self.expected[STAND_IN] = self.data[1000:6000]
        self.expected["models/inner"] = b"ordinary" * 3000
        (self.root / "models/inner").write_bytes(self.expected["models/inner"])
        (self.root / "only/link").symlink_to("exact")
        self.attributes = folder / "attributes"
        self.attributes.write_text(
            "# where files are\n\n"
            + "".join(self.line(name, at, size) for name, (at, size) in FILES.items())
            + self.line(f'"/{STAND_IN}"', 1000, 5000, "file_size=5000")
            + "only/link type=external\nmodels/inner type=internal blob_id=none\n/nowhere type=external\n"
        )

    def line(self, name: str, offset: int, size: int, more: str = "") -> str:
        pieces = [
            self.data[at : min(at + CHUNK, offset + size)] for at in range(offset, offset + size, CHUNK)
        ]
        crcs = ",".join(f"{google_crc32c.value(piece):#x}" for piece in pieces)
        return (
            f"{name} type=external blob_index=3 blob_id={self.id} chunk_size=2MiB "
            f"chunk_0_compressed_offset={offset} compressed_size={SIZE} crcs={crcs} {more}\n"
        )

    def create(self, folder: Path, version: int, *more: str | Path) -> Path:
        """Build both bootstraps and merge them; returns the merged one."""
        out = folder / f"out{version}"
        out.mkdir()
        image_command(
            "create", "-v", str(version), "-B", out / "boot", "-D", self.blobs, "--attributes",
            self.attributes, "-J", out / "json", *more, self.root,
        )  # fmt: skip
        result = json.loads((out / "json").read_text())
        assert result["external_blobs"] == [self.id]
        assert result["external_bootstrap"] == str(out / "boot.external")
        (out / "boot").rename(out / result["blobs"][0])
        image_command("merge", "-B", out / "merged", out / result["blobs"][0], out / "boot.external")
        return out


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


@pytest.mark.parametrize("version", [5, 6])
def test_both_halves_and_the_whole(source: Source, tmp_path: Path, version: int) -> None:
    out = source.create(tmp_path, version)
    (inner,) = [path for path in out.iterdir() if len(path.name) == 64]
    with nydus.open(inner, source.blobs) as image:
        assert [name for _, _, names in image.walk() for name in names] == ["inner"]
        assert image.listdir() == ["models"], "a directory of external files only is not in this half"
    with nydus.open(out / "boot.external", source.blobs) as image:
        names = {f"{top}/{name}".strip("/") for top, _, files in image.walk() for name in files}
        assert names == source.expected.keys() - {"models/inner"} | {"only/link"}
        assert image.blobs[0].features & BlobFeature.EXTERNAL
    for name in ("boot.external", "merged"):
        text = image_command("check", out / name, "-D", source.blobs)
        assert f"{source.id}, compressed size {SIZE}" in text
        assert "WARN" not in text
    image_command("unpack", out / "merged", "-D", source.blobs, "--output", out / "tar")
    with tarfile.open(out / "tar") as tar:
        for name, data in source.expected.items():
            assert tar.extractfile(name).read() == data  # type: ignore[union-attr]
        assert tar.getmember("only/link").linkname == "exact"
    blobs = json.loads(image_command("inspect", out / "boot.external", "-R", "blobs"))
    assert [blob["blob_id"] for blob in blobs] == [source.id]
    # What is read is what is written.
    for name in ("boot.external", "merged"):
        data = read_bytes(str(out / name))
        assert rafs.write(rafs.read(data)) == data


@pytest.mark.parametrize("version", [5, 6])
@pytest.mark.root
def test_mounted_by_the_daemon(source: Source, tmp_path: Path, version: int) -> None:
    out = source.create(tmp_path, version)
    config = localfs_config(source.blobs, tmp_path / "cache")
    with Nydusd.of(tmp_path / "daemon", out / "merged", config) as daemon:
        for name, data in source.expected.items():
            assert (daemon.mountpoint / name).read_bytes() == data
        assert daemon.stop() == 0


def test_as_the_reference_lays_it_out(source: Source) -> None:
    """Facts of rafs.md 4.7: indices in the order of the tree, places as stored, no digests."""
    attributes = external.load(str(source.attributes))
    result = external.build_external(str(source.root), attributes, len, BuildOptions(version=5))
    tree = result.tree
    assert rafs.read(result.bootstrap).blobs[0].features == 0x4000_0800
    names = ["/models/deep/small", "/models/large", "/only/again", "/only/exact", "/only/stand in"]
    found = [tree.node_chunks(tree.find(name.encode()) or 0) for name in names]
    order = [int(chunk["index"]) for chunks in sorted(found, key=lambda c: c["index"][0]) for chunk in chunks]
    assert order == list(range(1 + 4 + 1 + 2 + 1))
    assert [int(offset) for offset in tree.node_chunks(tree.find(b"/models/large") or 0)["coffset"]] == [
        512 * 7 + CHUNK * number for number in range(4)
    ]
    assert (tree.chunks["uoffset"] == tree.chunks["coffset"]).all()
    assert not any(chunk["digest"].tobytes().strip(b"\0") for chunk in tree.chunks)


@pytest.mark.parametrize("version", [5, 6])
def test_a_wrong_byte_is_found(source: Source, tmp_path: Path, version: int) -> None:
    out = source.create(tmp_path, version)
    path = source.blobs / source.id
    data = bytearray(path.read_bytes())
    data[CHUNK + 600] ^= 1
    path.write_bytes(data)
    text = image_command("check", out / "merged", "-D", source.blobs, code=1)
    assert "has the wrong checksum" in text
    with (
        nydus.open(out / "merged", source.blobs) as image,
        pytest.raises(FormatError, match="wrong checksum"),
    ):
        image.read("/only/exact")
    path.write_bytes(data[:-1])
    assert "wrong size of the blob" in image_command("check", out / "merged", "-D", source.blobs, code=1)


def test_a_blob_elsewhere_is_not_an_error(source: Source, tmp_path: Path) -> None:
    out = source.create(tmp_path, 6)
    (source.blobs / source.id).unlink()
    text = image_command("check", out / "merged", "-D", source.blobs)
    assert f"external blob {source.id} is not verified" in text


@pytest.mark.parametrize("features", [[], ["--features", "blob-toc"]])
def test_inline(source: Source, tmp_path: Path, features: list[str]) -> None:
    """As converters ask for it: both blobs through FIFOs, each with its bootstrap at the end."""
    got: dict[str, bytes] = {}
    readers = []
    for name in ("blob", "external"):
        os.mkfifo(tmp_path / name)

        def read(name: str = name) -> None:
            got[name] = (tmp_path / name).read_bytes()

        readers.append(threading.Thread(target=read))
        readers[-1].start()
    image_command(
        "create", "-t", "directory", "--blob-inline-meta", "-b", tmp_path / "blob", "--external-blob",
        tmp_path / "external", "--attributes", source.attributes, *features, source.root,
    )  # fmt: skip
    for reader in readers:
        reader.join(20)
    assert not list(tmp_path.glob("*.external"))
    for name in ("blob", "external"):
        (tmp_path / f"{name}.file").write_bytes(got[name])
    tree = load(str(tmp_path / "external.file"))
    assert [blob.id for blob in tree.blobs] == [source.id]
    assert tree.find(b"/only/exact") and not tree.find(b"/models/inner")
    with nydus.open(tmp_path / "external.file", source.blobs) as image:
        assert image.read("/only/exact") == source.expected["only/exact"]
    assert load(str(tmp_path / "blob.file")).find(b"/models/inner")


def test_nothing_external(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "attributes").write_text("/file type=internal\n")
    image_command(
        "create", "-B", tmp_path / "boot", "-D", tmp_path, "--attributes", tmp_path / "attributes",
        tmp_path / "root",
    )  # fmt: skip
    assert not (tmp_path / "boot.external").exists()
    assert stat.S_ISREG((tmp_path / "boot").stat().st_mode)


GOOD = f"blob_index=0 blob_id={'a' * 64} chunk_size=4KiB chunk_0_compressed_offset=0 compressed_size=9000"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("blob_index=0 ", ""), "blob_index is missing"),
        (("index=0", "index=-1"), "blob_index cannot be used .expected a number up to 253, found -1"),
        (("a" * 64, "abc"), "blob_id is not a sha256"),
        (("4KiB", "4KB"), "a power of two from 4KiB to 64MiB"),
        (("4KiB", "128MiB"), "chunk_size cannot be used"),
        (("4KiB", "4QiB"), "chunk_size cannot be used"),
        (("size=9000", "size=8999"), "reaches beyond its blob .expected at least 0 . 9000, found 8999"),
        (("offset=0", "offset=1e3"), "chunk_0_compressed_offset cannot be used"),
        (("size=9000", "size=9000 crcs=1,2"), "crcs does not fit the number of chunks .expected 3, found 2"),
        (("size=9000", "size=9000 crcs=1,2,xyz"), "crcs cannot be used"),
        (("size=9000", f"size={1 << 50}"), "compressed_size cannot be used"),
    ],
)
def test_attributes_that_cannot_be(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    (tmp_path / "file").write_bytes(bytes(9000))
    line = f"file type=external {GOOD}".replace(*change)
    attributes = external.Attributes(f"\n{line}\n".encode(), "attributes")
    with pytest.raises(FormatError, match=f"attributes: line 2: /file: .*{message}"):
        external.build_external(str(tmp_path), attributes, len, BuildOptions(chunk_size=4096))


@pytest.mark.parametrize(
    "line", ["/../etc type=external", '"/x type=external', "/ type=external", "!x type=external"]
)
def test_no_paths(line: str) -> None:
    with pytest.raises(FormatError, match="attributes: line 1: "):
        external.Attributes(line.encode(), "attributes")


def test_files_that_disagree(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(5000))
    text = f"a type=external {GOOD}\nb type=external {GOOD.replace('9000', '9001')}"
    with pytest.raises(FormatError, match="blob 0 is another one for other files"):
        external.build_external(
            str(tmp_path), external.Attributes(text.encode()), len, BuildOptions(chunk_size=4096)
        )


def test_chunk_size_of_version_6(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(5000))
    attributes = external.Attributes(f"a type=external {GOOD}".encode())
    with pytest.raises(FormatError, match="build with --chunk-size 0x1000"):
        external.build_external(str(tmp_path), attributes, len, BuildOptions())
    tree = external.build_external(str(tmp_path), attributes, len, BuildOptions(version=5)).tree
    assert tree.nodes["chunk_count"].tolist() == [0, 2]


def test_usage(source: Source, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x"), io.BytesIO())
    text = image_command(
        "create",
        "-t",
        "tar-rafs",
        "-D",
        tmp_path,
        "--attributes",
        source.attributes,
        tmp_path / "tar",
        code=2,
    )
    assert "--attributes needs type dir-rafs" in text
    text = image_command(
        "create", "-B", tmp_path / "b.external", "-D", tmp_path, "--attributes", source.attributes,
        source.root, code=1,
    )  # fmt: skip
    assert "would have this name, too" in text
    with pytest.raises(NydusError, match="cannot be read"):
        external.load(str(tmp_path / "none"))
