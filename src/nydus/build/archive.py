"""Images back into tar archives, in the ustar format with PAX headers where that is too small."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator, Set
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from nydus.rafs import order
from nydus.rafs.model import Array, Tree

if TYPE_CHECKING:
    from nydus.image import Image

log = logging.getLogger(__name__)

BLOCK = 512
#: Names made into headers together, and bytes handed to the sink together.
_GROUP = 2048
_FLUSH = 1 << 20
_NAME = 100
_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}
_HARD_LINK = b"1"
_ZEROS = bytes(BLOCK)

_HEADER = np.dtype(
    [
        ("name", "S100"),
        ("mode", "S8"),
        ("uid", "S8"),
        ("gid", "S8"),
        ("size", "S12"),
        ("mtime", "S12"),
        ("checksum", "S8"),
        ("type", "S1"),
        ("target", "S100"),
        ("magic", "V8"),
        ("user", "S32"),
        ("group", "S32"),
        ("major", "S8"),
        ("minor", "S8"),
        ("prefix", "V167"),
    ]
)
assert _HEADER.itemsize == BLOCK
#: Fields of an entry that have a PAX record when they do not fit: largest value of the octal digits.
_LIMITS = (("uid", 0o7777777), ("gid", 0o7777777), ("size", 0o77777777777), ("mtime", 0o77777777777))


def write_tar(
    image: Image, write: Callable[[bytes], object], *, omit: Set[int] = frozenset(), root: bool = False
) -> int:
    """Write all names of an image, depth first in raw name order.

    Names have no leading slash, hard links an absolute target; whiteouts stay as they are stored. Times
    finer than seconds, extended attributes and long names go into PAX headers. Sockets are left out with a
    warning, as a tar archive cannot hold them.

    Args:
        write: gets the archive in order, about 1 MiB at a time.
        omit: rows of directories that get no entry of their own.
        root: write ``./``, too.

    Returns:
        The number of entries.

    Raises:
        FormatError, BackendError: the data of a file are wrong, or cannot be had.
    """
    tree = image.tree
    rows, first = _entries(tree, root)
    is_data = (tree.nodes["chunk_count"][rows] > 0) & (first[tree.nodes["link"][rows]] == rows)
    data = image.stream_rows(rows[is_data].tolist())
    pending: list[bytes | memoryview] = []
    size = 0

    def put(*parts: bytes | memoryview) -> None:
        nonlocal size
        pending.extend(parts)
        size += sum(map(len, parts))
        if size >= _FLUSH:
            write(b"".join(pending))
            pending.clear()
            size = 0

    paths = _paths(tree, rows)
    for start in range(0, len(rows), _GROUP):
        part = slice(start, start + _GROUP)
        headers = _headers(tree, rows[part], list(islice(paths, _GROUP)), first)
        for header, row, has_data in zip(headers, rows[part], is_data[part], strict=True):
            if row in omit:
                continue
            put(header)
            if not has_data:
                continue
            length = left = int(tree.nodes["size"][row])
            while left > 0:
                piece = next(data)
                left -= len(piece)
                put(piece)
            put(_ZEROS[: -length % BLOCK])
    put(bytes(2 * BLOCK))
    write(b"".join(pending))
    return len(rows) - len(omit)


def _entries(tree: Tree, root: bool) -> tuple[Array, Array]:
    """Rows to write in order, and by row of an inode the first of its names that is written."""
    rows = order.preorder(tree.nodes["parent"])[0 if root else 1 :]
    sockets = (tree.nodes["mode"][rows] & 0o170000) == stat.S_IFSOCK
    for row in rows[sockets].tolist():
        log.warning("%s is a socket: left out", os.fsdecode(tree.path(row)))
    rows = rows[~sockets]
    first = np.zeros(len(tree), np.int64)
    # The last assignment to an inode stays: go backwards.
    first[tree.nodes["link"][rows[::-1]]] = rows[::-1]
    return rows, first


def _paths(tree: Tree, rows: Array) -> Iterator[bytes]:
    """The names in the archive of rows in depth-first order; only those of directories are kept."""
    directories = {0: b""}
    names = tree.names
    for start in range(0, len(rows), _GROUP):
        part = rows[start : start + _GROUP]
        nodes = tree.nodes[part]
        is_directory = ((nodes["mode"] & 0o170000) == stat.S_IFDIR).tolist()
        columns = (nodes[name].tolist() for name in ("parent", "name_offset", "name_length"))
        for row, directory, parent, at, length in zip(part.tolist(), is_directory, *columns, strict=True):
            path = directories[parent] + names[at : at + length] if row else b"./"
            if directory and row:
                directories[row] = path + b"/"
            yield path


def _headers(tree: Tree, rows: Array, names: list[bytes], first: Array) -> Iterator[bytes]:
    """The header of each entry, with the PAX header before it where there is one."""
    nodes = tree.nodes[rows]
    kinds = (nodes["mode"] & 0o170000).tolist()
    types, targets = [], []
    for kind, row, original in zip(kinds, rows.tolist(), first[nodes["link"]].tolist(), strict=True):
        if kind == stat.S_IFREG and original != row:
            types.append(_HARD_LINK)
            targets.append(tree.path(original))
        else:
            types.append(_TYPES[kind])
            targets.append(tree.target(row) if kind == stat.S_IFLNK else b"")
    table = np.zeros(len(nodes), _HEADER)
    kind_bytes = np.array(types, "S1")
    values = {name: nodes[name].astype(np.int64) for name, _ in _LIMITS}
    values["size"][(kind_bytes != b"0")] = 0
    table["name"], table["target"], table["type"] = (
        [name[:_NAME] for name in names],
        [target[:_NAME] for target in targets],
        kind_bytes,
    )
    table["mode"] = _octal(nodes["mode"].astype(np.int64) & 0o7777, 7)
    for name, limit in _LIMITS:
        table[name] = _octal(np.clip(values[name], 0, limit), _HEADER[name].itemsize - 1)
    device = np.isin(nodes["mode"] & 0o170000, [stat.S_IFCHR, stat.S_IFBLK])
    rdev = np.where(device, nodes["rdev"], 0).astype(np.int64)
    table["major"] = _octal(rdev >> 8 & 0xFFF, 7)
    table["minor"] = _octal(rdev & 0xFF | rdev >> 12 & 0xFFF00, 7)
    _seal(table)
    headers = table.tobytes()
    wide = (nodes["mtime_ns"] > 0) | (nodes["xattr"] >= 0)
    for name, limit in _LIMITS:
        wide |= (values[name] > limit) | (values[name] < 0)
    for number, special in enumerate(wide.tolist()):
        header = headers[number * BLOCK : (number + 1) * BLOCK]
        long = len(names[number]) > _NAME or len(targets[number]) > _NAME
        if special or long:
            records = _records(tree, nodes[number], values, number, names[number], targets[number])
            header = _pax(records) + header
        yield header


def _records(
    tree: Tree, node: Array, values: dict[str, Array], number: int, name: bytes, target: bytes
) -> dict[bytes, bytes]:
    """The PAX records of an entry: what its header has no room for."""
    records: dict[bytes, bytes] = {}
    if len(name) > _NAME:
        records[b"path"] = name
    if len(target) > _NAME:
        records[b"linkpath"] = target
    for field, limit in _LIMITS:
        value = int(values[field][number])
        if not 0 <= value <= limit:
            records[field.encode()] = b"%d" % value
    if node["mtime_ns"]:
        # Nanoseconds count upwards, also where seconds are negative.
        total = int(node["mtime"]) * 10**9 + int(node["mtime_ns"])
        records[b"mtime"] = b"%s%d.%09d" % (b"-" if total < 0 else b"", *divmod(abs(total), 10**9))
    if int(node["xattr"]) >= 0:
        for key, content in tree.xattrs[int(node["xattr"])]:
            # A key ends at its first "="; GNU tar writes it so.
            records[b"SCHILY.xattr." + key.replace(b"=", b"%3D")] = content
    return records


def _pax(records: dict[bytes, bytes]) -> bytes:
    """A PAX header with its data. Images built from a directory have one for every name: no numpy here."""
    data = b"".join(_record(key, value) for key, value in records.items())
    size = b"%011o" % len(data)
    checksum = b"%06o\0 " % (_PAX_SUM + sum(size))
    return b"".join((_PAX[0], size, _PAX[1], checksum, _PAX[2], data, _ZEROS[: -len(data) % BLOCK]))


def _pax_template() -> tuple[tuple[bytes, bytes, bytes], int]:
    """What stands before the size, between size and checksum, and behind; and the checksum without size."""
    head = b"././@PaxHeader".ljust(_NAME, b"\0") + b"0000644\0" + b"0000000\0" * 2
    middle = b"\0" + b"0" * 11 + b"\0"
    tail = (b"x".ljust(101, b"\0") + b"ustar\x0000").ljust(173, b"\0") + b"0000000\0" * 2
    tail = tail.ljust(BLOCK - 156, b"\0")
    return (head, middle, tail), sum(head) + sum(middle) + sum(tail) + 8 * ord(" ")


_PAX, _PAX_SUM = _pax_template()


def _record(key: bytes, value: bytes) -> bytes:
    # The length counts its own digits.
    base = len(key) + len(value) + 3
    length = base + len(str(base))
    if len(str(length)) > len(str(base)):
        length = base + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _seal(table: Array) -> None:
    """Set magic and checksum."""
    table["magic"] = np.void(b"ustar\x0000")
    table["checksum"] = b" " * 8
    sums = table.view(np.uint8).reshape(len(table), BLOCK).sum(axis=1, dtype=np.int64)
    # Six digits, a zero byte and a blank, as every tar writes it.
    digits = _octal(sums, 6).view(np.uint8).reshape(-1, 6)
    sealed = np.zeros((len(table), 8), np.uint8)
    sealed[:, :6], sealed[:, 7] = digits, ord(" ")
    table.view(np.uint8).reshape(len(table), BLOCK)[:, 148:156] = sealed


def _octal(values: Array, digits: int) -> Array:
    """Numbers as octal digits with leading zeros ("S" strings)."""
    shifts = np.arange(digits - 1, -1, -1, dtype=np.int64) * 3
    text = (values.astype(np.int64)[:, None] >> shifts & 7) + ord("0")
    return np.ascontiguousarray(text.astype(np.uint8)).view(f"S{digits}").reshape(-1)
