"""Build cache images: converted layers kept in a registry for the next conversion, on whatever machine.

The form is that of the reference: a manifest whose layers are Nydus blobs, each with the digest of its source
layer. Here each also says what it was built with, and is used only if that is what is wanted now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from nydus.convert.copy import copy_blob
from nydus.convert.finished import Finished, Stored, chain
from nydus.convert.progress import LayerProgress
from nydus.convert.reuse import Hex, Known, Latin1
from nydus.convert.select import Image
from nydus.errors import BackendError, NydusError
from nydus.oci import model
from nydus.oci.model import Descriptor, Manifest
from nydus.oci.place import RegistryPlace, Source

#: Annotation of a cached layer: what :class:`_Entry` holds, as JSON.
ENTRY = "dev.pynydus.build-cache"
#: What some tools and stores allow for one annotation.
_MAX_ENTRY = 4096


class _Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is to be known of a blob besides its digest and size.

    Attributes:
        key: see :func:`~nydus.convert.reuse.options_key`.
        bootstrap, toc, toc_size, implied, reference: of a layer, see :class:`~nydus.convert.reuse.Known`.
        diff_id: of the bootstrap of a whole image; its blobs are those of the layers.
        blobs: of which blobs that bootstrap is, see :func:`~nydus.convert.finished.chain`.
    """

    key: str
    bootstrap: Hex = ""
    toc: Hex = ""
    toc_size: model.Size = 0
    implied: tuple[Latin1, ...] = ()
    reference: str = ""
    diff_id: model.Digest | None = None
    blobs: str = ""


class BuildCache:
    """The cache image at one place.

    Args:
        version: caches of another version are neither used nor kept.
        most: layers and images to keep; the newest stay.
    """

    def __init__(self, place: RegistryPlace, version: str = "v1", most: int = 200) -> None:
        self.place, self._version, self._most = place, version, most
        self._records: tuple[Descriptor, ...] = ()
        self._key = ""
        self._layers: dict[str, Known] = {}
        self._images: dict[str, tuple[Descriptor, _Entry]] = {}

    @property
    def repository(self) -> str:
        return self.place.reference.name

    def load(self, key: str) -> dict[str, Known]:
        """The usable layers by digest of their source layer; none if there is no cache yet.

        Args:
            key: of what is converted now, see :func:`~nydus.convert.reuse.options_key`.

        Raises:
            NydusError: it cannot be read, or is something else.
        """
        self._key = key
        source = self.place.open()
        try:
            descriptor, data = source.manifest(self.place.target)
        except BackendError as error:
            if error.status == 404:
                return {}
            what = f"build cache {self.place}: {error}"
            raise BackendError(what, permanent=error.permanent, status=error.status) from error
        document = model.decode_image(data, descriptor.media_type, f"build cache {self.place}")
        version = (document.annotations or {}).get(model.NYDUS_CACHE_VERSION)
        if not isinstance(document, Manifest) or version is None:
            raise NydusError(f"{self.place}: is not a build cache; it would be overwritten")
        if version != self._version:
            return {}
        self._records = document.layers
        for record in document.layers:
            entry = _entry(record)
            of = record.annotations.get(model.NYDUS_SOURCE_DIGEST, "")
            if entry is None or entry.key != key:
                continue  # one that the reference wrote does not say what it was built with
            if entry.diff_id:
                self._images[of] = record, entry
                continue
            self._layers[of] = Known(
                digest=record.digest,
                size=record.size,
                bootstrap=entry.bootstrap,
                toc=entry.toc,
                toc_size=entry.toc_size,
                repository=self.repository,
                implied=entry.implied,
                reference=entry.reference,
            )
        return self._layers

    def find(self, image: Image) -> Finished | None:
        """What an image became, if all of it is here."""
        source = chain(image.manifest.layers)
        bootstrap, entry = self._images.get(source, (None, None))
        layers = [self._layers.get(layer.digest) for layer in image.manifest.layers]
        blobs = tuple(Stored(known.digest, known.size, known.reference) for known in layers if known)
        # The blob of a layer that was converted again may be another one: of another version of a codec.
        if bootstrap is None or entry is None or entry.diff_id is None:
            return None
        if len(blobs) < len(layers) or entry.blobs != chain(blobs):
            return None
        return Finished(
            source=source,
            blobs=blobs,
            bootstrap=Stored(bootstrap.digest, bootstrap.size),
            diff_id=entry.diff_id,
            repository=self.repository,
        )

    def store(
        self,
        layers: Mapping[str, Known],
        blobs: tuple[Source, str],
        images: Sequence[Finished],
        bootstraps: tuple[Source, str],
    ) -> None:
        """Adds what was converted to the cache.

        Args:
            layers: source digest -> converted layer.
            blobs: where the blobs of the layers are, and its ``host/name``, "" if it is no registry.
            images: of these layers.
            bootstraps: the same for their bootstraps.

        Raises:
            BackendError: the cache cannot be written.
        """
        added = [
            _record(model.NYDUS_BLOB, known, source, _entry_of(known, self._key))
            for source, known in layers.items()
        ]
        added += [
            _record(
                model.OCI_LAYER_GZIP,
                image.bootstrap,
                image.source,
                _Entry(self._key, diff_id=image.diff_id, blobs=chain(image.blobs)),
            )
            for image in {image.source: image for image in images}.values()  # of platforms alike
        ]
        added = [record for record in added if len(record.annotations[ENTRY]) <= _MAX_ENTRY]
        if tuple(added) == self._records[: len(added)]:
            return
        replaced = {_identity(record) for record in added}
        kept = [record for record in self._records if _identity(record) not in replaced]
        sources = {model.NYDUS_BLOB: blobs, model.OCI_LAYER_GZIP: bootstraps}
        try:
            self._put(added, kept, sources)
        except BackendError as error:
            if error.status not in (400, 404):
                raise
            self._put(added, [], sources)  # it has lost a blob of what it kept

    def _put(
        self,
        added: Sequence[Descriptor],
        kept: Sequence[Descriptor],
        sources: Mapping[str, tuple[Source, str]],
    ) -> None:
        sink = self.place.open_sink()
        for record in added:
            if not kept or record not in self._records:
                source, repository = sources[record.media_type]
                host, _, name = repository.partition("/")
                link_from = name if host == self.repository.partition("/")[0] else ""
                copy_blob(source, sink, LayerProgress(0, record.digest, record.size), link_from)
        manifest = Manifest(
            schema_version=2,
            media_type=model.OCI_MANIFEST,
            config=sink.put_blob(b"{}", model.OCI_CONFIG),
            layers=(*added, *kept)[: self._most],
            annotations={model.NYDUS_CACHE_VERSION: self._version},
        )
        sink.put_manifest(self.place.target, model.encode(manifest), model.OCI_MANIFEST)


def _record(kind: str, blob: Known | Stored, source: str, entry: _Entry) -> Descriptor:
    annotations = {model.NYDUS_SOURCE_DIGEST: source, ENTRY: model.encode(entry).decode()}
    if kind == model.NYDUS_BLOB:
        annotations[model.NYDUS_BLOB_ANNOTATION] = "true"
    return Descriptor(media_type=kind, digest=blob.digest, size=blob.size, annotations=annotations)


def _entry_of(known: Known, key: str) -> _Entry:
    return _Entry(key, known.bootstrap, known.toc, known.toc_size, known.implied, known.reference)


def _entry(record: Descriptor) -> _Entry | None:
    try:
        return msgspec.json.decode(record.annotations.get(ENTRY, ""), type=_Entry)
    except msgspec.MsgspecError:
        return None


def _identity(record: Descriptor) -> tuple[str, str]:
    entry = _entry(record)
    return record.annotations.get(model.NYDUS_SOURCE_DIGEST, ""), entry.key if entry else ""
