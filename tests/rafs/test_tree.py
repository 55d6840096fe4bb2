"""Trees survive being written and read, in both versions."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nydus import rafs
from nydus.rafs import derived
from rafs.trees import CHUNK_SIZE, DIR, Item, listing, make

ODD_NAMES = [
    b"!x",
    b"+x",
    b"-x",
    b" x",
    b".x",
    b".-",
    b"..x",
    b"a",
    b"~",
    b"\xff\xfe",
    "é".encode(),
    b"n" * 255,
]
KITCHEN = {
    **{b"/odd/" + name: Item(content=name) for name in ODD_NAMES},
    **{b"/many/%06d-%s" % (i, b"y" * (i % 200)): Item(content=b"%d" % (i % 7)) for i in range(500)},
    b"/empty": DIR,
    b"/z/deep/er/still": DIR,
    b"/z/file": Item(
        content=b"x" * (5 * CHUNK_SIZE + 1), xattrs=((b"user.a", b"1"), (b"security.capability", b"\0"))
    ),
    b"/a-link": Item(link=b"/z/file"),
    b"/short": Item(stat.S_IFLNK | 0o777, b"z/file"),
    b"/page": Item(stat.S_IFLNK | 0o777, b"p" * 4096),
    b"/long": Item(stat.S_IFLNK | 0o777, b"q" * 4090),
    b"/null": Item(stat.S_IFCHR | 0o666, rdev=0x103),
    b"/fifo": Item(stat.S_IFIFO | 0o600),
    b"/sock": Item(stat.S_IFSOCK | 0o600),
    b"/acl": Item(
        stat.S_IFDIR | 0o750, xattrs=((b"system.posix_acl_default", b"\2\0\0\0"), (b"trusted.x", b""))
    ),
    b"/old": Item(mtime=-5, uid=0xFFFF_FFFE),
}


@pytest.mark.parametrize("version", [5, 6])
def test_round_trip(version: int) -> None:
    tree = make(KITCHEN, version)
    tree.nodes["nlink"] = derived.nlinks(tree)
    data = rafs.write(tree)
    again = rafs.read(data, "kitchen")
    assert listing(again) == listing(tree)
    assert rafs.write(again) == data
    assert listing(again)[b"/z/file"][3] == 2


@pytest.mark.parametrize("version", [5, 6])
def test_empty(version: int) -> None:
    data = rafs.write(make({}, version))
    tree = rafs.read(data)
    assert (len(tree), tree.blobs, len(tree.chunks)) == (1, [], 0)
    assert rafs.write(tree) == data


def test_both_versions_hold_the_same() -> None:
    old = rafs.read(rafs.write(make(KITCHEN, 5)))
    new = rafs.read(rafs.write(make(KITCHEN, 6)))
    assert listing(old) == listing(new)


def test_find() -> None:
    tree = rafs.read(rafs.write(make(KITCHEN)))
    for row, path in tree.walk():
        assert tree.find(path) == row
        assert tree.path(row) == path
    assert tree.find(b"/z/nothing") is None


def test_super_block_alone() -> None:
    tree = make(KITCHEN)
    tree.prefetch = [0, tree.find(b"/z/file") or 0]
    head = rafs.superblock(rafs.write(tree))
    assert head.inode_count == len(tree)
    assert head.blobs == tree.blobs
    assert head.device_blocks == [tree.blobs[0].uncompressed_size // 4096]
    assert len(head.prefetch) == 2 and head.prefetch[0] == head.root


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.lists(
            st.binary(min_size=1, max_size=40).filter(
                lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..")
            ),
            min_size=1,
            max_size=4,
        ).map(lambda parts: b"/" + b"/".join(parts)),
        st.one_of(
            st.builds(lambda size: Item(content=bytes([size % 251]) * size), st.integers(0, 3 * CHUNK_SIZE)),
            st.builds(
                lambda target: Item(stat.S_IFLNK | 0o777, target), st.binary(min_size=1, max_size=5000)
            ),
            st.just(Item(stat.S_IFCHR | 0o600, rdev=0x501)),
            st.builds(lambda v: Item(xattrs=((b"user.x", v),)), st.binary(max_size=6000)),
        ),
        max_size=40,
    ),
    st.sampled_from([5, 6]),
)
def test_any_tree(items: dict[bytes, Item], version: int) -> None:
    # A path below a file makes that file a directory.
    prefixes = {
        b"/".join(path.split(b"/")[:depth]) for path in items for depth in range(2, path.count(b"/") + 1)
    }
    tree = make({path: item for path, item in items.items() if path not in prefixes}, version)
    tree.nodes["nlink"] = derived.nlinks(tree)
    data = rafs.write(tree)
    again = rafs.read(data)
    assert listing(again) == listing(tree)
    assert rafs.write(again) == data
