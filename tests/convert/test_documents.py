"""Bootstrap layers and archives made to harm whoever reads them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from nydus.convert.documents import BOOTSTRAP, bootstrap_layer, read_bootstrap_layer, unpack_bootstrap_layer
from nydus.errors import BackendError, FormatError, NydusError
from nydus.oci.archive import open_archive
from nydus.oci.layout import Layout
from nydus.oci.model import Descriptor

_END = bytes(1024)


def _header(name: str, size: bytes = b"00000000000\0", kind: bytes = b"0", **fields: bytes) -> bytes:
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[124:136], header[156:157] = size, kind
    for offset, value in fields.items():
        header[int(offset[2:]) : int(offset[2:]) + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _base256(value: int) -> bytes:
    lead = b"\xff" if value < 0 else b"\x80"
    return lead + value.to_bytes(11, "big", signed=True)


def _pax(records: bytes) -> bytes:
    return _header("x", b"%011o\0" % len(records), b"x") + records + bytes(-len(records) % 512)


HOSTILE = {
    "negative size": _header("a") + _header(BOOTSTRAP, _base256(-512)),
    "very negative size": _header(BOOTSTRAP, _base256(-1024)),
    "sparse file of a terabyte": _header(BOOTSTRAP, kind=b"S", at483=_base256(1 << 40)),
    "length of a record": _pax(b"99999999999999999999 a=b\n") + _header(BOOTSTRAP),
    "sparse map": _pax(b"22 GNU.sparse.map=1,x\n") + _header(BOOTSTRAP),
    "negative size in a record": _pax(b"13 size=-512\n") + _header(BOOTSTRAP),
    "headers upon headers": _pax(b"6 a=b\n") * 3000 + _header(BOOTSTRAP),
    "file outside": _header(BOOTSTRAP) + _header("image/../../outside"),
    "cut short": _header(BOOTSTRAP, b"00000100000\0"),
    "nothing": b"",
}


@pytest.mark.parametrize("name", set(HOSTILE) - {"headers upon headers"})
def test_a_hostile_bootstrap_layer(name: str) -> None:
    with pytest.raises(FormatError, match="somewhere"):
        unpack_bootstrap_layer(HOSTILE[name] + _END if HOSTILE[name] else b"", "somewhere")


def test_no_path_leads_out_of_the_layer() -> None:
    names = (BOOTSTRAP, "./image/a", "/etc/passwd", "//b", "image/c/../d")
    tar = b"".join(map(_header, names)) + _END
    assert set(unpack_bootstrap_layer(tar, "")[0]) == {BOOTSTRAP, "image/a", "etc/passwd", "b", "image/d"}


def test_a_layer_of_impossible_size_is_not_read(tmp_path: Path) -> None:
    layout = Layout(tmp_path).create()
    packed, diff_id = bootstrap_layer(b"boot", {"a": b"meta"})
    layer = layout.put_blob(packed, "")
    files = {BOOTSTRAP: b"boot", "image/a.blob.meta": b"meta"}
    assert read_bootstrap_layer(layout, layer, "") == (files, diff_id)
    with pytest.raises(FormatError, match="larger than 1 GiB"):
        read_bootstrap_layer(layout, Descriptor(digest=layer.digest, size=1 << 40), "")
    with pytest.raises(BackendError, match="expected"):
        read_bootstrap_layer(layout, Descriptor(digest=layer.digest, size=1), "")


def test_a_small_layer_does_not_inflate_without_end() -> None:
    packed, diff_id = bootstrap_layer(bytes(60 << 20), {})
    assert unpack_bootstrap_layer(packed, "")[1] == diff_id
    packed, _ = bootstrap_layer(bytes(100 << 20), {})
    with pytest.raises(FormatError, match="is larger than 7"):
        unpack_bootstrap_layer(packed, "")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image.tar"
    path.write_bytes(HOSTILE[name] + _END)
    with pytest.raises(NydusError, match=r"image\.tar"):
        open_archive(path)


def test_an_archive_that_does_not_fit_when_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    path = tmp_path / "image.tar.gz"
    path.write_bytes(gzip.compress(bytes(1 << 20)))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    with pytest.raises(BackendError, match=r"TMPDIR.*No space left"):
        open_archive(path)


@pytest.mark.parametrize(
    "digest", ["../../../../etc/passwd", "sha256:../../x", "md5:" + "0" * 32, "sha256:0", ""]
)
def test_what_an_image_calls_a_digest_leads_nowhere(digest: str, tmp_path: Path) -> None:
    from nydus.oci.place import RegistryPlace, Source
    from nydus.oci.reference import Reference

    layout = Layout(tmp_path).create()
    registry = RegistryPlace(Reference("127.0.0.1:1", "a", "b"), plain_http=True).open()
    sources: list[Source] = [layout, registry]
    for source in sources:
        assert not source.has_blob(digest)
        for use in (source.blob_size, lambda name, s=source: s.read_range(name, 0, 1),
                    lambda name, s=source: s.blob(name, 1).read(1)):  # fmt: skip
            with pytest.raises(BackendError, match="is not the digest of a blob"):
                use(digest)
