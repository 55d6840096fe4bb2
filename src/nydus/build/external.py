"""Files whose data lie in blobs that were there before: only a bootstrap is made of them; rafs.md 4.7.

Which files, and where their data are, says an attributes file in the syntax of ``gitattributes``, with a line
``PATH type=external KEY=VALUE…`` for each:

* ``blob_index``, ``blob_id`` and ``compressed_size``: number, sha256 and length of the blob
* ``chunk_0_compressed_offset``: where in the blob the file starts
* ``chunk_size``: pieces in which the file is read; ``crcs`` (may be left out) are the CRC-32C of these pieces
* ``file_size`` (may be left out): the length of the file where the one in the directory is an empty stand-in
"""

from __future__ import annotations

import logging
import os
import re
import stat
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from nydus.build.blob import MAX_CHUNKS, HashingSink, Sink
from nydus.build.directory import add_inode, is_whiteout
from nydus.build.layer import BuildOptions, LayerResult, device, super_flags, write_bootstrap
from nydus.build.merge import MAX_BLOBS
from nydus.build.sections import SectionWriter
from nydus.build.tree import TreeBuilder
from nydus.errors import ConfigError, FormatError, NydusError
from nydus.rafs import blobmeta, checks, ragged
from nydus.rafs.model import CHUNK, BlobFeature, BlobInfo, ChunkFlag, Compression, Tree

log = logging.getLogger(__name__)

_SUFFIXES = {"": 1, "b": 1} | {
    prefix + unit: base**power
    for power, letter in enumerate("kmgt", 1)
    for prefix, base, units in ((letter, 1000, ("", "b")), (letter + "i", 1024, ("", "b")))
    for unit in units
}
_ESCAPE = re.compile(rb"\\([abfnrtv\"\\]|[0-7]{1,3})")
_ESCAPES = {b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}
_LOCATION = ("blob_index", "blob_id", "chunk_size", "chunk_0_compressed_offset", "compressed_size")


@dataclass(frozen=True, slots=True)
class Location:
    """Where the bytes of a file are.

    Attributes:
        blob_index, blob_id: number and sha256 (hex) of the blob; ``blob_size`` is its length in bytes.
        chunk_size: bytes of each piece but the last, a power of two.
        offset: of the first piece in the blob.
        crcs: CRC-32C of each piece; empty if they are not known.
    """

    blob_index: int
    blob_id: str
    blob_size: int
    chunk_size: int
    offset: int
    crcs: tuple[int, ...] = ()


class Attributes:
    """The external names of an attributes file.

    Attributes:
        names: absolute paths with the number of their lines.

    Raises (all methods):
        FormatError: a line, or a value in one, that is not in the form it should have.
    """

    def __init__(self, data: bytes, where: str = "") -> None:
        self._where = where
        self._values: dict[bytes, dict[str, str]] = {}
        self.names: dict[bytes, int] = {}
        for number, line in enumerate(data.splitlines(), 1):
            line = line.strip()
            if not line or line.startswith((b"#", b"[attr]")):
                continue
            path, rest = self._path(line, number)
            values = dict(_values(rest.decode("utf-8", "replace")))
            if values.get("type") == "external":
                self._values[path], self.names[path] = values, number
            elif path in self.names:  # the last line for a name counts
                del self._values[path], self.names[path]

    def size(self, path: bytes) -> int:
        """The size of a file that is only a stand-in; 0 if the attributes do not say."""
        return self._number(path, "file_size", 1 << 44) if "file_size" in self._values[path] else 0

    def location(self, path: bytes, size: int) -> Location:
        """Where a file of ``size`` bytes is."""
        values = self._values[path]
        for key in _LOCATION:
            if key not in values:
                raise self._fail(path, f"{key} is missing")
        blob_id = values["blob_id"]
        if not re.fullmatch("[0-9a-f]{64}", blob_id):
            raise self._fail(path, "blob_id is not a sha256", blob_id, "64 hex digits")
        chunk_size = _size(values["chunk_size"])
        if (
            chunk_size is None
            or chunk_size & (chunk_size - 1)
            or not (checks.MIN_CHUNK_SIZE <= chunk_size <= checks.MAX_UNIT)
        ):
            text = "a power of two from 4KiB to 64MiB (4MB is 4,000,000 bytes)"
            raise self._fail(path, "chunk_size cannot be used", values["chunk_size"], text)
        found = Location(
            self._number(path, "blob_index", MAX_BLOBS - 1),
            blob_id,
            self._number(path, "compressed_size", checks.MAX_COMPRESSED),
            chunk_size,
            self._number(path, "chunk_0_compressed_offset", checks.MAX_COMPRESSED),
            tuple(self._crcs(path, values["crcs"])) if "crcs" in values else (),
        )
        if found.offset + size > found.blob_size:
            text = f"at least {found.offset} + {size}"
            raise self._fail(path, "the file reaches beyond its blob", found.blob_size, text)
        count = -(-size // chunk_size)
        if found.crcs and len(found.crcs) != count:
            raise self._fail(path, "crcs does not fit the number of chunks", len(found.crcs), count)
        return found

    def _path(self, line: bytes, number: int) -> tuple[bytes, bytes]:
        if line.startswith(b'"'):
            closed = re.match(rb'"((?:[^"\\]|\\.)*)"(?=\s|$)', line)
            if closed is None:
                raise FormatError("a quoted path does not end", where=f"{self._where}: line {number}")
            path, rest = _ESCAPE.sub(_unescape, closed[1]), line[closed.end() :]
        else:
            path, _, rest = line.replace(b"\t", b" ").partition(b" ")
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        if b".." in parts or not parts or path.startswith(b"!") or b"\0" in path:
            raise FormatError("not a path", where=f"{self._where}: line {number}", found=path)
        return b"/" + b"/".join(parts), rest

    def _number(self, path: bytes, key: str, limit: int) -> int:
        text = self._values[path][key]
        if not (text.isascii() and text.isdigit()) or len(text) > 20 or int(text) > limit:
            raise self._fail(path, f"{key} cannot be used", text, f"a number up to {limit}")
        return int(text)

    def _crcs(self, path: bytes, text: str) -> Iterator[int]:
        for item in text.split(","):
            digits = item.strip().removeprefix("0x")
            if not re.fullmatch("[0-9a-fA-F]{1,8}", digits):
                raise self._fail(path, "crcs cannot be used", item, "hexadecimal numbers of 32 bits")
            yield int(digits, 16)

    def _fail(self, path: bytes, what: str, found: object = None, expected: object = None) -> FormatError:
        where = f"{self._where}: line {self.names[path]}"
        return FormatError(f"{os.fsdecode(path)}: {what}", where=where, found=found, expected=expected)


def _unescape(match: re.Match[bytes]) -> bytes:
    found = match[1]
    return bytes([int(found, 8) & 0xFF]) if found[0] in b"01234567" else _ESCAPES.get(found, found)


def _values(text: str) -> Iterator[tuple[str, str]]:
    for item in text.split():
        key, _, value = item.partition("=")
        if not key.startswith(("-", "!")):
            yield key, value


def _size(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,15})\s*([a-z]*)", text.strip().lower())
    unit = _SUFFIXES.get(match[2]) if match else None
    return int(match[1]) * unit if match and unit else None


def load(path: str) -> Attributes:
    """Read an attributes file. Raises NydusError where it cannot be read, FormatError where it is wrong."""
    try:
        with open(path, "rb") as file:
            return Attributes(file.read(), path)
    except OSError as error:
        raise NydusError(f"{path}: cannot be read: {error.strerror}") from None


def build_external(path: str, attributes: Attributes, sink: Sink, options: BuildOptions) -> LayerResult:
    """The external names of a directory, and the directories that lead to them, as an image of their own.

    Args:
        sink: gets the bootstrap, where it is to be inline. There is no data.
        options: those of the layer. Chunks are neither shared nor compressed nor encrypted.

    Raises:
        FormatError: attributes that do not fit the files, or each other.
        NydusError: something cannot be read.
    """
    options = replace(options, parent=None, dictionary=None, encrypt=False, batch_size=0)
    try:
        builder, files = _scan(os.fsencode(path), attributes, options)
    except OSError as error:
        where = os.fsdecode(error.filename) if error.filename else path
        raise NydusError(f"{where}: cannot be read: {error.strerror}") from None
    tree = _tree(builder, files, attributes, options)
    out = HashingSink(sink)
    result = LayerResult(tree, write_bootstrap(tree))
    if options.inline_meta:
        sections = SectionWriter(out, True)
        sections.bootstrap(result.bootstrap, Compression.ZSTD if options.toc else Compression.NONE)
        if options.toc:
            result.toc_digest, result.toc_size = sections.contents()
    result.seal(out)
    return result


def _scan(
    root: bytes, attributes: Attributes, options: BuildOptions
) -> tuple[TreeBuilder, dict[int, tuple[bytes, int]]]:
    """The names; and path and size of each file with data by inode."""
    status = os.stat(root)
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{os.fsdecode(root)} is not a directory")
    builder = TreeBuilder(device(os.major(status.st_rdev), os.minor(status.st_rdev)), os.fsdecode(root))
    add_inode(builder, status, root, options, 0)
    directories = {b"": 0}
    links: dict[tuple[int, int], int] = {}
    files: dict[int, tuple[bytes, int]] = {}

    def place(path: bytes) -> tuple[int, os.stat_result] | None:
        """The directory of a path, and what is there."""
        prefix, _, name = path.rpartition(b"/")
        if prefix not in directories:
            above = place(prefix)
            if above is None or not stat.S_ISDIR(above[1].st_mode):
                return None
            number = add_inode(builder, above[1], root + prefix, options)
            builder.enter(above[0], prefix.rpartition(b"/")[2], number)
            directories[prefix] = number
        try:
            status = os.lstat(root + path)
        except FileNotFoundError:
            return None
        return None if is_whiteout(options.whiteout, name, status) else (directories[prefix], status)

    missing = 0
    for path in sorted(attributes.names):
        found = place(path)
        if found is None:
            missing += 1
            continue
        directory, status = found
        regular = stat.S_ISREG(status.st_mode)
        key = (status.st_ino, status.st_dev)
        if stat.S_ISDIR(status.st_mode) and path in directories:
            continue
        number = links.get(key) if regular and status.st_nlink > 1 else None
        if number is None:
            size = status.st_size or attributes.size(path) if regular else 0
            number = add_inode(builder, status, root + path, options, size=size)
            if size:
                files[number] = path, size
            if regular:
                links[key] = number
        builder.enter(directory, path.rpartition(b"/")[2], number)
        if stat.S_ISDIR(status.st_mode):
            directories[path] = number
    if missing:
        log.warning("%d external names are not in %s", missing, os.fsdecode(root))
    return builder, files


def _tree(
    builder: TreeBuilder,
    files: Mapping[int, tuple[bytes, int]],
    attributes: Attributes,
    options: BuildOptions,
) -> Tree:
    places: dict[int, Location] = {}
    columns = {name: array("Q") for name in ("blob_index", "coffset", "usize", "flags", "crc")}
    counts: list[int] = []
    chunk_count = 0
    for number in dict.fromkeys(builder.number().inodes.tolist()):
        if number not in files:
            continue
        path, size = files[number]
        where = attributes.location(path, size)
        known = places.setdefault(where.blob_index, where)
        if (known.blob_id, known.blob_size) != (where.blob_id, where.blob_size):
            raise FormatError(
                f"{os.fsdecode(path)}: blob {where.blob_index} is another one for other files",
                found=(where.blob_id, where.blob_size),
                expected=(known.blob_id, known.blob_size),
            )
        starts = range(0, size, where.chunk_size)
        if options.version == 6 and len(starts) > 1 and where.chunk_size % options.chunk_size:
            raise FormatError(
                f"{os.fsdecode(path)}: chunks of {where.chunk_size:#x} bytes are no multiple of the image's; "
                f"build with --chunk-size {where.chunk_size:#x}",
                found=hex(options.chunk_size),
            )
        builder.set_chunks(number, chunk_count, len(starts))
        counts.append(len(starts))
        chunk_count += len(starts)
        if chunk_count > MAX_CHUNKS:
            raise FormatError("a blob cannot have more chunks", expected=MAX_CHUNKS)
        columns["blob_index"].extend([where.blob_index] * len(starts))
        columns["coffset"].extend(where.offset + start for start in starts)
        columns["usize"].extend(min(where.chunk_size, size - start) for start in starts)
        columns["flags"].extend([int(ChunkFlag.HAS_CRC) if where.crcs else 0] * len(starts))
        columns["crc"].extend(where.crcs or [0] * len(starts))
        if where.chunk_size > known.chunk_size:
            places[where.blob_index] = where
    table = np.zeros(chunk_count, CHUNK)
    for name, values in columns.items():
        table[name] = np.array(values, np.uint64)
    table["csize"], table["uoffset"] = table["usize"], table["coffset"]
    blobs = []
    # Numbers that no file uses are left out: an image has no blob without chunks.
    given = table["blob_index"].copy()
    for index, number in enumerate(sorted(places)):
        rows = np.flatnonzero(given == number)
        table["blob_index"][rows], table["index"][rows] = index, np.arange(len(rows))
        blobs.append(_blob(places[number], len(rows), options))
        if options.version == 6:
            # EROFS needs places at block boundaries; the stored ones are where a tar archive had room.
            table["uoffset"][rows], blobs[-1].uncompressed_size = blobmeta.own_places(table[rows])
    tree = builder.finish(
        options.version, options.chunk_size, super_flags(options), table, np.arange(chunk_count), blobs
    )
    tree.chunks["file_offset"] = ragged.offsets_within(tree.chunks["usize"], np.array(counts, np.int64))
    return tree


def _blob(place: Location, chunk_count: int, options: BuildOptions) -> BlobInfo:
    features = BlobFeature.EXTERNAL | BlobFeature.CAP_TAR_TOC
    if options.version == 6:
        features |= BlobFeature.ALIGNED
    if options.inline_meta:
        features |= BlobFeature.INLINED_FS_META | BlobFeature.HAS_TAR_HEADER
    return BlobInfo(
        place.blob_id,
        place.chunk_size,
        chunk_count=chunk_count,
        compression=Compression.NONE,
        digester=options.digester,
        features=features,
        compressed_size=place.blob_size,
        uncompressed_size=place.blob_size,
    )
