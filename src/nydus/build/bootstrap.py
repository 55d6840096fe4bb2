"""Bootstraps on disk: their own files, or at the end of a data blob."""

from __future__ import annotations

import dataclasses
import os

from nydus.build.layer import UNKNOWN_ID
from nydus.errors import FormatError, NydusError
from nydus.rafs import toc
from nydus.rafs.model import BlobFeature, SuperFlag, Tree


def read_bytes(path: str) -> bytes:
    """A bootstrap: that of a file, or the one inside a blob.

    Raises:
        NydusError: the file cannot be read.
        FormatError: it is neither.
    """
    from nydus import rafs

    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(2048)
            try:
                rafs.detect(head)
                return head + file.read()
            except FormatError as error:
                reason = error
            descriptor = file.fileno()

            def read(offset: int, length: int) -> bytes:
                return os.pread(descriptor, length, offset)

            try:
                return toc.extract_bootstrap(read, size, path)
            except FormatError:
                raise FormatError(f"{path}: {reason}") from None
    except OSError as error:
        raise NydusError(f"{path}: cannot be read: {error.strerror}") from None


def load(path: str) -> Tree:
    """The tree of a bootstrap file, or of a blob that holds its bootstrap.

    A blob that does not know its own id is known by the name of its file up to the first dot.

    Raises:
        NydusError: the file cannot be read.
        FormatError: it is neither, or damaged.
    """
    from nydus import rafs

    return name_blobs(rafs.read(read_bytes(path), path), path)


def name_blobs(tree: Tree, path: str) -> Tree:
    """Call a blob that does not know its own id by the name of its file up to the first dot."""
    tree.blobs = [
        dataclasses.replace(blob, id=stem(path)) if blob.id == UNKNOWN_ID else blob for blob in tree.blobs
    ]
    return tree


def dictionary_path(argument: str) -> str:
    """The file that a ``--chunk-dict`` argument names: ``PATH`` or ``bootstrap=PATH``.

    Raises:
        NydusError: another kind of dictionary.
    """
    kind, equals, path = argument.partition("=")
    if not equals:
        return argument
    if kind != "bootstrap":
        raise NydusError(f"chunk dictionaries of kind {kind!r} are not supported; use bootstrap=PATH")
    return path


def stem(path: str) -> str:
    """The name of a file up to the first dot."""
    return os.path.basename(path).split(".", 1)[0]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerBlob:
    """What the caller of a merge knows of the blob of one layer; empty or None is not known.

    Attributes:
        digest: sha256 (hex) of the file that holds chunks (or, for a layer that stays a gzip archive, the
            tables).
        size: of the same file.
        original_id: sha256 (hex) of the archive that a SEPARATE blob refers to.
        toc_digest, toc_size: of the table of contents.
    """

    digest: str = ""
    size: int | None = None
    original_id: str = ""
    toc_digest: str = ""
    toc_size: int | None = None


def describe_blob(tree: Tree, known: LayerBlob, name: str, shared: frozenset[str] = frozenset()) -> Tree:
    """Say in a layer's tree what its own blob is called and how it is checked (rafs.md 4.3).

    Args:
        name: id to use if nothing better is known; "" to keep the one in the tree.
        shared: ids of blobs that belong to a chunk dictionary; like EXTERNAL ones they have their names.
    """
    blobs = []
    for blob in tree.blobs:
        if blob.id in shared or blob.features & BlobFeature.EXTERNAL:
            blobs.append(blob)
            continue
        blob = dataclasses.replace(blob)
        separate = bool(blob.features & BlobFeature.SEPARATE)
        if not tree.flags & SuperFlag.TARFS and name:
            blob.id = known.original_id or name
            if known.digest and not separate:
                blob.id = known.digest
        if separate:
            if known.digest:
                blob.rafs_digest = _digest(known.digest)
            if known.size is not None:
                blob.rafs_size = known.size
        elif known.size is not None:
            blob.compressed_size = known.size
        if known.toc_digest:
            blob.toc_digest = _digest(known.toc_digest)
        if known.toc_size is not None:
            blob.toc_size = known.toc_size
        blobs.append(blob)
    return dataclasses.replace(tree, blobs=blobs)


def _digest(text: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != 32:
        raise NydusError(f"{text!r} is not a sha256 in hexadecimal digits")
    return value
