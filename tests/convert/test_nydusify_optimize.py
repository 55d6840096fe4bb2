"""``nydusify optimize``: the same files, those of a trace in a blob of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty import FaultyRegistry
from nydusify_command import Nydusify

from nydus import rafs
from nydus.convert.check import check
from nydus.convert.copy import copy
from nydus.convert.opened import PREFETCH_BLOB, Opened, open_nydus
from nydus.convert.trace import read_trace, resolve
from nydus.errors import ConfigError
from nydus.oci import model
from nydus.oci.place import ArchivePlace, LayoutPlace, RegistryPlace
from nydus.oci.reference import parse
from nydus.rafs.buffer import Buffer
from nydus.rafs.v6.reader import Reader

pytestmark = pytest.mark.vectors
AMD64 = model.Platform(os="linux", architecture="amd64")


def push(vectors: Path, server: FaultyRegistry, name: str) -> str:
    reference = f"{server.host}/app:{name}"
    copy(ArchivePlace(vectors / f"oci/{name}.tar"), RegistryPlace(parse(reference), plain_http=True))
    return reference


def place(reference: str) -> RegistryPlace:
    return RegistryPlace(parse(reference), plain_http=True)


def files_of(opened: Opened) -> list[str]:
    """Regular files with data, largest first."""
    nodes = opened.tree.nodes
    found = [
        (int(nodes["size"][row]), os.fsdecode(path))
        for row, path in opened.tree.walk()
        if nodes["mode"][row] >> 12 == 8 and nodes["size"][row]
    ]
    return [path for _, path in sorted(found, reverse=True)]


@pytest.mark.parametrize("repository", ["app", "other/repository"])
@pytest.mark.parametrize(
    "name", ["v6-zstd", "v6-batch", "v5-zstd", "docker-schema2", "merged-index", "oci-ref"]
)
def test_into_any_repository(
    vectors: Path, server: FaultyRegistry, nydusify: Nydusify, tmp_path: Path, name: str, repository: str
) -> None:
    if name == "oci-ref":
        copy(ArchivePlace(vectors / "oci/source.tar"), place(f"{server.host}/app:source"))
    source = push(vectors, server, name)
    wanted = files_of(open_nydus(place(source), AMD64))[1:4]
    (tmp_path / "list").write_text("\n".join(wanted) + "\n")
    target = f"{server.host}/{repository}:fast"
    done = nydusify(
        *("optimize", "--source", source, "--target", target, "--plain-http"),
        *("--prefetch-files", str(tmp_path / "list"), "--platform", "linux/amd64"),
    )
    assert done.returncode == 0, done.stderr
    made = open_nydus(place(target), AMD64)
    manifest, config = made.found.manifest, made.found.config
    blob = manifest.layers[-1].annotations[PREFETCH_BLOB]
    assert manifest.layers[-2].digest == f"sha256:{blob}"
    assert len(config.rootfs.diff_ids) == len(manifest.layers)
    history = [entry for entry in config.history or () if not entry.empty_layer]
    assert len(history) == len(manifest.layers)
    assert made.files["image/prefetch.files"] == (tmp_path / "list").read_bytes()
    if made.tree.version == 6:
        assert f"image/{blob}.blob.meta" in made.files
    for path in wanted:
        row = made.tree.find(path.encode())
        assert row is not None
        assert {made.tree.blobs[number].id for number in made.tree.node_chunks(row)["blob_index"]} == {blob}
    assert [os.fsdecode(made.tree.path(row)) for row in made.tree.prefetch][:3] == wanted
    (tmp_path / "work").mkdir()
    report = check(place(target), ArchivePlace(vectors / "oci/source.tar"), AMD64, tmp_path / "work")
    assert report.checks["filesystem"] > 10
    assert not list((tmp_path / "cwd").iterdir()), "the work directory is gone"


@pytest.mark.root
def test_mounted_it_reads_the_same(
    vectors: Path, server: FaultyRegistry, nydusify: Nydusify, tmp_path: Path
) -> None:
    source = push(vectors, server, "v6-zstd")
    (tmp_path / "list").write_text(json.dumps(files_of(open_nydus(place(source), AMD64))[:2]))
    target = f"{server.host}/elsewhere:fast"
    done = nydusify(
        *("optimize", "--source", source, "--target", target, "--plain-http"),
        *("--prefetch-files", str(tmp_path / "list")),
    )
    assert done.returncode == 0, done.stderr
    copy(ArchivePlace(vectors / "oci/source.tar"), place(f"{server.host}/app:source"))
    done = nydusify("check", "--source", f"{server.host}/app:source", "--target", target, "--plain-http")
    assert done.returncode == 0, done.stderr


def test_nothing_to_optimize(
    vectors: Path, server: FaultyRegistry, nydusify: Nydusify, tmp_path: Path
) -> None:
    (tmp_path / "list").write_text("/no/such/file\n")
    source = push(vectors, server, "v6-zstd")
    arguments = ["optimize", "--source", source, "--target", f"{server.host}/app:new", "--plain-http"]
    done = nydusify(*arguments, "--prefetch-files", str(tmp_path / "list"))
    assert done.returncode == 1 and "names no file of" in done.stderr
    done = nydusify(*arguments, "--prefetch-files", str(tmp_path / "no"))
    assert done.returncode == 1 and "No such file" in done.stderr
    copy(ArchivePlace(vectors / "oci/source.tar"), place(f"{server.host}/app:source"))
    arguments[2] = f"{server.host}/app:source"
    done = nydusify(*arguments, "--prefetch-files", str(tmp_path / "list"))
    assert done.returncode == 1 and "is not a Nydus image" in done.stderr
    assert not any(path.endswith("manifests/new") for path in server.paths("PUT"))


@pytest.fixture
def opened(vectors: Path) -> Callable[[str], Opened]:
    return lambda name: open_nydus(ArchivePlace(vectors / f"oci/{name}.tar"), AMD64)


def test_formats_of_traces(opened: Callable[[str], Opened]) -> None:
    boot = opened("v6-zstd").files["image/image.boot"]

    def paths(text: str) -> list[str]:
        return [file.path for file in read_trace(text.encode(), "trace", boot)]

    assert paths("/a\n/b\n/a\n") == ["/a", "/b"]
    assert paths('["/a", "/b"]') == ["/a", "/b"]
    assert paths('path,size,elapsed\n/a,10,7\n"/b,c",20,9\n') == ["/a", "/b,c"]
    assert paths('{"path":"/a","size":1,"elapsed":3}\n{"path":"/b","size":1,"elapsed":5}\n') == ["/a", "/b"]
    (file,) = read_trace(b'{"version":"v1","files":[{"path":"/a","ranges":[[0,1]]}]}', "trace", boot)
    assert (file.path, file.ranges) == ("/a", [(0, 1)])
    for wrong in ("a\n", "[1]", '{"x":1}', "{", '["a"]', "\0"):
        with pytest.raises(ConfigError, match="trace"):
            paths(wrong)


@pytest.mark.parametrize("name", ["v6-zstd", "v5-zstd"])
def test_access_patterns_name_inodes(opened: Callable[[str], Opened], name: str) -> None:
    image = opened(name)
    wanted = files_of(image)[:3]
    rows = [image.tree.find(path.encode()) for path in wanted]
    boot = image.files["image/image.boot"]
    numbers = [(row or 0) + 1 for row in rows]
    if image.tree.version == 6:
        reader = Reader(Buffer(boot, ""), rafs.superblock(boot))
        reader.tree()
        numbers = [int(reader.nids[row]) for row in rows]
    records = [
        {"ino": ino, "nr_read": 1, "first_access_time_secs": 5, "first_access_time_nanos": nanos}
        for nanos, ino in enumerate(numbers)
    ]
    text = json.dumps([*reversed(records), {"ino": 1 << 60, "nr_read": 1}]).encode()
    assert [file.path for file in read_trace(text, "pattern", boot)] == wanted


def test_traces_name_files_in_other_ways(opened: Callable[[str], Opened]) -> None:
    tree = opened("v6-zstd").tree
    everything = files_of(opened("v6-zstd"))
    found, missing = resolve(read_trace(b"/\n/nothing\n", "trace", b""), tree)
    assert set(everything) <= {file.path for file in found} and missing == ["/nothing"]
    links = [os.fsdecode(path) for row, path in tree.walk() if tree.nodes["mode"][row] >> 12 == 0o12]
    for link in links:
        found, missing = resolve(read_trace(os.fsencode(link), "trace", b""), tree)
        assert link not in [file.path for file in found]


def test_places_without_registry(vectors: Path, tmp_path: Path) -> None:
    from nydus.convert.optimize import optimize

    source = ArchivePlace(vectors / "oci/v6-zstd.tar")
    (first, *_) = files_of(open_nydus(source, AMD64))
    target = LayoutPlace(tmp_path / "layout", "fast")
    made = optimize(source, target, first.encode(), "trace", AMD64, tmp_path)
    assert made.files == 1 and made.chunks >= 1 and made.missing == []
    check(target, ArchivePlace(vectors / "oci/source.tar"), AMD64, tmp_path)
