"""What a container changed, as the tar archive of an OCI layer."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

from nydus.errors import ConfigError, NydusError

_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_OVERLAY = "trusted.overlay."


@dataclass(slots=True)
class Selection:
    """Which paths of a container are meant.

    Attributes:
        extra: folders and files to take besides what was changed (mounts), absolute.
        excluded: paths to leave out with all below them, absolute.
    """

    extra: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)

    def leaves_out(self, path: str) -> bool:
        return any(path == other or path.startswith(other + "/") for other in self.excluded)


def parse_selection(texts: Sequence[str]) -> Selection:
    """Reads ``--with-path`` values; those with ``!`` in front are left out.

    Raises:
        ConfigError: one is not an absolute path below the root.
    """
    selection = Selection()
    for text in texts:
        path = text.removeprefix("!")
        clean = str(PurePosixPath(path))
        if not path.startswith("/") or ".." in PurePosixPath(path).parts or clean.strip("/") == "":
            raise ConfigError(f"--with-path {text!r}: not an absolute path below /")
        clean = "/" + clean.strip("/")
        target = selection.excluded if text.startswith("!") else selection.extra
        if clean not in target:
            target.append(clean)
    return selection


def write_upper(upper: str, selection: Selection, out: IO[bytes]) -> None:
    """Writes the upper folder of an overlay as a layer: its files, and whiteouts for what is gone.

    Raises:
        NydusError: it cannot be read, or uses what a layer cannot say.
    """
    with _archive(out) as archive:
        _Writer(archive, upper, "", selection, overlay=True).run()


def write_folder(root: str, path: str, selection: Selection, out: IO[bytes]) -> None:
    """Writes one path as a container sees it (with what is mounted there), in place of what the image has.

    Args:
        root: the container's root, ``/proc/<pid>/root``.
        path: absolute in the container; no part of it may be a symbolic link, which would be followed
            outside of the container.

    Raises:
        NydusError: it cannot be read.
    """
    descriptor = _inside(root, path)
    try:
        opened = f"/proc/self/fd/{descriptor}"
        with _archive(out) as archive:
            writer = _Writer(archive, opened, path.strip("/"), selection, overlay=False)
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                writer.run()
            else:
                writer.add(opened, path.strip("/"), os.fstat(descriptor), _xattrs(descriptor))
    finally:
        os.close(descriptor)


def _inside(root: str, path: str) -> int:
    """Opens a path below a root that somebody else controls."""
    where, current = "", os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in path.strip("/").split("/"):
            where += f"/{part}"
            deeper = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=current)
            os.close(current)
            current = deeper
    except OSError as error:
        os.close(current)
        what = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise NydusError(f"--with-path {path}: {where} of the container {what}") from error
    return current


@contextmanager
def _archive(out: IO[bytes]) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(
            fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf8", errors="surrogateescape"
        ) as archive:
            yield archive
    except BrokenPipeError:
        raise  # whoever reads has failed, and says why
    except OSError as error:
        raise NydusError(f"{error.filename or 'changes'}: cannot be read: {error.strerror}") from error


class _Writer:
    def __init__(
        self, archive: tarfile.TarFile, root: str, prefix: str, selection: Selection, *, overlay: bool
    ) -> None:
        self._archive, self._root, self._prefix = archive, root, prefix
        self._selection, self._overlay = selection, overlay
        self._links: dict[tuple[int, int], str] = {}

    def run(self) -> None:
        """Writes the folder and all below it, in sorted order."""
        stack = [""]
        while stack:
            inside = stack.pop()
            real = f"{self._root}/{inside}" if inside else self._root
            name = "/".join(part for part in (self._prefix, inside) if part)
            status = os.stat(real) if not inside else os.lstat(real)
            xattrs = _xattrs(real if inside else f"{real}/.")
            self._refuse(name, xattrs)
            self.add(real, name or "./", status, xattrs)
            if (self._overlay and xattrs.get(f"{_OVERLAY}opaque") == b"y") or not (self._overlay or inside):
                self._mark(f"{name}/{_OPAQUE}" if name else _OPAQUE)
            folders = []
            for entry in sorted(os.listdir(real)):  # noqa: PTH208
                path = f"{inside}/{entry}" if inside else entry
                full = f"{self._prefix}/{path}" if self._prefix else path
                if self._selection.leaves_out(f"/{full}"):
                    continue
                if entry.startswith(_WHITEOUT):
                    raise NydusError(
                        f"/{full}: a layer cannot hold a file whose name begins with {_WHITEOUT}"
                    )
                below = os.lstat(f"{self._root}/{path}")
                if stat.S_ISDIR(below.st_mode):
                    folders.append(path)
                elif self._overlay and stat.S_ISCHR(below.st_mode) and below.st_rdev == 0:
                    self._mark(f"{full.rpartition('/')[0]}/{_WHITEOUT}{entry}".lstrip("/"))
                elif not stat.S_ISSOCK(below.st_mode):
                    attributes = _xattrs(f"{self._root}/{path}")
                    self._refuse(full, attributes)
                    self.add(f"{self._root}/{path}", full, below, attributes)
            stack.extend(reversed(folders))

    def _refuse(self, name: str, xattrs: dict[str, bytes]) -> None:
        for what in ("redirect", "metacopy"):
            if self._overlay and f"{_OVERLAY}{what}" in xattrs:
                raise NydusError(
                    f"/{name}: its content lies in another layer (overlayfs {what}): cannot be committed"
                )

    def add(self, real: str, name: str, status: os.stat_result, xattrs: dict[str, bytes]) -> None:
        """Writes one entry."""
        entry: Any = tarfile.TarInfo(name)
        entry.mode, entry.uid, entry.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
        entry.mtime = status.st_mtime_ns // 10**9
        if status.st_mtime_ns % 10**9:
            entry.pax_headers["mtime"] = f"{entry.mtime}.{status.st_mtime_ns % 10**9:09d}"
        for key, value in xattrs.items():
            if not key.startswith(_OVERLAY):
                entry.pax_headers[f"SCHILY.xattr.{key}"] = value.decode("utf8", "surrogateescape")
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            known = self._links.get((status.st_dev, status.st_ino)) if status.st_nlink > 1 else None
            if known is not None:
                entry.type, entry.linkname = tarfile.LNKTYPE, known
                entry.pax_headers.clear()
            else:
                self._links[status.st_dev, status.st_ino] = name
                self._file(entry, real, status)
                return
        elif kind == stat.S_IFDIR:
            entry.type = tarfile.DIRTYPE
        elif kind == stat.S_IFLNK:
            entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(real)
        elif kind == stat.S_IFIFO:
            entry.type = tarfile.FIFOTYPE
        else:
            entry.type = tarfile.CHRTYPE if kind == stat.S_IFCHR else tarfile.BLKTYPE
            entry.devmajor, entry.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
        self._archive.addfile(entry)

    def _file(self, entry: Any, real: str, status: os.stat_result) -> None:
        entry.size = status.st_size
        # The path of an open file in /proc is a link that must be followed.
        follow = 0 if real.startswith("/proc/self/fd/") and real.count("/") == 4 else os.O_NOFOLLOW
        with open(os.open(real, os.O_RDONLY | os.O_NONBLOCK | follow | os.O_CLOEXEC), "rb") as file:
            try:
                self._archive.addfile(entry, file)
            except OSError as error:
                if isinstance(error, BrokenPipeError) or error.errno:
                    raise
                raise NydusError(f"/{entry.name}: got shorter while it was read") from error

    def _mark(self, name: str) -> None:
        entry: Any = tarfile.TarInfo(name)
        entry.mode = 0
        self._archive.addfile(entry)


def _xattrs(place: str | int) -> dict[str, bytes]:
    """The attributes of a path (not of what a link points to), or of an open file."""
    follow = isinstance(place, int)
    names = os.listxattr(place, follow_symlinks=follow)
    return {name: os.getxattr(place, name, follow_symlinks=follow) for name in names}
