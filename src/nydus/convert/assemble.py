"""The parts of a Nydus image put together: converted layers, the bootstrap over them, the documents."""

from __future__ import annotations

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
from nydus.convert.opened import Opened
from nydus.convert.options import ConvertOptions
from nydus.convert.progress import Silent
from nydus.convert.select import Image
from nydus.errors import ConfigError
from nydus.oci import model
from nydus.oci.model import Descriptor, Manifest
from nydus.oci.place import Sink, SinkPlace, SourcePlace

if TYPE_CHECKING:
    from jwcrypto.jwk import JWK


@dataclass(frozen=True, slots=True)
class Assembled:
    """The layers of a Nydus image, all of which are stored.

    Attributes:
        blobs: with the file data; none of an image whose blobs are in a storage backend.
        diff_id: of ``bootstrap``, the last layer.
    """

    blobs: Sequence[Descriptor]
    bootstrap: Descriptor
    diff_id: str

    def finished(self, found: Image, repository: str) -> Finished:
        """What to remember of it."""
        blobs = tuple(
            Stored(blob.digest, blob.size, blob.annotations.get(model.NYDUS_REF, "")) for blob in self.blobs
        )
        bootstrap = Stored(self.bootstrap.digest, self.bootstrap.size)
        return Finished(
            source=chain(found), blobs=blobs, bootstrap=bootstrap, diff_id=self.diff_id, repository=repository
        )


def assemble_again(finished: Finished) -> Assembled:
    """An image that was put together before and is in the target already."""
    bootstrap = finished.bootstrap
    return Assembled(
        _layers(finished.blobs),
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
    readers: Sequence[JWK],
) -> Assembled:
    """Merges the layers of one image and stores the bootstrap.

    Args:
        backend: where the blobs are instead of the target, whose manifest then does not list them.
        dictionary: whose chunks the layers refer to; its blobs that are used become layers, too.
        readers: for whom the bootstrap is encrypted.
    """
    from nydus.build.layer import prefetch_rows, write_bootstrap
    from nydus.build.merge import merge

    used: list[str] = []  # digests of the blobs that are

    def make() -> bytes:
        tree = merge([blob.tree for blob in blobs], dictionary.tree if dictionary else None)
        tree.prefetch = prefetch_rows(tree, options.prefetch)
        used.extend(f"sha256:{blob.id}" for blob in tree.blobs)
        return write_bootstrap(tree)

    metas = {blob.digest.removeprefix("sha256:"): blob.meta for blob in blobs if blob.meta}
    packed, diff_id = bootstrap_layer(make, metas)
    bootstrap = put_bootstrap(writer, packed, readers)
    layers = _layers(blobs, encrypted=bool(readers))
    if dictionary is not None:
        own = {layer.digest for layer in layers}
        blobs_sink = backend.open_sink() if backend else writer
        for digest in used:
            if digest not in own and not dictionary.layer_of(digest) and not blobs_sink.has_blob(digest):
                raise ConfigError(f"{dictionary.place}: its blob {digest} is not in {backend}")
        wanted = [layer.digest for layer in map(dictionary.layer_of, used) if layer]
        shared = [layer for layer in dictionary.blobs if layer.digest in wanted and layer.digest not in own]
        link_from = "" if backend else linkable_repository(dictionary.place, target)
        dictionary.copy_to(blobs_sink, link_from, Silent(), shared)
        layers += shared
    return Assembled([] if backend else layers, bootstrap, diff_id)


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
    found: Image, parts: Assembled, source: SourcePlace, writer: Sink, options: ConvertOptions
) -> Manifest:
    """Stores the config of a Nydus image; returns its manifest, which is not stored yet.

    Args:
        found: the image that was converted.
    """
    diff_ids = [*(layer.digest for layer in parts.blobs), parts.diff_id]
    where = f"{source}: config"
    raw_config = rewrite_config(found.raw_config, diff_ids, where, keep_history=bool(parts.blobs))
    kind = model.NYDUS_CONFIG if options.merge_platform else config_type(found.manifest, oci=options.oci)
    config = writer.put_blob(raw_config, kind)
    origin = found.descriptor
    subject = Descriptor(media_type=found.manifest.media_type, digest=origin.digest, size=origin.size)
    return rewrite_manifest(
        found.manifest,
        origin.digest,
        str(source),
        config,
        parts.blobs,
        parts.bootstrap,
        fs_version=options.fs_version,
        oci=options.oci,
        subject=subject if options.with_referrer else None,
    )
