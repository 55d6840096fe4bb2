"""Layers that were converted before: found again by source layer and options, and taken over as they are.

The record is a folder of small files, one for each layer and set of options. What it says is believed only as
far as the target confirms it: the blob must be there, and the tables read from its end must have the recorded
digests.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from nydus import __version__
from nydus.convert.copy import copy_blob
from nydus.convert.options import ConvertOptions
from nydus.convert.progress import LayerProgress
from nydus.errors import FormatError, NydusError
from nydus.oci import model
from nydus.oci.auth import home
from nydus.oci.place import Sink, Source

if TYPE_CHECKING:
    from nydus.convert.job import Converted

#: Changes whenever the builder gives other bytes for the same options.
_FORMAT = 2
#: Files in one folder; beyond, the older half goes.
_MOST = 4096
#: Of the tables of a layer, as they are stored, that are read at once.
_MAX_TABLES = 64 << 20

#: A sha256 (hex), or "" for none.
Hex = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]
#: The bytes of a path as Latin-1.
Latin1 = Annotated[str, msgspec.Meta(pattern="^[\\x00-\\xff]*$")]


class Known(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A converted layer.

    Attributes:
        digest, size: of the blob.
        bootstrap: sha256 (hex) of the bootstrap within it.
        toc, toc_size: sha256 (hex) and size of its table of contents; "" and 0 without one.
        repository: ``host/name`` where it was stored last.
        source: digest of the layer it was made of.
        reference: digest of the layer that holds its data (oci-ref), else "".
        implied: directories that the layer only implies, which its bootstrap does not tell.
    """

    digest: model.Digest
    size: model.Size
    bootstrap: Hex
    toc: Hex = ""
    toc_size: model.Size = 0
    repository: str = ""
    source: str = ""
    reference: str = ""
    implied: tuple[Latin1, ...] = ()


def options_key(options: ConvertOptions, dictionary: str = "") -> str:
    """A name (hex) for all that the bytes of a blob depend on besides its source layer.

    Args:
        dictionary: digest of the image whose chunks are referred to, "" for none.
    """
    parameters = (
        _FORMAT,
        __version__,
        options.fs_version,
        options.compressor,
        options.chunk_size,
        options.batch_size,
        options.aligned_chunk,
    )
    # The prefetch table of a layer lies in its bootstrap, which is part of the blob.
    prefetch = [path.decode("utf8", "surrogateescape") for path in options.prefetch]
    text = repr((parameters, prefetch, options.oci_ref, dictionary)).encode("utf8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()[:32]


def default_folder() -> Path | None:
    """Where this user's record is (XDG_CACHE_HOME); None for a user without a home directory."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    if base.startswith("/"):
        return Path(base) / "pynydus/layers"
    return (folder := home()) and folder / ".cache/pynydus/layers"


class Record:
    """The record of converted layers in a folder; a folder that cannot be used is an empty record.

    Args:
        key: see :func:`options_key`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder / key

    def find(self, source_digest: str) -> Known | None:
        """What a source layer became."""
        try:
            data = (self._folder / source_digest.partition(":")[2]).read_bytes()
            known = msgspec.json.decode(data, type=Known)
        except (OSError, msgspec.MsgspecError):
            return None
        return known if known.source == source_digest else None

    def add(self, source_digest: str, known: Known) -> None:
        """Notes a converted layer."""
        data = msgspec.json.encode(msgspec.structs.replace(known, source=source_digest))
        note(self._folder, source_digest.partition(":")[2], data)


class Reversed(msgspec.Struct, frozen=True, kw_only=True):
    """An ordinary layer that was made of a Nydus image.

    Attributes:
        source: see :meth:`ReversedLayers.find`.
        repository: ``host/name`` where it was stored last.
    """

    source: str
    digest: model.Digest
    size: model.Size
    diff_id: model.Digest
    repository: str


class ReversedLayers:
    """The record of layers that were made of Nydus images (``convert --reverse``), beside the other.

    A layer depends on the whole image: its blob does not say which directories were only implied.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "reversed"

    def find(self, source: str) -> Reversed | None:
        """What was made of an image's blob.

        Args:
            source: digests of the image's bootstrap layer and of the blob, "" for the whole file system.
        """
        try:
            data = (self._folder / self._name(source)).read_bytes()
            found = msgspec.json.decode(data, type=Reversed)
        except (OSError, msgspec.MsgspecError):
            return None
        return found if found.source == source else None

    def add(self, made: Reversed) -> None:
        """Notes such a layer."""
        note(self._folder, self._name(made.source), msgspec.json.encode(made))

    def _name(self, source: str) -> str:
        return hashlib.sha256(f"{_FORMAT} {__version__} {source}".encode()).hexdigest()


def note(folder: Path, name: str, data: bytes) -> None:
    """Writes a small file into a folder that keeps newer ones only. It is a help: errors are ignored."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
            file.write(data)
        Path(file.name).replace(folder / name)
        entries = list(folder.iterdir())
        if len(entries) > _MOST:
            entries.sort(key=lambda path: path.stat().st_mtime)
            for entry in entries[: -_MOST // 2]:
                entry.unlink(missing_ok=True)
    except OSError:
        pass


def take_over(
    known: Known,
    source: Source,
    sink: Sink,
    repository: str,
    cache: Source | None = None,
    stopped: threading.Event | None = None,
) -> Tables | None:
    """Uses a blob that the target has, or can link from where it was stored last, or copy from a cache.

    Args:
        source, sink: the target, for reading and writing.
        repository: ``host/name`` of the target, "" if it is no registry.
        cache: where the blob is kept, None for nowhere.
        stopped: ends a copy from there.

    Returns:
        What is then read of it; None if it is not there, or is not what the record says.
    """
    try:
        if bring(known.digest, known.size, known.repository, sink, repository, cache, stopped):
            return Tables(known, source)
    except NydusError:
        pass
    return None


def bring(
    digest: str,
    size: int,
    stored_in: str,
    sink: Sink,
    repository: str,
    cache: Source | None = None,
    stopped: threading.Event | None = None,
) -> bool:
    """Has a blob in the target that need not be made again; see :func:`take_over`.

    Args:
        stored_in: ``host/name`` where it was stored last.
        stopped: see there.

    Returns:
        False if it is not to be had.

    Raises:
        BackendError: the target or the cache cannot be asked.
    """
    host, _, _ = repository.partition("/")
    other_host, _, other = stored_in.partition("/")
    if sink.has_blob(digest):
        return True
    elsewhere = repository and stored_in != repository and host == other_host
    if elsewhere and sink.mount_blob(digest, other):
        return True
    if cache is None:
        return False
    copy_blob(cache, sink, LayerProgress(0, digest, size), stopped=stopped)
    return True


class Tables:
    """The end of a converted layer's blob, where its tables are, fetched at once.

    Raises:
        FormatError: the table of contents is damaged.
        BackendError: it cannot be read.
    """

    def __init__(self, known: Known, source: Source) -> None:
        from nydus.rafs import toc

        self.known, self._source = known, source
        self._start, self._data = known.size, b""
        contents = toc.read_toc(self.read, known.size, f"blob {known.digest}")
        if contents:  # blobs of version 5 have none
            offsets = [entry.offset for entry in contents.entries if entry.name != toc.IMAGE_BLOB]
            first = min(offsets, default=known.size)
            if 0 < known.size - first <= _MAX_TABLES:
                self._data, self._start = self.read(first, known.size - first), first

    def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes of the blob."""
        known = self.known
        if offset < 0 or offset + size > known.size:
            where = f"blob {known.digest}"
            raise FormatError("a table lies outside of the blob", where=where, offset=offset)
        if offset >= self._start:
            return self._data[offset - self._start : offset - self._start + size]
        return self._source.read_range(known.digest, offset, size)


def read_back(tables: Tables) -> Converted:
    """Makes of a blob's tables what a merge needs of the layer.

    Raises:
        FormatError: it is not what was recorded.
        BackendError: it cannot be read.
    """
    from dataclasses import replace

    from nydus import rafs
    from nydus.build.layer import UNKNOWN_ID
    from nydus.convert.job import Converted
    from nydus.rafs import blobmeta, toc
    from nydus.rafs.model import NodeFlag

    known, read = tables.known, tables.read
    where, name = f"blob {known.digest}", known.digest.partition(":")[2]
    bootstrap = toc.extract_bootstrap(read, known.size, where)
    if hashlib.sha256(bootstrap).hexdigest() != known.bootstrap:
        raise FormatError("another bootstrap than was recorded", where=where)
    tree = rafs.read(bootstrap, where)
    # The other blobs are those of a chunk dictionary.
    own = [n for n, blob in enumerate(tree.blobs) if f"sha256:{blob.id}" == known.reference]
    own = own or [n for n, blob in enumerate(tree.blobs) if blob.id == UNKNOWN_ID]
    for number in own:
        if known.reference:  # what the builder, too, adds once the blob is written
            size = known.toc_size
            entries = read(known.size - size, size)[: -toc.HEADER_SIZE] if size else b""
            tree.blobs[number] = replace(
                tree.blobs[number],
                rafs_digest=bytes.fromhex(name),
                rafs_size=known.size,
                toc_digest=hashlib.sha256(entries).digest(),
            )
        else:
            tree.blobs[number] = replace(tree.blobs[number], id=name)
    for path in known.implied:
        row = tree.find(path.encode("latin1"))
        if row is not None:
            tree.nodes["flags"][row] |= NodeFlag.IMPLIED
    meta = b""
    if tree.version == 6 and own:
        checked = replace(tree.blobs[own[0]], toc_digest=bytes.fromhex(known.toc), toc_size=known.toc_size)
        chunks = blobmeta.load(checked, read, where, known.size)
        meta = blobmeta.to_cache_file(chunks)
    return Converted(
        known.digest,
        known.size,
        tree,
        meta,
        duplicates=0,
        seconds=0.0,
        bootstrap=known.bootstrap,
        toc=known.toc,
        toc_size=known.toc_size,
        reused=True,
        reference=known.reference,
    )


def known_of(converted: Converted, repository: str = "") -> Known:
    """What to remember of a converted layer; ``repository`` is where it was stored."""
    from nydus.rafs.model import NodeFlag

    tree = converted.tree
    implied = (tree.nodes["flags"] & NodeFlag.IMPLIED).nonzero()[0].tolist()
    return Known(
        digest=converted.digest,
        size=converted.size,
        bootstrap=converted.bootstrap,
        toc=converted.toc,
        toc_size=converted.toc_size,
        repository=repository,
        reference=converted.reference,
        implied=tuple(tree.path(row).decode("latin1") for row in implied),
    )
