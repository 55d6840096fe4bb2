"""What a file system holds, path by path, taken from wherever it is, for comparing two of them.

Deliberately independent of the builder: layers are read with the standard library's tar reader, so that a
mistake of ours in reading them shows as a difference.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from nydus.errors import FormatError, NydusError
from nydus.oci.place import Stream

if TYPE_CHECKING:
    from nydus.image import Image

_MAX_LINKS = 40  # in one path, as in Linux
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_XATTR = "SCHILY.xattr."
_PIECE = 1 << 20
_STARGZ = frozenset({"stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark"})


@dataclass(slots=True, eq=False)
class Entry:
    """One inode.

    Attributes:
        mode: type and permissions.
        size: bytes; 0 except for regular files.
        rdev: (major, minor) of devices.
        mtime: whole seconds, None where nobody said it (a directory that a layer only implies).
        content: sha256 (hex) of a regular file.
        names: all paths of the inode, if there are several.
    """

    mode: int
    uid: int
    gid: int
    size: int = 0
    mtime: int | None = None
    rdev: tuple[int, int] = (0, 0)
    target: str = ""
    xattrs: dict[str, bytes] = field(default_factory=dict)
    content: str = ""
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        xattrs = " ".join(f"{name}={value.hex()}" for name, value in sorted(self.xattrs.items()))
        return (
            f"size: {self.size}, mode: {stat.filemode(self.mode)}, uid: {self.uid}, gid: {self.gid}, "
            f"mtime: {self.mtime}, rdev: {self.rdev[0]}:{self.rdev[1]}, symlink: {self.target!r}, "
            f"xattrs: map[{xattrs}], links: {len(self.names) or 1}, hash: {self.content}"
        )


Listing = dict[str, Entry]


class Difference(NydusError):
    """Two file systems are not the same; the text names the first path where they differ."""


def compare(source: Listing, target: Listing) -> int:
    """Requires two file systems to be the same, and returns the number of paths.

    Everything counts: type, mode, owner, size, time (seconds), device, target, extended attributes, content,
    and which names are one inode. Only of the root the attributes do not, since images often do not have it,
    nor the permissions of symbolic links: they mean nothing, archives have any, and file systems 0777.

    Raises:
        Difference: they are not; the first path in sorted order.
    """
    for path in sorted(source.keys() | target.keys()):
        a, b = source.get(path), target.get(path)
        if b is None:
            raise Difference(f"file not found in target image: {path}")
        if a is None:
            raise Difference(f"file not found in source image: {path}")
        if path == "/" and stat.S_ISDIR(b.mode):
            continue
        if what := _difference(a, b):
            raise Difference(
                f"file not match in target image: {path}: its {what}; [source] {a}; [target] {b}"
            )
    return len(source)


def _difference(a: Entry, b: Entry) -> str:
    for name in ("mode", "uid", "gid", "size", "rdev", "target", "xattrs", "content", "names"):
        if name == "mode" and stat.S_ISLNK(a.mode) and stat.S_ISLNK(b.mode):
            continue
        if getattr(a, name) != getattr(b, name):
            return {"names": "hard links", "rdev": "device"}.get(name, name)
    return "mtime" if None not in (a.mtime, b.mtime) and a.mtime != b.mtime else ""


def of_image(image: Image) -> Listing:
    """Reads every file of a RAFS image through its blobs; each chunk is verified on the way.

    Raises:
        FormatError, BackendError: a file cannot be read.
    """
    found: Listing = {}
    inodes: dict[int, Entry] = {}
    names: dict[int, list[str]] = {}
    for row, raw in image.tree.walk():
        path = os.fsdecode(raw)
        one = image.entry(row)
        names.setdefault(one.inode, []).append(path)
        entry = inodes.get(one.inode)
        if entry is None:
            entry = Entry(
                one.mode, one.uid, one.gid, mtime=one.mtime, rdev=one.device or (0, 0), target=one.target
            )
            entry.xattrs = one.xattrs
            if one.is_file:
                entry.size = one.size
                try:
                    entry.content = _hash(image.stream_row(row))
                except NydusError as error:
                    raise NydusError(f"{path}: {error}") from error
            inodes[one.inode] = entry
        found[path] = entry
    _name_links((inodes[number], paths) for number, paths in names.items())
    return found


def of_directory(root: str) -> Listing:
    """Reads a mounted file system, and what is mounted within it.

    Raises:
        NydusError: a file cannot be read.
    """
    found: Listing = {}
    inodes: dict[tuple[int, int], Entry] = {}
    names: dict[tuple[int, int], list[str]] = {}

    def add(path: str) -> None:
        real = root + path
        info = os.lstat(real)
        inode = (info.st_dev, info.st_ino)
        names.setdefault(inode, []).append(path)
        entry = inodes.get(inode)
        if entry is None:
            entry = Entry(info.st_mode, info.st_uid, info.st_gid, mtime=int(info.st_mtime))
            if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
                entry.rdev = (os.major(info.st_rdev), os.minor(info.st_rdev))
            if stat.S_ISLNK(info.st_mode):
                entry.target = os.readlink(real)
            listed = os.listxattr(real, follow_symlinks=False)
            entry.xattrs = {name: os.getxattr(real, name, follow_symlinks=False) for name in listed}
            if stat.S_ISREG(info.st_mode):
                entry.size = info.st_size
                with open(real, "rb", buffering=0) as file:
                    entry.content = _hash(iter(lambda: file.read(_PIECE), b""))
            inodes[inode] = entry
        found[path] = entry

    try:
        add("/")
        for folder, folders, files in os.walk(root, onerror=_raise):
            inside = folder[len(root) :].rstrip("/")
            for name in (*folders, *files):
                add(f"{inside}/{name}")
    except OSError as error:
        raise NydusError(f"{error.filename}: {error.strerror}") from error
    _name_links((inodes[number], paths) for number, paths in names.items())
    return found


def _raise(error: OSError) -> None:
    raise error


def _hash(pieces: Any) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _name_links(inodes: Iterator[tuple[Entry, list[str]]]) -> None:
    for entry, paths in inodes:
        if len(paths) > 1:
            entry.names = tuple(sorted(paths))


class _Node:
    """A name in the overlay of layers; ``entry`` is shared by hard links."""

    __slots__ = ("children", "entry")

    def __init__(self, entry: Entry, children: dict[str, _Node] | None = None) -> None:
        self.entry, self.children = entry, children


def _implied() -> _Node:
    return _Node(Entry(stat.S_IFDIR | 0o755, 0, 0), {})


class Overlay:
    """The file system of OCI layers; give them lowest first to :meth:`apply`.

    Args:
        keep_xattr: which attributes count.
        layered: a layer hides what its whiteouts name; False if archives are just unpacked into one folder.
    """

    def __init__(
        self,
        keep_xattr: Callable[[str, bytes], bool] = lambda name, value: True,
        *,
        layered: bool = True,
    ) -> None:
        self._root = _implied()
        self._keep = keep_xattr
        self._layered = layered

    def apply(self, stream: Stream, diff_id: str, where: str) -> None:
        """Puts one layer (plain, gzip or zstd) on top.

        Raises:
            FormatError: it is no tar archive, or not what its diff id says.
            BackendError: it cannot be read, or its digest is wrong.
        """
        plain = _Hashed(_inflate(stream, where))
        layer = _implied() if self._layered else self._root
        whiteouts: list[list[str]] = []
        try:
            with tarfile.open(fileobj=plain, mode="r|", bufsize=_PIECE) as archive:  # type: ignore[call-overload]
                for member in archive:
                    self._add(archive, member, layer, whiteouts)
        except (tarfile.TarError, EOFError, ValueError) as error:
            _drain(stream)
            raise FormatError(f"not a tar archive: {error}", where=where) from error
        while plain.read(_PIECE):
            pass
        _drain(stream)
        found = f"sha256:{plain.digest.hexdigest()}"
        if diff_id and found != diff_id:
            raise FormatError("wrong diff id", where=where, expected=diff_id, found=found)
        if self._layered:
            for parts in whiteouts:
                self._remove(parts)
            self._merge(self._root, layer)

    def add_file(self, stream: Stream, name: str, size: int) -> None:
        """Puts one file on top, whose data are all of a stream."""
        digest = hashlib.sha256()
        while piece := stream.read(_PIECE):
            digest.update(piece)
        parts = _parts(name)
        layer = _implied() if self._layered else self._root
        entry = Entry(stat.S_IFREG | 0o644, 0, 0, size, 0, content=digest.hexdigest())
        self._parent(layer, parts)[parts[-1]] = _Node(entry, None)
        if self._layered:
            self._merge(self._root, layer)

    def _add(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, layer: _Node, whiteouts: list[list[str]]
    ) -> None:
        parts = _parts(member.name)
        if len(parts) == 1 and parts[0] in _STARGZ:
            return
        if self._layered and parts and parts[-1].startswith(_WHITEOUT):
            whiteouts.append(parts)
            if not _lies_in_file(layer, parts):
                self._parent(layer, parts)
            return
        if member.islnk():
            entry = self._linked(layer, _parts(member.linkname))
            if entry is None:
                raise tarfile.TarError(f"hard link {member.name!r} to a missing file {member.linkname!r}")
        else:
            entry = self._entry(archive, member)
        if not parts:
            layer.entry = entry
            return
        parent = self._parent(layer, parts)
        old = parent.get(parts[-1])
        children = (
            (old.children if old and old.children is not None else {}) if stat.S_ISDIR(entry.mode) else None
        )
        parent[parts[-1]] = _Node(entry, children)

    def _entry(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> Entry:
        kinds = {
            tarfile.DIRTYPE: stat.S_IFDIR,
            tarfile.SYMTYPE: stat.S_IFLNK,
            tarfile.CHRTYPE: stat.S_IFCHR,
            tarfile.BLKTYPE: stat.S_IFBLK,
            tarfile.FIFOTYPE: stat.S_IFIFO,
        }
        kind = kinds.get(member.type, stat.S_IFREG)
        mode = kind | (0o777 if kind == stat.S_IFLNK else member.mode & 0o7777)
        entry = Entry(mode, member.uid, member.gid, mtime=int(member.mtime // 1))
        for key, value in member.pax_headers.items():
            if key.startswith(_XATTR):
                name, data = key.removeprefix(_XATTR), value.encode("utf8", "surrogateescape")
                if self._keep(name, data):
                    entry.xattrs[name] = data
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            entry.rdev = (member.devmajor, member.devminor)
        elif kind == stat.S_IFLNK:
            entry.target = member.linkname
        elif kind == stat.S_IFREG:
            file = archive.extractfile(member)
            entry.size = member.size
            entry.content = _hash(iter(lambda: file.read(_PIECE), b"")) if file else _hash(())
        return entry

    def _parent(self, top: _Node, parts: list[str]) -> dict[str, _Node]:
        """The folder of a path. Links are followed as by a container runtime: never out of the root."""
        way, todo, links = [top], parts[:-1], 0
        while todo:
            part = todo.pop(0)
            folder = way[-1].children
            assert folder is not None
            child = folder.get(part)
            if part == "..":
                del way[max(1, len(way) - 1) :]
            elif child is not None and stat.S_ISLNK(child.entry.mode) and links < _MAX_LINKS:
                links += 1
                if child.entry.target.startswith("/"):
                    del way[1:]
                todo = [*_parts(child.entry.target), *todo]
            else:
                if child is None or child.children is None:
                    child = folder[part] = _implied()
                way.append(child)
        assert way[-1].children is not None
        return way[-1].children

    def _linked(self, layer: _Node, parts: list[str]) -> Entry | None:
        """The file that a hard link names, in its own layer or below."""
        for top in (layer, self._root):
            node: _Node | None = top
            for part in parts:
                node = node.children.get(part) if node and node.children is not None else None
            if node is not None and node.children is None:
                return node.entry
        return None

    def _remove(self, parts: list[str]) -> None:
        node = self._root
        for part in parts[:-1]:
            child = node.children.get(part) if node.children is not None else None
            if child is None:
                return
            node = child
        if node.children is None:
            return
        if parts[-1] == _OPAQUE:
            node.children.clear()
        else:
            node.children.pop(parts[-1].removeprefix(_WHITEOUT), None)

    def _merge(self, below: _Node, above: _Node) -> None:
        if above.entry.mtime is not None:
            below.entry = above.entry
        else:  # Only implied: it keeps its attributes. The reference gives it no time, so none is compared.
            below.entry.mtime = None
        assert above.children is not None and below.children is not None
        for name, node in above.children.items():
            old = below.children.get(name)
            if old is None or old.children is None or node.children is None:
                below.children[name] = node
            else:
                self._merge(old, node)

    def listing(self) -> Listing:
        """All of it."""
        found: Listing = {}
        paths: dict[int, tuple[Entry, list[str]]] = {}
        stack = [("", self._root)]
        while stack:
            path, node = stack.pop()
            found[path or "/"] = node.entry
            paths.setdefault(id(node.entry), (node.entry, []))[1].append(path or "/")
            if node.children is not None:
                stack.extend((f"{path}/{name}", child) for name, child in node.children.items())
        _name_links(iter(paths.values()))
        return found


def _lies_in_file(node: _Node, parts: list[str]) -> bool:
    """Whether a path leads through something that is no directory; umoci writes such whiteouts."""
    for part in parts[:-1]:
        if node.children is None or part not in node.children:
            break
        node = node.children[part]
    return node.children is None


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _drain(stream: Stream) -> None:
    """Reads to the end, where the digest of the stored bytes is checked."""
    while stream.read(_PIECE):
        pass


class _Hashed:
    """Hashes what is read, and gives the last member of an archive the padding that umoci leaves out."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._size = 0
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self.digest.update(data)
        if not data:
            data = bytes(-self._size % 512)
        self._size += len(data)
        return data


def _inflate(stream: Stream, where: str) -> Any:
    from nydus.build.stream import blocks

    class Joined:
        def __init__(self) -> None:
            self._blocks = blocks(stream, where)
            self._rest = memoryview(b"")

        def read(self, size: int) -> bytes:
            pieces = []
            while size:
                if not self._rest:
                    self._rest = memoryview(next(self._blocks, b""))
                    if not self._rest:
                        break
                pieces.append(self._rest[:size])
                self._rest = self._rest[len(pieces[-1]) :]
                size -= len(pieces[-1])
            return b"".join(pieces)

    return Joined()
