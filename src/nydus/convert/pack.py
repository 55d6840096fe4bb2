"""``nydusify build``: a directory becomes an image, on disk or in an object store."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nydus.errors import ConfigError, NydusError

if TYPE_CHECKING:
    from nydus.build.compact import CompactOptions
    from nydus.build.layer import BuildOptions, LayerResult
    from nydus.rafs.model import Tree

_PIECE = 4 << 20
_STEM = 255
#: Keys of the compaction's configuration: as documented, as the reference reads them, ours.
_COMPACT = (
    ("min_used_ratio", "MinUsedRatio", "min_used_ratio"),
    ("compact_blob_size", "CompactBlobSize", "small"),
    ("max_compact_size", "MaxCompactSize", "largest"),
    ("layers_to_compact", "LayersToCompact", "fewest"),
)
_COMPACT_DEFAULTS = {"min_used_ratio": 5, "small": 10 << 20, "largest": 100 << 20, "fewest": 32}


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where a build is pushed to: an object store, with prefixes for both kinds of files."""

    kind: str
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in ("oss", "s3"):
            raise ConfigError(f"unknown backend type {self.kind!r}; there are oss and s3")

    def push(self, path: Path, name: str, prefix: str) -> None:
        """Sends a file.

        Args:
            prefix: the key of the configuration that says what is put before the name.

        Raises:
            BackendError: the store refuses it. NydusError: the file cannot be read.
        """
        with self._open(prefix) as store, store.upload() as upload:
            try:
                with open(path, "rb") as file:
                    while piece := file.read(_PIECE):
                        upload.write(piece)
            except OSError as error:
                raise NydusError(f"{path}: {error.strerror}") from error
            upload.commit_as(name)

    def _open(self, prefix: str) -> Any:
        from contextlib import closing

        from nydus.storage import backends

        known = {key: value for key, value in self.config.items() if not key.endswith("_prefix")}
        return closing(backends.create(self.kind, {**known, "object_prefix": self.config.get(prefix, "")}))

    def blobs(self) -> dict[str, Any]:
        """The ``device.backend`` with which its blobs are read."""
        known = {key: value for key, value in self.config.items() if not key.endswith("_prefix")}
        return {"type": self.kind, "config": {**known, "object_prefix": self.config.get("blob_prefix", "")}}


@dataclass(frozen=True, slots=True)
class PackOptions:
    """What to build and how.

    Attributes:
        name: of the image; with an extension it is that of the bootstrap, else it gets ``.meta``.
        build: how; without parent and dictionary.
        dictionary, parent: bootstrap files.
        compact: first make the parent's blobs fewer.
        push: send bootstrap and new blobs to the bucket.
    """

    source: Path
    output: Path
    name: str
    build: BuildOptions
    dictionary: str = ""
    parent: str = ""
    compact: CompactOptions | None = None
    bucket: Bucket | None = None
    push: bool = False


@dataclass(slots=True)
class Packed:
    """What was built.

    Attributes:
        bootstrap, blob: files; ``blob`` is None without any data of its own.
        compacted: ids of blobs that took the place of the parent's.
        pushed: names of objects.
    """

    tree: Tree
    bootstrap: Path
    blob: Path | None
    result: LayerResult
    compacted: list[str] = field(default_factory=list)
    pushed: list[str] = field(default_factory=list)


def pack(options: PackOptions) -> Packed:
    """Builds an image of a directory. Blobs come before the bootstrap that names them, also in the bucket.

    Raises:
        ConfigError: options that contradict each other. NydusError: what cannot be read or written.
    """
    from nydus.build.bootstrap import dictionary_path, load
    from nydus.build.directory import build_directory
    from nydus.build.output import Output, write_file

    bootstrap, blob = _names(options.name)
    if not options.source.is_dir():
        raise ConfigError(f"{options.source} is not a directory")
    if options.compact is not None and not (options.parent and options.bucket):
        raise ConfigError("compacting needs a parent bootstrap and the backend that has its blobs")
    if options.push and options.bucket is None:
        raise ConfigError("there is no backend to push to")
    parent = load(options.parent) if options.parent else None
    dictionary = load(dictionary_path(options.dictionary)) if options.dictionary else None
    compacted: list[str] = []
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NydusError(f"{options.output}: {error.strerror}") from error
    folder = str(options.output)
    if options.compact is not None and options.bucket is not None and parent is not None:
        shared = frozenset(blob.id for blob in dictionary.blobs) if dictionary else frozenset()
        compacting = replace(options.compact, shared=shared)
        parent, compacted = _compact(parent, folder, compacting, options.bucket)
    build = replace(options.build, parent=parent, dictionary=dictionary)
    with Output(folder, directory=True) as out:
        result = build_directory(str(options.source), out.write, build)
        path = None
        if result.blob is not None:
            # Others find a blob by its id; only an image of its own has it under a name.
            named = bool(parent is not None or options.push)
            path = Path(out.commit(result.blob_id if named else blob))
    target = options.output / bootstrap
    write_file(str(target), result.bootstrap)
    packed = Packed(result.tree, target, path, result, compacted)
    if options.push and options.bucket is not None:
        files = [(options.output / blob_id, blob_id) for blob_id in compacted]
        files += [(path, result.blob_id)] if path else []
        for file, name in files:
            options.bucket.push(file, name, "blob_prefix")
            packed.pushed.append(name)
        options.bucket.push(target, bootstrap, "meta_prefix")
        packed.pushed.append(bootstrap)
    return packed


def _names(name: str) -> tuple[str, str]:
    """File names of bootstrap and blob."""
    if not name or name in (".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > _STEM - 5:
        raise ConfigError(f"{name!r} is not a name for an image")
    stem, extension = os.path.splitext(name)  # noqa: PTH122
    return (name if extension else f"{name}.meta"), f"{stem}.blob"


def _compact(parent: Tree, folder: str, options: CompactOptions, bucket: Bucket) -> tuple[Tree, list[str]]:
    from nydus import image
    from nydus.build.compact import compact

    before = {blob.id for blob in parent.blobs}
    with image.open(parent, bucket.blobs()) as opened:
        tree = compact(opened, folder, options)
    if tree is None:
        return parent, []
    return tree, [blob.id for blob in tree.blobs if blob.id not in before]


def compact_options(text: bytes | str, where: str) -> CompactOptions:
    """Reads the configuration of the compaction.

    Numbers may be strings, and keys as documented (``min_used_ratio``) or as the reference takes them
    (``MinUsedRatio``).

    Raises:
        ConfigError: it is something else.
    """
    from nydus.build.compact import CompactOptions

    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: expected an object, got {type(given).__name__}")
    values = dict(_COMPACT_DEFAULTS)
    for documented, read, ours in _COMPACT:
        for key in (documented, read):
            if (value := given.pop(key, None)) is None:
                continue
            try:
                number = int(value, 0) if isinstance(value, str) else value
            except ValueError:
                number = None
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise ConfigError(f"{where}: {key} is {value!r}, not a number")
            values[ours] = number
    if given:
        raise ConfigError(f"{where}: unknown key {sorted(given)[0]!r}")
    return CompactOptions(
        values["min_used_ratio"], values["small"], values["largest"], values["fewest"], frozenset()
    )
