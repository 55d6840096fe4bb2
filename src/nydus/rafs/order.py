"""The order in which the formats number and place names; rafs.md 0.5."""

from __future__ import annotations

import numpy as np

from nydus.rafs.model import Array


def preorder(parents: Array) -> Array:
    """Depth-first pre-order of the directories of a tree, as positions in ``parents`` (i8).

    ``parents`` holds, for each directory, the position of its parent; position 0 is the root. Siblings must
    be consecutive and in name order, as they are in both breadth-first order and P-order. What the root does
    not lead to is left out.
    """
    count = len(parents)
    # Where the child directories of each directory start and end; only consecutive siblings are found.
    first = np.zeros(count, np.int64)
    last = np.zeros(count, np.int64)
    if count > 1:
        owners = parents[1:].astype(np.int64)
        edges = np.flatnonzero(np.diff(owners)) + 1
        begins = np.concatenate([[0], edges])
        ends = np.concatenate([edges, [len(owners)]])
        first[owners[begins]] = begins + 1
        last[owners[begins]] = ends + 1
    low, high = first.tolist(), last.tolist()
    result: list[int] = []
    stack = [0]
    while stack:
        directory = stack.pop()
        result.append(directory)
        if high[directory]:
            stack.extend(range(high[directory] - 1, low[directory] - 1, -1))
    return np.array(result, np.int64)


def first_children(order: Array, child_counts: Array) -> Array:
    """The row of the first child of each directory when names are numbered in P-order (i8).

    Args:
        order: directories in pre-order, from :func:`preorder`.
        child_counts: number of children by directory, in the numbering that ``order`` uses.

    An empty directory gets the next row that was not given out when its turn came.
    """
    counts = child_counts[order].astype(np.int64)
    result = np.zeros(len(child_counts), np.int64)
    result[order] = 1 + np.cumsum(counts) - counts
    return result
