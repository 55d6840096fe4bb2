"""Chunk dictionaries: what images share, used by later builds."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nydus
from build.test_archive import run
from nydus.build.bootstrap import load
from nydus.build.chunkdict import Source, generate
from nydus.build.layer import write_bootstrap
from nydus.build.tree import TreeBuilder
from nydus.errors import NydusError
from nydus.rafs.model import BlobFeature

SHARED = [os.urandom(0x3000) + b"tail", b"tiny", os.urandom(0x1000)]


def image(folder: Path, name: str, contents: list[bytes], **options: object) -> Path:
    """The bootstrap of an image with these files; its blob goes to ``folder/blobs``."""
    root = folder / f"root-{name}"
    root.mkdir()
    for number, content in enumerate(contents):
        (root / f"{name[:1]}{number}").write_bytes(content)
    (folder / "blobs").mkdir(exist_ok=True)
    (folder / name).mkdir()
    with nydus.create(root, folder / "blobs", chunk_size=0x1000, **options) as made:
        made.save(folder / name / "bootstrap")
    return folder / name / "bootstrap"


@pytest.mark.parametrize(
    "options", [{}, {"version": 5}, {"batch_size": 0x1000}, {"encrypt": True}, {"toc": True}], ids=str
)
def test_later_builds_store_only_what_is_new(tmp_path: Path, options: dict[str, object]) -> None:
    paths = [
        image(tmp_path, f"{n}:1", [*SHARED, os.urandom(5000)], **options) for n in ("one", "two", "three")
    ]
    tree = generate([Source.of_path(str(path), load(str(path))) for path in paths])
    sizes = sorted(tree.chunks["usize"].tolist())
    assert sizes == [4, 4, 0x1000, 0x1000, 0x1000, 0x1000] and len(tree.blobs) == 1
    data = write_bootstrap(tree)
    with nydus.open(data, tmp_path / "blobs") as dictionary:
        assert dictionary.listdir("/chunkdict") == ["0", "1", "2"]
        assert {dictionary.read("/chunkdict/1"), dictionary.read("/chunkdict/2")} == {b"tail", b"tiny"}
    root = tmp_path / "new"
    root.mkdir()
    new = os.urandom(3000)
    (root / "known").write_bytes(SHARED[0])
    (root / "new").write_bytes(new)
    plain = {key: value for key, value in options.items() if key == "version"}
    with nydus.create(
        root, tmp_path / "blobs", chunk_size=0x1000, dictionary=load_bytes(data), **plain
    ) as built:
        own = [blob.chunk_count for blob in built.blobs if blob.id != tree.blobs[0].id]
        assert own == [1] and len(built.blobs) == 2
        assert built.read("/known") == SHARED[0] and built.read("/new") == new
        again = built.bootstrap()
    with nydus.open(again, tmp_path / "blobs") as reopened:
        assert reopened.read("/known") == SHARED[0] and reopened.read("/new") == new


def load_bytes(data: bytes) -> object:
    return nydus.open(data).tree


def test_dictionary_of_the_reference(tmp_path: Path) -> None:
    """It has all chunks, of whatever size, in one file, and marks their blobs."""
    paths = [image(tmp_path, f"{n}:1", SHARED) for n in ("one", "two")]
    ours = generate([Source.of_path(str(path), load(str(path))) for path in paths])
    builder = TreeBuilder()
    number = builder.add(b"/chunkdict", stat.S_IFREG | 0o644, size=0x1000 * len(ours.chunks))
    builder.set_chunks(number, 0, len(ours.chunks))
    chunks = ours.chunks[np.argsort(ours.chunks["uoffset"])]
    blobs = [replace(blob, features=blob.features | BlobFeature.CHUNKDICT_GENERATED) for blob in ours.blobs]
    theirs = builder.finish(6, 0x1000, ours.flags, chunks, np.arange(len(chunks)), blobs)
    root = tmp_path / "new"
    root.mkdir()
    for number, content in enumerate(SHARED):
        (root / f"known{number}").write_bytes(content)
    dictionary = load_bytes(write_bootstrap(theirs))
    with nydus.create(root, tmp_path / "blobs", chunk_size=0x1000, dictionary=dictionary) as built:
        again = built.bootstrap()
    with nydus.open(again, tmp_path / "blobs") as built:
        assert [blob.id for blob in built.blobs] == [blob.id for blob in ours.blobs]
        assert [built.read(f"/known{number}") for number in range(3)] == SHARED


def test_images_that_do_not_fit(tmp_path: Path) -> None:
    first = Source("a", "1", load(str(image(tmp_path, "a:1", SHARED))))
    other = Source("b", "1", load(str(image(tmp_path, "b:1", SHARED, version=5))))
    with pytest.raises(NydusError, match="version of b:1"):
        generate([first, other])
    with pytest.raises(NydusError):
        generate([])
    assert not len(generate([first]).chunks)  # nothing is shared


def test_command(tmp_path: Path) -> None:
    paths = [image(tmp_path, name, [*SHARED, name.encode() * 9]) for name in ("host:5000:app:v1", "app:v2")]
    database, output = tmp_path / "db", tmp_path / "dict"
    done = run("chunkdict", "generate", "--database", f"sqlite://{database}", "-B", output, "-J",
               tmp_path / "json", "-v", *paths)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "json").read_text())["blobs"]) == 1
    assert len(load(str(output)).chunks) == 6
    with sqlite3.connect(database) as connection:
        query = "SELECT image_reference, version, count(*) FROM chunks GROUP BY 1, 2 ORDER BY 2"
        assert connection.execute(query).fetchall() == [("app", "v1", 7), ("app", "v2", 7)]
        assert connection.execute("SELECT count(*) FROM blobs").fetchone() == (2,)
    connection.close()
    (tmp_path / "out").mkdir()
    assert run("chunkdict", "generate", "-D", tmp_path / "out", *paths).returncode == 0
    assert next((tmp_path / "out").iterdir()).read_bytes() == output.read_bytes()
    assert run("chunkdict", "generate", "-B", output).returncode == 2
    done = run("chunkdict", "generate", "-B", output, "--database", "mysql://x", *paths)
    assert done.returncode == 1 and "sqlite" in done.stderr
    done = run("chunkdict", "generate", "-B", output, "--database", "sqlite:///no/such/dir/db", *paths)
    assert done.returncode == 1 and "Traceback" not in done.stderr
