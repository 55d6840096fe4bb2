"""Tar archives of every dialect become the tree that a container runtime would unpack."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from isal import isal_zlib

from nydus.build.layer import BuildOptions, LayerResult, build_layer
from nydus.build.stream import Window, blocks
from nydus.build.tar import Entry, TarReader
from nydus.errors import FormatError
from nydus.rafs.model import Compression, Tree

OPTIONS = BuildOptions(compression=Compression.NONE, chunk_size=0x1000, workers=1)


def read(data: bytes) -> list[tuple[Entry, bytes]]:
    reader = TarReader(Window(blocks(io.BytesIO(data), "test"), "test"))
    return [(entry, b"".join(bytes(piece) for piece in reader.chunks(entry, 4096))) for entry in reader]


def build(data: bytes, options: BuildOptions = OPTIONS) -> tuple[LayerResult, bytes]:
    blob: list[bytes] = []
    result = build_layer(io.BytesIO(data), blob.append, options, where="test")
    return result, b"".join(blob)


def paths(tree: Tree) -> list[str]:
    return [os.fsdecode(path) for _, path in tree.walk()]


def content(result: LayerResult, blob: bytes, path: bytes) -> bytes:
    row = result.tree.find(path)
    assert row is not None
    return b"".join(
        blob[int(chunk["coffset"]) : int(chunk["coffset"] + chunk["csize"])]
        for chunk in result.tree.node_chunks(row)
    )


def mode(tree: Tree, path: bytes) -> int:
    row = tree.find(path)
    assert row is not None
    return int(tree.nodes[row]["mode"])


Member = tuple[str, dict[str, object], bytes]


def archive(*members: Member, format: int = tarfile.PAX_FORMAT, pax: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, pax_headers=pax or {}) as tar:
        for name, attributes, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def file(name: str, data: bytes = b"", **attributes: object) -> Member:
    return name, attributes, data


def directory(name: str, mode: int = 0o755, **attributes: object) -> Member:
    return name, {"type": tarfile.DIRTYPE, "mode": mode, **attributes}, b""


def symlink(name: str, target: str) -> Member:
    return name, {"type": tarfile.SYMTYPE, "linkname": target}, b""


def hard_link(name: str, target: str, **attributes: object) -> Member:
    return name, {"type": tarfile.LNKTYPE, "linkname": target, **attributes}, b""


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_writes(format: int) -> None:
    long = "d" * 60 + "/" + "e" * 60 + "/" + "f" * 30
    members = [
        directory("dir", 0o1750, uid=7, gid=8, mtime=1234567890),
        file("dir/file", b"x" * 5000, mode=0o4711),
        file(long, b"long"),
        symlink("link", "dir/file"),
        hard_link("hard", "dir/file"),
        ("char", {"type": tarfile.CHRTYPE, "devmajor": 10, "devminor": 299}, b""),
        ("fifo", {"type": tarfile.FIFOTYPE}, b""),
    ]
    found = {entry.name: (entry, data) for entry, data in read(archive(*members, format=format))}
    assert found[b"dir/file"][1] == b"x" * 5000
    assert found[b"dir/file"][0].mode == stat.S_IFREG | 0o4711
    assert found[long.encode()][1] == b"long"
    assert found[b"link"][0].link == b"dir/file"
    assert found[b"hard"][0].hard_link
    assert (found[b"char"][0].major, found[b"char"][0].minor) == (10, 299)
    entry = found.get(b"dir") or found[b"dir/"]
    assert (entry[0].uid, entry[0].gid, entry[0].mtime) == (7, 8, 1234567890)


def test_pax_overrides_and_attributes() -> None:
    name = "ü" * 120
    info = file(
        name,
        b"data",
        uid=3_000_000,
        gid=2,
        mtime=-1.5,
        pax_headers={"SCHILY.xattr.user.a": "1", "SCHILY.xattr.com.apple.x": "2"},
    )
    result, _ = build(archive(info))
    row = result.tree.find(b"/" + name.encode())
    assert row is not None
    node = result.tree.nodes[row]
    assert (int(node["uid"]), int(node["mtime"]), int(node["mtime_ns"])) == (3_000_000, -2, 0)
    assert result.tree.node_xattrs(row) == ((b"user.a", b"1"),)


def test_attributes_left_out_are_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    odd = {
        "SCHILY.xattr.com.apple.x": "2",
        "SCHILY.xattr.user." + "n" * 251: "3",
        "SCHILY.xattr.user.ok": "1",
    }
    build(archive(*(file(str(number), b"", pax_headers=odd) for number in range(5))))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("test: 10 extended attributes are left out")
    assert "com.apple.x" in message
    caplog.clear()
    build(archive(file("x", b"", pax_headers={"SCHILY.xattr.user.ok": "1"})))
    assert not caplog.records


def test_global_headers_are_ignored() -> None:
    result, _ = build(archive(file("a", b"1"), pax={"path": "evil", "comment": "git"}))
    assert paths(result.tree) == ["/", "/a"]


def test_base_256_numbers() -> None:
    data = archive(file("a", b"1", uid=1 << 31, gid=0o10000000), format=tarfile.GNU_FORMAT)
    ((entry, _),) = read(data)
    assert (entry.uid, entry.gid) == (1 << 31, 0o10000000)


def test_implicit_parents_and_root() -> None:
    result, _ = build(archive(file("./a/b/c", b"1"), directory("./", 0o700, mtime=5)))
    assert paths(result.tree) == ["/", "/a", "/a/b", "/a/b/c"]
    assert mode(result.tree, b"/a/b") == stat.S_IFDIR | 0o755
    assert mode(result.tree, b"/") == stat.S_IFDIR | 0o700


def test_names_never_climb_out_of_the_root() -> None:
    result, _ = build(archive(file("../../etc/passwd", b"1"), file("/abs", b"2"), file("a/../../b", b"3")))
    assert paths(result.tree) == ["/", "/abs", "/b", "/etc", "/etc/passwd"]


def test_parents_that_are_links_are_followed_inside_the_root() -> None:
    members = [
        directory("usr"),
        symlink("bin", "usr/bin"),
        symlink("usr/lib", "../../../lib64"),
        file("bin/sh", b"1"),
        file("usr/lib/x", b"2"),
    ]
    result, _ = build(archive(*members))
    assert paths(result.tree) == [
        "/", "/bin", "/lib64", "/lib64/x", "/usr", "/usr/bin", "/usr/bin/sh", "/usr/lib",
    ]  # fmt: skip


def test_link_loops_end() -> None:
    with pytest.raises(FormatError, match="too many symbolic links"):
        build(archive(symlink("a", "b"), symlink("b", "a"), file("a/x", b"1")))


def test_last_duplicate_wins() -> None:
    members = [
        file("a", b"first"),
        file("a", b"second"),
        directory("d", 0o700),
        file("d/x", b"1"),
        directory("d", 0o711),
        directory("e"),
        file("e/y", b"2"),
        file("e", b"now a file"),
        symlink("s", "d"),
        directory("s"),
    ]
    result, blob = build(archive(*members))
    assert paths(result.tree) == ["/", "/a", "/d", "/d/x", "/e", "/s"]
    assert content(result, blob, b"/a") == b"second"
    assert content(result, blob, b"/e") == b"now a file"
    assert mode(result.tree, b"/d") == stat.S_IFDIR | 0o711
    assert stat.S_ISDIR(mode(result.tree, b"/s"))


@pytest.mark.parametrize("before", [False, True])
def test_hard_links_before_or_after_their_target(before: bool) -> None:
    target = file("dir/target", b"data", mode=0o600)
    links = [hard_link("link1", "dir/target", mode=0o600), hard_link("x/link2", "link1", mode=0o600)]
    members = [*reversed(links), target] if before else [target, *links]
    result, blob = build(archive(*members))
    tree = result.tree
    rows = [tree.find(path) for path in (b"/dir/target", b"/link1", b"/x/link2")]
    assert None not in rows
    assert {int(tree.nodes[row]["link"]) for row in rows} == {2}
    assert {int(tree.nodes[row]["nlink"]) for row in rows} == {3}
    assert content(result, blob, b"/link1") == b"data"


def test_hard_link_outlives_its_target() -> None:
    result, blob = build(archive(file("a", b"old"), hard_link("b", "a"), file("a", b"new")))
    assert content(result, blob, b"/b") == b"old"
    assert content(result, blob, b"/a") == b"new"
    assert [int(n) for n in result.tree.nodes["nlink"]] == [2, 1, 1]


def test_hard_links_to_what_is_not_there() -> None:
    with pytest.raises(FormatError, match=r"target of a hard link .*a -> nowhere"):
        build(archive(hard_link("a", "nowhere")))
    with pytest.raises(FormatError, match="hard link to a directory"):
        build(archive(directory("d"), hard_link("a", "d")))


def test_file_in_a_file() -> None:
    with pytest.raises(FormatError, match="not a directory: a/b"):
        build(archive(file("a", b"1"), file("a/b", b"2")))


@pytest.mark.parametrize(
    "format", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix"]
)
def test_sparse_files(format: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    expected = bytearray(3 << 20)
    with open(path, "wb") as out:
        out.truncate(len(expected))
        for i in range(30):
            offset = i * 100_000 + 777
            piece = bytes([i + 1]) * 5000
            expected[offset : offset + 5000] = piece
            out.seek(offset)
            out.write(piece)
    made = subprocess.run(
        f"tar --sparse --format={format} -cf - sparse -C / etc/hostname",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    found = {entry.name: data for entry, data in read(made.stdout)}
    assert found[b"sparse"] == expected
    assert found[b"etc/hostname"] == Path("/etc/hostname").read_bytes()
    assert len(made.stdout) < len(expected)


def test_holes_cost_little(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as out:
        out.truncate(100 << 30)
    made = subprocess.run(["tar", "-S", "-cf", "-", "sparse"], cwd=tmp_path, capture_output=True, check=True)
    result, _ = build(made.stdout, BuildOptions(workers=1))
    assert len(result.tree.chunks) == 100 << 10
    assert result.blob is not None and result.blob.chunk_count == 1
    with open(path, "wb") as out:
        out.truncate(10 << 40)
    made = subprocess.run(["tar", "-S", "-cf", "-", "sparse"], cwd=tmp_path, capture_output=True, check=True)
    with pytest.raises(FormatError, match="sparse file is too large"):
        build(made.stdout, BuildOptions(workers=1))


def two_members(data: bytes) -> bytes:
    return isal_gzip(data[:700]) + isal_gzip(data[700:]) + bytes(100)


def isal_gzip(data: bytes) -> bytes:
    member = isal_zlib.compressobj(1, isal_zlib.DEFLATED, 31)
    return bytes(member.compress(data) + member.flush())


def two_frames(data: bytes) -> bytes:
    return zstandard.compress(data[:700]) + zstandard.compress(data[700:])


@pytest.mark.parametrize("pack", [bytes, isal_gzip, two_members, zstandard.compress, two_frames])
def test_compressed_streams(pack: Callable[[bytes], bytes]) -> None:
    data = archive(file("a", os.urandom(3000)), file("b", bytes(5_000_000)))
    result, _ = build(pack(data))
    expected, _ = build(data)
    assert result.bootstrap == expected.bootstrap


def test_many_tiny_members() -> None:
    data = archive(file("a", os.urandom(200_000)))
    packed = b"".join(isal_gzip(data[i : i + 100]) for i in range(0, len(data), 100))
    assert build(packed)[0].bootstrap == build(data)[0].bootstrap


@pytest.mark.parametrize("cut", [10, 600, 5000, 20_000])
@pytest.mark.parametrize("pack", [bytes, isal_gzip])
def test_cut_short(pack: Callable[[bytes], bytes], cut: int) -> None:
    packed = pack(archive(file("a", os.urandom(30_000))))
    with pytest.raises(FormatError, match="test: "):
        build(packed[:cut])


def test_errors_name_the_member() -> None:
    data = archive(file("etc/first", b"x" * 600), file("usr/bin/second", b"y" * 3000))
    begins = data.index(b"usr/bin/second")
    for damaged, words in (
        (data[: begins + 2000], r"^test: usr/bin/second: the stream ends too early at offset 0x"),
        (data[: begins + 300], "^test: after etc/first: the stream ends too early at offset 0x"),
        (data[:700], "^test: etc/first: the stream ends"),
        (data[:begins] + b"?" + data[begins + 1 :], "^test: after etc/first: not a tar header: wrong"),
        (data[:300], "^test: the stream ends"),
        (archive(file("a\x1b[31m\nb", b"x" * 9000))[:2000], r"^test: a\\x1b\[31m\\nb: the stream ends"),
    ):
        with pytest.raises(FormatError, match=words):
            build(damaged)
    packed = bytearray(isal_gzip(archive(file("big", os.urandom(1 << 22)))))
    packed[-6] ^= 1
    with pytest.raises(FormatError, match=r"^test: (after )?big: not a gzip stream: .* at offset 0x"):
        build(bytes(packed))


def test_damaged_gzip() -> None:
    packed = bytearray(isal_gzip(archive(file("a", os.urandom(30_000)))))
    packed[-6] ^= 1  # the checksum
    with pytest.raises(FormatError, match="gzip"):
        build(bytes(packed))


def test_not_an_archive() -> None:
    with pytest.raises(FormatError, match="not a tar header"):
        build(b"#!/bin/sh\n" * 100)


def test_unknown_member_type() -> None:
    data = bytearray(archive(file("a"), format=tarfile.USTAR_FORMAT))
    data[156] = ord("V")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    with pytest.raises(FormatError, match=r"unknown type .*found V"):
        build(bytes(data))


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(10240)])
def test_ends(end: bytes) -> None:
    data = archive(file("a", b"1"), format=tarfile.USTAR_FORMAT)[:1024]
    assert paths(build(data + end)[0].tree) == ["/", "/a"]


@pytest.mark.parametrize("left", [5, 6, 511])
def test_the_padding_of_the_last_member_may_be_missing(left: int) -> None:
    """umoci 0.4 inserts such layers, and Go reads them."""
    from nydus.build.zran import build_reference

    data = archive(file("first", b"12345"), file("last", b"67890"))[: 3 * 512 + left]
    result, blob = build(data)
    assert content(result, blob, b"/last") == b"67890"
    options = BuildOptions(compression=Compression.GZIP, workers=1)
    found = build_reference(io.BytesIO(isal_gzip(data)), lambda _: None, options, where="test")
    assert paths(found.tree) == ["/", "/first", "/last"]
    for bad in (data[: 3 * 512 + 4], data[:1100]):
        with pytest.raises(FormatError, match="too early"):
            build(bad)
        with pytest.raises(FormatError, match="too early"):
            build_reference(io.BytesIO(isal_gzip(bad)), lambda _: None, options, where="test")


def test_a_whiteout_in_what_is_a_file_now() -> None:
    """umoci lists what was in the directory, too; it says nothing that the file does not."""
    result, _ = build(archive(file("d", b"x"), file("d/.wh.a"), file("d/e/.wh.b"), file("f/.wh.c")))
    assert paths(result.tree) == ["/", "/d", "/f", "/f/.wh.c"]


def test_hostile_sizes_cost_nothing() -> None:
    """Declared sizes are not believed before the bytes are there."""
    for size in (1 << 40, 1 << 62):
        info = tarfile.TarInfo("a")
        info.size = size
        header = info.tobuf(tarfile.GNU_FORMAT)
        with pytest.raises(FormatError):
            build(header + b"x" * 1000)
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = b"L", 1 << 40
    with pytest.raises(FormatError, match="too large"):
        build(info.tobuf(tarfile.GNU_FORMAT))


def test_empty_layer() -> None:
    result, blob = build(bytes(1024))
    assert (result.blob_id, blob, result.tree.blobs) == ("", b"", [])
    assert paths(result.tree) == ["/"]


@pytest.mark.vectors
def test_every_type_of_entry(vectors: Path) -> None:
    for name in ("all-entry-type.tar", "all-entry-type-macos.tar"):
        data = (vectors / "upstream" / "tar" / name).read_bytes()
        assert len(read(data)) > 3
