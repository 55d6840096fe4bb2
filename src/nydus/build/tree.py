"""Trees under construction: names come in any order, and go out in the order the formats number them."""

from __future__ import annotations

import logging
import stat
import struct
from dataclasses import dataclass

import numpy as np

from nydus.errors import FormatError
from nydus.rafs.model import CHUNK, NODE, Array, BlobInfo, NodeFlag, SuperFlag, Tree, Xattrs

log = logging.getLogger(__name__)

#: ``rdev`` of names that are no devices, in tar builds (rafs.md 1.3).
NO_DEVICE = 0xFFFF_FFFF
NAME_MAX = 255
PATH_MAX = 4096
_IMPLICIT_MODE = stat.S_IFDIR | 0o755
_MAX_SYMLINKS = 40

#: One NODE row, packed without going through numpy: a small numpy assignment costs ten times as much.
_ROW = struct.Struct("<8I Qq 2I 3Q Ii 3H")
assert _ROW.size == NODE.itemsize
_SIZE = _ROW.size
_MODE_AT = NODE.fields["mode"][1]  # type: ignore[index]
_FLAGS_AT = NODE.fields["flags"][1]  # type: ignore[index]


@dataclass(frozen=True, slots=True)
class Numbering:
    """All names in P-order (rafs.md 0.5); row *i* of each column is the name with index ``i + 1``.

    Attributes:
        names: last components; empty for the root.
        inodes: inode number of the builder.
        parent: row of the parent.
        first: (row, first child, number of children) of each directory.
    """

    names: list[bytes]
    inodes: Array
    parent: Array
    first: Array


class TreeBuilder:
    """Accumulates names and inodes, and turns them into a :class:`Tree`.

    Every name has an inode; hard links share one. Inodes are numbered from 0 (the root directory) in the
    order they were made. An inode refers to its data by a run of *chunk references*, numbered in the order
    in which the caller stored them; :meth:`finish` is told what each reference stands for.

    Paths are taken as a container runtime takes them: relative to the root, never out of it, symbolic links
    in the parent followed inside it, missing parents made (0755, 0:0, mtime 0).

    Args:
        rdev: device number of the root and of directories that are only implied.
        where: what is read, for error messages.

    Raises (all methods):
        FormatError: a name or link that no file system could hold.
    """

    def __init__(self, rdev: int = NO_DEVICE, where: str = "") -> None:
        self._rows = bytearray()
        self._rdev = rdev
        self._where = where
        self._xattrs: dict[Xattrs, int] = {}
        #: Attributes that RAFS has no room for, and the name of the first.
        self._left_out, self._example = 0, b""
        self._targets: dict[int, bytes] = {}
        #: inode of each directory → its entries.
        self._children: dict[int, dict[bytes, int]] = {}
        #: directory part of a path as spelled in the source → inode; emptied when a name changes its meaning.
        self._known: dict[bytes, int] = {}
        self._waiting: list[tuple[bytes, bytes, tuple[int, int, int, int] | None]] = []
        self._numbering: Numbering | None = None
        self._imply()

    def __len__(self) -> int:
        """Inodes so far."""
        return len(self._rows) // _SIZE

    def add_inode(
        self,
        mode: int,
        uid: int = 0,
        gid: int = 0,
        mtime: int = 0,
        mtime_ns: int = 0,
        *,
        size: int = 0,
        rdev: int = NO_DEVICE,
        target: bytes = b"",
        xattrs: Xattrs = (),
        number: int | None = None,
    ) -> int:
        """Make an inode without a name (or give inode ``number`` new attributes); returns its number."""
        if xattrs:
            known = known_xattrs(xattrs)
            if len(known) < len(xattrs) and not self._left_out:
                self._example = next(pair[0] for pair in xattrs if pair not in known)
            self._left_out += len(xattrs) - len(known)
            xattrs = known
        xattr = self._xattrs.setdefault(xattrs, len(self._xattrs)) if xattrs else -1
        if number is None:
            number = len(self._rows) // _SIZE
            self._rows += bytes(_SIZE)
        kind = mode & 0o170000
        if kind == stat.S_IFLNK:
            if not 0 < len(target) < PATH_MAX:
                raise FormatError(
                    "a symbolic link has an impossible target", where=self._where, found=len(target)
                )
            self._targets[number] = target
            size = len(target)
        elif kind == stat.S_IFDIR:
            self._children.setdefault(number, {})
        _ROW.pack_into(
            self._rows, number * _SIZE,
            0, 0, 0, number, mode, uid, gid, 1, size, mtime, mtime_ns, rdev, 0, 0, 0, 0, xattr, 0, 0, 0,
        )  # fmt: skip
        return number

    def set_chunks(self, number: int, first: int, count: int) -> None:
        """Say that the data of an inode are the chunk references ``first .. first + count``."""
        base = number * _SIZE
        row = list(_ROW.unpack_from(self._rows, base))
        row[14], row[15] = first, count
        _ROW.pack_into(self._rows, base, *row)

    def enter(self, directory: int, name: bytes, number: int) -> None:
        """Name an inode inside a directory inode; for callers that walk a real directory."""
        self._children[directory][name] = number

    def remove(self, directory: int, name: bytes) -> None:
        """Take a name out of a directory inode."""
        del self._children[directory][name]

    def is_empty(self, directory: int) -> bool:
        """Whether a directory inode has no entries."""
        return not self._children[directory]

    def add(
        self,
        path: bytes,
        mode: int,
        uid: int = 0,
        gid: int = 0,
        mtime: int = 0,
        *,
        size: int = 0,
        rdev: int = NO_DEVICE,
        target: bytes = b"",
        xattrs: Xattrs = (),
    ) -> int:
        """Add a name with an inode of its own, replacing what had this name; returns the inode.

        A directory over a directory keeps its entries and gets the new attributes.
        """
        parent, name = self.locate(path)
        entries = self._children[parent]
        old = entries.get(name) if name else 0
        same = old if stat.S_ISDIR(mode) and old in self._children else None
        if not name and same is None:
            raise self._fail("the root can only be a directory", path)
        number = self.add_inode(
            mode, uid, gid, mtime, size=size, rdev=rdev, target=target, xattrs=xattrs, number=same
        )
        if same is None:
            if old is not None:
                self._known.clear()
            entries[name] = number
        return number

    def link(
        self, path: bytes, target: bytes, attributes: tuple[int, int, int, int] | None = None
    ) -> int | None:
        """Add a hard link to a name that is there already or comes later (then the inode is None for now).

        Args:
            attributes: (mode, uid, gid, mtime) of the link's own header, which runtimes apply to the inode.
        """
        directory, base = self.locate(target)
        number = self._children[directory].get(base) if base else 0
        parent, name = self.locate(path)
        if not name:
            raise self._fail("the root cannot be a hard link", path)
        entries = self._children[parent]
        if number is None:
            if entries.pop(name, None) is not None:
                self._known.clear()
            self._waiting.append((path, target, attributes))
            return None
        if number in self._children:
            raise self._fail("a hard link to a directory", path)
        if name in entries:
            self._known.clear()
        base_at = number * _SIZE
        mode = struct.unpack_from("<I", self._rows, base_at + _MODE_AT)[0]
        if not stat.S_ISREG(mode):
            # Only regular files can have several names in RAFS; give the others an inode for each name.
            copy = len(self)
            self._rows += self._rows[base_at : base_at + _SIZE]
            struct.pack_into("<I", self._rows, copy * _SIZE + 12, copy)
            if number in self._targets:
                self._targets[copy] = self._targets[number]
            entries[name] = copy
            return copy
        if attributes is not None:
            row = list(_ROW.unpack_from(self._rows, base_at))
            row[4:7] = attributes[:3]
            row[9] = attributes[3]
            _ROW.pack_into(self._rows, base_at, *row)
        struct.pack_into("<H", self._rows, base_at + _FLAGS_AT, NodeFlag.TAR_LINK)
        entries[name] = number
        return number

    def lies_in_file(self, path: bytes) -> bool:
        """Whether something on the way to a path is there, but is neither a directory nor a symbolic link."""
        number = 0
        for part in _clean(path)[:-1]:
            entries = self._children.get(number)
            if entries is None:
                return number not in self._targets
            if part not in entries:
                return False
            number = entries[part]
        return number not in self._children and number not in self._targets

    def locate(self, path: bytes) -> tuple[int, bytes]:
        """The directory inode and last component of a path (``b""`` for the root), parents made as needed."""
        trimmed = path.rstrip(b"/")
        prefix, _, name = trimmed.rpartition(b"/")
        if name in (b"", b".", b".."):
            parts = _clean(path)
            if not parts:
                return 0, b""
            prefix, name = b"/".join(parts[:-1]), parts[-1]
        if len(name) > NAME_MAX or len(trimmed) > PATH_MAX:
            raise self._fail("a name is too long", path)
        parent = self._known.get(prefix)
        if parent is None:
            parent = self._known[prefix] = self._directory(_clean(prefix), path)
        return parent, name

    def _directory(self, parts: list[bytes], path: bytes) -> int:
        stack = [0]
        todo = parts[::-1]
        followed = 0
        while todo:
            part = todo.pop()
            if part == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            entries = self._children[stack[-1]]
            number = entries.get(part)
            if number is None:
                if len(part) > NAME_MAX:
                    raise self._fail("a name is too long", path)
                number = entries[part] = self._imply()
            if number in self._children:
                stack.append(number)
                continue
            target = self._targets.get(number)
            followed += 1
            if target is None:
                raise self._fail("a name lies in something that is not a directory", path)
            if followed > _MAX_SYMLINKS:
                raise self._fail("too many symbolic links on the way to a name", path)
            if target.startswith(b"/"):
                stack = [0]
            todo += [part for part in reversed(target.split(b"/")) if part not in (b"", b".")]
        return stack[-1]

    def _imply(self) -> int:
        """Make a directory that nothing describes, and return its inode."""
        number = self.add_inode(_IMPLICIT_MODE, rdev=self._rdev)
        struct.pack_into("<H", self._rows, number * _SIZE + _FLAGS_AT, NodeFlag.IMPLIED)
        return number

    def _fail(self, what: str, path: bytes) -> FormatError:
        return FormatError(f"{what}: {path[:200].decode(errors='backslashreplace')}", where=self._where)

    def _resolve_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        while waiting:
            again = []
            for path, target, attributes in waiting:
                directory, base = self.locate(path)
                if base in self._children[directory]:
                    continue  # replaced later on
                if self.link(path, target, attributes) is None:
                    again.append(self._waiting.pop())
            if len(again) == len(waiting):
                raise self._fail(
                    "the target of a hard link is not in the layer", b" -> ".join(waiting[0][:2])
                )
            waiting = again

    def number(self) -> Numbering:
        """Number the names; call it when all are there. The result is kept for :meth:`finish`."""
        if self._numbering is not None:
            return self._numbering
        self._resolve_waiting()
        names = [b""]
        inodes = [0]
        parents: list[int] = []  # row and number of children of each directory that has some
        counts: list[int] = []
        first: list[tuple[int, int, int]] = []
        children = self._children
        stack = [(0, 0)]
        while stack:
            number, row = stack.pop()
            entries = children[number]
            start = len(inodes)
            first.append((row, start, len(entries)))
            if not entries:
                continue
            ordered = sorted(entries)
            numbers = [entries[name] for name in ordered]
            names += ordered
            inodes += numbers
            parents.append(row)
            counts.append(len(numbers))
            below = [(inode, start + i) for i, inode in enumerate(numbers) if inode in children]
            below.reverse()
            stack += below
        parent = np.zeros(len(inodes), np.uint32)
        parent[1:] = np.repeat(np.array(parents, np.uint32), counts)
        self._numbering = Numbering(names, np.array(inodes, np.intp), parent, np.array(first, np.uint32))
        return self._numbering

    def finish(
        self,
        version: int,
        chunk_size: int,
        flags: SuperFlag,
        table: Array,
        references: Array,
        blobs: list[BlobInfo],
    ) -> Tree:
        """The tree of all names. Ends the builder: its own tables are freed.

        Args:
            table: CHUNK rows, one for each distinct chunk.
            references: row of ``table`` for each chunk reference.
        """
        if self._left_out:
            log.warning(
                "%s%d extended attributes are left out, as RAFS cannot hold them (the first one: %s)",
                f"{self._where}: " if self._where else "",
                self._left_out,
                self._example[:255].decode(errors="backslashreplace"),
            )
        order = self.number()
        names = order.names
        nodes: Array = np.frombuffer(self._rows, NODE)[order.inodes]
        nodes["parent"] = order.parent
        rows, starts, counts = order.first.T
        nodes["first_child"][rows], nodes["child_count"][rows] = starts, counts
        kind = nodes["mode"] & 0o170000
        lengths = np.fromiter(map(len, names), np.uint64, len(names))
        nodes["name_length"] = lengths
        nodes["name_offset"] = np.cumsum(lengths) - lengths
        targets = []
        size = 0
        for row in np.flatnonzero(kind == stat.S_IFLNK).tolist():
            target = self._targets[int(nodes["link"][row])]
            nodes["target_offset"][row], nodes["target_length"][row] = size, len(target)
            targets.append(target)
            size += len(target)
        self._children, self._known, self._targets = {}, {}, {}
        self._rows, self._numbering = bytearray(), None
        heap = b"".join(names)
        del order, names
        group_links(nodes, nodes["link"])
        if version == 5:
            directory_sizes(nodes)
        runs, positions = gather_runs(nodes)
        chunks = table[references[runs]] if len(runs) else np.zeros(0, CHUNK)
        chunks["file_offset"] = positions * np.uint64(chunk_size)
        if (nodes["xattr"] >= 0).any():
            flags |= SuperFlag.HAS_XATTR
        return Tree(
            version, chunk_size, flags, nodes, heap, b"".join(targets), chunks,
            list(self._xattrs), blobs,
        )  # fmt: skip


_XATTR_PREFIXES = (b"user.", b"security.", b"trusted.")
_XATTR_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")


def known_xattrs(xattrs: tuple[tuple[bytes, bytes], ...]) -> tuple[tuple[bytes, bytes], ...]:
    """The attributes that RAFS can hold; runtimes ignore what a file system does not support, too."""
    if not xattrs:
        return ()
    return tuple(
        (name, value)
        for name, value in xattrs
        if (name.startswith(_XATTR_PREFIXES) or name in _XATTR_NAMES)
        and len(name) <= 255
        and len(value) <= 0xFFFF
    )


def _clean(path: bytes) -> list[bytes]:
    """The components of a path, ``.`` and ``..`` applied as text; what climbs out stays at the root."""
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return parts


def group_links(nodes: Array, groups: Array) -> None:
    """Set ``link`` and ``nlink`` of rows in P-order from one number for each inode (rafs.md 0.5)."""
    _, first, inverse, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    nodes["link"] = first[inverse]
    nodes["nlink"] = counts[inverse]
    directories = (nodes["mode"] & 0o170000) == stat.S_IFDIR
    below = np.bincount(nodes["parent"][1:][directories[1:]], minlength=len(nodes))
    nodes["nlink"][directories] = 2 + below[directories]


def directory_sizes(nodes: Array) -> None:
    """Set the sizes of directories as v5 builds have them (rafs.md 1.3)."""
    directories = (nodes["mode"] & 0o170000) == stat.S_IFDIR
    sums = np.bincount(
        nodes["parent"][1:], nodes["name_length"][1:].astype(np.float64) + 8, minlength=len(nodes)
    )
    sizes = (sums.astype(np.uint64) + np.uint64(4095)) & ~np.uint64(4095)
    nodes["size"][directories] = np.maximum(sizes, 4096)[directories]


def gather_runs(nodes: Array) -> tuple[Array, Array]:
    """Lay the chunk runs of all inodes end to end in P-order; sets ``chunk`` of every row.

    Returns:
        For each chunk of the new layout, its old position and its number in its file.
    """
    rows = np.arange(len(nodes))
    owners = np.flatnonzero((nodes["link"] == rows) & (nodes["chunk_count"] > 0))
    counts = nodes["chunk_count"][owners].astype(np.int64)
    starts = nodes["chunk"][owners].astype(np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    positions = np.arange(total) - np.repeat(ends - counts, counts)
    nodes["chunk"] = 0
    nodes["chunk"][owners] = ends - counts
    nodes["chunk"] = nodes["chunk"][nodes["link"]]
    return np.repeat(starts, counts) + positions, positions.astype(np.uint64)
