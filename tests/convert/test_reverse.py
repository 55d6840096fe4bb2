"""OCI images to Nydus and back: the file system stays what it was."""

from __future__ import annotations

import gzip
import io
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from documents import load
from faulty import FaultyRegistry

from nydus.convert.backend import FolderPlace
from nydus.convert.check import check
from nydus.convert.image import image
from nydus.convert.listing import Listing, Overlay, compare
from nydus.convert.optimize import optimize
from nydus.convert.options import ConvertOptions
from nydus.convert.reverse import reverse
from nydus.convert.select import host_platform, select
from nydus.errors import ConfigError, NydusError
from nydus.oci import model
from nydus.oci.model import Manifest
from nydus.oci.place import ArchivePlace, LayoutPlace, RegistryPlace, SourcePlace
from nydus.oci.reference import parse
from nydus.storage.backends.localfs import LocalFs

BIG = bytes(range(256)) * 9000


class Layer:
    """A tar archive that is being made."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._out, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(
        self, name: str, data: bytes | None = None, kind: bytes = tarfile.REGTYPE, **more: object
    ) -> Layer:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode, entry.mtime = kind, 0o755 if kind == tarfile.DIRTYPE else 0o640, 1_700_000_000
        for key, value in more.items():
            setattr(entry, key, value)
        entry.size = len(data or b"")
        self._tar.addfile(entry, io.BytesIO(data or b""))
        return self

    def folder(self, name: str, **more: object) -> Layer:
        return self.add(name, kind=tarfile.DIRTYPE, **more)

    def done(self) -> bytes:
        self._tar.close()
        return self._out.getvalue()


def layers() -> list[bytes]:
    """Everything that makes layers of images difficult."""
    xattrs = {"SCHILY.xattr.user.note": "über", "SCHILY.xattr.security.capability": "\x01\x00\x00\x02"}
    long = "deep/" * 30 + "name" * 30
    return [
        Layer()
        .folder("a", mode=0o1770, uid=7, gid=8)
        .folder("a/b", mode=0o700, uid=3)
        .add("a/b/one", BIG)
        .add("a/b/two", kind=tarfile.LNKTYPE, linkname="a/b/one")
        .add("a/gone", b"gone")
        .folder("opaque", mode=0o711)
        .add("opaque/old", b"old")
        .add("with-xattrs", b"x", pax_headers=xattrs)
        .add(long, b"long", uid=3_000_000, mtime=-5)
        .done(),
        Layer()
        .add("a/b/new", b"new")  # a and a/b are only implied: their attributes stay
        .add("a/.wh.gone")
        .add("opaque/.wh..wh..opq")
        .add("opaque/young", b"young")
        .add("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)
        .add("fifo", kind=tarfile.FIFOTYPE)
        .add("link", kind=tarfile.SYMTYPE, linkname="../a/b/one", mode=0o777)
        .done(),
        Layer().add("link", kind=tarfile.SYMTYPE, linkname="elsewhere", mode=0o777).done(),
        Layer().folder("a/b", mode=0o755, mtime=0).add("a/b/last", b"").add("void/x", b"").done(),
        Layer().add("a/.wh.b").done(),
        Layer().add("a/b/again", BIG[:5000]).done(),
    ]


def place(server: FaultyRegistry, tag: str, repository: str = "made") -> RegistryPlace:
    return RegistryPlace(parse(f"{server.host}/{repository}:{tag}"), plain_http=True)


@pytest.fixture
def made(server: FaultyRegistry) -> RegistryPlace:
    target = place(server, "oci")
    sink = target.open_sink()
    tars = layers()
    config = {
        "architecture": host_platform().architecture,
        "os": "linux",
        "config": {"Cmd": ["/x"]},
        "rootfs": {"type": "layers", "diff_ids": [model.digest(tar) for tar in tars]},
        "history": [{"created_by": f"layer {number}"} for number in range(len(tars))],
    }
    manifest = Manifest(
        schema_version=2,
        media_type=model.OCI_MANIFEST,
        config=sink.put_blob(model.encode(config), model.OCI_CONFIG),
        layers=tuple(sink.put_blob(gzip.compress(tar), model.OCI_LAYER_GZIP) for tar in tars),
    )
    sink.put_manifest("oci", model.encode(manifest), model.OCI_MANIFEST)
    return target


def listing(source: SourcePlace) -> Listing:
    """The file system of an OCI image, read with the standard library's tar reader."""
    reader = source.open()
    _, images = select(reader, source.target, str(source), [host_platform()])
    overlay = Overlay()
    for layer, diff_id in zip(images[0].manifest.layers, images[0].config.rootfs.diff_ids, strict=True):
        overlay.apply(reader.blob(layer.digest, layer.size), diff_id, layer.digest)
    return overlay.listing()


def round_trip(source: SourcePlace, server: FaultyRegistry, options: ConvertOptions) -> RegistryPlace:
    nydus, back = place(server, "nydus"), place(server, "back")
    image(source, nydus, options)
    reverse(nydus, back)
    return back


QUICK = ConvertOptions(attempts=1)
OPTIONS = {
    "v6": ConvertOptions(),
    "v5": ConvertOptions(fs_version=5, compressor="lz4_block"),
    "batch": ConvertOptions(batch_size=1 << 16, chunk_size=1 << 16),
    "oci-ref": ConvertOptions(oci_ref=True, oci=True),
    "merged": ConvertOptions(merge_platform=True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_made_image(server: FaultyRegistry, made: RegistryPlace, tmp_path: Path, name: str) -> None:
    back = round_trip(made, server, OPTIONS[name])
    assert compare(listing(made), listing(back)) > 30
    before, after = load(made.open(), "oci"), load(back.open(), "back")
    assert after["config"]["content"]["config"] == before["config"]["content"]["config"]
    assert after["config"]["content"]["history"] == before["config"]["content"]["history"]
    assert after["config"]["mediaType"] == model.OCI_CONFIG
    assert [layer["mediaType"] for layer in after["layers"]] == [model.OCI_LAYER_GZIP] * 6
    if name == "oci-ref":
        assert [layer["digest"] for layer in after["layers"]] == [x["digest"] for x in before["layers"]]
    if name != "merged":  # whose OCI half has the layers of its source
        check(place(server, "nydus"), back, host_platform(), tmp_path / "work")


@pytest.mark.vectors
@pytest.mark.parametrize("name", ["v6", "v5", "oci-ref"])
def test_the_source_of_the_vectors(server: FaultyRegistry, vectors: Path, name: str) -> None:
    source = ArchivePlace(vectors / "oci/source.tar")
    assert compare(listing(source), listing(round_trip(source, server, OPTIONS[name]))) > 15


@pytest.mark.vectors
@pytest.mark.parametrize("name", ["v5-zstd", "v6-zstd", "v6-lz4", "v6-batch", "prefetch", "docker-schema2"])
def test_images_of_the_reference(vectors: Path, tmp_path: Path, name: str) -> None:
    back = LayoutPlace(tmp_path / "back", "latest")
    reverse(ArchivePlace(vectors / f"oci/{name}.tar"), back)
    assert compare(listing(ArchivePlace(vectors / "oci/source.tar")), listing(back)) > 15


def test_blobs_in_a_storage_backend(server: FaultyRegistry, made: RegistryPlace, tmp_path: Path) -> None:
    """Nobody knows which layer is which, so the file system is one."""
    nydus, back = place(server, "nydus"), place(server, "back")
    image(made, nydus, backend=FolderPlace(tmp_path / "blobs"))
    with pytest.raises(ConfigError, match="storage backend"):
        reverse(nydus, back)
    with closing(LocalFs(dir=str(tmp_path / "blobs"))) as blobs:
        reverse(nydus, back, backend=blobs)
    assert compare(listing(made), listing(back)) > 30
    assert len(load(back.open(), "back")["layers"]) == 1


def test_an_optimized_image(server: FaultyRegistry, made: RegistryPlace, tmp_path: Path) -> None:
    nydus, optimized, back = place(server, "nydus"), place(server, "optimized"), place(server, "back")
    image(made, nydus)
    optimize(nydus, optimized, b"/a/b/again\n", "list", host_platform(), tmp_path)
    reverse(optimized, back)
    assert compare(listing(made), listing(back)) > 30
    found = load(back.open(), "back")
    assert len(found["layers"]) == len(found["config"]["content"]["history"]) == 6


def test_an_image_with_a_chunk_dictionary(server: FaultyRegistry, made: RegistryPlace) -> None:
    """Its layers are followed by blobs that are layers of another image."""
    dictionary, nydus, back = place(server, "dictionary"), place(server, "nydus"), place(server, "back")
    image(made, dictionary)
    image(made, nydus, dictionary=dictionary)
    assert len(load(nydus.open(), "nydus")["layers"]) > 7
    reverse(nydus, back)
    assert compare(listing(made), listing(back)) > 30
    assert len(load(back.open(), "back")["layers"]) == 6


def test_a_changed_blob_is_refused(server: FaultyRegistry, made: RegistryPlace) -> None:
    """Also where the change is in the blob's own tables, which no chunk's digest covers."""
    nydus = place(server, "nydus")
    image(made, nydus, ConvertOptions(workers=1))
    for layer in load(nydus.open(), "nydus")["layers"][:2]:
        path = server.store.blobs / layer["digest"].partition(":")[2]
        whole = path.read_bytes()
        for offset in range(512, len(whole), max(1, len(whole) // 7)):
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
            with pytest.raises(NydusError):
                reverse(nydus, place(server, "back"), QUICK)
        path.write_bytes(whole)
    reverse(nydus, place(server, "back"))
