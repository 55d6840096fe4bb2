"""What a container reads first, as the tools that watch one write it down."""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Iterable

import msgspec

from nydus import image as images
from nydus import rafs
from nydus.build.optimize import PrefetchFile, parse_prefetch_files
from nydus.errors import ConfigError
from nydus.rafs.model import Tree

_MAX_TRACE = 64 << 20


class _Access(msgspec.Struct):
    """A line of the optimizer: the first access to a file."""

    path: str


class _Pattern(msgspec.Struct):
    """A record of ``/api/v1/metrics/pattern`` of a daemon; ``ino`` is the inode number in the bootstrap."""

    ino: int
    first_access_time_secs: int = 0
    first_access_time_nanos: int = 0


def read_trace(data: bytes, where: str, bootstrap: bytes) -> list[PrefetchFile]:
    """The files of a trace in the order of their first use. The format is told by the content:

    * ``{"version": "v1", "files": [{"path": …, "ranges": [[offset, size], …]}]}``, as of ``nydus-image``,
    * ``["/path", …]``,
    * ``path,size,elapsed`` lines of the snapshotter's optimizer, with that header, or its JSON lines,
    * one path on each line,
    * what ``/api/v1/metrics/pattern`` of a daemon says of this image.

    Args:
        where: name of the trace, for messages.
        bootstrap: of the image; inode numbers are looked up in it.

    Raises:
        ConfigError: it is none of them.
    """
    if len(data) > _MAX_TRACE:
        raise ConfigError(f"{where}: larger than {_MAX_TRACE} bytes")
    text = data.strip()
    try:
        if text.startswith(b"["):
            records = msgspec.json.decode(text, type=list[_Pattern | str])
            paths = [record for record in records if isinstance(record, str)]
            accesses = [record for record in records if isinstance(record, _Pattern)]
            return _files([*paths, *_of_inodes(accesses, bootstrap)], where)
        if text.startswith(b"{"):
            if b'"files"' in text or b'"version"' in text:
                return parse_prefetch_files(text, where)
            return _files((msgspec.json.decode(line, type=_Access).path for line in text.splitlines()), where)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not a list of files: {error}") from None
    lines = os.fsdecode(text)
    if lines.startswith("path,"):
        try:
            return _files([row["path"] for row in csv.DictReader(io.StringIO(lines)) if row["path"]], where)
        except csv.Error as error:
            raise ConfigError(f"{where}: not a CSV file: {error}") from None
    return _files([line.strip() for line in lines.splitlines() if line.strip()], where)


def _files(paths: Iterable[str], where: str) -> list[PrefetchFile]:
    found = list(dict.fromkeys(paths))
    for path in found:
        if not path.startswith("/") or "\0" in path:
            raise ConfigError(f"{where}: {path[:200]!r} is not an absolute path")
    return [PrefetchFile(path) for path in found]


def _of_inodes(records: list[_Pattern], bootstrap: bytes) -> list[str]:
    if not records:
        return []
    if rafs.detect(bootstrap) == 6:
        from nydus.rafs.buffer import Buffer
        from nydus.rafs.v6.reader import Reader

        reader = Reader(Buffer(bootstrap, "bootstrap"), rafs.superblock(bootstrap))
        tree = reader.tree()
        rows = {nid: row for row, nid in reversed(list(enumerate(reader.nids.tolist())))}
    else:
        tree = rafs.read(bootstrap)
        rows = {row + 1: row for row in range(len(tree))}
    records = sorted(records, key=lambda each: (each.first_access_time_secs, each.first_access_time_nanos))
    return [os.fsdecode(tree.path(rows[record.ino])) for record in records if record.ino in rows]


def resolve(files: Iterable[PrefetchFile], tree: Tree) -> tuple[list[PrefetchFile], list[str]]:
    """The regular files that a trace means: symbolic links followed, directories with all that is in them.

    Returns:
        Those that the image has, each once, and the paths that it does not have.
    """
    image = images.Image(tree, None)
    found: dict[str, PrefetchFile] = {}
    missing = []
    for file in files:
        try:
            row = image.row(file.path)
        except OSError:
            missing.append(file.path)
            continue
        mode = int(tree.nodes["mode"][row])
        path = os.fsdecode(tree.path(row))
        if stat.S_ISREG(mode):
            found.setdefault(path, PrefetchFile(path, file.ranges))
        elif stat.S_ISDIR(mode):
            for folder, _, names in image.walk(path):
                for name in names:
                    inside = f"{folder.rstrip('/')}/{name}"
                    if stat.S_ISREG(image.stat(inside, follow_symlinks=False).mode):
                        found.setdefault(inside, PrefetchFile(inside))
    return list(found.values()), missing
