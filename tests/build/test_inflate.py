"""Gzip streams with places to enter them again."""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Iterator

import pytest

from nydus.build import inflate
from nydus.build.inflate import GzipWindow, Library
from nydus.errors import FormatError


def plain(generator: random.Random, size: int) -> bytes:
    """Something with words in it, and stretches that cannot be compressed."""
    words = [generator.randbytes(generator.randrange(2, 12)) for _ in range(200)]
    parts = []
    while size > 0:
        if generator.random() < 0.2:
            part = generator.randbytes(min(size, generator.randrange(1, 40_000)))
        else:
            part = b" ".join(generator.choices(words, k=2000))[:size]
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def member(generator: random.Random, data: bytes) -> bytes:
    """One gzip member with blocks of every kind and size."""
    level, memory = generator.randrange(10), generator.randrange(1, 10)
    packer = zlib.compressobj(level, zlib.DEFLATED, 31, memory, generator.choice([0, 0, 0, 1, 2, 3, 4]))
    flushes = (zlib.Z_NO_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_PARTIAL_FLUSH)
    out = b""
    while data:
        step = generator.randrange(1, 200_000)
        out += packer.compress(data[:step]) + packer.flush(generator.choice(flushes))
        data = data[step:]
    return out + packer.flush()


def cut(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def walk(
    stored: bytes, piece: int, steps: list[int], library: Library
) -> tuple[bytes, list[tuple[object, ...]]]:
    """Plain bytes of all steps, and what is known after each."""
    window = GzipWindow(cut(stored, piece), library=library)
    data, seen = b"", []
    for step in steps:
        if step < 0:
            window.skip(-step)
            data += bytes(-step)
        elif step == 512:
            data += window.header() or b""
        else:
            data += window.take(step)
        window.settle()
        boundary = window.boundary
        seen.append((window.consumed, boundary, window.dictionary()))
    window.drain()
    return data, [*seen, (window.consumed,)]


def enter(stored: bytes, boundary: inflate.Boundary, dictionary: bytes) -> bytes:
    """Inflate from a boundary, with its bits shifted to the start of a byte (not for stored blocks)."""
    rest = stored[boundary.in_offset - (1 if boundary.bits else 0) :]
    if boundary.bits:
        shifted = int.from_bytes(rest, "little") >> (8 - boundary.bits)
        rest = shifted.to_bytes(len(rest), "little")
    return zlib.decompressobj(-15, zdict=dictionary).decompress(rest, 1000)


@pytest.mark.parametrize("seed", range(6))
def test_both_libraries_stop_at_the_same_places(seed: int) -> None:
    generator = random.Random(seed)
    contents = [plain(generator, generator.randrange(1, 900_000)) for _ in range(3)]
    stored = b"".join(member(generator, data) for data in contents)
    content = b"".join(contents)
    steps: list[int] = []
    left = len(content)
    while left:
        step = generator.choice((512, generator.randrange(1, 700), generator.randrange(1, 300_000)))
        step = min(step, left)
        left -= step
        steps.append(-step if generator.random() < 0.2 and step != 512 else step)
    fast = inflate.zlib_ng()
    assert fast, "the functions of zlib-ng cannot be seen"
    piece = generator.choice((1 << 20, 70_000, 999))
    data, seen = walk(stored, piece, steps, fast)
    assert (data, seen) == walk(stored, piece, steps, inflate.zlib())
    position = 0
    for step in steps:
        if step > 0:
            assert data[position : position + step] == content[position : position + step]
        position += abs(step)
    assert seen[-1] == (len(stored),)


def test_inflating_can_start_at_every_boundary() -> None:
    generator = random.Random(7)
    content = b" ".join(b"%x" % generator.randrange(1 << generator.randrange(20)) for _ in range(150_000))
    packer = zlib.compressobj(6, zlib.DEFLATED, 31, 5)
    stored = packer.compress(content) + packer.flush()
    window = GzipWindow(cut(stored, 50_000))
    boundaries = {}
    for _ in range(len(content) // 5000):
        window.take(5000)
        boundaries[window.boundary.out_offset] = (window.boundary, window.dictionary())
    assert len({boundary.bits for boundary, _ in boundaries.values()}) > 4
    for boundary, dictionary in boundaries.values():
        start = boundary.out_offset
        assert dictionary == content[max(0, start - 32768) : start]
        assert enter(stored, boundary, dictionary) == content[start : start + 1000]


def test_what_was_taken_stays_when_the_buffer_is_full() -> None:
    content = random.Random(1).randbytes(1 << 20) * 7
    window = GzipWindow(cut(gzip.compress(content, 1), 1 << 20))
    taken = [window.take(700_000) for _ in range(10)]
    assert b"".join(taken) == content[:7_000_000]
    assert window.take(len(content) - 7_000_000) == content[7_000_000:]
    assert window.header() is None


@pytest.mark.parametrize(
    "header",
    [
        b"\x1f\x8b\x08\x00" + bytes(6),
        b"\x1f\x8b\x08\x04" + bytes(6) + b"\x03\0abc",
        b"\x1f\x8b\x08\x1e" + bytes(6) + b"\x01\0x" + b"name\0" + b"comment\0" + b"\x12\x34",
    ],
)
@pytest.mark.parametrize("piece", [1, 3, 100])
def test_headers(header: bytes, piece: int) -> None:
    stored = header + gzip.compress(b"some data", mtime=0)[10:]
    window = GzipWindow(cut(stored + stored, piece))
    assert window.boundary.in_offset == len(header)
    assert window.take(18) == b"some data" * 2
    assert window.boundary.in_offset == len(stored) + len(header)
    window.drain()
    assert window.consumed == 2 * len(stored)


def test_padding_behind_the_last_member_is_read() -> None:
    window = GzipWindow(cut(gzip.compress(b"x" * 512) + bytes(5000), 100))
    assert window.header() == b"x" * 512
    assert window.header() is None
    window.drain()


@pytest.mark.parametrize("library", [inflate.zlib(), inflate.zlib_ng()], ids=["zlib", "zlib-ng"])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda stored: stored[:-3], "cut short"),
        (lambda stored: stored[:-30], "ends inside a member"),
        (lambda stored: stored[:-8] + b"\xff" + stored[-7:], "wrong checksum"),
        (lambda stored: stored[:10] + b"\x07" + stored[11:], "invalid block type"),
        (lambda stored: b"\x1f\x8b\x07" + stored[3:], "unknown kind"),
        (lambda stored: b"plain" + stored, "not a gzip stream"),
        (lambda stored: b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * 70_000, "header is too long"),
        (lambda stored: b"\x1f\x8b\x08\x08" + bytes(6) + b"x", "cut short"),
    ],
)
def test_damage_is_named(damage: object, complaint: str, library: Library) -> None:
    stored = gzip.compress(random.Random(2).randbytes(3000), mtime=0)
    with pytest.raises(FormatError, match=complaint):
        GzipWindow(cut(damage(stored), 1000), "layer", library).drain()  # type: ignore[operator]


def test_ends_within_a_header() -> None:
    window = GzipWindow(cut(gzip.compress(b"x" * 600), 100))
    window.take(500)
    with pytest.raises(FormatError, match="too early"):
        window.header()
