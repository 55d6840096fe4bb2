"""Layers laid over each other are what an overlay file system shows."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nydus import rafs
from nydus.build.directory import build_directory
from nydus.build.layer import BuildOptions, LayerResult, build_layer
from nydus.build.merge import InconsistentLayers, Whiteout, merge, overlay
from nydus.errors import NydusError
from nydus.rafs.model import Compression, SuperFlag, Tree

OPTIONS = BuildOptions(compression=Compression.NONE, workers=1)


def layer(names: dict[str, bytes | None], options: BuildOptions = OPTIONS) -> LayerResult:
    """A layer with these files; names that end with ``/`` are directories, ``name -> target`` hard links."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in names.items():
            name, _, target = name.partition(" -> ")
            info = tarfile.TarInfo(name.rstrip("/"))
            if name.endswith("/"):
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif target:
                info.type, info.linkname = tarfile.LNKTYPE, target
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    out.seek(0)
    return build_layer(out, lambda data: None, options)


def names(tree: Tree) -> list[str]:
    return [os.fsdecode(path)[1:] for _, path in tree.walk()][1:]


def merged(*layers: dict[str, bytes | None]) -> Tree:
    tree = merge([layer(names).tree for names in layers])
    for write, read in ((rafs.v6.write, rafs.v6.read),):
        assert names(read(write(tree))) == names(tree)
    return tree


def test_whiteouts_and_opaque_directories() -> None:
    tree = merged(
        {"a/": None, "a/x": b"1", "a/y": b"2", "b/": None, "b/z": b"3", "c": b"4"},
        {"a/": None, "a/.wh.x": None, "b/": None, "b/.wh..wh..opq": None, "b/new": b"5", ".wh.c": None},
    )
    assert names(tree) == ["a", "a/y", "b", "b/new"]


def test_whiteout_and_replacement_in_one_layer() -> None:
    tree = merged({"d/": None, "d/x": b"1"}, {".wh.d": None, "d": b"file"})
    assert names(tree) == ["d"]


def test_whiteouts_of_the_lowest_layer_and_of_new_directories_mean_nothing() -> None:
    tree = merged({".wh.a": None, "b": b"1"}, {"new/": None, "new/.wh.x": None, "new/y": b"2"})
    assert names(tree) == ["b", "new", "new/y"]


def test_directories_and_files_replace_each_other() -> None:
    tree = merged(
        {"f": b"1", "d/": None, "d/x": b"2"},
        {"f/": None, "f/y": b"3", "d": b"4"},
        {"d/": None, "d/z": b"5"},
    )
    assert names(tree) == ["d", "d/z", "f", "f/y"]


def test_links_live_inside_a_layer() -> None:
    tree = merged({"a": b"1", "b -> a": None, "c -> a": None}, {"b": b"other"})
    rows = {name: tree.find(b"/" + name) for name in (b"a", b"b", b"c")}
    nlink = {name: int(tree.nodes[row]["nlink"]) for name, row in rows.items()}
    assert nlink == {b"a": 2, b"b": 1, b"c": 2}
    assert tree.nodes[rows[b"c"]]["link"] == rows[b"a"]


def test_blobs_are_numbered_by_first_use() -> None:
    layers = [layer({"z": b"low"}), layer({"gone": b"middle"}), layer({"a": b"high", ".wh.gone": None})]
    tree = merge([built.tree for built in layers])
    assert [blob.id for blob in tree.blobs] == [layers[2].blob_id, layers[0].blob_id]


def test_the_same_layer_twice() -> None:
    built = layer({"a": b"1"})
    tree = merge([built.tree, layer({"a/": None}).tree, built.tree])
    assert [blob.id for blob in tree.blobs] == [built.blob_id]


def test_prefetch_follows_the_names() -> None:
    options = BuildOptions(compression=Compression.NONE, prefetch_table=True, workers=1)
    low, high = layer({"a": b"1", "b": b"2"}, options), layer({"0": b"3", ".wh.a": None}, options)
    low.tree.prefetch = [row for name in (b"/b", b"/a") if (row := low.tree.find(name)) is not None]
    tree = merge([low.tree, high.tree])
    assert [tree.path(row) for row in tree.prefetch] == [b"/b"]


def test_layers_that_do_not_fit() -> None:
    a = layer({"a": b"1"}).tree
    b = layer({"b": b"1"}, BuildOptions(compression=Compression.NONE, chunk_size=0x1000)).tree
    with pytest.raises(InconsistentLayers, match="chunk size of layer 2"):
        merge([a, b])
    with pytest.raises(NydusError, match="nothing to merge"):
        merge([])


def test_sources_stay_as_they_are() -> None:
    low, high = layer({"a/": None, "a/x": b"1"}).tree, layer({"a/": None, "a/y": b"2"}).tree
    before = (low.nodes.tobytes(), high.nodes.tobytes(), high.chunks.tobytes())
    merge([low, high])
    assert before == (low.nodes.tobytes(), high.nodes.tobytes(), high.chunks.tobytes())


def test_many_layers_of_many_blobs() -> None:
    trees = [layer({f"f{i}": str(i).encode()}).tree for i in range(255)]
    assert len(merge(trees[:254]).blobs) == 254
    with pytest.raises(NydusError, match="255 blobs"):
        merge(trees)


def test_parent_of_a_build(tmp_path: Path) -> None:
    (tmp_path / "keep").write_bytes(b"same content")
    (tmp_path / "gone").write_bytes(b"gone")
    parent = build_directory(str(tmp_path), lambda data: None, OPTIONS)
    upper = tmp_path / "upper"
    upper.mkdir()
    (upper / "copy").write_bytes(b"same content")
    (upper / "new").write_bytes(b"new")
    (upper / ".wh.gone").write_bytes(b"")
    options = BuildOptions(compression=Compression.NONE, workers=1, parent=parent.tree)
    result = build_directory(str(upper), lambda data: None, options)
    assert names(result.tree) == ["copy", "keep", "new"]
    assert [blob.id for blob in result.tree.blobs] == [parent.blob_id, result.blob_id]
    assert result.blob_size and result.blob is not None and result.blob.chunk_count == 1
    again = rafs.read(result.bootstrap)
    assert names(again) == names(result.tree)
    assert [blob.id for blob in again.blobs] == [parent.blob_id, result.blob_id]


# What the kernel's overlayfs shows of random layers.

_NAMES = st.sampled_from(["a", "b", "c", "d"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)
_CHANGES = st.lists(
    st.tuples(st.sampled_from(["file", "dir", "remove", "opaque", "replace"]), _PATHS, st.binary(max_size=9)),
    max_size=12,
)


@contextmanager
def mounted(lower: list[Path], where: Path) -> Iterator[Path]:
    folders = ":".join(str(path) for path in reversed(lower))
    upper, work = where.with_name(where.name + "-u"), where.with_name(where.name + "-w")
    for path in (where, upper, work):
        path.mkdir()
    options = f"lowerdir={folders},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, where], check=True)
    try:
        yield upper
    finally:
        subprocess.run(["umount", where], check=True)


def apply(root: Path, changes: list[tuple[str, str, bytes]]) -> None:
    """Change a mounted overlay as a container would; what cannot be done is left out."""
    for action, name, data in changes:
        path = root / name
        try:
            if action == "file":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            elif action == "dir":
                path.mkdir(parents=True, exist_ok=True)
            elif action in ("remove", "opaque", "replace"):
                subprocess.run(["rm", "-rf", path], check=True)
                if action == "opaque":
                    path.mkdir()
                    (path / "fresh").write_bytes(data)
                elif action == "replace":
                    path.write_bytes(data)
        except OSError:
            continue


def tree_of(root: Path) -> dict[str, tuple[object, ...]]:
    """Names with mode, owner, time and content (of directories only the mode)."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            row: tuple[object, ...] = (status.st_mode,)
            if name in files:
                content = blake3(Path(path).read_bytes()).digest() if status.st_size else b""
                row = (status.st_mode, status.st_uid, status.st_mtime_ns, status.st_size, content)
            found["/" + os.path.relpath(path, root)] = row
    return found


@pytest.mark.root
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(_CHANGES, min_size=2, max_size=3))
def test_like_overlayfs(
    layers: list[list[tuple[str, str, bytes]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("overlay")
    base = root / "base"
    base.mkdir()
    apply(base, [("file", "a/b/c", b"0"), ("file", "b/a", b"0"), ("dir", "c/d", b"")])
    folders = [base]
    shown: dict[str, tuple[object, ...]] = {}
    for number, changes in enumerate(layers):
        where = root / f"mount{number}"
        with mounted(folders, where) as upper:
            apply(where, changes)
            shown = tree_of(where)
        folders.append(upper)
    options = BuildOptions(compression=Compression.NONE, whiteout=Whiteout.NONE, workers=1)
    trees = [build_directory(str(folder), lambda data: None, options).tree for folder in folders]
    tree = overlay(trees, Whiteout.OVERLAYFS)
    found: dict[str, tuple[object, ...]] = {}
    for row, path in tree.walk():
        node = tree.nodes[row]
        found[os.fsdecode(path)] = (int(node["mode"]),)
        if stat.S_ISREG(int(node["mode"])):
            time = int(node["mtime"]) * 10**9 + int(node["mtime_ns"])
            content = b"".join(chunk.tobytes() for chunk in tree.node_chunks(row)["digest"])
            found[os.fsdecode(path)] += (int(node["uid"]), time, int(node["size"]), content)
    del found["/"]
    assert found == shown
    assert not tree.flags & SuperFlag.TARFS
