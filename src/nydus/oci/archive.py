"""Images in a tar file: an OCI layout, or what ``docker save`` writes; plain, gzip or zstd."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from nydus.errors import BackendError, ConfigError, FormatError
from nydus.oci import model
from nydus.oci.layout import IMAGE_NAME, LAYOUT, REF_NAME, Layout, LayoutReader, blob_path
from nydus.oci.model import Descriptor
from nydus.oci.reference import Reference

_MAX_LINKS = 8
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_WRITTEN = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".tzst": "zstd"}
_NOT_WRITTEN = (".bz2", ".tbz2", ".xz", ".txz", ".lz4", ".lzma", ".lzo", ".br", ".Z", ".zip")


class TarFiles:
    """The regular files of a tar archive, read in place. Nothing is unpacked.

    Args:
        path: the archive. A compressed one is inflated into an unnamed file in ``TMPDIR`` first.
        inflated: a file that has its contents already, see :func:`inflate`.

    Raises:
        FormatError: it is no tar archive, or is cut short.
        BackendError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], inflated: str | os.PathLike[str] | None = None) -> None:
        self.name = str(path)
        self._places: dict[str, tuple[int, int]] = {}
        self._added: dict[str, bytes] = {}
        try:
            self._file: IO[bytes] = _opened(path, inflated)
            self._scan()
        except OSError as error:
            raise BackendError(f"{self.name}: {error.strerror or error}", permanent=True) from error
        # What tarfile says of numbers that cannot be, and of headers upon headers.
        except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
            raise FormatError(f"not a readable tar archive: {error}", where=self.name) from error

    def _scan(self) -> None:
        links: dict[str, str] = {}
        last = -1
        with tarfile.open(fileobj=self._file, mode="r:") as archive:
            for member in archive:
                if member.offset <= last:  # a negative size leads back
                    raise FormatError("the members of the tar archive overlap", where=self.name)
                last = member.offset
                name = os.path.normpath(member.name)
                if member.isreg():
                    self._places[name] = (member.offset_data, member.size)
                elif member.issym():
                    links[name] = os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))
                elif member.islnk():
                    links[name] = os.path.normpath(member.linkname)
        # docker save makes a layer that occurs twice a link to its first copy
        for name, target in links.items():
            for _ in range(_MAX_LINKS):
                target = links.get(target, target)
            if target in self._places:
                self._places.setdefault(name, self._places[target])
        if any(
            offset + size > os.fstat(self._file.fileno()).st_size for offset, size in self._places.values()
        ):
            raise FormatError("the tar archive is cut short", where=self.name)

    def add(self, path: str, data: bytes) -> None:
        """Puts a file of our own beside those of the archive."""
        self._added[path] = data

    def alias(self, path: str, other: str) -> None:
        """Gives a file a second name."""
        self._places[path] = self._places[other]

    def size(self, path: str) -> int:
        if (added := self._added.get(path)) is not None:
            return len(added)
        return self._places[path][1]

    def read(self, path: str, offset: int, size: int) -> bytes:
        if (added := self._added.get(path)) is not None:
            return added[offset : offset + size]
        start, length = self._places[path]
        return os.pread(self._file.fileno(), max(0, min(size, length - offset)), start + offset)


def _opened(path: str | os.PathLike[str], inflated: str | os.PathLike[str] | None) -> IO[bytes]:
    if inflated is not None or not is_compressed(path):
        return open(inflated or path, "rb")
    plain = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        inflate(path, plain, f"{tempfile.gettempdir()} (TMPDIR)")
    except BaseException:
        plain.close()
        raise
    return plain


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether an archive is gzip or zstd.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(4)
    return head[:2] == _GZIP or head == _ZSTD


def inflate(path: str | os.PathLike[str], plain: IO[bytes], where: str) -> None:
    """Writes what a compressed archive holds into a file, which is then at its start.

    Args:
        where: that file is, in messages.

    Raises:
        FormatError: the archive is damaged.
        BackendError: the disk is full.
    """
    opened: Any
    with open(path, "rb") as file:
        head = file.read(2)
        file.seek(0)
        if head == _GZIP:
            from isal import igzip

            opened = igzip.IGzipFile(fileobj=file, mode="rb")  # type: ignore[no-untyped-call]
        else:
            import zstandard

            opened = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(
                file, read_across_frames=True
            )
        try:
            while piece := opened.read(1 << 20):
                plain.write(piece)
            plain.flush()
        except OSError as error:
            if error.errno is None:  # of the codec
                raise FormatError(f"damaged compressed archive: {error}", where=str(path)) from error
            what = f"cannot be unpacked in {where}: {error.strerror}"
            raise BackendError(f"{path}: {what}", permanent=True) from error
        except Exception as error:  # each codec has its own
            raise FormatError(f"damaged compressed archive: {error}", where=str(path)) from error
    plain.seek(0)


def open_archive(
    path: str | os.PathLike[str], inflated: str | os.PathLike[str] | None = None
) -> LayoutReader:
    """Opens an archive for reading; its manifests and blobs are read as those of a layout.

    Args:
        path, inflated: see :class:`TarFiles`.

    Raises:
        FormatError: neither an OCI layout nor a docker archive.
    """
    files = TarFiles(path, inflated)
    try:
        files.size("index.json")
    except KeyError:
        _present_docker_archive(files)
    return LayoutReader(files)


class _Saved(msgspec.Struct):
    """One image in the ``manifest.json`` of a docker archive."""

    config: str = msgspec.field(name="Config")
    layers: tuple[str, ...] = msgspec.field(name="Layers")
    tags: tuple[str, ...] | None = msgspec.field(name="RepoTags", default=None)


def _present_docker_archive(files: TarFiles) -> None:
    """Adds the documents of an OCI layout to what ``docker save`` wrote."""
    where = f"{files.name}: manifest.json"
    try:
        data = files.read("manifest.json", 0, model.MAX_DOCUMENT)
    except KeyError:
        what = "neither an OCI layout nor a docker archive: no index.json and no manifest.json"
        raise FormatError(what, where=files.name) from None
    entries: list[Descriptor] = []
    for saved in model.decode(data, list[_Saved], where):
        try:
            raw = files.read(os.path.normpath(saved.config), 0, model.MAX_DOCUMENT)
            config = model.decode(raw, model.ImageConfig, f"{files.name}: {saved.config}")
            paths = [os.path.normpath(layer) for layer in saved.layers]
            if len(paths) != len(config.rootfs.diff_ids):
                expected, found = len(config.rootfs.diff_ids), len(paths)
                raise FormatError("wrong number of layers", where=where, expected=expected, found=found)
            pairs = zip(paths, config.rootfs.diff_ids, strict=True)
            layers = tuple(_saved_layer(files, path, diff_id) for path, diff_id in pairs)
        except KeyError as error:
            raise FormatError(f"names {error.args[0]!r}, which is not in the archive", where=where) from None
        described = model.describe(raw, model.DOCKER_CONFIG)
        files.add(blob_path(described.digest), raw)
        manifest = model.Manifest(
            schema_version=2, media_type=model.DOCKER_MANIFEST, config=described, layers=layers
        )
        document = model.encode(manifest)
        annotations = {REF_NAME: saved.tags[0], IMAGE_NAME: saved.tags[0]} if saved.tags else {}
        entry = model.describe(document, model.DOCKER_MANIFEST, annotations=annotations)
        files.add(blob_path(entry.digest), document)
        entries.append(entry)
    index = model.Index(schema_version=2, media_type=model.OCI_INDEX, manifests=tuple(entries))
    files.add("index.json", model.encode(index))


def _saved_layer(files: TarFiles, path: str, diff_id: str) -> Descriptor:
    """A plain layer is named by its diff id (checked when it is read); a compressed one has to be hashed."""
    size = files.size(path)
    digest, media_type = diff_id, "application/vnd.docker.image.rootfs.diff.tar"
    if files.read(path, 0, 2) == b"\x1f\x8b":
        hashed, position = hashlib.sha256(), 0
        while piece := files.read(path, position, 1 << 20):
            hashed.update(piece)
            position += len(piece)
        digest, media_type = f"sha256:{hashed.hexdigest()}", model.DOCKER_LAYER_GZIP
    files.alias(blob_path(digest), path)
    return Descriptor(media_type=media_type, digest=digest, size=size)


def write_archive(layout: Layout, path: str | os.PathLike[str], reference: Reference) -> None:
    """Packs the image that ``layout`` holds into a tar file, as an OCI layout; blobs of others stay out.

    A single image also gets docker's ``manifest.json``. The file appears only when it is complete.

    Args:
        path: its ending says whether it is compressed, see :func:`compression_of`.

    Raises:
        BackendError: it cannot be written.
    """
    described, data = layout.manifest()
    document = model.decode_image(data, described.media_type, str(layout))
    annotations = {IMAGE_NAME: str(reference), REF_NAME: reference.tag or reference.digest}
    entry = msgspec.structs.replace(described, annotations=annotations)
    index = model.Index(schema_version=2, media_type=model.OCI_INDEX, manifests=(entry,))
    extra = {"oci-layout": LAYOUT, "index.json": model.encode(index)}
    if isinstance(document, model.Manifest):
        saved = {
            "Config": blob_path(document.config.digest),
            "RepoTags": [str(reference)],
            "Layers": [blob_path(layer.digest) for layer in document.layers],
        }
        extra["manifest.json"] = model.encode([saved])
    target = Path(path)
    aside = ""
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            aside = file.name
            with _compressed(file, compression_of(target)) as out:
                _pack(out, layout, extra, _reachable(layout, described, document))
            file.flush()
            os.fsync(file.fileno())
        Path(aside).chmod(0o644)
        Path(aside).replace(target)
    except BaseException as error:
        if aside:
            Path(aside).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise BackendError(f"{target}: {error.strerror or error}", permanent=True) from error
        raise


def compression_of(path: str | os.PathLike[str]) -> str:
    """How an archive of this name is to be compressed: ``gzip``, ``zstd``, or "" for not at all.

    Raises:
        ConfigError: in a way in which we write none.
    """
    name = os.fspath(path)
    if name.endswith(_NOT_WRITTEN):
        raise ConfigError(f"{name}: archives are written as .tar, .tar.gz or .tar.zst")
    return next((kind for ending, kind in _WRITTEN.items() if name.endswith(ending)), "")


@contextmanager
def _compressed(file: IO[bytes], kind: str) -> Iterator[IO[bytes]]:
    """``file``, with a compressor before it. The same data give the same bytes."""
    opened: Any
    if kind == "gzip":
        from isal import igzip

        opened = igzip.IGzipFile(filename="", fileobj=file, mode="wb", mtime=0)  # type: ignore[no-untyped-call]
    elif kind == "zstd":
        import zstandard

        opened = zstandard.ZstdCompressor().stream_writer(file, closefd=False)
    else:
        yield file
        return
    with opened:
        yield opened


def _reachable(
    layout: Layout, described: model.Descriptor, document: model.Manifest | model.Index
) -> set[str]:
    """Digests of all that belongs to an image."""
    found = {described.digest}
    if isinstance(document, model.Manifest):
        layers = {layer.digest for layer in document.layers}
        return found | {document.config.digest} | layers | set(model.data_layers(document))
    for entry in document.manifests:
        if layout.has_blob(entry.digest):
            _, data = layout.manifest(entry.digest)
            found |= _reachable(layout, entry, model.decode_image(data, entry.media_type, str(layout)))
    return found


def _pack(file: IO[bytes], layout: Layout, extra: dict[str, bytes], wanted: set[str]) -> None:
    import io

    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in extra.items():
            archive.addfile(_entry(name, len(data)), io.BytesIO(data))
        for blob in sorted((layout.root / "blobs" / "sha256").iterdir()):
            if f"sha256:{blob.name}" not in wanted:
                continue
            with open(blob, "rb") as opened:
                archive.addfile(_entry(f"blobs/sha256/{blob.name}", blob.stat().st_size), opened)


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry
