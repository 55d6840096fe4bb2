"""What ``nydusify check`` says can be trusted: it reads everything, wherever and whose the image is."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from broken import BOOT, Rebuilt, section
from faulty import FaultyRegistry
from images import put_image
from nydusify_command import Nydusify

from nydus.convert.check import CheckError, check
from nydus.convert.copy import copy
from nydus.convert.image import image
from nydus.convert.options import ConvertOptions
from nydus.errors import NydusError
from nydus.oci import model
from nydus.oci.archive import write_archive
from nydus.oci.layout import Layout, blob_path
from nydus.oci.place import ArchivePlace, LayoutPlace, RegistryPlace, SourcePlace
from nydus.oci.reference import parse
from nydus.rafs import toc

pytestmark = pytest.mark.vectors
AMD64 = model.Platform(os="linux", architecture="amd64")


def refused(target: SourcePlace, source: SourcePlace | None, work: Path) -> str:
    """What check says of an image that is wrong."""
    work.mkdir(exist_ok=True)
    with pytest.raises(NydusError) as caught:
        check(target, source, AMD64, work)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def source(vectors: Path) -> ArchivePlace:
    return ArchivePlace(vectors / "oci/source.tar")


@pytest.fixture
def rebuilt(vectors: Path, tmp_path: Path) -> Rebuilt:
    return Rebuilt(ArchivePlace(vectors / "oci/v6-zstd.tar"), tmp_path / "rebuilt")


@pytest.mark.parametrize("name", ["v6-lz4", "docker-schema2"])
def test_runnable_images_of_the_reference(vectors: Path, tmp_path: Path, name: str) -> None:
    """The others are in test_check."""
    origin = ArchivePlace(vectors / "oci/run/source.tar")
    report = check(ArchivePlace(vectors / f"oci/run/{name}.tar"), origin, AMD64, tmp_path)
    assert report.checks["filesystem"] == report.checks["files"] > 10


# Blobs with one wrong bit and right digests


PLACES = {
    "data": lambda contents, data: 40,
    "blob.meta": section(toc.BLOB_META, 3),
    "header of blob.meta": section(toc.BLOB_META_HEADER, 40),
    "digests": section(toc.BLOB_DIGEST, 5),
    "bootstrap": section(toc.IMAGE_BOOT, 77),
    "tar header of the bootstrap": lambda contents, data: section(toc.IMAGE_BOOT, -1)(contents, data) + 5,
    "name in the table of contents": lambda contents, data: contents.offset + 10,
    "digest in the table of contents": lambda contents, data: contents.offset + 40,
    "offset in the table of contents": lambda contents, data: contents.offset + 128 + 60,
    "end": lambda contents, data: -100,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_bit_that_no_digest_of_the_image_shows(rebuilt: Rebuilt, tmp_path: Path, place: str) -> None:
    rebuilt.flip(PLACES[place])
    said = refused(rebuilt.place, None, tmp_path / "work")
    assert "validate" in said and "target image" in said


def test_a_blob_with_more_behind_it(rebuilt: Rebuilt, tmp_path: Path) -> None:
    rebuilt.set_blob(0, rebuilt.layer(0) + bytes(512))
    assert "validate" in refused(rebuilt.place, None, tmp_path / "work")


def test_a_blob_in_place_of_another(rebuilt: Rebuilt, tmp_path: Path) -> None:
    rebuilt.set_blob(0, rebuilt.layer(1))
    assert "validate" in refused(rebuilt.place, None, tmp_path / "work")


@pytest.mark.parametrize("name", ["v6-zstd", "v5-zstd", "v6-batch"])
def test_any_bit_of_the_bootstrap(vectors: Path, source: ArchivePlace, tmp_path: Path, name: str) -> None:
    """A changed bit is found, or is in a place that says nothing (the device number of a file, attributes of
    later names of an inode in v5); nothing crashes."""
    rebuilt = Rebuilt(ArchivePlace(vectors / f"oci/{name}.tar"), tmp_path / "rebuilt")
    files = rebuilt.files()
    used = [i for i, byte in enumerate(files[BOOT]) if byte]
    dice, missed = random.Random(name), []
    (tmp_path / "work").mkdir()
    for _ in range(40):
        data, at = bytearray(files[BOOT]), dice.choice(used)
        data[at] ^= 1 << dice.randrange(8)
        rebuilt.set_files({**files, BOOT: bytes(data)})
        try:
            check(rebuilt.place, source, AMD64, tmp_path / "work")
        except NydusError:
            continue
        missed.append(at)
    assert len(missed) <= 4, missed


# Another source


def change_source(
    vectors: Path, folder: Path, change: Callable[[tarfile.TarInfo, bytes], bytes]
) -> LayoutPlace:
    """The source image with one change of what its layers hold; which is not what the target was made of."""
    place = LayoutPlace(folder, "latest")
    copy(ArchivePlace(vectors / "oci/source.tar"), place)
    layout = Layout(folder)
    manifest = json.loads(layout.manifest("latest")[1])
    config = json.loads((folder / blob_path(manifest["config"]["digest"])).read_bytes())
    for number, layer in enumerate(manifest["layers"]):
        data = gzip.decompress((folder / blob_path(layer["digest"])).read_bytes())
        buffer = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(data)) as old,
            tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as new,
        ):
            for member in old:
                file = old.extractfile(member) if member.isreg() else None
                content = change(member, file.read() if file else b"")
                if member.name:
                    member.size = len(content) if member.isreg() else 0
                    new.addfile(member, io.BytesIO(content))
        stored = layout.put_blob(gzip.compress(buffer.getvalue(), mtime=0), model.OCI_LAYER_GZIP)
        layer |= {"digest": stored.digest, "size": stored.size}
        config["rootfs"]["diff_ids"][number] = model.digest(buffer.getvalue())
    manifest["config"] = json.loads(model.encode(layout.put_blob(model.encode(config), model.OCI_CONFIG)))
    layout.put_manifest("latest", model.encode(manifest), model.OCI_MANIFEST)
    return place


def content(member: tarfile.TarInfo, data: bytes) -> bytes:
    return data[:-1] + b"\0" if len(data) > 1000 else data


def one_byte_more(member: tarfile.TarInfo, data: bytes) -> bytes:
    return data + b"\n" if len(data) > 1000 else data


def mode(member: tarfile.TarInfo, data: bytes) -> bytes:
    if member.isreg():
        member.mode ^= 0o4000
    return data


def owner(member: tarfile.TarInfo, data: bytes) -> bytes:
    member.gid += 1
    return data


def time(member: tarfile.TarInfo, data: bytes) -> bytes:
    member.mtime = int(member.mtime) + (1 if member.isreg() else 0)
    return data


def attribute(member: tarfile.TarInfo, data: bytes) -> bytes:
    if member.isreg():
        member.pax_headers = {**member.pax_headers, "SCHILY.xattr.user.more": "x"}
    return data


def link(member: tarfile.TarInfo, data: bytes, seen: dict[str, bytes] = {}) -> bytes:  # noqa: B006
    seen[member.name] = data
    if member.name == "hard4":
        member.type = tarfile.REGTYPE
        return seen["hard3"]
    return data


def name(member: tarfile.TarInfo, data: bytes) -> bytes:
    if member.name.endswith("/keep"):
        member.name += "x"
        member.pax_headers = {k: v for k, v in member.pax_headers.items() if k != "path"}
    return data


def nothing(member: tarfile.TarInfo, data: bytes) -> bytes:
    return data


SAID = {
    content: "its content",
    one_byte_more: "its size",
    mode: "its mode",
    owner: "its gid",
    time: "its mtime",
    attribute: "its xattrs",
    link: "its hard links",
    name: "file not found in",
}


@pytest.mark.parametrize("change", SAID, ids=lambda change: change.__name__)
def test_a_source_that_differs(
    vectors: Path, tmp_path: Path, change: Callable[[tarfile.TarInfo, bytes], bytes]
) -> None:
    other = change_source(vectors, tmp_path / "other", change)
    said = refused(ArchivePlace(vectors / "oci/v6-zstd.tar"), other, tmp_path / "work")
    assert said.startswith("validate filesystem failed") and SAID[change] in said


def test_a_source_that_does_not_differ(vectors: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    check(
        ArchivePlace(vectors / "oci/v6-zstd.tar"),
        change_source(vectors, tmp_path / "other", nothing),
        AMD64,
        tmp_path / "work",
    )


def test_a_broken_source(vectors: Path, source: ArchivePlace, tmp_path: Path) -> None:
    copy(source, LayoutPlace(tmp_path / "other", "latest"))
    layout = Layout(tmp_path / "other")
    layer = json.loads(layout.manifest("latest")[1])["layers"][0]["digest"]
    path = tmp_path / "other" / blob_path(layer)
    path.write_bytes(path.read_bytes()[:-1])
    target = ArchivePlace(vectors / "oci/v6-zstd.tar")
    said = refused(target, LayoutPlace(tmp_path / "other", "latest"), tmp_path / "work")
    assert said.startswith("validate filesystem failed: source image")


# Merged indexes


class Merged:
    """A copy of a merged index, whose Nydus half can be changed."""

    def __init__(self, vectors: Path, folder: Path) -> None:
        self.place = LayoutPlace(folder, "latest")
        copy(ArchivePlace(vectors / "oci/merged-index.tar"), self.place)
        self.layout = Layout(folder)
        self.index = json.loads(self.layout.manifest("latest")[1])
        (self.entry,) = (e for e in self.index["manifests"] if e.get("artifactType") == model.NYDUS_MANIFEST)
        self.manifest = json.loads((folder / blob_path(self.entry["digest"])).read_bytes())

    def save(self) -> None:
        stored = self.layout.put_blob(model.encode(self.manifest), model.OCI_MANIFEST)
        self.entry |= {"digest": stored.digest, "size": stored.size}
        self.layout.put_manifest("latest", model.encode(self.index), model.OCI_INDEX)


def half_blob(m: Merged) -> None:
    path = m.layout.root / blob_path(m.manifest["layers"][0]["digest"])
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def half_missing(m: Merged) -> None:
    m.index["manifests"].remove(m.entry)


def half_version(m: Merged) -> None:
    m.manifest["layers"][-1]["annotations"][model.NYDUS_FS_VERSION] = "5"


def half_layers(m: Merged) -> None:
    m.manifest["layers"][:2] = m.manifest["layers"][1::-1]


def half_annotation(m: Merged) -> None:
    del m.manifest["layers"][-1]["annotations"]


def half_platform(m: Merged) -> None:
    m.entry["platform"]["architecture"] = "arm64"


def half_manifest_gone(m: Merged) -> None:
    m.entry["digest"] = model.digest(b"")
    m.entry["size"] = 0


def half_size(m: Merged) -> None:
    m.entry["size"] += 1


HALVES = {
    half_blob: "corrupted blob",
    half_missing: "no Nydus image for linux/amd64",
    half_version: "the annotation says RAFS version",
    half_layers: "diff id",
    half_annotation: "no annotation that says it is the bootstrap",
    half_platform: "no Nydus image for linux/amd64",
    half_manifest_gone: "no blob",
    half_size: "wrong size of manifest",
}


@pytest.mark.parametrize("damage", HALVES, ids=lambda damage: damage.__name__)
def test_the_nydus_half_of_a_merged_index(
    vectors: Path, source: ArchivePlace, tmp_path: Path, damage: Callable[[Merged], None]
) -> None:
    merged = Merged(vectors, tmp_path / "merged")
    damage(merged)
    if damage not in (half_manifest_gone, half_size):
        merged.save()
    else:
        merged.layout.put_manifest("latest", model.encode(merged.index), model.OCI_INDEX)
    assert HALVES[damage] in refused(merged.place, source, tmp_path / "work")


# Indexes over ordinary layers


def test_an_index_over_another_layer(vectors: Path, source: ArchivePlace, tmp_path: Path) -> None:
    rebuilt = Rebuilt(ArchivePlace(vectors / "oci/oci-ref.tar"), tmp_path / "layout")
    copy(source, LayoutPlace(tmp_path / "layout", "source"))
    layer = rebuilt.manifest["layers"][0]
    reference = layer["annotations"][model.NYDUS_REF]
    path = tmp_path / "layout" / blob_path(reference)
    data = path.read_bytes()
    path.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    assert "corrupted blob" in refused(rebuilt.place, None, tmp_path / "work")
    path.write_bytes(data)
    layer["annotations"][model.NYDUS_REF] = rebuilt.manifest["layers"][1]["annotations"][model.NYDUS_REF]
    rebuilt.save()
    assert "is not in the manifest" in refused(rebuilt.place, None, tmp_path / "work")
    del layer["annotations"][model.NYDUS_REF]
    rebuilt.save()
    assert "is not in the manifest" in refused(rebuilt.place, None, tmp_path / "work")


# Our own images, everywhere

OURS = {
    "v6": ConvertOptions(),
    "v5": ConvertOptions(fs_version=5),
    "lz4": ConvertOptions(compressor="lz4_block", chunk_size=0x10000),
    "batch": ConvertOptions(batch_size=0x10000),
    "none": ConvertOptions(compressor="none", aligned_chunk=True),
    "merged": ConvertOptions(merge_platform=True),
    "referrer": ConvertOptions(with_referrer=True),
    "oci-ref": ConvertOptions(oci_ref=True),
}


@pytest.mark.parametrize("kind", OURS)
def test_our_own_images_pass_and_fail(
    server: FaultyRegistry, source: ArchivePlace, nydusify: Nydusify, tmp_path: Path, kind: str
) -> None:
    origin, target = f"{server.host}/app:source", f"{server.host}/app:{kind}"
    copy(source, RegistryPlace(parse(origin), plain_http=True))
    place = RegistryPlace(parse(target), plain_http=True)
    image(RegistryPlace(parse(origin), plain_http=True), place, OURS[kind])
    arguments = ("check", "--source", origin, "--target", target, "--plain-http", "--no-mount")
    done = nydusify(*arguments, "--platform", "linux/amd64")
    assert done.returncode == 0, done.stderr
    (tmp_path / "work").mkdir()
    damaged = LayoutPlace(tmp_path / "layout", "latest")
    copy(place, damaged)
    blobs = {f"sha256:{path.name}" for path in (tmp_path / "layout/blobs/sha256").iterdir()}
    assert len(blobs) >= 6
    copy(source, LayoutPlace(tmp_path / "layout", "source"))
    check(damaged, source, AMD64, tmp_path / "work")
    dice = random.Random(kind)
    for digest in sorted(blobs):
        path = tmp_path / "layout" / blob_path(digest)
        data = bytearray(path.read_bytes())
        at = dice.randrange(len(data))
        data[at] ^= 1 << dice.randrange(8)
        good = path.read_bytes()
        path.write_bytes(data)
        assert refused(damaged, source, tmp_path / "work")
        path.write_bytes(good)
    check(damaged, source, AMD64, tmp_path / "work")


# What the command answers


def test_registries_that_lack_or_lie(
    server: FaultyRegistry, vectors: Path, nydusify: Nydusify, tmp_path: Path
) -> None:
    place = RegistryPlace(parse(f"{server.host}/app:v6"), plain_http=True)
    copy(ArchivePlace(vectors / "oci/v6-zstd.tar"), place)
    manifest = json.loads(place.repository().manifest("v6")[1])
    victim = manifest["layers"][1]["digest"]
    wrong = [
        lambda handler: victim in handler.path and not handler.send_error(404),
        lambda handler: victim in handler.path and handler.command == "GET" and lie(handler),
        lambda handler: "/manifests/" in handler.path and not handler.send_error(500),
    ]

    def lie(handler: object) -> bool:
        data = bytes(manifest["layers"][1]["size"])
        handler.send_response(200)  # type: ignore[attr-defined]
        handler.send_header("Content-Length", str(len(data)))  # type: ignore[attr-defined]
        handler.end_headers()  # type: ignore[attr-defined]
        handler.wfile.write(data)  # type: ignore[attr-defined]
        return True

    arguments = ("check", "--target", f"{server.host}/app:v6", "--plain-http", "--no-mount")
    for intercept, words in zip(wrong, ("404", "corrupted blob", "500"), strict=True):
        server.intercepts[:] = [intercept]
        done = nydusify(*arguments, "--output-json", "report.json", "--platform", "linux/amd64")
        assert done.returncode == 1 and words in done.stderr.splitlines()[-1], done.stderr
        assert "level=fatal" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        report = json.loads((tmp_path / "cwd/report.json").read_text())
        assert report["verified"] is False and words in report["error"]
    server.intercepts.clear()
    done = nydusify(*arguments, "--platform", "linux/amd64")
    assert done.returncode == 0 and "verified image" in done.stderr


def test_archives_that_are_none(vectors: Path, nydusify: Nydusify, tmp_path: Path) -> None:
    whole = (vectors / "oci/v6-zstd.tar").read_bytes()
    two = Layout(tmp_path / "two").create()
    for number in (1, 2):
        copy(
            ArchivePlace(vectors / "oci" / f"v{4 + number}-zstd.tar"),
            LayoutPlace(tmp_path / "two", str(number)),
        )
    del two
    cases = {
        "cut.tar": whole[: len(whole) // 2],
        "zero.tar": b"",
        "text.tar": b"not an archive" * 1000,
        "gzip.tar": gzip.compress(whole)[:-2000],
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    for name in (*cases, "two", "missing.tar"):
        done = nydusify("check", "--target-archive", str(tmp_path / name), "--no-mount")
        assert done.returncode == 1, name
        assert done.stderr.count("level=fatal") == 1 and "Traceback" not in done.stderr, done.stderr
        assert name in done.stderr.splitlines()[-1]


def test_archives_of_every_wrapping(vectors: Path, nydusify: Nydusify, tmp_path: Path) -> None:
    whole = (vectors / "oci/v6-zstd.tar").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole, 1))
    layout = tmp_path / "layout"
    copy(ArchivePlace(vectors / "oci/v6-zstd.tar"), LayoutPlace(layout, "latest"))
    write_archive(Layout(layout), tmp_path / "b.tar", parse("example.com/app:v1"))
    for path in (tmp_path / "a.tar.gz", layout, tmp_path / "b.tar"):
        done = nydusify(
            *("check", "--target-archive", str(path), "--platform", "linux/amd64", "--no-mount"),
            *("--source-archive", str(vectors / "oci/source.tar")),
        )
        assert done.returncode == 0, done.stderr


def test_an_ordinary_image_is_no_target(vectors: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with pytest.raises(CheckError, match="is not a Nydus image"):
        check(ArchivePlace(vectors / "oci/source.tar"), None, AMD64, tmp_path / "work")


def test_permissions_of_symbolic_links_mean_nothing(server: FaultyRegistry, tmp_path: Path) -> None:
    """Archives have any; file systems have 0777."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("link")
        entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, "target", 0o640
        archive.addfile(entry)
    made = put_image(server, "links", buffer.getvalue())
    target = LayoutPlace(tmp_path / "target")
    image(made, target, ConvertOptions(oci=True))
    (tmp_path / "work").mkdir()
    assert check(target, made, AMD64, tmp_path / "work").checks["filesystem"] == 2
