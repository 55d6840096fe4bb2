"""Images back into tar archives, through the API and ``nydus-image unpack``."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nydus
from api.test_image import describe, open_vector
from conformance.content import expected
from conformance.test_read import NAMES
from nydus.build.archive import write_tar
from nydus.build.layer import BuildOptions, LayerBuilder, stargz_special
from nydus.build.tree import TreeBuilder
from nydus.errors import NydusError


def unpack(image: nydus.Image) -> bytes:
    out = io.BytesIO()
    write_tar(image, out.write)
    return out.getvalue()


@pytest.mark.vectors
@pytest.mark.parametrize("name", NAMES)
def test_unpacked_vector_builds_the_same_image(name: str, vectors: Path, tmp_path: Path) -> None:
    with open_vector(vectors, name, tmp_path) as image:
        archive = unpack(image)
    (tmp_path / "again").mkdir()
    with nydus.create(io.BytesIO(archive), tmp_path / "again") as again:
        found = describe(again)
    rows = expected(vectors / name / "expected.jsonl")
    del rows["/"]
    for path in [path for path, row in rows.items() if stat.S_ISSOCK(row["mode"])]:
        del rows[path]
    assert found.keys() == rows.keys()
    for path, row in rows.items():
        assert found[path] == row


@pytest.mark.vectors
def test_python_reads_the_archive_as_we_do(vectors: Path, tmp_path: Path) -> None:
    with open_vector(vectors, "v6-dir-zstd", tmp_path) as image:
        archive = tarfile.open(fileobj=io.BytesIO(unpack(image)))  # noqa: SIM115
        members = archive.getmembers()
        names = [member.name for member in members]
        assert names == [os.fsdecode(path[1:]) for row, path in image.tree.walk() if row]
        for member in members:
            entry = image.stat("/" + member.name, follow_symlinks=False)
            assert member.mode == stat.S_IMODE(entry.mode)
            assert (member.uid, member.gid, int(member.mtime)) == (entry.uid, entry.gid, entry.mtime)
            assert "/" not in (member.name[:1], member.name[-1:])
            if member.islnk():
                assert member.size == 0 and member.linkname.startswith("/")
                assert image.stat(member.linkname).inode == entry.inode
            elif member.isreg():
                assert archive.extractfile(member).read() == image.read("/" + member.name)  # type: ignore[union-attr]
            elif member.issym():
                assert member.linkname == entry.target
            elif member.isdev() and not member.isfifo():
                assert (member.devmajor, member.devminor) == entry.device
            for key, value in entry.xattrs.items():
                assert (
                    os.fsencode(member.pax_headers[f"SCHILY.xattr.{key}"]) == value or value.find(b"\0") >= 0
                )


def test_attribute_names_cannot_split_a_record(tmp_path: Path) -> None:
    builder = TreeBuilder()
    builder.add(b"file", stat.S_IFREG | 0o644, xattrs=((b"user.a=b", b"value"), (b"user.c", b"=\n")))
    layer = LayerBuilder(len, BuildOptions())
    with layer.writer:
        tree = layer.finish(builder).tree
    with nydus.open(tree, tmp_path) as image, tarfile.open(fileobj=io.BytesIO(unpack(image))) as archive:
        (member,) = archive.getmembers()
    assert member.pax_headers == {"SCHILY.xattr.user.a%3Db": "value", "SCHILY.xattr.user.c": "=\n"}


NAMES_OF = st.binary(min_size=1, max_size=130).filter(
    lambda n: not {0, 47} & set(n) and n not in (b".", b"..")
)
FILES = st.tuples(
    st.lists(st.sampled_from([b"a", b"b", b"deep", b"\xff"]), max_size=3),  # directories
    # Whiteouts mean something, and so do the files of eStargz in the root.
    NAMES_OF.filter(lambda name: not name.startswith(b".wh.") and not stargz_special(name)),
    st.sampled_from([b"0", b"1", b"2", b"3", b"6"]),
    st.binary(max_size=60),  # content, or what a link leads to
    st.integers(0, 200) | st.just(4096 * 3),  # how often the content is repeated
    st.integers(-(2**33), 2**34),  # time
    st.integers(0, 2**32 - 2),  # owner: the last one means none to the kernel
    st.dictionaries(st.sampled_from(["user.a", "security.b", "trusted.c"]), st.binary(max_size=40)),
)


def random_image(entries: list[Any], version: int, folder: str) -> nydus.Image | None:
    """An image of what :data:`FILES` describes, with its blob in a folder; None for what no image can be."""
    source = TreeBuilder()
    sink: list[bytes] = []
    layer = LayerBuilder(sink.append, BuildOptions(version=version, chunk_size=0x1000, workers=1))
    files: list[bytes] = []
    with layer.writer:
        for folders, name, kind, content, repeat, mtime, owner, xattrs in entries:
            path = b"/".join([*folders, name])
            sets = tuple((key.encode(), value) for key, value in sorted(xattrs.items()))
            try:
                if kind == b"1" and files:
                    source.link(path, files[len(content) % len(files)])
                elif kind == b"2" and content.strip(b"\0"):
                    target = content.replace(b"\0", b"x")
                    source.add(path, stat.S_IFLNK | 0o777, owner, 1, mtime, target=target)
                elif kind in b"36":
                    mode = stat.S_IFCHR if kind == b"3" else stat.S_IFIFO
                    rdev = owner & 0xFFFFF if kind == b"3" else 0
                    # The kernel shows no others of such files.
                    sets = tuple(pair for pair in sets if not pair[0].startswith(b"user."))
                    source.add(path, mode | 0o640, 2, owner, mtime, rdev=rdev, xattrs=sets)
                else:
                    data = content * repeat
                    number = source.add(
                        path, stat.S_IFREG | 0o4755, owner, 0, mtime, size=len(data), xattrs=sets
                    )
                    pieces = [data[at : at + 0x1000] for at in range(0, len(data), 0x1000)]
                    source.set_chunks(number, *layer.writer.add(pieces))
                    files.append(path)
            except NydusError:  # a name below something that is no directory
                continue
        try:
            built = layer.finish(source)
        except NydusError:  # a link to what was replaced
            return None
    if built.blob_size:
        Path(folder, built.blob_id).write_bytes(b"".join(sink))
    return nydus.open(built.tree, folder)


@given(st.lists(FILES, max_size=12), st.sampled_from([5, 6]))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_trees(entries: list[Any], version: int) -> None:
    """build → unpack → build is the same tree."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        image = random_image(entries, version, first)
        if image is None:
            return
        with image:
            archive = unpack(image)
            before = describe(image)
        with nydus.create(
            io.BytesIO(archive), second, version=version, chunk_size=0x1000, workers=1
        ) as again:
            assert describe(again) == before
        names = [member.name for member in tarfile.open(fileobj=io.BytesIO(archive))]  # noqa: SIM115
        assert len(names) == len(before)


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    root.mkdir()
    for path, times in (("old", -1.5), ("zero", 0), ("late", 2**33 + 0.25)):
        (root / path).write_text(path)
        os.utime(root / path, (0, times))
    (root / ("n" * 255)).write_text("long")
    (root / ("n" * 100)).write_text("fits")
    os.link(root / ("n" * 255), root / "short")
    deep = root
    for _ in range(3):
        deep = deep / ("d" * 100)
        deep.mkdir()
    (deep / "file").write_bytes(os.urandom(5000))
    (root / "link").symlink_to("t" * 150)
    (root / ".wh.gone").touch()
    os.mkfifo(root / "fifo")
    return root


@pytest.fixture
def image(rootfs: Path, tmp_path: Path) -> nydus.Image:
    (tmp_path / "blobs").mkdir()
    from nydus.build.merge import Whiteout

    image = nydus.create(rootfs, tmp_path / "blobs", whiteout=Whiteout.NONE)
    image.save(tmp_path / "boot")
    return image


def listing(root: Path) -> dict[str, tuple[object, ...]]:
    result: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        data = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        result[str(path.relative_to(root))] = (
            status.st_mode, status.st_mtime_ns, 0 if path.is_dir() else status.st_nlink, data,
        )  # fmt: skip
    return result


def test_gnu_tar_extracts_what_was_built(image: nydus.Image, rootfs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["tar", "-C", out, "-xpf", "-"], input=unpack(image), check=True, capture_output=True)
    assert listing(out) == listing(rootfs)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from nydus.cli.nydus_image import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_command_writes_to_files_and_fifos(image: nydus.Image, tmp_path: Path) -> None:
    archive = unpack(image)
    boot, blobs = tmp_path / "boot", tmp_path / "blobs"
    assert run("unpack", boot, "-D", blobs, "--output", tmp_path / "a.tar").returncode == 0
    assert (tmp_path / "a.tar").read_bytes() == archive
    os.mkfifo(tmp_path / "fifo")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "fifo").read_bytes()))
    reader.start()
    (blob,) = blobs.iterdir()
    done = run("unpack", "--log-level", "warn", "-B", boot, "--output", tmp_path / "fifo", "--blob", blob)
    reader.join(10)
    assert done.returncode == 0 and done.stdout + done.stderr == "" and found == [archive]
    config = f'{{"dir": "{blobs}"}}'
    backend = ("--backend-type", "localfs", "--backend-config", config)
    assert run("unpack", boot, *backend, "--output", tmp_path / "c.tar").returncode == 0
    assert (tmp_path / "c.tar").read_bytes() == archive


def test_failures_leave_no_output(image: nydus.Image, tmp_path: Path) -> None:
    boot, output = tmp_path / "boot", tmp_path / "out.tar"
    (tmp_path / "none").mkdir()
    for arguments, code, text in (
        ((boot, "--output", output), 1, "no source of blobs"),
        ((boot, "-D", tmp_path / "none", "--output", output), 1, "no such file"),
        ((boot, "-D", tmp_path / "nowhere", "--output", output), 1, "not a directory"),
        ((tmp_path / "blobs", "-D", tmp_path / "blobs", "--output", output), 1, "directory"),
        (("-D", tmp_path, "--output", output), 2, "bootstrap"),
        ((boot, "-D", tmp_path), 2, "--output"),
        ((boot, "--backend-type", "localfs", "--backend-config", "[", "--output", output), 1, "JSON"),
        ((boot, "--backend-type", "moon", "--backend-config", "{}", "--output", output), 1, "moon"),
    ):
        done = run("unpack", *arguments)
        assert (done.returncode, text in done.stderr, "Traceback" in done.stderr) == (code, True, False), done
        assert not output.exists() and not list(tmp_path.glob(".nydus*"))
