"""Building from a directory on disk."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterable, Sequence
from functools import partial

import numpy as np

from nydus.build.blob import Piece, Sink
from nydus.build.layer import BuildOptions, LayerBuilder, LayerResult, device
from nydus.build.merge import Whiteout
from nydus.build.tree import TreeBuilder
from nydus.errors import NydusError
from nydus.rafs.model import Xattrs

#: Bytes of a file read at once and then cut into chunks. A multiple of every smaller chunk size.
_STEP = 1 << 20


def build_directory(
    path: str,
    sink: Sink,
    options: BuildOptions | None = None,
    prefetch: Iterable[bytes] = (),
    external: Collection[bytes] = (),
) -> LayerResult:
    """Build from a directory into a blob.

    Args:
        sink: gets the bytes of the blob in order.
        prefetch: absolute paths inside the image. With a prefetch policy the files at or below them come
            first in the blob.
        external: absolute paths inside the image to leave out, with directories that hold nothing else
            (:mod:`nydus.build.external`).

    Raises:
        NydusError: something cannot be read, or changes while it is.
    """
    options = options or BuildOptions()
    patterns = list(prefetch)
    layer = LayerBuilder(sink, options)
    with layer.writer:
        builder, files = scan(path, options, external)
        ordered, first = _file_order(builder, files, patterns)
        chunk_size = options.chunk_size
        step = max(_STEP, chunk_size)
        for position, number in enumerate(ordered):
            if position == first:
                layer.prefetch_end()
            size, name = files[number]
            builder.set_chunks(number, layer.writer.count, -(-size // chunk_size))
            for offset in range(0, size, step):
                length = min(step, size - offset)
                load = partial(_read, name, offset, length, chunk_size)
                layer.writer.add_later(load, -(-length // chunk_size), length, size <= chunk_size)
        if first == len(ordered):
            layer.prefetch_end()
        return layer.finish(builder, patterns)


def scan(
    path: str, options: BuildOptions, external: Collection[bytes] = ()
) -> tuple[TreeBuilder, dict[int, tuple[int, bytes]]]:
    """Walk a directory; returns its names, and size and path of each non-empty regular file by inode."""
    root = os.fsencode(path).rstrip(b"/") or b"/"
    files: dict[int, tuple[int, bytes]] = {}
    links: dict[tuple[int, int], int] = {}
    base = options.parent is None
    whiteout = options.whiteout
    emptied: list[int] = []
    try:
        status = os.stat(root)
        if not stat.S_ISDIR(status.st_mode):
            raise NydusError(f"{path}: not a directory")
        builder = TreeBuilder(device(os.major(status.st_rdev), os.minor(status.st_rdev)), path)
        add_inode(builder, status, root, options, 0)
        stack = [(0, root)]
        above: dict[int, tuple[int, bytes]] = {}
        while stack:
            directory, prefix = stack.pop()
            with os.scandir(prefix) as entries:
                for entry in entries:
                    name = entry.name
                    status = entry.stat(follow_symlinks=False)
                    if base and is_whiteout(whiteout, name, status):
                        continue
                    if external and b"/" + entry.path[len(root) :].lstrip(b"/") in external:
                        if not stat.S_ISDIR(status.st_mode):
                            emptied.append(directory)
                            continue
                        emptied.append(len(builder))
                    regular = stat.S_ISREG(status.st_mode)
                    if regular and status.st_nlink > 1:
                        key = (status.st_ino, status.st_dev)
                        known = links.get(key)
                        if known is not None:
                            builder.enter(directory, name, known)
                            continue
                    number = add_inode(builder, status, entry.path, options)
                    builder.enter(directory, name, number)
                    if regular:
                        if status.st_nlink > 1:
                            links[key] = number
                        if status.st_size:
                            files[number] = (status.st_size, entry.path)
                    elif stat.S_ISDIR(status.st_mode):
                        stack.append((number, entry.path))
                        if external:
                            above[number] = directory, name
    except OSError as error:
        where = os.fsdecode(error.filename) if error.filename else path
        raise NydusError(f"{where}: cannot be read: {error.strerror}") from None
    for number in emptied:
        while number in above and builder.is_empty(number):
            number, name = above.pop(number)
            builder.remove(number, name)
    return builder, files


def add_inode(
    builder: TreeBuilder,
    status: os.stat_result,
    name: bytes,
    options: BuildOptions,
    number: int | None = None,
    size: int | None = None,
) -> int:
    """Make an inode of a file on disk; the root (number 0) has no time in directory builds (rafs.md 2.5).

    Args:
        size: of a regular file, instead of its own.
    """
    kind = status.st_mode & 0o170000
    ns = 0 if number == 0 else status.st_mtime_ns
    length = status.st_size if size is None else size
    return builder.add_inode(
        status.st_mode,
        status.st_uid if options.owners else 0,
        status.st_gid if options.owners else 0,
        ns // 1_000_000_000,
        ns % 1_000_000_000,
        size=length if kind == stat.S_IFREG else 0,
        rdev=device(os.major(status.st_rdev), os.minor(status.st_rdev)),
        target=os.readlink(name) if kind == stat.S_IFLNK else b"",
        xattrs=_xattrs(name),
        number=number,
    )


def is_whiteout(spec: Whiteout, name: bytes, status: os.stat_result) -> bool:
    """Whether a file on disk says that a name of the layers below is gone."""
    if spec is Whiteout.OCI:
        return name.startswith(b".wh.")
    if spec is Whiteout.OVERLAYFS:
        return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
    return False


def _xattrs(path: bytes) -> Xattrs:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return ()
        raise
    if not names:
        return ()
    pairs = sorted((os.fsencode(name), os.getxattr(path, name, follow_symlinks=False)) for name in names)
    return tuple(pairs)


def _file_order(
    builder: TreeBuilder, files: dict[int, tuple[int, bytes]], patterns: Sequence[bytes]
) -> tuple[list[int], int]:
    """Inodes with data in the order of the blob, and how many of them are prefetched (rafs.md 3.1, 4.4)."""
    order = builder.number()
    rows = order.inodes.tolist()
    in_order = [number for number in dict.fromkeys(rows) if number in files]
    if not patterns:
        return in_order, 0
    children = {row: range(start, start + count) for row, start, count in order.first.tolist()}
    first: dict[int, None] = {}
    for pattern in patterns:
        row: int | None = 0
        for part in pattern.split(b"/"):
            if part:
                below = children.get(row, range(0)) if row is not None else range(0)
                row = next((child for child in below if order.names[child] == part), None)
        if row is None:
            continue
        inside = np.zeros(len(rows), bool)
        inside[row] = True
        stack = [row]
        while stack:
            below = children.get(stack.pop(), range(0))
            inside[below.start : below.stop] = True
            stack += [child for child in below if child in children]
        first.update(dict.fromkeys(rows[i] for i in np.flatnonzero(inside).tolist() if rows[i] in files))
    return [*first, *(number for number in in_order if number not in first)], len(first)


def _read(path: bytes, offset: int, size: int, chunk_size: int) -> list[Piece]:
    """The chunks of a part of a file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            block = os.pread(descriptor, size, offset)
            while len(block) < size:
                more = os.pread(descriptor, size - len(block), offset + len(block))
                if not more:
                    raise NydusError(f"{os.fsdecode(path)}: got shorter while it was read")
                block += more
        finally:
            os.close(descriptor)
    except OSError as error:
        raise NydusError(f"{os.fsdecode(path)}: cannot be read: {error.strerror}") from None
    if size <= chunk_size:
        return [block]
    view = memoryview(block)
    return [view[start : start + chunk_size] for start in range(0, size, chunk_size)]
