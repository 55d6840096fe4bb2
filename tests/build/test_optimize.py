"""Images with a blob for what is read first: the same files, read from there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

import nydus
from api.test_image import describe, open_vector
from build.test_archive import run
from conformance.content import expected
from nydus.build.optimize import PrefetchFile, optimize, parse_prefetch_files
from nydus.rafs.model import BlobFeature

NAMES = [
    "v5-dir-zstd", "v5-dir-lz4_block", "v5-dir-aligned", "v6-dir-zstd", "v6-dir-none", "v6-dir-batch",
    "v6-dir-encrypted", "v6-dir-4k-chunks", "v6-dir-toc", "v6-inline-meta", "v6-targz-ref", "merge-v6",
    "dict-v6",
]  # fmt: skip


@pytest.mark.vectors
@pytest.mark.parametrize("name", NAMES)
def test_vector_reads_the_same(name: str, vectors: Path, tmp_path: Path) -> None:
    rows = expected(vectors / name / "expected.jsonl")
    del rows["/"]
    files = [path for path, row in rows.items() if row.get("sha256") and row["size"]]
    wanted = files[::3]
    with open_vector(vectors, name, tmp_path) as image:
        result = optimize(image, [PrefetchFile(path) for path in wanted], str(tmp_path / "blobs"))
        data = image.with_tree(result.tree).bootstrap()
    assert result.blob is not None and result.blob.chunk_count
    with nydus.open(data, tmp_path / "blobs") as again:
        last = len(again.blobs) - 1
        assert again.blobs[last].id == result.blob.id
        for path in wanted:
            assert set(again.chunks(path)["blob_index"].tolist()) == {last}
        found = describe(again)
    for path, row in rows.items():
        assert found[path] == row
    if name == "v6-dir-encrypted":
        assert result.blob.features & BlobFeature.ENCRYPTED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    root.mkdir()
    (root / "big").write_bytes(os.urandom(0x8000))
    (root / "small").write_bytes(b"small")
    os.link(root / "small", root / "other")
    (root / "empty").touch()
    (tmp_path / "blobs").mkdir()
    nydus.create(root, tmp_path / "blobs", chunk_size=0x1000).save(tmp_path / "boot")
    return tmp_path


def test_ranges_and_links(folder: Path) -> None:
    with nydus.open(folder / "boot", folder / "blobs") as image:
        files = [
            PrefetchFile("/big", [(0x1001, 1), (0x3FFF, 2), (1 << 70, 5), (0, 0)]),
            PrefetchFile("/other"),
        ]
        tree = optimize(image, files, str(folder / "blobs")).tree
        again = image.with_tree(tree)
        assert again.chunks("/big")["blob_index"].tolist() == [0, 1, 0, 1, 1, 0, 0, 0]
        assert again.chunks("/small")["blob_index"].tolist() == [1]
        assert [blob.chunk_count for blob in tree.blobs][1] == 4
        nothing = optimize(image, [PrefetchFile("/empty"), PrefetchFile("/no")], str(folder / "blobs"))
        assert nothing.blob is None and nothing.tree is image.tree


def test_command(folder: Path) -> None:
    (folder / "list").write_text(
        '{"version": "v1", "files": [{"path": "/big", "ranges": [[0, 4096]]}, {"path": "small"},'
        '{"path": "/other"}]}'
    )
    (folder / "out").mkdir()
    arguments = ["-B", folder / "boot", "-p", folder / "list", "-D", folder / "blobs", "-J", folder / "json"]
    arguments += ["--output-blob-dir", folder / "out", "-O", folder / "new"]
    done = run("optimize", *arguments)
    assert done.returncode == 0 and "not an absolute path" in done.stderr, done.stderr
    (made,) = (folder / "out").iterdir()
    assert hashlib.sha256(made.read_bytes()).hexdigest() == made.name
    document = json.loads((folder / "json").read_text())
    assert document["blobs"][-1] == made.name and document["bootstrap"] == str(folder / "new")
    shutil.copy(made, folder / "blobs")
    with nydus.open(folder / "new", folder / "blobs") as again:
        assert again.read("/big") == (folder / "rootfs" / "big").read_bytes()
        assert again.read("/small") == b"small"
    (folder / "nowhere").mkdir()
    arguments[5] = folder / "nowhere"
    done = run("optimize", *arguments)
    assert (
        done.returncode == 1 and "no such file" in done.stderr and len(list((folder / "out").iterdir())) == 1
    )


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"version": "v2"}', '{"version": "v1", "files": [{"path": "/a", "ranges": [[-1, 1]]}]}'],
)
def test_wrong_documents(text: str) -> None:
    with pytest.raises(nydus.ConfigError):
        parse_prefetch_files(text.encode())


def test_empty_document() -> None:
    assert parse_prefetch_files(b" \n") == [] == parse_prefetch_files(b'{"version": "v1"}')
