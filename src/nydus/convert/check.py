"""``nydusify check``: is this a sound Nydus image, and the same file system as that one?"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nydus.convert.artifact import tar_layers
from nydus.convert.backend import BackendPlace, blobs_of
from nydus.convert.documents import BOOTSTRAP, read_bootstrap_layer
from nydus.convert.listing import Difference, Listing, Overlay, compare, of_image
from nydus.convert.progress import Progress, Silent
from nydus.convert.reading import Reading
from nydus.convert.select import Image, host_platform, matches, select
from nydus.errors import BackendError, ConfigError, FormatError, NydusError
from nydus.oci import model
from nydus.oci.encryption import ENCRYPTED
from nydus.oci.foreign import open_layer, plain_http
from nydus.oci.model import Platform
from nydus.oci.place import Source, SourcePlace

if TYPE_CHECKING:
    from nydus.oci.encryption import PrivateKey
    from nydus.rafs.model import Tree

#: Bytes of one request, which for an object store is one round trip.
_PIECE = 4 << 20
#: Blobs downloaded at the same time.
_AT_ONCE = 4
_BOOTSTRAP_TYPES = (
    model.OCI_LAYER_GZIP,
    model.DOCKER_LAYER_GZIP,
    model.OCI_LAYER,
    f"{model.OCI_LAYER_GZIP}{ENCRYPTED}",
)

#: Gives the listing of a Nydus image through a mount: (place, image, bootstrap file, work folder).
Mounted = Callable[["Side", Path], Listing]


class CheckError(NydusError):
    """The image is wrong; the text names the rule."""

    def __init__(self, rule: str, side: str, what: object) -> None:
        super().__init__(
            f"validate {rule} failed: {side} image: {what}" if side else f"validate {rule} failed: {what}"
        )


@dataclass(slots=True)
class Side:
    """One of the two images.

    Attributes:
        name: ``source`` or ``target``.
        nydus, oci: what it has of the wanted platform; a merged index has both.
        files: of the bootstrap layer.
        tree: of the bootstrap.
        index: the document that names the manifests, b"" if there is none.
        blobs: the storage backend of an image whose blobs are in one.
        stored: digest -> size of the blobs of ``nydus``, wherever they are.
    """

    name: str
    place: SourcePlace
    reader: Source
    nydus: Image | None = None
    oci: Image | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    tree: Tree | None = None
    index: bytes = b""
    blobs: BackendPlace | None = None
    stored: dict[str, int] = field(default_factory=dict)

    def count(self, report: Report, rule: str, number: int = 1) -> None:
        report.count(rule if self.name == "target" else f"{self.name} {rule}", number)

    def image(self) -> Image:
        found = self.nydus or self.oci
        assert found is not None
        return found


@dataclass(slots=True)
class Report:
    """What was verified.

    Attributes:
        checks: rule -> number of things that it held for; ``source …`` are those of the source.
    """

    target: str
    source: str = ""
    platform: str = ""
    kind: str = "nydus"
    fs_version: int = 0
    mounted: bool = False
    checks: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def count(self, rule: str, number: int = 1) -> None:
        self.checks[rule] = self.checks.get(rule, 0) + number


def check(
    target: SourcePlace,
    source: SourcePlace | None,
    platform: Platform | None,
    work_dir: Path,
    progress: Progress | None = None,
    mounted: Mounted | None = None,
    target_blobs: BackendPlace | None = None,
    source_blobs: BackendPlace | None = None,
    keys: Sequence[PrivateKey] = (),
    report: Report | None = None,
) -> Report:
    """Checks a Nydus image, and that it is the same as another image.

    Every document, every blob and every chunk is read and verified.

    Args:
        source: the image it was made of, or another Nydus image of it; None to check the target alone.
        platform: None is this machine's where there is a choice.
        work_dir: gets the documents and the bootstrap, in ``source`` and ``target``. Kept.
        target_blobs, source_blobs: storage backends with the blobs of an image that does not list them.
        keys: private keys, for encrypted images.
        mounted: reads the target's files through a mount; None reads them through our own reader.
        report: to write into, for a caller that wants to know how far a check came that failed.

    Raises:
        CheckError: something is wrong with the image.
        NydusError: it cannot be read.
    """
    progress = progress or Silent()
    report = report or Report(str(target), str(source or ""))
    progress.note("parsing image", image=target)
    sides = [_parse("target", target, platform)]
    if source is not None:
        sides.insert(0, _parse("source", source, platform))
    mine = sides[-1]
    report.platform = str(mine.image().platform)
    for side in sides:
        if not platform and not matches(side.image().platform, host_platform()):
            what = f"is for {side.image().platform}, this machine is {host_platform()}"
            report.warnings.append(f"{side.name} image: {what}")
    sides[0].blobs, mine.blobs = source_blobs, target_blobs
    if mine.nydus is None:
        raise CheckError(
            "manifest", "target", f"{target} is not a Nydus image: its last layer is no bootstrap"
        )
    for name in ("source", "target"):
        _forget(work_dir / name)
    for side in sides:
        _dump(side, work_dir / side.name, progress, keys)
    for side in sides:
        for found in (side.oci, side.nydus):
            if found is not None:
                progress.note(
                    "checking manifest", image=side.place, type="nydus" if found is side.nydus else "oci"
                )
                _check_manifest(side, found, report)
    if len(sides) == 2:
        _compare_configs(sides[0], sides[1], report)
    for side in sides:
        if side.nydus is not None:
            progress.note("checking bootstrap", image=side.place, type="nydus")
            _check_bootstrap(side, report)
    reading = Reading(_to_read(sides), progress)
    with _temporary(work_dir) as folder:
        for side in sides:
            if side.nydus is not None:
                progress.note("checking blobs", image=side.place, type="nydus")
                _fetch_blobs(side, folder / side.name, report, reading)
        progress.note("mounting image" if mounted else "reading image", image=target, type="nydus")
        files = mounted(mine, folder) if mounted else _listing(mine, folder / "target", reading)
        report.mounted = mounted is not None
        report.count("files", len(files))
        if mine.oci is not None:
            progress.note("comparing the halves of the index", image=target)
            _check_halves(mine, files, report, reading)
        if source is not None:
            progress.note("reading image", image=source, type="nydus" if sides[0].nydus else "oci")
            expected = _listing(sides[0], folder / "source", reading)
            progress.note("comparing filesystem")
            try:
                report.count("filesystem", compare(expected, files))
            except Difference as error:
                raise CheckError("filesystem", "", error) from error
    progress.note("verified image", image=target)
    return report


def _to_read(sides: Sequence[Side]) -> Iterator[tuple[str, str, int]]:
    """The blobs of the Nydus images, and the layers of ordinary ones: (side, digest, size)."""
    for side in sides:
        for digest, size in side.stored.items():
            yield side.name, digest, size
        if side.oci is not None and (side.nydus is None or side.name == "target"):
            for layer in side.oci.manifest.layers:
                yield side.name, layer.digest, layer.size


def _parse(name: str, place: SourcePlace, platform: Platform | None) -> Side:
    side = Side(name, place, place.open())
    try:
        wanted = [platform] if platform else ()
        index, images = select(side.reader, place.target, str(place), wanted, nydus=True)
    except FormatError as error:
        raise CheckError("manifest", name, error) from error
    for found in images:
        if found.is_nydus or found.descriptor.artifact_type == model.NYDUS_MANIFEST:
            side.nydus = side.nydus or found
        else:
            side.oci = side.oci or found
        config = found.config
        if not model.is_model(found.manifest) and (not config.os or not config.architecture):
            raise CheckError("manifest", name, "the config has no os or no architecture")
        given = found.descriptor.platform
        if index is not None and given and (given.os, given.architecture) != (config.os, config.architecture):
            what = f"the config is for {config.platform}, the index says {given}"
            raise CheckError("manifest", name, what)
    if index is not None:
        _, side.index = side.reader.manifest(place.target)
    if index is not None and side.oci and side.nydus is None and name == "target":
        raise CheckError("manifest", name, f"the index has no Nydus image for {platform or host_platform()}")
    return side


def _forget(folder: Path) -> None:
    """Removes what an earlier check left in a folder, and nothing else."""
    for kind in ("oci", "nydus"):
        for what in ("index", "manifest", "config", "output"):
            (folder / f"{kind}_{what}.json").unlink(missing_ok=True)
    if (folder / "nydus_bootstrap").is_dir():
        shutil.rmtree(folder / "nydus_bootstrap")


def _dump(side: Side, folder: Path, progress: Progress, keys: Sequence[PrivateKey]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, found in (("oci", side.oci), ("nydus", side.nydus)):
        if found is None:
            continue
        progress.note("dumping manifest", image=side.place, type=kind)
        if side.index:
            (folder / f"{kind}_index.json").write_bytes(_indented(side.index))
        (folder / f"{kind}_manifest.json").write_bytes(_indented(found.raw_manifest))
        (folder / f"{kind}_config.json").write_bytes(_indented(found.raw_config))
    if side.nydus is None:
        return
    progress.note("pulling bootstrap", image=side.place, type="nydus")
    layer = side.nydus.manifest.layers[-1]
    where = f"{side.place}: bootstrap layer"
    try:
        side.files, diff_id = read_bootstrap_layer(side.reader, layer, where, keys)
    except ConfigError:
        raise
    except NydusError as error:
        raise CheckError("bootstrap", side.name, error) from error
    expected = side.nydus.config.rootfs.diff_ids[-1:]
    if expected != (diff_id,) and not model.is_model(side.nydus.manifest):
        wanted = expected[0] if expected else "none"
        raise CheckError(
            "bootstrap",
            side.name,
            f"wrong diff id of the bootstrap layer: config has {wanted}, it is {diff_id}",
        )
    bootstrap = folder / "nydus_bootstrap"
    # That of an encrypted image holds the keys of its blobs.
    bootstrap.mkdir(mode=0o700 if layer.media_type.endswith(ENCRYPTED) else 0o777)
    for name, data in side.files.items():
        path = bootstrap / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _indented(data: bytes) -> bytes:
    return json.dumps(json.loads(data), indent=2).encode()


def _check_manifest(side: Side, found: Image, report: Report) -> None:
    def wrong(what: str) -> CheckError:
        return CheckError("manifest", side.name, what)

    manifest, diff_ids = found.manifest, found.config.rootfs.diff_ids
    if model.is_model(manifest):
        _check_model(side, found, report)
        return
    if len(diff_ids) != len(manifest.layers):
        raise wrong(
            f"invalid diff ids in image config: {len(diff_ids)} (diff ids) != {len(manifest.layers)} (layers)"
        )
    if found is not side.nydus:
        side.count(report, "manifest", len(manifest.layers))
        return
    last = manifest.layers[-1]
    if last.annotations.get(model.NYDUS_BOOTSTRAP) != "true":
        raise wrong("the last layer has no annotation that says it is the bootstrap")
    if last.media_type not in _BOOTSTRAP_TYPES:
        raise wrong(f"the bootstrap layer has the media type {last.media_type!r}")
    for number, (layer, diff_id) in enumerate(zip(manifest.layers[:-1], diff_ids, strict=False), 1):
        if layer.media_type != model.NYDUS_BLOB:
            raise wrong(f"layer {number} has the media type {layer.media_type!r}, not {model.NYDUS_BLOB}")
        if layer.annotations.get(model.NYDUS_BLOB_ANNOTATION) != "true":
            raise wrong(f"layer {number} has no annotation that says it is a Nydus blob")
        if diff_id != layer.digest:
            raise wrong(f"layer {number}: its diff id {diff_id} is not its digest {layer.digest}")
    side.count(report, "manifest", len(manifest.layers))


def _check_model(side: Side, found: Image, report: Report) -> None:
    manifest = found.manifest
    if found is side.nydus:
        subject = manifest.subject
        if subject is None or subject.media_type != model.OCI_MANIFEST:
            raise CheckError("manifest", side.name, "its subject is not the manifest of a model artifact")
        if manifest.layers[-1].annotations.get(model.NYDUS_BOOTSTRAP) != "true":
            raise CheckError("manifest", side.name, "the last layer is not marked as the bootstrap")
    side.count(report, "manifest", len(manifest.layers))


def _compare_configs(source: Side, target: Side, report: Report) -> None:
    def settings(found: Image) -> dict[str, Any]:
        return {k: v for k, v in (found.config.config or {}).items() if k != "ArgsEscaped"}

    expected = settings(source.image())
    for found in (target.oci, target.nydus):
        if found is None:
            continue
        if settings(found) != expected:
            keys = [k for k in {**expected, **settings(found)} if expected.get(k) != settings(found).get(k)]
            raise CheckError(
                "manifest", "target", f"the config differs from the source's in {', '.join(sorted(keys))}"
            )
    if target.oci is not None and source.oci is not None:
        theirs = [layer.digest for layer in source.oci.manifest.layers]
        mine = [
            layer for layer in target.oci.manifest.layers if model.NYDUS_EMPTY_LAYER not in layer.annotations
        ]
        if [layer.digest for layer in mine] != theirs:
            raise CheckError(
                "manifest", "target", "the OCI half of the index has other layers than the source"
            )
        for layer in mine:
            if not target.reader.has_blob(layer.digest):
                raise CheckError("manifest", "target", f"layer {layer.digest} of the OCI half is not there")
    report.count("config")


def _check_bootstrap(side: Side, report: Report) -> None:
    from nydus.rafs.verify import verify

    def wrong(what: object) -> CheckError:
        return CheckError("bootstrap", side.name, what)

    assert side.nydus is not None
    tree, problems = verify(side.files[BOOTSTRAP], f"{side.place}: {BOOTSTRAP}")
    if tree is None or problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise wrong(f"{problems[0]}{more}")
    side.tree = tree
    layers = side.nydus.manifest.layers
    version = layers[-1].annotations.get(model.NYDUS_FS_VERSION)
    if version is None:
        report.warnings.append(f"{side.name} image: the bootstrap layer does not say its RAFS version")
    elif version != str(tree.version):
        raise wrong(f"the annotation says RAFS version {version!r}, the bootstrap is {tree.version}")
    report.fs_version = tree.version
    sizes = {layer.digest.partition(":")[2]: layer.size for layer in layers[:-1]}
    references = {
        layer.annotations[model.NYDUS_REF].partition(":")[2]
        for layer in layers
        if model.NYDUS_REF in layer.annotations
    }
    if layers[:-1] and all(model.NYDUS_REF in layer.annotations for layer in layers[:-1]):
        report.kind = "oci-ref"
    if model.is_model(side.nydus.manifest):
        report.kind = "model-artifact"
    if tree.blobs and not layers[:-1]:
        report.kind = "storage-backend"
        if side.blobs is None:
            raise wrong(f"its blobs are in a storage backend; say which with --{side.name}-backend-type")
        with closing(side.blobs.open()) as backend:
            for blob in tree.blobs:
                try:
                    sizes[blob.id] = side.stored[f"sha256:{blob.id}"] = backend.size(blob.id)
                except BackendError as error:
                    raise wrong(f"blob {blob.id} is not in {side.blobs}: {error}") from error
    side.stored.update((layer.digest, layer.size) for layer in layers[:-1])
    for reference in references:
        digest = f"sha256:{reference}"
        if not side.reader.has_blob(digest):
            raise wrong(f"blob {reference}, which the image refers to, is not in its repository")
        side.stored[digest] = side.reader.blob_size(digest)
    for blob in tree.blobs:
        if blob.id in references:
            continue
        if blob.id not in sizes:
            raise wrong(f"blob {blob.id} of the bootstrap is not in the manifest")
        elif sizes[blob.id] < blob.compressed_size:
            raise wrong(
                f"blob {blob.id} should have {blob.compressed_size} bytes, its layer has {sizes[blob.id]}"
            )
    for name in side.files:
        blob_id = name.removeprefix("image/").removesuffix(".blob.meta")
        if name.endswith(".blob.meta") and blob_id not in sizes:
            raise wrong(f"{name} belongs to no layer")
    side.count(report, "bootstrap", len(tree))


def _fetch_blobs(side: Side, folder: Path, report: Report, reading: Reading) -> None:
    """Downloads the blobs, which checks their digests; compares their tables with the bootstrap layer's."""
    assert side.nydus is not None
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        source: Source = side.reader
        if side.blobs is not None and not side.nydus.manifest.layers[:-1]:
            source = blobs_of(side.blobs, stack.enter_context(closing(side.blobs.open())))
        stopped = threading.Event()
        pool = stack.enter_context(ThreadPoolExecutor(_AT_ONCE, "check"))
        pending = [
            pool.submit(_fetch, side, source, digest, folder, reading, stopped) for digest in side.stored
        ]
        try:
            for done in as_completed(pending):
                side.count(report, "blobs")
                side.count(report, "blob bytes", done.result())
        except BaseException:
            stopped.set()
            for waiting in pending:
                waiting.cancel()
            raise
    _check_contents(side, folder, report)
    _check_metas(side, folder, report)


def _fetch(
    side: Side, source: Source, digest: str, folder: Path, reading: Reading, stopped: threading.Event
) -> int:
    """Downloads one blob; returns its size."""
    path = folder / digest.partition(":")[2]
    try:
        with open(path, "wb") as file, closing(source.blob(digest, side.stored[digest])) as stream:
            with closing(reading.of(side.name, digest, stream)) as counted:
                while not stopped.is_set() and (piece := counted.read(_PIECE)):
                    file.write(piece)
            return file.tell()
    except NydusError as error:
        raise CheckError("blob", side.name, error) from error
    except OSError as error:
        raise NydusError(f"{path}: {error.strerror}") from error


def _check_contents(side: Side, folder: Path, report: Report) -> None:
    """What lies in the blobs besides data; a blob that only its own bootstrap refers to counts as well."""
    from nydus.convert.contents import check_contents
    from nydus.rafs.model import BlobFeature

    assert side.nydus is not None and side.tree is not None
    listed = {
        blob.rafs_digest.hex() if any(blob.rafs_digest) else blob.id
        for blob in side.tree.blobs
        if blob.features & BlobFeature.HAS_TOC
    }
    encrypted = {blob.id for blob in side.tree.blobs if blob.cipher}
    names = [layer.digest.partition(":")[2] for layer in side.nydus.manifest.layers[:-1]]
    for name in dict.fromkeys(names or [blob.id for blob in side.tree.blobs]):
        with open(folder / name, "rb") as file:
            descriptor, size = file.fileno(), file.seek(0, os.SEEK_END)

            def read(offset: int, length: int, descriptor: int = descriptor) -> bytes:
                return os.pread(descriptor, length, offset)

            try:
                where = f"blob {name}"
                found = check_contents(read, size, where, listed=name in listed, encrypted=name in encrypted)
            except FormatError as error:
                raise CheckError("blob", side.name, error) from error
        side.count(report, "sections", found)


def _check_halves(side: Side, files: Listing, report: Report, reading: Reading) -> None:
    """A merged index has the same files twice; this reads and verifies the layers of its ordinary half."""
    assert side.oci is not None
    try:
        report.count("merged files", compare(_layers(side, reading), files))
    except Difference as error:
        raise CheckError(
            "filesystem", side.name, f"the two halves of the index are not the same: {error}"
        ) from error


def _check_metas(side: Side, folder: Path, report: Report) -> None:
    from nydus.rafs import blobmeta

    assert side.tree is not None
    for blob in side.tree.blobs:
        name = blob.rafs_digest.hex() if any(blob.rafs_digest) else blob.id
        copy = side.files.get(f"image/{name}.blob.meta")
        if copy is None:
            continue
        if len(copy) == blobmeta.HEADER_SIZE:  # what the reference writes with lz4: only the header
            report.warnings.append(f"{side.name} image: image/{name}.blob.meta has no table")
            continue
        with open(folder / name, "rb") as file:

            def read(offset: int, size: int, file: Any = file) -> bytes:
                file.seek(offset)
                data: bytes = file.read(size)
                return data

            try:
                chunks = blobmeta.load(blob, read, f"blob {name}", (folder / name).stat().st_size)
                kept = blobmeta.from_cache_file(blob, copy, f"image/{name}.blob.meta")
                section, header = blobmeta.encode(chunks)
                # The header of the copy may say that the blob holds a bootstrap, which the image does not.
                if not copy.startswith(section) or blobmeta.encode(kept) != (section, header):
                    raise FormatError("is not the table of the blob", where=f"image/{name}.blob.meta")
            except FormatError as error:
                raise CheckError("bootstrap", side.name, error) from error
        side.count(report, "chunk tables")


def _listing(side: Side, folder: Path, reading: Reading) -> Listing:
    try:
        if side.nydus is not None:
            from nydus import image
            from nydus.storage.backends.localfs import LocalFs

            assert side.tree is not None
            backend = LocalFs(dir=str(folder))
            try:
                return of_image(image.open(side.tree, backend))
            finally:
                backend.close()
        return _layers(side, reading)
    except NydusError as error:
        raise CheckError("filesystem", side.name, error) from error


def _layers(side: Side, reading: Reading) -> Listing:
    """The files of an ordinary image."""
    assert side.oci is not None
    overlay = Overlay(_kept, layered=not model.is_model(side.oci.manifest))
    if model.is_model(side.oci.manifest):
        for number, (layer, name) in enumerate(tar_layers(side.oci.manifest), 1):
            blob = side.reader.blob(layer.digest, layer.size)
            with closing(reading.of(side.name, layer.digest, blob)) as stream:
                if name:
                    overlay.add_file(stream, name, layer.size)
                else:
                    # No diff id: the digest, with which it is fetched, is all that is known of it.
                    overlay.apply(stream, "", f"layer {number} of {side.place}")
        return overlay.listing()
    pairs = zip(side.oci.manifest.layers, side.oci.config.rootfs.diff_ids, strict=True)
    for number, (layer, diff_id) in enumerate(pairs, 1):
        blob = open_layer(side.reader, layer, plain_http=plain_http(side.place))
        with closing(reading.of(side.name, layer.digest, blob)) as stream:
            overlay.apply(stream, diff_id, f"layer {number} of {side.place}")
    return overlay.listing()


def _kept(name: str, value: bytes) -> bool:
    """RAFS holds the attributes of these name spaces only (and overlayfs hides the others, too)."""
    from nydus.build.tree import known_xattrs

    return bool(known_xattrs(((name.encode("utf8", "surrogateescape"), value),)))


@contextmanager
def _temporary(work_dir: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=work_dir, prefix=".blobs-") as folder:
        yield Path(folder)
