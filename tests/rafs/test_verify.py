"""Sound images have no problems; damaged ones have theirs named."""

from __future__ import annotations

import dataclasses
import tarfile
from pathlib import Path

import numpy as np
import pytest

from nydus import rafs
from nydus.rafs import v6
from nydus.rafs.model import BlobFeature
from nydus.rafs.v6 import layout
from nydus.rafs.verify import verify
from rafs.test_tree import KITCHEN
from rafs.trees import Item, make


def current(version: int) -> bytes:
    tree = make(KITCHEN, version)
    tree.flags |= rafs.model.SuperFlag.ENCRYPTION_NONE
    return rafs.write(tree)


@pytest.mark.parametrize("version", [5, 6])
def test_sound(version: int) -> None:
    tree, problems = verify(current(version), "sound")
    assert tree is not None and not problems


@pytest.mark.vectors
def test_reference_images_are_sound(vectors: Path) -> None:
    paths = [*vectors.glob("*/bootstrap"), *vectors.glob("merge-v?/layers/*")]
    paths += [vectors / "upstream/bootstrap/rafs-v6-2.2.boot", *vectors.glob("upstream/repeatable/*able")]
    for path in paths:
        if path.is_file():
            assert verify(path.read_bytes(), str(path))[1] == []
    images = [*(vectors / "oci").glob("v*.tar"), *(vectors / "upstream/snapshotter").glob("v?-boot*.tar.gz")]
    for image in images:
        with tarfile.open(image) as archive:
            for member in archive:
                if member.name.endswith("boot"):
                    raw = archive.extractfile(member)
                    assert raw and verify(raw.read(), image.name)[1] == []


def damage(data: bytes, offset: int, value: bytes) -> list[str]:
    out = bytearray(data)
    out[offset : offset + len(value)] = value
    return [str(problem) for problem in verify(bytes(out), "damaged")[1]]


def test_fields_of_v6() -> None:
    data = current(6)
    head = rafs.superblock(data)
    root = head.meta_offset + 32 * head.root
    table, _ = head.chunk_table
    for offset, value, text in (
        (layout.SUPER_OFFSET + 16, b"\1", "inode count at offset 0x410 (expected"),
        (root + 44, b"\x63", "link count at offset"),
        (root + 20, b"\x63", "inode number at offset"),
        (root + 8, bytes([data[root + 8] + 1]), "size of a directory at offset"),
        (layout.DEVICE_OFFSET + 64, b"\1\0\0\0", "blocks of device 0 at offset 0x5c0"),
        (layout.DEVICE_OFFSET + 68, b"\1\0\0\0", "mapped address of device 0 at offset 0x5c4"),
        (layout.SUPER_OFFSET + 36, b"\xff", "blocks of the super block at offset 0x424"),
        (layout.SUPER_OFFSET + 80, b"\x08", "incompat of the super block at offset 0x450 (expected 12"),
        (table, b"\xff\xff", "the chunk table is not sorted, or lacks a chunk"),
        (table + 64, b"\1\1\1\1", "file_offset of a chunk record"),
    ):
        problems = damage(data, offset, value)
        assert any(text in problem for problem in problems), (text, problems)
        assert all(problem.startswith("damaged: ") for problem in problems)


def test_directory_entries_of_v6() -> None:
    data = current(6)
    at = data.index(b"...deepfile")  # the names of /z
    problems = damage(data, at - 4 * layout.DIRENT.itemsize, b"\x01")  # nid of "."
    assert any("directory block" in problem for problem in problems)


def test_overlap() -> None:
    tree = make({b"/a": Item(content=b"1"), b"/b": Item(content=b"2"), b"/c": Item(0o20644, rdev=1)})
    tree.flags |= rafs.model.SuperFlag.ENCRYPTION_NONE
    data = bytearray(rafs.write(tree))
    nids = [row for row, _ in tree.walk()]
    assert len(nids) == 4
    # Give the device node 2 attributes more than there is room for before what follows it.
    head = rafs.superblock(bytes(data))
    area = np.frombuffer(bytes(data), np.uint8)[head.meta_offset :]
    for nid in range(head.root, len(area) // 32 - 1):
        if area[32 * nid + 4 : 32 * nid + 6].view("<u2")[0] == 0o20644:
            data[head.meta_offset + 32 * nid + 2] = 255
    _, problems = verify(bytes(data), "overlap")
    assert problems


def test_fields_of_v5() -> None:
    tree = make(KITCHEN, 5)
    tree.blobs = [dataclasses.replace(blob, features=BlobFeature.CAP_TAR_TOC) for blob in tree.blobs]
    data = rafs.write(tree)
    assert verify(data)[1] == []
    reader = rafs.v5.reader.Reader(rafs.Buffer(data), rafs.superblock(data))
    row = reader.tree().find(b"/short")
    assert row is not None
    place = int(reader.places[row])
    for offset, text in ((56, "project id"), (72, "block count"), (82, "unknown flags"), (92, "child index")):
        problems = damage(data, place + offset, b"\x63")
        assert any(problem.startswith(f"damaged: {text}") for problem in problems), (text, problems)


def test_digests_of_v5() -> None:
    data = current(5)
    reader = rafs.v5.reader.Reader(rafs.Buffer(data), rafs.superblock(data))
    tree = reader.tree()
    row = tree.find(b"/short")
    assert row is not None
    problems = damage(data, int(reader.places[row]), b"\0\0")
    assert problems[0].startswith("damaged: digest of b'/short' at offset")
    # The target is covered by the digest, and the digest of the root covers that one.
    at = data.index(b"z/file", int(reader.places[row]))
    assert len(damage(data, at, b"y")) == 2
    assert any("link count" in problem for problem in damage(data, int(reader.places[0]) + 88, b"\x09"))
    assert any("unique inodes" in problem for problem in damage(data, 24, b"\x09"))


def test_unreadable() -> None:
    tree, problems = verify(b"nothing", "x")
    assert tree is None and str(problems[0]) == "x: not a RAFS bootstrap"
    assert v6.read(current(6)).version == 6
