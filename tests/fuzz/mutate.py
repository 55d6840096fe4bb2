"""Mutations of binary and text inputs that are the same for the same seed on every machine."""

from __future__ import annotations

import random

_INTERESTING = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0xFFF, 0x1000, 0x7FFF, 0x8000, 0xFFFF, 1 << 20,
                (1 << 24) - 1, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 44,
                (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
_WORDS = (b"null", b"[]", b"{}", b'""', b"-1", b"1e999", b"true", b"\xff", b"\\ud800", b"..", b"/", b"\0",
          b":", b'"', b"[" * 3000, b"9" * 400, b"=", b"\n", b" ", b"a" * 300)  # fmt: skip


def mutate(seed: bytes, others: list[bytes], rng: random.Random, *, text: bool = False) -> bytes:
    """A variant of an input: one to eight small changes, most of them where the tables begin."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4, 8))):
        if not data:
            data += bytes([rng.randrange(256)])
        _change(data, others, rng, text)
    return bytes(data)


def _place(data: bytearray, rng: random.Random) -> int:
    # Headers lie at the start, and footers at the end; what is between is mostly alike.
    kind = rng.randrange(4)
    span = min(len(data), 4096)
    if kind == 0:
        return rng.randrange(span)
    if kind == 1:
        return len(data) - 1 - rng.randrange(span)
    return rng.randrange(len(data))


def _change(data: bytearray, others: list[bytes], rng: random.Random, text: bool) -> None:
    at = _place(data, rng)
    kind = rng.randrange(11)
    length = min(rng.choice((1, 2, 4, 8, 12, 32, 64, 80, 128, 512, 4096)), len(data) - at)
    if text and kind in (1, 2, 9):
        kind = 10
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        size = rng.choice((1, 2, 4, 8))
        at = at // size * size if rng.randrange(4) else at
        data[at : at + size] = (rng.choice(_INTERESTING) % (1 << 8 * size)).to_bytes(size, "little")
    elif kind == 2:
        size = min(rng.choice((1, 2, 4, 8)), len(data) - at)
        value = int.from_bytes(data[at : at + size], "little") + rng.choice(
            (-16, -8, -2, -1, 1, 2, 8, 16, 4096)
        )
        data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    elif kind == 3:
        data[at] = rng.randrange(256)
    elif kind == 4:
        data[at : at + length] = bytes([rng.choice((0, 0, 0xFF, 0x2E, 0x30))]) * length
    elif kind == 5:
        source = rng.randrange(len(data))
        data[at : at + length] = data[source : source + length].ljust(length, b"\0")
    elif kind == 6:
        del data[at : at + length]
    elif kind == 7:
        data[at:at] = data[at : at + length]
    elif kind == 8 and rng.randrange(3) == 0:
        del data[at:]
    elif kind == 9 and others:
        other = rng.choice(others)
        start = rng.randrange(len(other) + 1)
        data[at : at + length] = other[start : start + length]
    else:
        data[at : at + (length if rng.randrange(2) else 0)] = rng.choice(_WORDS)
