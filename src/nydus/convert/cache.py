"""Build cache images: converted layers kept in a registry for the next conversion, on whatever machine.

The form is that of the reference: a manifest whose layers are Nydus blobs, each with the digest of its source
layer. Here each also says what it was built with, and is used only if that is what is wanted now.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from nydus.convert.copy import copy_blob
from nydus.convert.options import ConvertOptions
from nydus.convert.progress import LayerProgress
from nydus.convert.reuse import Known, options_key
from nydus.errors import BackendError, NydusError
from nydus.oci import model
from nydus.oci.model import Descriptor, Manifest
from nydus.oci.place import RegistryPlace, Source

#: Annotation of a cached layer: what :class:`_Entry` holds, as JSON.
ENTRY = "dev.pynydus.build-cache"
#: What some tools and stores allow for one annotation.
_MAX_ENTRY = 4096


class _Entry(msgspec.Struct, frozen=True):
    key: str
    bootstrap: str
    toc: str
    toc_size: int
    implied: tuple[str, ...] = ()
    reference: str = ""


class BuildCache:
    """The cache image at one place.

    Args:
        version: caches of another version are neither used nor kept.
        most: layers to keep; the newest stay.
    """

    def __init__(self, place: RegistryPlace, version: str = "v1", most: int = 200) -> None:
        self.place, self._version, self._most = place, version, most
        self._layers: tuple[Descriptor, ...] = ()

    @property
    def repository(self) -> str:
        return self.place.reference.name

    def load(self, options: ConvertOptions, dictionary: str = "") -> dict[str, Known]:
        """The usable layers by digest of their source layer; none if there is no cache yet.

        Args:
            dictionary: see :func:`~nydus.convert.reuse.options_key`.

        Raises:
            NydusError: it cannot be read, or is something else.
        """
        source = self.place.open()
        try:
            descriptor, data = source.manifest(self.place.target)
        except BackendError as error:
            if error.status == 404:
                return {}
            raise
        document = model.decode_image(data, descriptor.media_type, f"build cache {self.place}")
        version = (document.annotations or {}).get(model.NYDUS_CACHE_VERSION)
        if not isinstance(document, Manifest) or version is None:
            raise NydusError(f"{self.place}: is not a build cache; it would be overwritten")
        if version != self._version:
            return {}
        self._layers = document.layers
        key, found = options_key(options, dictionary), {}
        for layer in document.layers:
            try:
                entry = msgspec.json.decode(layer.annotations.get(ENTRY, "null"), type=_Entry)
            except msgspec.MsgspecError:
                continue  # one that the reference wrote does not say what it was built with
            if entry.key == key:
                found[layer.annotations.get(model.NYDUS_SOURCE_DIGEST, "")] = Known(
                    digest=layer.digest,
                    size=layer.size,
                    bootstrap=entry.bootstrap,
                    toc=entry.toc,
                    toc_size=entry.toc_size,
                    repository=self.repository,
                    implied=entry.implied,
                    reference=entry.reference,
                )
        return found

    def store(
        self,
        layers: Mapping[str, Known],
        options: ConvertOptions,
        target: Source,
        repository: str,
        dictionary: str = "",
    ) -> None:
        """Adds layers to the cache.

        Args:
            layers: source digest -> converted layer, whose blobs are all in ``target``.
            repository: ``host/name`` of the target, "" if it is no registry.
            dictionary: see :func:`~nydus.convert.reuse.options_key`.

        Raises:
            BackendError: the cache cannot be written.
        """
        sink, key = self.place.open_sink(), options_key(options, dictionary)
        same_host = repository.partition("/")[0] == self.repository.partition("/")[0]
        link_from = repository.partition("/")[2] if same_host else ""
        added = []
        for source_digest, known in layers.items():
            entry = _Entry(key, known.bootstrap, known.toc, known.toc_size, known.implied, known.reference)
            if len(model.encode(entry)) > _MAX_ENTRY:
                continue
            copy_blob(target, sink, LayerProgress(0, known.digest, known.size), link_from)
            annotations = {
                model.NYDUS_BLOB_ANNOTATION: "true",
                model.NYDUS_SOURCE_DIGEST: source_digest,
                ENTRY: model.encode(entry).decode(),
            }
            added.append(
                Descriptor(
                    media_type=model.NYDUS_BLOB, digest=known.digest, size=known.size, annotations=annotations
                )
            )
        mine = {(layer.annotations[model.NYDUS_SOURCE_DIGEST], key) for layer in added}
        kept = [layer for layer in self._layers if _identity(layer) not in mine]
        manifest = Manifest(
            schema_version=2,
            media_type=model.OCI_MANIFEST,
            config=sink.put_blob(b"{}", model.OCI_CONFIG),
            layers=(*added, *kept)[: self._most],
            annotations={model.NYDUS_CACHE_VERSION: self._version},
        )
        sink.put_manifest(self.place.target, model.encode(manifest), model.OCI_MANIFEST)


def _identity(layer: Descriptor) -> tuple[str, str]:
    try:
        key = msgspec.json.decode(layer.annotations.get(ENTRY, "null"), type=_Entry).key
    except msgspec.MsgspecError:
        key = ""
    return layer.annotations.get(model.NYDUS_SOURCE_DIGEST, ""), key
