"""Laying trees over each other, with whiteouts, as an overlay file system does; rafs.md 4.2 and 4.3."""

from __future__ import annotations

import dataclasses
import enum
import stat
from collections.abc import Sequence

import numpy as np

from nydus.build.tree import gather_runs, group_links
from nydus.errors import NydusError
from nydus.rafs.model import CHUNK, Array, BlobFeature, BlobInfo, NodeFlag, SuperFlag, Tree, Xattrs

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_OVERLAY_OPAQUE = b"trusted.overlay.opaque"
#: Stored in 8 bits, counted from 1 (rafs.md 0).
MAX_BLOBS = 254


class Whiteout(enum.Enum):
    """How a layer says that a name of the layers below is gone."""

    OCI = "oci"
    OVERLAYFS = "overlayfs"
    NONE = "none"


class InconsistentLayers(NydusError):
    """Layers that cannot be merged because they were built differently."""

    #: Of the command, as in the reference.
    exit_code = 2


#: A node of some layer: its number among all rows of all layers.
_Node = int


class _Overlay:
    """The names of the merged tree; directories below an untouched one stay as they are in their layer."""

    def __init__(self, layers: Sequence[Tree], whiteout: Whiteout) -> None:
        self.layers = layers
        self.spec = whiteout
        sizes = [len(layer) for layer in layers]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        #: Implied directories and the ones below, whose attributes they keep (as an unpacked layer would).
        self.attributes: dict[_Node, _Node] = {}
        self.implied = [(layer.nodes["flags"] & NodeFlag.IMPLIED != 0).tolist() for layer in layers]
        #: Whether a layer may say that something is gone; most do not.
        self.removes = [_may_remove(layer, whiteout) for layer in layers]
        #: Contents of the directories that differ from those of their layer.
        self.changed: dict[_Node, dict[bytes, _Node]] = {}
        self.columns = [
            (
                layer.nodes["first_child"].tolist(),
                layer.nodes["child_count"].tolist(),
                layer.nodes["name_offset"].tolist(),
                layer.nodes["name_length"].tolist(),
                ((layer.nodes["mode"] & 0o170000) == stat.S_IFDIR).tolist(),
            )
            for layer in layers
        ]

    def entries(self, layer: int, row: int) -> dict[bytes, _Node]:
        """The entries of a directory as its layer has them, in order."""
        first, count, offsets, lengths, _ = self.columns[layer]
        names = self.layers[layer].names
        start, base = first[row], self.starts[layer]
        return {
            names[offsets[child] : offsets[child] + lengths[child]]: base + child
            for child in range(start, start + count[row])
        }

    def place(self, node: _Node) -> tuple[int, int]:
        """Layer and row of a node."""
        low, high = 0, len(self.layers)
        while high - low > 1:
            middle = (low + high) // 2
            if self.starts[middle] <= node:
                low = middle
            else:
                high = middle
        return low, node - self.starts[low]

    def current(self, node: _Node) -> dict[bytes, _Node]:
        known = self.changed.get(node)
        return known if known is not None else self.entries(*self.place(node))

    def is_directory(self, node: _Node) -> bool:
        layer, row = self.place(node)
        return bool(self.columns[layer][4][row])

    def opaque(self, layer: int, row: int, entries: dict[bytes, _Node]) -> bool:
        if self.spec is Whiteout.OCI:
            return _OPAQUE in entries
        if self.spec is Whiteout.OVERLAYFS:
            return dict(self.layers[layer].node_xattrs(row)).get(_OVERLAY_OPAQUE) == b"y"
        return False

    def removed(self, layer: int, name: bytes, row: int) -> bytes | None:
        """The name that an entry removes from the layers below, if it is a whiteout."""
        if self.spec is Whiteout.OCI:
            return name[len(_WHITEOUT) :] if name.startswith(_WHITEOUT) else None
        if self.spec is Whiteout.OVERLAYFS:
            node = self.layers[layer].nodes[row]
            gone = stat.S_ISCHR(int(node["mode"])) and int(node["rdev"]) == 0
            return name if gone else None
        return None

    def apply(self, layer: int) -> None:
        """Put a layer on top of what is there; the root is node 0 of the lowest layer until replaced."""
        base = self.starts[layer]
        # (directory of the layer, what is below it or None)
        stack: list[tuple[int, _Node | None]] = [(0, self.root if layer else None)]
        while stack:
            row, lower = stack.pop()
            removes = self.removes[layer]
            if lower is None and not removes:
                continue  # all below is as the layer has it
            upper = self.entries(layer, row)
            opaque = removes and self.opaque(layer, row, upper)
            merged = {} if lower is None or opaque else dict(self.current(lower))
            added: dict[bytes, _Node] = {} if removes else upper
            dropped = False
            for name, node in upper.items() if removes else ():
                gone = self.removed(layer, name, node - base)
                if gone is None:
                    added[name] = node
                else:
                    merged.pop(gone, None)
                    dropped = True
            directories = self.columns[layer][4]
            for name, node in added.items():
                if directories[node - base]:
                    below = merged.get(name)
                    if below is not None and not self.is_directory(below):
                        below = None
                    if below is not None and self.implied[layer][node - base]:
                        self.attributes[node] = self.attributes.get(below, below)
                    stack.append((node - base, below))
            if merged or dropped:
                merged.update(added)
                self.changed[base + row] = merged
        if layer and self.implied[layer][0]:
            self.attributes[base] = self.attributes.get(self.root, self.root)
        self.root = base

    root: _Node = 0

    def order(self) -> tuple[Array, Array, Array, Array]:
        """Number the merged names in P-order: node, parent row, first child and child count of each."""
        numbers = [self.root]
        parents: list[int] = []
        counts: list[int] = []
        first: list[tuple[int, int, int]] = []
        stack = [(self.root, 0)]
        while stack:
            node, row = stack.pop()
            start = len(numbers)
            changed = self.changed.get(node)
            if changed is not None:
                nodes = [changed[name] for name in sorted(changed)]
                below = [(child, start + i) for i, child in enumerate(nodes) if self.is_directory(child)]
            else:
                layer, own = self.place(node)
                column = self.columns[layer]
                begin, end = column[0][own], column[0][own] + column[1][own]
                base = self.starts[layer]
                nodes = list(range(base + begin, base + end))
                below = [
                    (base + child, start + child - begin)
                    for child, directory in zip(range(begin, end), column[4][begin:end], strict=True)
                    if directory
                ]
            first.append((row, start, len(nodes)))
            if nodes:
                numbers += nodes
                parents.append(row)
                counts.append(len(nodes))
                below.reverse()
                stack += below
        above = np.concatenate([[0], np.repeat(np.array(parents, np.int64), counts)]).astype(np.uint32)
        rows, starts, lengths = np.array(first, np.uint32).T
        first_child = np.zeros(len(numbers), np.uint32)
        child_count = np.zeros(len(numbers), np.uint32)
        first_child[rows], child_count[rows] = starts, lengths
        return np.array(numbers, np.int64), above, first_child, child_count


def _may_remove(layer: Tree, whiteout: Whiteout) -> bool:
    """False if a layer has no whiteouts for sure."""
    if whiteout is Whiteout.OCI:
        return _WHITEOUT in layer.names
    if whiteout is Whiteout.OVERLAYFS:
        devices = (layer.nodes["mode"] & 0o170000) == stat.S_IFCHR
        return bool(layer.xattrs or (devices & (layer.nodes["rdev"] == 0)).any())
    return False


def overlay(
    layers: Sequence[Tree], whiteout: Whiteout = Whiteout.OCI, *, clean_base: bool = True, keep: int = 0
) -> Tree:
    """One tree of several layers, lowest first.

    Args:
        clean_base: drop whiteouts of the lowest layer too, where they mean nothing.
        keep: blobs of the lowest layer that stay in the table at their indices even if nothing uses them.

    The trees given are not changed; ``prefetch`` of the result is that of the layers, by path.

    Raises:
        InconsistentLayers: version, chunk size, owners or TARFS mode differ.
        NydusError: more blobs than an image can have.
    """
    check_consistent(layers)
    merged = _Overlay(layers, whiteout)
    if clean_base:
        merged.apply(0)
    for number in range(1, len(layers)):
        merged.apply(number)
    numbers, parents, first_child, child_count = merged.order()

    # The columns of all layers, with their references moved to where the joined heaps have them.
    stacked = np.concatenate([layer.nodes for layer in layers])
    names = targets = chunks = sets = links = blobs = 0
    all_chunks = []
    for layer, start in zip(layers, merged.starts, strict=False):
        part = stacked[start : start + len(layer)]
        part["name_offset"] += np.uint64(names)
        part["target_offset"] += np.uint64(targets)
        part["chunk"] += np.uint64(chunks)
        part["xattr"][part["xattr"] >= 0] += sets
        part["link"] += np.uint32(links)
        records = layer.chunks.copy()
        records["blob_index"] += np.uint32(blobs)
        all_chunks.append(records)
        names, targets = names + len(layer.names), targets + len(layer.targets)
        chunks, sets = chunks + len(layer.chunks), sets + len(layer.xattrs)
        links, blobs = links + len(layer), blobs + len(layer.blobs)
    if merged.attributes:
        above, below = (
            np.array(list(part), np.int64) for part in zip(*merged.attributes.items(), strict=True)
        )
        for column in ("mode", "uid", "gid", "mtime", "mtime_ns", "rdev", "xattr"):
            stacked[column][above] = stacked[column][below]
    nodes = stacked[numbers]
    nodes["parent"], nodes["first_child"], nodes["child_count"] = parents, first_child, child_count
    nodes["name_length"][0] = 0
    group_links(nodes, nodes["link"])
    runs, _ = gather_runs(nodes)
    records = np.concatenate(all_chunks)[runs] if len(runs) else np.zeros(0, CHUNK)
    table = _renumber_blobs(records, [blob for layer in layers for blob in layer.blobs], keep)
    tree = Tree(
        version=layers[0].version,
        chunk_size=layers[0].chunk_size,
        flags=layers[-1].flags,
        nodes=nodes,
        names=b"".join(layer.names for layer in layers),
        targets=b"".join(layer.targets for layer in layers),
        chunks=records,
        xattrs=_without_opaque([xattrs for layer in layers for xattrs in layer.xattrs], whiteout),
        blobs=table,
    )
    for layer in layers:
        for row in layer.prefetch:
            found = tree.find(layer.path(row))
            if found is not None and found not in tree.prefetch:
                tree.prefetch.append(found)
    return tree


def check_consistent(layers: Sequence[Tree]) -> None:
    """Require what :func:`overlay` does of its layers."""
    if not layers:
        raise NydusError("nothing to merge")
    first = layers[0]
    for number, layer in enumerate(layers[1:], 2):
        for what, a, b in (
            ("version", first.version, layer.version),
            ("chunk size", first.chunk_size, layer.chunk_size),
            (
                "recording of owners",
                bool(first.flags & SuperFlag.EXPLICIT_UID_GID),
                bool(layer.flags & SuperFlag.EXPLICIT_UID_GID),
            ),
            ("TARFS mode", bool(first.flags & SuperFlag.TARFS), bool(layer.flags & SuperFlag.TARFS)),
            (
                "digester",
                first.version == 5 and first.flags & SuperFlag.HASH_SHA256,
                layer.version == 5 and layer.flags & SuperFlag.HASH_SHA256,
            ),
        ):
            if a != b:
                raise InconsistentLayers(
                    f"Inconsistent RAFS Filesystem: {what} of layer {number} is {b}, of layer 1 {a}"
                )


def merge(
    layers: Sequence[Tree],
    dictionary: Tree | None = None,
    parent: Tree | None = None,
    whiteout: Whiteout = Whiteout.OCI,
) -> Tree:
    """The image of several layers, lowest first, each with at most one blob of its own that is not EXTERNAL.

    Args:
        dictionary: the chunk dictionary that the layers were built with; its blobs are shared.
        parent: a merged image below all layers.

    Blobs are numbered by first use in the merged tree, unused ones dropped; they no longer count as holding
    the file system's metadata.

    Raises:
        InconsistentLayers: see :func:`overlay`.
        NydusError: a layer has several blobs of its own.
    """
    shared = {blob.id for blob in dictionary.blobs} if dictionary else set()
    for number, layer in enumerate(layers, 1):
        external = {blob.id for blob in layer.blobs if blob.features & BlobFeature.EXTERNAL}
        own = [blob.id for blob in layer.blobs if blob.id not in shared | external]
        if len(own) > 1:
            raise NydusError(f"layer {number} has {len(own)} blobs outside of the chunk dictionary, not one")
    tree = overlay([*([parent] if parent else []), *layers], whiteout)
    tree.flags = _merged_flags(tree)
    return tree


def _merged_flags(tree: Tree) -> SuperFlag:
    flags = tree.flags
    if tree.version == 6:
        flags |= SuperFlag.HAS_XATTR
        if all(blob.features & BlobFeature.INLINED_CHUNK_DIGEST for blob in tree.blobs):
            flags |= SuperFlag.INLINED_CHUNK_DIGEST
        else:
            flags &= ~SuperFlag.INLINED_CHUNK_DIGEST
    elif (tree.nodes["xattr"] >= 0).any():
        flags |= SuperFlag.HAS_XATTR
    return flags


def _renumber_blobs(chunks: Array, blobs: Sequence[BlobInfo], keep: int) -> list[BlobInfo]:
    """Number blobs by first use in ``chunks``; the same blob of several layers becomes one."""
    identity: dict[str, int] = {}
    canonical = np.array(
        [identity.setdefault(blob.id, number) for number, blob in enumerate(blobs)] or [0], np.int64
    )
    used = canonical[chunks["blob_index"].astype(np.int64)]
    values, first = np.unique(used, return_index=True)
    order = [*range(keep), *(number for number in values[np.argsort(first)].tolist() if number >= keep)]
    if len(order) > MAX_BLOBS:
        raise NydusError(f"the image would have {len(order)} blobs; at most {MAX_BLOBS} are possible")
    place = np.zeros(len(canonical), np.uint32)
    place[order] = np.arange(len(order), dtype=np.uint32)
    chunks["blob_index"] = place[used]
    return [
        dataclasses.replace(blobs[number], features=blobs[number].features & ~BlobFeature.INLINED_FS_META)
        for number in order
    ]


def _without_opaque(sets: list[Xattrs], whiteout: Whiteout) -> list[Xattrs]:
    if whiteout is not Whiteout.OVERLAYFS:
        return sets
    return [tuple(pair for pair in xattrs if pair[0] != _OVERLAY_OPAQUE) for xattrs in sets]
