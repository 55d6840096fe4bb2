"""Compaction: the same files out of fewer and smaller blobs."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

import nydus
from api.test_image import describe
from build.test_archive import run
from nydus.build.compact import CompactOptions, compact
from nydus.rafs.model import Compression

KINDS = [
    {},
    {"version": 5},
    {"version": 5, "compression": Compression.LZ4_BLOCK},
    {"toc": True},
    {"batch_size": 0x4000},
    {"encrypt": True},
    {"encrypt": True, "batch_size": 0x4000},
    {"compression": Compression.NONE},
]


def layers(tmp_path: Path, count: int, **options: object) -> nydus.Image:
    """An image of several layers, each of which hides most of the one below."""
    folder = tmp_path / "blobs"
    folder.mkdir()
    parts = []
    for number in range(count):
        root = tmp_path / f"layer{number}"
        (root / "dir").mkdir(parents=True)
        (root / "dir" / "changed").write_bytes(os.urandom(50_000))
        (root / f"kept{number}").write_bytes(b"%d" % number * 9_000)
        (root / f"small{number}").write_bytes(os.urandom(100))
        (root / f"same{number}").write_bytes(bytes(range(256)) * 20)
        os.link(root / f"kept{number}", root / "dir" / f"link{number}")
        with nydus.create(root, folder, chunk_size=0x4000, inline_meta=False, **options) as image:
            parts.append(image.tree)
    image = nydus.merge(parts, folder)
    assert len(image.blobs) == count
    return image


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_small_blobs_become_one(tmp_path: Path, options: dict[str, object]) -> None:
    with layers(tmp_path, 3, **options) as image:
        before = describe(image)
        folder = str(tmp_path / "blobs")
        tree = compact(image, folder, CompactOptions(min_used_ratio=60))
    assert tree is not None
    # Each blob has a key of its own, so that encrypted ones cannot be joined, only made smaller.
    assert len(tree.blobs) == (3 if options.get("encrypt") else 1)
    for blob in tree.blobs:
        path = tmp_path / "blobs" / blob.id
        if blob.id not in [old.id for old in image.blobs]:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == blob.id
            assert path.stat().st_size == blob.compressed_size
    again = nydus.open(tree).bootstrap()
    with nydus.open(again, folder) as compacted:
        assert describe(compacted) == before
        assert compact(compacted, folder, CompactOptions(min_used_ratio=60)) is None


def test_only_what_is_hardly_used_is_rewritten(tmp_path: Path) -> None:
    with layers(tmp_path, 3) as image:
        folder = str(tmp_path / "blobs")
        tree = compact(image, folder, CompactOptions(min_used_ratio=50, small=0))
        assert tree is not None
        # The uppermost layer is used completely.
        assert [blob.id == old.id for blob, old in zip(tree.blobs, image.blobs, strict=True)].count(True) == 1
        assert sum(b.compressed_size for b in tree.blobs) < sum(b.compressed_size for b in image.blobs) // 2
        with nydus.open(tree, folder) as compacted:
            assert describe(compacted) == describe(image)
        shared = frozenset(blob.id for blob in image.blobs)
        assert compact(image, folder, CompactOptions(50, shared=shared)) is None
        assert compact(image, folder, CompactOptions(50, fewest=4)) is None


def test_size_limits_and_duplicates(tmp_path: Path) -> None:
    with layers(tmp_path, 4) as image:
        folder = str(tmp_path / "blobs")
        one = compact(image, folder, CompactOptions())
        assert one is not None and len(one.blobs) == 1
        same = [one.node_chunks(one.find(b"/same%d" % n) or 0)["index"].tolist() for n in range(4)]
        assert same[0] == same[1] == same[2] == same[3]
        two = compact(image, folder, CompactOptions(largest=10_000))
        assert two is not None and 1 < len(two.blobs) < 4


def test_a_wrong_chunk_stops_it(tmp_path: Path) -> None:
    with layers(tmp_path, 2) as image:
        path = tmp_path / "blobs" / image.blobs[1].id
        data = bytearray(path.read_bytes())
        data[20_000] ^= 1
        path.write_bytes(data)
        before = sorted(path.name for path in (tmp_path / "blobs").iterdir())
        with pytest.raises(nydus.FormatError):
            compact(image, str(tmp_path / "blobs"), CompactOptions())
        assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == before


def test_command(tmp_path: Path) -> None:
    with layers(tmp_path, 3) as image:
        image.save(tmp_path / "boot")
        before = describe(image)
    arguments = ("compact", "-B", tmp_path / "boot", "-D", tmp_path / "blobs", "-J", tmp_path / "json")
    done = run(*arguments, "--layers-to-compact", "9", "-O", tmp_path / "none")
    assert done.returncode == 0 and not (tmp_path / "none").exists() and not (tmp_path / "json").exists()
    done = run(*arguments, "--min-used-ratio", "40")
    assert done.returncode == 0, done.stderr
    output = tmp_path / "boot.bootstrap.compact"
    with nydus.open(output, tmp_path / "blobs") as compacted:
        assert describe(compacted) == before
        document = json.loads((tmp_path / "json").read_text())
        assert document["blobs"] == [blob.id for blob in compacted.blobs] and len(document["blobs"]) == 1
        assert document["bootstrap"] == str(output) and document["fs_version"] == "6"
    assert run(*arguments, "--min-used-ratio", "100").returncode == 2
    assert run(*arguments, "--backend-type", "registry").returncode == 2
