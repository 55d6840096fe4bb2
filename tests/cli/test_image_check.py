"""``nydus-image check``, ``inspect`` and ``stat`` on images of the reference and on damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nydus import rafs
from nydus.cli import image_view
from nydus.cli.nydus_image import nydus_image
from nydus.errors import NydusError
from nydus.image import Image, open_backend

pytestmark = pytest.mark.vectors

WITH_BLOBS = """
    v5-dir-zstd v5-dir-aligned v6-dir-none v6-dir-lz4_block v6-dir-zstd v6-dir-sha256 v6-dir-4k-chunks
    v6-dir-batch v6-dir-encrypted v6-dir-toc v6-tar dict-v5 dict-v6 merge-v5 merge-v6
"""


def run(*arguments: str | Path, input: str = "") -> Result:
    return CliRunner().invoke(nydus_image, [str(a) for a in arguments] + ["-l", "error"], input=input)


@pytest.mark.parametrize("name", WITH_BLOBS.split())
def test_check_with_blobs(name: str, vectors: Path, tmp_path: Path) -> None:
    folder = vectors / name
    result = run("check", folder / "bootstrap", "-D", folder / "blobs", "-J", tmp_path / "out.json")
    assert result.exception is None, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "RAFS filesystem metadata is valid, referenced data blobs: "
    document = json.loads((tmp_path / "out.json").read_text())
    assert len(document["blobs"]) == len(lines) - 1
    assert document["fs_version"] == ("5" if "v5" in name else "6")
    assert document["compressor"] in ("none", "lz4_block", "zstd")
    for index, (line, blob) in enumerate(zip(lines[1:], document["blobs"], strict=True)):
        assert line.startswith(f"\t {index}: {blob}, compressed size ")


def test_check_of_an_inlined_bootstrap(vectors: Path) -> None:
    folder = vectors / "v6-inline-meta" / "blobs"
    (blob,) = folder.iterdir()
    result = run("check", blob, "-D", folder)
    assert result.exception is None, result.output
    assert blob.name in result.stdout and "chunk-digest" in result.stdout


def test_check_names_each_damaged_chunk(vectors: Path, tmp_path: Path) -> None:
    folder = vectors / "v6-dir-zstd"
    (blob,) = (folder / "blobs").iterdir()
    data = bytearray(blob.read_bytes())
    for offset in (5000, 100_000):
        data[offset] ^= 0xFF
    (tmp_path / blob.name).write_bytes(data)
    result = run("check", folder / "bootstrap", "-D", tmp_path)
    assert isinstance(result.exception, NydusError)
    assert str(result.exception).endswith("2 problems")
    assert f"{blob.name}: chunk 1: " in result.stderr and f"{blob.name}: chunk 5: " in result.stderr
    assert "valid" not in result.stdout

    (tmp_path / blob.name).write_bytes(data[:-5])
    result = run("check", folder / "bootstrap", "-D", tmp_path)
    assert "wrong size of the blob (expected 449652, found 449647)" in result.stderr
    (tmp_path / blob.name).unlink()
    result = run("check", folder / "bootstrap", "-D", tmp_path)
    assert isinstance(result.exception, NydusError) and "no such file" in result.stderr


def test_check_names_damage_of_the_bootstrap(vectors: Path, tmp_path: Path) -> None:
    data = bytearray((vectors / "v6-dir-zstd" / "bootstrap").read_bytes())
    data[1024 + 16] += 1
    (tmp_path / "boot").write_bytes(data)
    result = run("check", "-B", tmp_path / "boot")
    assert isinstance(result.exception, NydusError) and result.exit_code == 1
    assert "inode count at offset 0x410 (expected 766, found 767)" in result.stderr
    (tmp_path / "boot").write_bytes(data[:5000])
    assert isinstance(run("check", tmp_path / "boot").exception, NydusError)
    assert run("check").exit_code == 2


def test_check_compares_bootstrap_and_blob(vectors: Path, tmp_path: Path) -> None:
    """What readers never look at, as they have it from elsewhere, must be right, too."""
    folder = vectors / "v6-dir-zstd"
    data = (folder / "bootstrap").read_bytes()
    table, _ = rafs.superblock(data).chunk_table
    for field, message in (
        (40, "stored size of chunk"), (48, "stored offset of chunk"), (76, "has the wrong checksum"),
    ):  # fmt: skip
        out = bytearray(data)
        out[table + 80 * 7 + field] ^= 1
        (tmp_path / "boot").write_bytes(out)
        assert run("check", tmp_path / "boot").exception is None, "only the blob can tell"
        result = run("check", tmp_path / "boot", "-D", folder / "blobs")
        assert isinstance(result.exception, NydusError) and str(result.exception).endswith(": 1 problem")
        assert message in result.stderr


def test_check_verbose(vectors: Path) -> None:
    lines = run("check", "-v", vectors / "merge-v6" / "bootstrap").stdout.splitlines()
    assert lines[0] == (
        'inode: dir "/": index 0 ino 128 real_ino 128 child_index 0 child_count 10 i_nlink 6 i_size 210 '
        "i_blocks 1 i_name_size 1 i_symlink_size 0 has_xattr false link None i_mtime 0 i_mtime_nsec 0"
    )
    assert any(
        line.startswith("\t chunk: id ef88d5fe65472e10") and "crc32 0x55151dbf" in line for line in lines
    )


def request(vectors: Path, line: str, name: str = "v6-dir-prefetch") -> str:
    result = run("inspect", vectors / name / "bootstrap", f"-R {line}")
    assert result.exception is None
    return result.stdout


def test_inspect_requests(vectors: Path) -> None:
    assert request(vectors, "stats") == '{"inodes_count":766}'
    blob = "9af15eb1afc3b6a9cccc9e197d1c42c5e9708b4a7953a22b57dd802955879a6b"
    assert request(vectors, "blobs") == (
        f'[{{"blob_id":"{blob}","compressed_size":587546,"decompressed_size":4255744,"readahead_offset":0,'
        '"readahead_size":0}]'
    )
    found = json.loads(request(vectors, "prefetch"))
    assert found[0] == {"inode": 172, "path": ["/zz-hard-text", "/data/text", "/other/hard-text"]}
    assert found[1] == {"inode": 3635, "path": ["/sizes/"]}
    assert request(vectors, "ls").startswith('d    222      "bin"\n     142      "blk"\n')
    assert request(vectors, "ls").endswith("\nnull")
    assert request(vectors, "cd nowhere").endswith("null")
    assert "Inode Number:       128\n" in request(vectors, "stat .")
    assert "\nFile: zz-hard-text                     Parent Path: /  " in request(vectors, "chunk 0")
    assert request(vectors, "icheck 3635").startswith("/sizes/\n")


@pytest.mark.parametrize("line", ["help", "unknown", "chunk many", "icheck 7", "cd", "ls -l"])
def test_inspect_refuses(line: str, vectors: Path) -> None:
    result = run("inspect", vectors / "v6-dir-prefetch" / "bootstrap", "--request", line)
    assert isinstance(result.exception, NydusError) and result.exit_code == 1


def test_inspect_prompt(vectors: Path) -> None:
    typed = "stats\ncd data\nls\nstat random\nbogus\ncd ..\nblobs\n"
    out = run("inspect", vectors / "v5-dir-zstd" / "bootstrap", input=typed).stdout
    assert out.startswith("Inspecting RAFS :> \n    Version:                5\n")
    assert '-    26       "random"' in out and "  Chunk list:\n        0 ->\n" in out
    assert "Error: unknown command" in out and "Blob Index:             0\n" in out


def test_inspect_completes_chunks_from_blobs(vectors: Path) -> None:
    folder = vectors / "v6-dir-batch"
    tree = rafs.read((folder / "bootstrap").read_bytes())
    # The bootstrap does not say where batched chunks are stored.
    assert int((tree.chunks["coffset"] == 0).sum()) > 700
    with Image(tree, open_backend(folder / "blobs")[0]) as image:
        assert int((image_view.complete_chunks(image)["coffset"] == 0).sum()) < 700
    result = run("inspect", folder / "bootstrap", "-D", folder / "blobs", "-R", "stat one")
    assert "  Chunk list:\n        0 ->\n" in result.stdout


def test_stat(vectors: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run("stat", "-B", vectors / "v6-dir-zstd" / "bootstrap", "-J", out).exception is None
    document = json.loads(out.read_text())
    assert (document["dedup_enabled"], document["target_enabled"]) == (False, False)
    base = document["base_image"]
    assert (base["chunks"], base["own_chunks"], base["own_uncomp_size"]) == (735, 735, 1064415)
    assert base["uncomp_size"] - base["padding_size"] == base["own_uncomp_size"]
    assert len(base["chunk_sizes"]) == 9 and len(base["file_sizes"]) == 45
    assert set(base) == set(document["target_image"])


def test_stat_of_a_set(vectors: Path, tmp_path: Path) -> None:
    for layer in (vectors / "merge-v6" / "layers").iterdir():
        shutil.copy(layer, tmp_path)
    out = tmp_path / "out.json"
    merged = vectors / "merge-v6" / "bootstrap"
    assert run("stat", "-D", tmp_path, "-T", merged, "-J", out).exception is None
    document = json.loads(out.read_text())
    assert document["base_image"]["dedup_chunks"] == 1
    assert document["target_image"]["ref_chunks"] == 11 and document["target_image"]["own_chunks"] == 0
    table = run("stat", "-D", tmp_path).stdout.split("Global Dedup Thresh: ")[1].splitlines()
    assert len(table) == 21
    assert run("stat").exit_code == 2
    (tmp_path / "none").mkdir()
    assert isinstance(run("stat", "-D", tmp_path / "none").exception, NydusError)
