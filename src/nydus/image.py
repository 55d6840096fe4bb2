"""Images as Python objects: open one, look at its names, read files of it from wherever the blobs are.

    with nydus.open("bootstrap", "blobs/") as image:
        for directory, names, files in image.walk():
            ...
        image.read("/etc/os-release")

    nydus.create("rootfs/", "blobs/").save("bootstrap")
    nydus.merge(["lower/bootstrap", "upper/bootstrap"], "blobs/").save("merged")

Paths are absolute inside the image, ``str`` (other bytes than UTF-8 as surrogate escapes) or ``bytes``; those
returned are ``str``. Names that do not exist raise the exceptions that :mod:`os` raises for them; everything
else that can go wrong is a :class:`~nydus.errors.NydusError`: FormatError for wrong bytes, BackendError where
blobs cannot be had.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

from nydus import rafs
from nydus.errors import ConfigError, FormatError, NydusError
from nydus.rafs import ragged
from nydus.rafs.model import CHUNK, Array, BlobInfo, ChunkFlag, Tree

if TYPE_CHECKING:
    from nydus.build.layer import BuildOptions
    from nydus.build.merge import Whiteout
    from nydus.oci.place import SourcePlace
    from nydus.storage.backend import Backend
    from nydus.storage.reader import Buffer, ChunkReader

Name = str | bytes | os.PathLike[str]

#: Prefixes of images that are not files, as other tools write them.
TRANSPORTS = ("docker://", "oci:", "oci-archive:")
_MAX_SYMLINKS = 40
_READ_AHEAD = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """What an image says of one name.

    Attributes:
        path: absolute path.
        inode: the same for all names of one inode, different for different ones.
        mode: type and permissions, as ``st_mode``.
        size: bytes; of a symbolic link the length of its target.
        mtime, mtime_ns: seconds since 1970, and nanoseconds beyond them.
        nlink: names of the inode; of a directory 2 + child directories.
        device: (major, minor) of device files, else None.
        target: of a symbolic link, else "".
        xattrs: extended attributes by full name.
    """

    path: str
    inode: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    mtime_ns: int
    nlink: int
    device: tuple[int, int] | None
    target: str
    xattrs: dict[str, bytes]

    @property
    def name(self) -> str:
        """The last component; "" for the root."""
        return self.path.rpartition("/")[2]

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)


class Image:
    """A file system image and the source of its data. Thread-safe. Use :func:`open` to make one.

    Attributes:
        tree: all names and chunks as tables.
    """

    def __init__(
        self, tree: Tree, backend: Backend | None, *, owned: bool = True, stem: str = "", threads: int = 0
    ) -> None:
        self.tree = tree
        self._backend = backend
        self._owned = owned
        self._stem, self._threads = stem, threads
        self._reader: ChunkReader | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the blobs, unless the backend was the caller's."""
        if self._backend is not None and self._owned:
            self._backend.close()

    def with_tree(self, tree: Tree) -> Image:
        """Another tree over the same source of blobs, which stays this image's to close."""
        return Image(tree, self._backend, owned=False, stem=self._stem, threads=self._threads)

    @property
    def blobs(self) -> list[BlobInfo]:
        """The data blobs, in the order of the image's blob table."""
        return self.tree.blobs

    @property
    def reader(self) -> ChunkReader:
        """The verified chunks behind the files.

        Raises:
            NydusError: the image was opened without a source of blobs.
        """
        if self._reader is None:
            if self._backend is None:
                raise NydusError("the image was opened without a source of its blobs")
            from nydus.storage.reader import ChunkReader

            self._reader = ChunkReader(self.tree, self._backend, meta_id=self._stem, threads=self._threads)
        return self._reader

    # Names

    def row(self, path: Name, *, follow: bool = True) -> int:
        """The row of a path in ``tree.nodes``; symbolic links are followed inside the image.

        Args:
            follow: also where the last component is one.

        Raises:
            FileNotFoundError, NotADirectoryError, OSError (too many symbolic links).
        """
        tree = self.tree
        todo = _split(os.fsencode(path))
        followed = 0
        row = 0
        while todo:
            part = todo.pop()
            if part == b"..":
                row = int(tree.nodes["parent"][row])
                continue
            if not stat.S_ISDIR(int(tree.nodes["mode"][row])):
                raise _missing(errno.ENOTDIR, path)
            child = _child(tree, row, part)
            if child is None:
                raise _missing(errno.ENOENT, path)
            if stat.S_ISLNK(int(tree.nodes["mode"][child])) and (todo or follow):
                followed += 1
                if followed > _MAX_SYMLINKS:
                    raise _missing(errno.ELOOP, path)
                target = tree.target(child)
                row = 0 if target.startswith(b"/") else row
                todo += _split(target)
            else:
                row = child
        return row

    def exists(self, path: Name) -> bool:
        """Whether a path leads to something; a dangling symbolic link does not."""
        try:
            self.row(path)
        except OSError:
            return False
        return True

    def stat(self, path: Name, *, follow_symlinks: bool = True) -> Entry:
        """The attributes of a path, or of the symbolic link that it names itself."""
        return self.entry(self.row(path, follow=follow_symlinks))

    def entry(self, row: int) -> Entry:
        """The attributes of a row of ``tree.nodes``."""
        tree = self.tree
        node = tree.nodes[row]
        mode, rdev = int(node["mode"]), int(node["rdev"])
        special = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        return Entry(
            path=os.fsdecode(tree.path(row)),
            inode=int(node["link"]) + 1,
            mode=mode,
            uid=int(node["uid"]),
            gid=int(node["gid"]),
            size=int(node["size"]),
            mtime=int(node["mtime"]),
            mtime_ns=int(node["mtime_ns"]),
            nlink=int(node["nlink"]),
            device=device_numbers(rdev) if special else None,
            target=os.fsdecode(tree.target(row)) if stat.S_ISLNK(mode) else "",
            xattrs={os.fsdecode(name): value for name, value in tree.node_xattrs(row)},
        )

    def _directory(self, path: Name) -> int:
        row = self.row(path)
        if not stat.S_ISDIR(int(self.tree.nodes["mode"][row])):
            raise _missing(errno.ENOTDIR, path)
        return row

    def listdir(self, path: Name = "/") -> list[str]:
        """The names in a directory, in raw byte order."""
        return [os.fsdecode(self.tree.name(row)) for row in self.tree.children(self._directory(path))]

    def scandir(self, path: Name = "/") -> Iterator[Entry]:
        """The entries of a directory; symbolic links are not followed."""
        for row in self.tree.children(self._directory(path)):
            yield self.entry(row)

    def walk(self, top: Name = "/") -> Iterator[tuple[str, list[str], list[str]]]:
        """(directory, names of directories in it, all other names) from the top down, as :func:`os.walk`."""
        tree = self.tree
        directories = (tree.nodes["mode"] & 0o170000) == stat.S_IFDIR
        stack = [self._directory(top)]
        while stack:
            row = stack.pop()
            children = tree.children(row)
            below = [child for child in children if directories[child]]
            others = [os.fsdecode(tree.name(child)) for child in children if not directories[child]]
            yield os.fsdecode(tree.path(row)), [os.fsdecode(tree.name(child)) for child in below], others
            stack.extend(reversed(below))

    def readlink(self, path: Name) -> str:
        """The target of a symbolic link."""
        row = self.row(path, follow=False)
        if not stat.S_ISLNK(int(self.tree.nodes["mode"][row])):
            raise _missing(errno.EINVAL, path)
        return os.fsdecode(self.tree.target(row))

    # Data

    def file(self, path: Name) -> int:
        """The row of a regular file; symbolic links are followed."""
        row = self.row(path)
        mode = int(self.tree.nodes["mode"][row])
        if not stat.S_ISREG(mode):
            raise _missing(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, path)
        return row

    def read(self, path: Name, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a regular file: ``size`` of them from ``offset`` on, fewer at its end; all by default."""
        return b"".join(self.stream(path, offset, size))

    def stream(self, path: Name, offset: int = 0, size: int | None = None) -> Iterator[Buffer]:
        """The same bytes as a sequence of buffers, in bounded memory."""
        return self.stream_row(self.file(path), offset, size)

    def stream_row(self, row: int, offset: int = 0, size: int | None = None) -> Iterator[Buffer]:
        """:meth:`stream` by row of ``tree.nodes``."""
        if offset < 0 or (size is not None and size < 0):
            raise ValueError(f"invalid range {offset}+{size}")
        length = int(self.tree.nodes["size"][row])
        end = length if size is None else min(offset + size, length)
        if offset >= end:
            return
        chunks = self.tree.node_chunks(row)
        starts, sizes = chunks["file_offset"].astype(np.int64), chunks["usize"].astype(np.int64)
        self._check_file(row, starts, sizes, length)
        first = int(np.searchsorted(starts, offset, side="right")) - 1
        last = int(np.searchsorted(starts, end, side="left"))
        part = chunks[first:last]
        at = int(starts[first])
        for data in self.reader.stream(part["blob_index"], part["index"]):
            low, high = max(offset - at, 0), min(end - at, len(data))
            yield data if high - low == len(data) else memoryview(data)[low:high]
            at += len(data)

    def _check_file(self, row: int, starts: Array, sizes: Array, length: int) -> None:
        ends = np.append(0, np.cumsum(sizes))
        if int(ends[-1]) != length or (ends[:-1] != starts).any():
            raise FormatError(
                "the chunks of a file are not its size",
                where=os.fsdecode(self.tree.path(row)),
                found=int(ends[-1]),
                expected=length,
            )

    def stream_rows(self, rows: Sequence[int]) -> Iterator[Buffer]:
        """The chunks of many regular files one after the other; the boundaries follow from their sizes.

        Far faster for many small files than one :meth:`stream_row` for each.
        """
        nodes, chunks = self.tree.nodes[np.asarray(rows, np.int64)], self.tree.chunks
        places = ragged.indexes(nodes["chunk"], nodes["chunk_count"])
        ends = np.append(0, np.cumsum(chunks["usize"][places], dtype=np.int64))
        last = np.cumsum(nodes["chunk_count"], dtype=np.int64)
        wrong = ends[last] - ends[last - nodes["chunk_count"]] != nodes["size"].astype(np.int64)
        if wrong.any():
            raise FormatError(
                "the chunks of a file are not its size",
                where=os.fsdecode(self.tree.path(int(rows[int(np.argmax(wrong))]))),
            )
        return self.reader.stream(chunks["blob_index"][places], chunks["index"][places])

    def open(self, path: Name) -> io.BufferedReader:
        """A regular file as a seekable binary file object."""
        return io.BufferedReader(_File(self, self.file(path)), _READ_AHEAD)

    def chunks(self, path: Name) -> Array:
        """The chunks of a regular file in file order: :data:`~nydus.rafs.model.CHUNK` rows.

        Where the image was opened with its blobs, all columns are filled in from their chunk tables.
        """
        chunks = self.tree.node_chunks(self.file(path)).copy()
        if self._backend is not None:
            for number in np.unique(chunks["blob_index"]).tolist():
                mine = chunks["blob_index"] == number
                table = chunk_records(self, number)
                for column in ("digest", "flags", "csize", "coffset", "crc"):
                    chunks[column][mine] = table[column][chunks["index"][mine]]
        return chunks

    # Writing

    def bootstrap(self) -> bytes:
        """The image's metadata as a bootstrap file of its version."""
        from nydus.build.layer import write_bootstrap

        return write_bootstrap(self.tree)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bootstrap to a file, which appears whole or not at all."""
        from nydus.build.output import write_file

        write_file(os.fspath(path), self.bootstrap())


class _File(io.RawIOBase):
    """Reads one regular file of an image."""

    def __init__(self, image: Image, row: int) -> None:
        self._image, self._row = image, row
        self._size = int(image.tree.nodes["size"][row])
        self._position = 0
        self.name = os.fsdecode(image.tree.path(row))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative seek position {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        for data in self._image.stream_row(self._row, self._position, len(view)):
            view[done : done + len(data)] = data
            done += len(data)
        self._position += done
        return done

    def readall(self) -> bytes:
        data = b"".join(self._image.stream_row(self._row, self._position))
        self._position += len(data)
        return data


def open(
    bootstrap: str | os.PathLike[str] | bytes | bytearray | memoryview | Tree,
    blobs: str | os.PathLike[str] | Backend | Mapping[str, Any] | None = None,
    *,
    threads: int = 0,
    plain_http: bool = False,
    insecure: bool = False,
    platform: str = "",
) -> Image:
    """Open an image.

    Args:
        bootstrap: path of a bootstrap file, or of a blob that holds its bootstrap; the bytes of a bootstrap;
            a tree; or where an image lies: ``docker://HOST/REPOSITORY:TAG``, ``oci:DIRECTORY[:TAG]`` (a
            layout) or ``oci-archive:FILE[:TAG]``.
        blobs: where the data are: a directory with a file for each blob id, one file that holds them all, a
            :class:`~nydus.storage.backend.Backend` (stays the caller's to close), or a configuration as of
            ``device.backend`` (``{"type": "registry", "config": {...}}``), or the daemon configuration that
            contains it. By default the directory of the bootstrap, or the place that the image lies in.
        threads: that decode at the same time; 0 for what the machine has, at most 4.
        plain_http, insecure: speak http to the registry; accept any TLS certificate.
        platform: ``OS/ARCHITECTURE[/VARIANT]`` of the image to take of an index; this machine's by default.

    Raises:
        NydusError: the bootstrap cannot be read. FormatError: it is damaged. ConfigError: unknown ``blobs``,
        or not a Nydus image. BackendError: the registry refuses.
    """
    stem = ""
    if isinstance(bootstrap, Tree):
        tree = bootstrap
    elif isinstance(bootstrap, str) and bootstrap.startswith(TRANSPORTS):
        from nydus.convert.opened import open_nydus
        from nydus.convert.select import parse_platform

        place = _place(bootstrap, plain_http, insecure)
        opened = open_nydus(place, parse_platform(platform) if platform else None)
        tree = opened.tree
        blobs = opened.backend if blobs is None else blobs
    elif isinstance(bootstrap, str | os.PathLike):
        from nydus.build import bootstrap as files

        path = os.fspath(bootstrap)
        tree, stem = files.load(path), files.stem(path)
        blobs = os.path.dirname(path) or "." if blobs is None else blobs
    else:
        tree = rafs.read(bootstrap)
    if blobs is None:
        return Image(tree, None)
    backend, owned = open_backend(blobs)
    return Image(tree, backend, owned=owned, stem=stem, threads=threads)


def _place(name: str, plain_http: bool, insecure: bool) -> SourcePlace:
    from nydus.oci import place, reference

    transport, _, rest = name.partition(":")
    if transport == "docker":
        parsed = reference.parse(rest.removeprefix("//"))
        return place.registry_place(parsed, plain_http=plain_http, insecure=insecure)
    file, colon, tag = rest.rpartition(":")
    path = Path(file if colon else rest)
    kind = place.LayoutPlace if transport == "oci" else place.ArchivePlace
    return kind(path, tag if colon else "", name)


def open_backend(blobs: str | os.PathLike[str] | Backend | Mapping[str, Any]) -> tuple[Backend, bool]:
    """The backend of a source of blobs as :func:`open` takes it, and whether it is the caller's to close."""
    from nydus.storage import backends

    if isinstance(blobs, str | os.PathLike):
        path = os.fspath(blobs)
        return backends.create("localfs", {"dir" if Path(path).is_dir() else "blob_file": path}), True
    if not isinstance(blobs, Mapping):
        return blobs, False
    section = blobs
    for key in ("config_v2", "device", "backend"):
        if isinstance(section.get(key), Mapping):
            section = section[key]
    legacy = section.get("config")
    if isinstance(legacy, Mapping) and "backend_type" in legacy:  # a blob cache entry
        section = {"type": legacy["backend_type"], "config": legacy.get("backend_config")}
    kind = section.get("type")
    config = section.get("config", section.get(str(kind)))
    if not isinstance(kind, str) or not isinstance(config, Mapping):
        raise ConfigError("a source of blobs needs 'type' and 'config'")
    return backends.create(kind, dict(config)), True


def create(
    source: str | os.PathLike[str] | BinaryIO,
    blobs: str | os.PathLike[str],
    *,
    prefetch: Iterable[bytes] = (),
    options: BuildOptions | None = None,
    **fields: Any,
) -> Image:
    """Build an image from a directory or a tar stream.

    Args:
        source: a directory; a tar file (plain, gzip or zstd) by its path; or a stream of one.
        blobs: existing directory in which the new blob gets the name of its id.
        prefetch: absolute paths to have at hand first, in order of importance.
        options: how to build; ``fields`` are those of :class:`~nydus.build.layer.BuildOptions`.

    Returns:
        The image, reading from ``blobs``; :meth:`Image.save` writes its bootstrap.

    Raises:
        FormatError: the source is damaged. ConfigError: impossible options. NydusError: it cannot be read, or
        the blob cannot be written.
    """
    from nydus.build.directory import build_directory
    from nydus.build.layer import BuildOptions, build_layer
    from nydus.build.output import Output

    try:
        chosen = options or BuildOptions(**fields)
    except TypeError as error:
        raise ConfigError(f"unknown build option: {error}") from None
    folder = os.fspath(blobs)
    with Output(folder, directory=True, mode=0o600) as out:
        if not isinstance(source, str | os.PathLike):
            result = build_layer(source, out.write, chosen, prefetch)
        elif Path(path := os.fspath(source)).is_dir():
            result = build_directory(path, out.write, chosen, prefetch)
        else:
            try:
                with Path(path).open("rb", buffering=0) as stream:
                    result = build_layer(stream, out.write, chosen, prefetch, path)
            except OSError as error:
                raise NydusError(f"{path}: cannot be read: {error.strerror}") from None
        if result.blob_size:
            out.commit(result.blob.id if result.blob is not None else result.blob_id)
    return open(result.tree, folder)


def merge(
    layers: Sequence[str | os.PathLike[str] | bytes | Tree | Image],
    blobs: str | os.PathLike[str] | Backend | Mapping[str, Any] | None = None,
    *,
    whiteout: Whiteout | None = None,
) -> Image:
    """The file system that layers give when they are laid over each other.

    Args:
        layers: lowest first, each as :func:`open` takes it or an image.
        blobs: where the data of all of them are.
        whiteout: how a layer says that a lower name is gone; OCI's ``.wh.`` names by default.

    Raises:
        InconsistentLayers: they were built in different ways. FormatError: one is damaged.
    """
    from nydus.build.merge import Whiteout, overlay
    from nydus.build.merge import merge as merge_layers

    trees = [layer.tree if isinstance(layer, Image) else open(layer).tree for layer in layers]
    oci = whiteout is None or whiteout is Whiteout.OCI
    tree = merge_layers(trees) if oci or whiteout is None else overlay(trees, whiteout)
    return open(tree, blobs)


def chunk_records(image: Image, blob: int) -> Array:
    """Every chunk of a blob as a :data:`~nydus.rafs.model.CHUNK` row, by index (``file_offset`` is 0)."""
    table = image.reader.chunk_map(blob)
    result = np.zeros(len(table), CHUNK)
    result["blob_index"], result["index"] = blob, np.arange(len(table))
    for name in ("uoffset", "usize", "coffset", "csize", "crc"):
        result[name] = getattr(table, name)
    result["flags"] = table.flags.astype(np.uint32) & ~np.uint32(ChunkFlag.ZRAN)
    if table.digests is not None:
        result["digest"] = np.ascontiguousarray(table.digests).view("V32").reshape(-1)
    return result


def device_numbers(rdev: int) -> tuple[int, int]:
    """(major, minor) of a device number in the 32-bit encoding of Linux."""
    return rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00


def _split(path: bytes) -> list[bytes]:
    """The components of a path, last first."""
    return [part for part in reversed(path.split(b"/")) if part not in (b"", b".")]


def _child(tree: Tree, row: int, name: bytes) -> int | None:
    children = tree.children(row)
    low, high = children.start, children.stop
    while low < high:
        middle = (low + high) // 2
        if tree.name(middle) < name:
            low = middle + 1
        else:
            high = middle
    return low if low < children.stop and tree.name(low) == name else None


def _missing(code: int, path: Name) -> OSError:
    # OSError picks FileNotFoundError and its siblings by the code.
    return OSError(code, os.strerror(code), os.fsdecode(path))
