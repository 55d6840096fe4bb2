"""The conversion of an OCI image into a Nydus image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nydus.convert.assemble import assemble, assemble_again, put_documents
from nydus.convert.backend import BackendPlace
from nydus.convert.cache import BuildCache
from nydus.convert.copy import copy_blobs, linkable_repository
from nydus.convert.finished import Finished, FinishedImages, bring_image, kept_layers
from nydus.convert.layers import convert_layers, readable, repository_of
from nydus.convert.opened import Opened, open_nydus
from nydus.convert.options import ConvertOptions
from nydus.convert.progress import LayerProgress, Progress, Silent
from nydus.convert.publish import put_image, put_merged
from nydus.convert.reuse import Record, known_of, options_key
from nydus.convert.select import Image, reference_name, select
from nydus.convert.sizes import Sizes, measure
from nydus.convert.target import require_target
from nydus.errors import ConfigError, FormatError
from nydus.oci import model
from nydus.oci.encryption import ENCRYPTED, recipients
from nydus.oci.model import Descriptor, Manifest, Platform
from nydus.oci.place import SinkPlace, Source, SourcePlace

_LAYER_TYPES = (
    "application/vnd.oci.image.layer.",
    "application/vnd.docker.image.rootfs.",
)


@dataclass(slots=True)
class Result:
    """What came of a conversion.

    Attributes:
        descriptor: of what the target names now: a manifest, or an index of several.
        pull_seconds, convert_seconds, push_seconds: reading the documents; converting layers (which are
            downloaded and uploaded meanwhile); merging them and storing the documents.
        duplicates: chunks that were stored once instead of several times.
    """

    descriptor: Descriptor
    sizes: Sizes
    pull_seconds: float = 0.0
    convert_seconds: float = 0.0
    push_seconds: float = 0.0
    duplicates: int = 0
    layers: list[LayerProgress] = field(default_factory=list)


def image(
    source: SourcePlace,
    target: SinkPlace,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    platforms: Sequence[Platform] | None = (),
    cache: BuildCache | None = None,
    backend: BackendPlace | None = None,
    dictionary: SourcePlace | None = None,
    *,
    fork: bool = False,
) -> Result:
    """Converts an image.

    Layers are converted in processes of their own, each streaming from the source into the target; nothing is
    stored here. The target's tag is written last, so that a failure leaves no image there.

    Args:
        platforms: () is that of this machine where there is a choice, None is all; with more than one the
            target is an index.
        cache: layers converted before, and where to add the new ones.
        dictionary: a Nydus image whose chunks are referred to instead of stored again; its blobs that are
            needed become layers too.
        backend: where blobs go instead of the target, which then holds the bootstrap alone.
        fork: see :class:`~nydus.convert.workers.Workers`.

    Raises:
        NydusError: one line that says what is wrong and where.
    """
    options, progress = options or ConvertOptions(), progress or Silent()
    options = _settle(
        options, cached=cache is not None, elsewhere=backend is not None, shared=dictionary is not None
    )
    readers = recipients(options.recipients)
    name = reference_name(target)
    started = time.monotonic()
    progress.note(f"pulling image {source}")
    reader = source.open()
    index, images = select(reader, source.target, str(source), platforms)
    for found in images:
        _check(found, reader, f"{source}", options)
    writer = target.open_sink()
    chunks: Opened | None = None
    if dictionary:
        chunks = open_nydus(dictionary, images[0].platform, exact=False, keys=None, later=True)
    key = options_key(options, chunks.found.descriptor.digest if chunks else "")
    cached = cache.load(key) if cache else {}
    cache_source = cache.place.open() if cache else None
    pulled = time.monotonic()
    progress.note(f"pulled image {source} , elapse {pulled - started:.3f}s")

    progress.note(f"converting image {source}")
    repository = repository_of(target)
    blobs_sink = backend.open_sink() if backend else None
    whole_cache = None if dictionary else cache  # which does not have the blobs of a dictionary
    record = FinishedImages(options.record, key) if options.record and repository and not cache else None

    def before(found: Image) -> Finished | None:
        known = whole_cache.find(found) if whole_cache else record.find(found) if record else None
        brought = known and bring_image(known, writer, repository, cache_source, blobs_sink)
        return known if brought else None

    finished = [before(found) for found in images]
    if not all(finished):
        if chunks and chunks.elsewhere and backend is None:
            raise ConfigError(
                f"{dictionary}: its blobs are in a storage backend, the image's have to be, too"
            )
        require_target(writer, target)
    pairs = list(zip(images, finished, strict=True))
    link_from = linkable_repository(source, target)
    # Where all is in one repository there is nothing to see.
    copying = Silent() if repository and repository_of(source) == repository else progress
    with convert_layers(
        [found for found, known in pairs if known is None],
        [state for found, known in pairs if known for state in kept_layers(found, known.blobs)],
        source,
        backend or target,
        options,
        progress,
        cached,
        Record(options.record, key) if options.record else None,
        chunks.tree if chunks and not all(finished) else None,
        cache_source,
        fork=fork,
    ) as (layers, blobs):
        converted = time.monotonic()
        progress.note(f"converted image {source} , elapse {converted - pulled:.3f}s")

        progress.note(f"pushing image {target}")
        if options.oci_ref:  # the data stay in the source's layers, so these have to be where the image is
            copy_blobs(
                reader,
                writer,
                list({layer.digest: layer for found in images for layer in found.manifest.layers}.values()),
                link_from,
                copying,
            )
        parts = [
            assemble_again(known)
            if known
            else assemble(
                [blobs[layer.digest] for layer in found.manifest.layers],
                writer,
                options,
                backend=backend,
                dictionary=chunks,
                target=target,
                readers=readers,
            )
            for found, known in pairs
        ]
    manifests = [
        put_documents(found, part, source, writer, options, listed=backend is None)
        for found, part in zip(images, parts, strict=True)
    ]
    originals: list[Manifest] = []
    if options.merge_platform:
        descriptor, originals = put_merged(name, images, manifests, reader, writer, link_from, copying)
    else:
        descriptor = put_image(name, images, manifests, index, writer, oci=options.oci)
    if record:
        for (found, known), part in zip(pairs, parts, strict=True):
            if known is None:
                record.add(found, part.finished(found, repository))
    if cache:
        digests = [layer.digest for found in images for layer in found.manifest.layers]
        used = {digest: known_of(blobs[digest]) if digest in blobs else cached[digest] for digest in digests}
        whole = zip(images, parts, strict=True) if whole_cache else ()
        with readable(backend or target, writer) as stored:
            cache.store(
                used,
                (stored, repository_of(backend or target)),
                [part.finished(found, repository) for found, part in whole],
                (writer, repository),
            )
    ended = time.monotonic()
    progress.note(f"pushed image {target} , elapse {ended - converted:.3f}s")
    # What holds the data without being listed.
    data: list[Sequence[Descriptor]] = [
        found.manifest.layers if options.oci_ref else [*part.blobs, *part.shared] if backend else ()
        for found, part in zip(images, parts, strict=True)
    ]
    return Result(
        descriptor,
        measure(
            [found.manifest for found in images], manifests, data, originals, in_backend=backend is not None
        ),
        pull_seconds=pulled - started,
        convert_seconds=converted - pulled,
        push_seconds=ended - converted,
        duplicates=sum(blob.duplicates for blob in blobs.values()),
        layers=layers,
    )


def _settle(options: ConvertOptions, *, cached: bool, elsewhere: bool, shared: bool) -> ConvertOptions:
    """The options with what follows from them.

    Args:
        cached, elsewhere, shared: there are a build cache, a storage backend, a chunk dictionary.
    """
    if options.recipients:
        if cached or shared:
            raise ConfigError(
                "encrypted images use no build cache or chunk dictionary: each has its own keys"
            )
        return replace(options, oci=True, record=None)
    if options.oci_ref:
        if elsewhere or shared:
            raise ConfigError("oci-ref cannot be used with a storage backend or a chunk dictionary")
        return replace(options, oci=True)
    return options


def _check(found: Image, reader: Source, where: str, options: ConvertOptions) -> None:
    if found.is_nydus:
        raise ConfigError(f"{where}: is a Nydus image already")
    if model.is_model(found.manifest):
        raise ConfigError(f"{where}: is a model artifact; use --source-backend-type model-artifact")
    if not found.manifest.layers:
        raise FormatError("the image has no layers", where=where)
    if len(found.manifest.layers) != len(found.config.rootfs.diff_ids):
        expected, count = len(found.config.rootfs.diff_ids), len(found.manifest.layers)
        raise FormatError("wrong number of layers", where=where, expected=f"{expected} diff ids", found=count)
    for number, layer in enumerate(found.manifest.layers, 1):
        kind = layer.media_type
        if kind.endswith(ENCRYPTED):
            raise ConfigError(
                f"{where}: layer {number} is encrypted; decrypt it first (skopeo copy --decryption-key)"
            )
        if not kind.startswith(_LAYER_TYPES):
            raise ConfigError(f"{where}: layer {number} is of a type that cannot be converted: {kind!r}")
        if options.oci_ref and "zstd" in kind:
            raise ConfigError(
                f"{where}: layer {number} is zstd; oci-ref needs gzip layers, convert it instead"
            )
        if options.oci_ref and layer.urls and not reader.has_blob(layer.digest):
            raise ConfigError(
                f"{where}: layer {number} is not in the registry, only its address is; "
                "oci-ref needs it there, convert it instead"
            )
