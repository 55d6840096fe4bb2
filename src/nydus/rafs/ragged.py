"""Runs of different lengths (names, targets, chunk lists) handled as whole tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nydus.rafs.model import Array

#: Items are handled in slices of this many, so that index arrays stay small beside the tables.
_SLICE = 1 << 15


def starts_of(lengths: Array) -> Array:
    """Where each run starts (u8) when runs lie back to back."""
    ends = np.cumsum(lengths, dtype=np.uint64)
    return ends - lengths.astype(np.uint64)


def indexes(starts: Array, lengths: Array) -> Array:
    """All positions of all runs, one after the other (i8)."""
    lengths = lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts.astype(np.int64) - (ends - lengths), lengths) + np.arange(total)


def offsets_within(sizes: Array, counts: Array) -> Array:
    """Where each item starts in its run (u8), from the size of each and the number of items in each run."""
    before = starts_of(sizes)
    counts = counts.astype(np.int64)
    firsts = (np.cumsum(counts) - counts)[counts > 0]
    return np.asarray(before - np.repeat(before[firsts], counts[counts > 0]))


def copy(target: Array, places: Array, source: Array, starts: Array, lengths: Array) -> None:
    """Copy run *i* of ``source`` to ``target[places[i]:]``; both are flat arrays of one type."""
    ends = np.cumsum(lengths, dtype=np.int64)
    step = min(_SLICE, (int(ends[-1]) if len(ends) else 0) // 8 + 4096)
    first = 0
    while first < len(lengths):
        base = int(ends[first - 1]) if first else 0
        last = max(int(np.searchsorted(ends, base + step, side="right")), first + 1)
        part = slice(first, last)
        target[indexes(places[part], lengths[part])] = source[indexes(starts[part], lengths[part])]
        first = last


def slices(count: int) -> Iterator[slice]:
    """Parts of a long table whose temporary columns would take more memory than the table."""
    for start in range(0, count, _SLICE):
        yield slice(start, min(start + _SLICE, count))


def join(source: Array, starts: Array, lengths: Array) -> Array:
    """The runs of ``source`` one after the other, as a new array."""
    total = int(lengths.sum(dtype=np.uint64)) if len(lengths) else 0
    result = np.empty(total, source.dtype)
    copy(result, starts_of(lengths), source, starts, lengths)
    return result


def scatter(out: Array, places: Array, records: Array) -> None:
    """Write one record at each byte offset of ``out`` (u1)."""
    if not len(records):
        return
    size = records.dtype.itemsize
    windows = np.lib.stride_tricks.sliding_window_view(out, size, writeable=True)
    windows[places] = records.view(np.uint8).reshape(-1, size)


def compare_next(heap: Array, starts: Array, lengths: Array) -> Array:
    """How each name compares with the one after it: -1, 0 or 1 (i1, one shorter than the input).

    Names are runs of ``heap`` (u1) without zero bytes, in raw byte order. Eight bytes are compared at a time,
    and only names that are equal so far go into the next round.
    """
    count = max(len(starts) - 1, 0)
    result = np.zeros(count, np.int8)
    if not count:
        return result
    padded = np.concatenate([heap, np.zeros(8, np.uint8)])
    words = np.lib.stride_tricks.sliding_window_view(padded, 8)
    starts, lengths = starts.astype(np.int64), lengths.astype(np.int64)
    pending = np.arange(count)

    def word(rows: Array, position: int) -> Array:
        left = np.clip(lengths[rows] - position, 0, 8)
        place = np.minimum(starts[rows] + position, len(heap))
        value = np.ascontiguousarray(words[place]).view(">u8").reshape(-1).astype(np.uint64)
        # Bytes behind the end of the name become zeros, which sort first.
        shift = ((8 - left) * 8).astype(np.uint64)
        value = np.where(left == 0, np.uint64(0), value >> np.minimum(shift, 63) << np.minimum(shift, 63))
        return np.asarray(value)

    position = 0
    while len(pending):
        left, right = word(pending, position), word(pending + 1, position)
        result[pending[left < right]] = -1
        result[pending[left > right]] = 1
        position += 8
        longest = np.maximum(lengths[pending], lengths[pending + 1])
        pending = pending[(left == right) & (longest > position)]
    return result
