"""The parts of a Nydus image put together: converted layers, the bootstrap over them, the documents."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nydus.convert.backend import BackendPlace
from nydus.convert.copy import linkable_repository
from nydus.convert.documents import (
    bootstrap_layer,
    config_type,
    put_bootstrap,
    rewrite_config,
    rewrite_manifest,
)
from nydus.convert.finished import Finished, Stored, chain
from nydus.convert.job import Converted
from nydus.convert.layers import readable
from nydus.convert.opened import Opened
from nydus.convert.options import ConvertOptions
from nydus.convert.progress import Silent
from nydus.convert.select import Image
from nydus.errors import ConfigError
from nydus.oci import model
from nydus.oci.model import Descriptor, Manifest
from nydus.oci.place import Sink, SinkPlace, SourcePlace

if TYPE_CHECKING:
    from nydus.oci.encryption import Recipient

log = logging.getLogger(__name__)

#: Paths that a warning names.
_TOLD = 5


@dataclass(frozen=True, slots=True)
class Assembled:
    """The layers of a Nydus image, all of which are stored.

    Attributes:
        blobs: with the file data of each layer of the source, in order.
        shared: those of a chunk dictionary that are referred to.
        diff_id: of ``bootstrap``, the last layer.
    """

    blobs: Sequence[Descriptor]
    shared: Sequence[Descriptor]
    bootstrap: Descriptor
    diff_id: str

    def finished(self, found: Image, repository: str) -> Finished:
        """What to remember of it."""
        return Finished(
            source=chain(found.manifest.layers),
            blobs=tuple(
                Stored(blob.digest, blob.size, blob.annotations.get(model.NYDUS_REF, ""))
                for blob in self.blobs
            ),
            shared=tuple(self.shared),
            bootstrap=Stored(self.bootstrap.digest, self.bootstrap.size),
            diff_id=self.diff_id,
            repository=repository,
        )


def assemble_again(finished: Finished) -> Assembled:
    """An image that was put together before and is in the target already."""
    bootstrap = finished.bootstrap
    return Assembled(
        _layers(finished.blobs),
        finished.shared,
        Descriptor(media_type=model.OCI_LAYER_GZIP, digest=bootstrap.digest, size=bootstrap.size),
        finished.diff_id,
    )


def assemble(
    blobs: Sequence[Converted],
    writer: Sink,
    options: ConvertOptions,
    *,
    backend: BackendPlace | None,
    dictionary: Opened | None,
    target: SinkPlace,
    readers: Sequence[Recipient],
) -> Assembled:
    """Merges the layers of one image and stores the bootstrap.

    Args:
        backend: where the blobs are instead of the target.
        dictionary: whose chunks the layers refer to; its blobs that are used are had there, too.
        readers: for whom the bootstrap is encrypted.
    """
    from nydus.build.layer import prefetch_rows, write_bootstrap
    from nydus.build.merge import merge

    used: list[str] = []  # digests of the blobs that are

    def make() -> bytes:
        tree = merge([blob.tree for blob in blobs], dictionary.tree if dictionary else None)
        if missing := [path for path in options.prefetch if tree.find(path) is None]:
            names = b", ".join(missing[:_TOLD]).decode(errors="backslashreplace")
            more = f" and {len(missing) - _TOLD} more" if len(missing) > _TOLD else ""
            log.warning("cannot be fetched first, not in the image: %s%s", names, more)
        tree.prefetch = prefetch_rows(tree, options.prefetch)
        used.extend(f"sha256:{blob.id}" for blob in tree.blobs)
        return write_bootstrap(tree)

    metas = {blob.digest.removeprefix("sha256:"): blob.meta for blob in blobs if blob.meta}
    packed, diff_id = bootstrap_layer(make, metas)
    bootstrap = put_bootstrap(writer, packed, readers)
    layers = _layers(blobs, encrypted=bool(readers))
    shared: list[Descriptor] = []
    if dictionary is not None:
        own = {layer.digest for layer in layers}
        wanted = [layer.digest for layer in map(dictionary.layer_of, used) if layer]
        shared = [layer for layer in dictionary.blobs if layer.digest in wanted and layer.digest not in own]
        link_from = "" if backend else linkable_repository(dictionary.place, target)
        dictionary.copy_to(backend.open_sink() if backend else writer, link_from, Silent(), shared)
        elsewhere = [digest for digest in used if digest not in own and not dictionary.layer_of(digest)]
        if elsewhere:
            place = backend or target
            with readable(place, writer) as stored:
                for digest in elsewhere:
                    if not stored.has_blob(digest):
                        raise ConfigError(f"{dictionary.place}: its blob {digest} is not in {place}")
                    shared.append(Descriptor(digest=digest, size=stored.blob_size(digest)))
    return Assembled(layers, shared, bootstrap, diff_id)


def _layers(blobs: Iterable[Converted | Stored], *, encrypted: bool = False) -> list[Descriptor]:
    return [
        Descriptor(
            media_type=model.NYDUS_BLOB,
            digest=blob.digest,
            size=blob.size,
            annotations={
                model.NYDUS_BLOB_ANNOTATION: "true",
                **({model.NYDUS_REF: blob.reference} if blob.reference else {}),
                **({model.NYDUS_ENCRYPTED_BLOB: "true"} if encrypted else {}),
            },
        )
        for blob in blobs
    ]


def put_documents(
    found: Image,
    parts: Assembled,
    source: SourcePlace,
    writer: Sink,
    options: ConvertOptions,
    *,
    listed: bool,
) -> Manifest:
    """Stores the config of a Nydus image; returns its manifest, which is not stored yet.

    Args:
        found: the image that was converted.
        listed: its blobs are layers; they are not if they are in a storage backend.
    """
    blobs = [*parts.blobs, *parts.shared] if listed else []
    diff_ids = [*(layer.digest for layer in blobs), parts.diff_id]
    where = f"{source}: config"
    raw_config = rewrite_config(found.raw_config, diff_ids, where, keep_history=listed)
    kind = model.NYDUS_CONFIG if options.merge_platform else config_type(found.manifest, oci=options.oci)
    config = writer.put_blob(raw_config, kind)
    origin = found.descriptor
    subject = Descriptor(media_type=found.manifest.media_type, digest=origin.digest, size=origin.size)
    return rewrite_manifest(
        found.manifest,
        origin.digest,
        str(source),
        config,
        blobs,
        parts.bootstrap,
        fs_version=options.fs_version,
        oci=options.oci,
        subject=subject if options.with_referrer else None,
    )
