"""A Nydus image where it lies, opened for reading its files and for making another image of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nydus.convert.copy import copy_blobs
from nydus.convert.documents import BOOTSTRAP, bootstrap_layer, put_bootstrap, read_bootstrap_layer
from nydus.convert.progress import Progress
from nydus.convert.select import Image, select
from nydus.errors import ConfigError, FormatError
from nydus.oci import model
from nydus.oci.encryption import ENCRYPTED
from nydus.oci.model import Descriptor, Platform
from nydus.oci.place import Sink, Source, SourcePlace
from nydus.storage.backend import MeteredBackend

if TYPE_CHECKING:
    from nydus.oci.encryption import PrivateKey, Recipient
    from nydus.rafs.model import Tree

#: Of the bootstrap layer: id of the blob with what is read first; digests of the blobs that commits added.
PREFETCH_BLOB = "containerd.io/snapshot/nydus-separated-blob-with-prefetch-files"
COMMITTED_BLOBS = "containerd.io/snapshot/nydus-commit-blobs"

_META = ".blob.meta"
_PIECE = 1 << 20
#: Annotations that tools leave on layers by mistake; they mean nothing outside of the store they come from.
_STRAY = (model.UNCOMPRESSED, "containerd.io/distribution.source.")


class SourceBackend(MeteredBackend):
    """The blobs of a repository, layout or archive by their id (sha256, hex)."""

    def __init__(self, source: Source) -> None:
        super().__init__("image")
        self._source = source

    def _read(self, blob_id: str, offset: int, size: int) -> bytes:
        return self._source.read_range(f"sha256:{blob_id}", offset, size)

    def size(self, blob_id: str) -> int:
        return self._source.blob_size(f"sha256:{blob_id}")

    def close(self) -> None:
        """The source stays open: it is not ours."""


@dataclass
class Opened:
    """A Nydus image of one platform.

    Attributes:
        found: its documents.
        keys: private keys, for an encrypted image.
    """

    place: SourcePlace
    source: Source
    found: Image
    keys: Sequence[PrivateKey] = ()

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Of the bootstrap layer, by path in it. For what this raises, see :func:`open_nydus`."""
        layer, diff_ids = self.found.manifest.layers[-1], self.found.config.rootfs.diff_ids
        where = f"{self.place}: bootstrap layer"
        files, diff_id = read_bootstrap_layer(self.source, layer, where, self.keys)
        if not model.is_model(self.found.manifest) and (not diff_ids or diff_ids[-1] != diff_id):
            expected = diff_ids[-1] if diff_ids else "none"
            raise FormatError("wrong diff id", where=where, expected=expected, found=diff_id)
        return files

    @cached_property
    def tree(self) -> Tree:
        """Its file system. For what this raises, see :func:`open_nydus`."""
        from nydus import rafs

        return rafs.read(self.files[BOOTSTRAP], f"{self.place}: {BOOTSTRAP}")

    @property
    def blobs(self) -> list[Descriptor]:
        """The layers without the bootstrap, as another image can list them."""
        return [
            msgspec.structs.replace(
                layer, annotations={k: v for k, v in layer.annotations.items() if not k.startswith(_STRAY)}
            )
            for layer in self.found.manifest.layers[:-1]
        ]

    @property
    def elsewhere(self) -> bool:
        """Whether its blobs are in a storage backend; then it does not list them."""
        return bool(self.tree.blobs) and not self.blobs

    @property
    def encrypted(self) -> bool:
        """Whether its bootstrap is, which has the keys of its blobs."""
        return self.found.manifest.layers[-1].media_type.endswith(ENCRYPTED)

    def require_readers(self, readers: Sequence[Recipient]) -> None:
        """That an image made of this one is for as few.

        Raises:
            ConfigError: nobody is named who may read an encrypted image, or somebody of one that is not.
        """
        if self.encrypted and not readers:
            raise ConfigError(
                f"{self.place}: is encrypted; say with --encrypt-recipients who may read the new image"
            )
        if readers and not self.encrypted:
            raise ConfigError(
                f"{self.place}: is not encrypted, nor would its blobs be in the new image; "
                "convert the original with --encrypt-recipients first"
            )

    @cached_property
    def backend(self) -> SourceBackend:
        """Where its blobs can be read.

        Raises:
            ConfigError: they are in a storage backend, of which the image does not say more.
        """
        if self.elsewhere:
            raise ConfigError(
                f"{self.place}: its blobs are in a storage backend; say which with --backend-type"
            )
        return SourceBackend(self.source)

    @property
    def metas(self) -> dict[str, bytes]:
        """Blob id -> ``blob.meta`` file, of those that the bootstrap layer has."""
        return {
            name.removeprefix("image/").removesuffix(_META): data
            for name, data in self.files.items()
            if name.endswith(_META)
        }

    def layer_of(self, digest: str) -> Descriptor | None:
        """The layer through which a blob of the tree is had: itself, or the index over it (``oci-ref``)."""
        return next((b for b in self.blobs if digest in (b.digest, b.annotations.get(model.NYDUS_REF))), None)

    def copy_to(
        self, writer: Sink, link_from: str, progress: Progress, layers: Sequence[Descriptor] | None = None
    ) -> int:
        """Has blobs in a target, with the layers that an index (``oci-ref``) is over; returns bytes sent.

        Args:
            link_from: a repository of the target's registry that has them, "" for none.
            layers: of this image; None is all but the bootstrap.
        """
        wanted = self.blobs if layers is None else layers
        found = {blob.digest: blob for blob in wanted}
        for blob in wanted:
            if (digest := blob.annotations.get(model.NYDUS_REF)) and digest not in found:
                found[digest] = Descriptor(digest=digest, size=self.source.blob_size(digest))
        return copy_blobs(self.source, writer, list(found.values()), link_from, progress)


def open_nydus(
    place: SourcePlace,
    platform: Platform | None = None,
    *,
    exact: bool = True,
    keys: Sequence[PrivateKey] | None = (),
    later: bool = False,
) -> Opened:
    """Opens a Nydus image; of a merged index its Nydus half. Reads the bootstrap, no blob.

    Args:
        platform: None is this machine's where there is a choice.
        exact: a single manifest must be for that platform, too.
        keys: private keys, for an encrypted image; None refuses such images, whose chunks cannot be shared.
        later: the bootstrap is read when it is first needed, not now.

    Raises:
        ConfigError: it is not a Nydus image, or there is none for the platform.
        FormatError: a document or the bootstrap is damaged.
        BackendError: it cannot be read.
    """
    return open_each(place, [platform] if platform else (), exact=exact, keys=keys, later=later)[0]


def open_each(
    place: SourcePlace,
    platforms: Sequence[Platform] | None,
    *,
    exact: bool = True,
    keys: Sequence[PrivateKey] | None = (),
    later: bool = False,
) -> list[Opened]:
    """The same for several platforms, or with None for all that there are."""
    source = place.open()
    _, images = select(source, place.target, str(place), platforms, nydus=True, exact=exact)
    found = [image for image in images if image.is_nydus]
    if not found:
        raise ConfigError(f"{place}: is not a Nydus image; convert it first")
    if keys is None and any(image.manifest.layers[-1].media_type.endswith(ENCRYPTED) for image in found):
        raise ConfigError(
            f"{place}: is encrypted; its chunks cannot be shared, as that would tell everybody their keys"
        )
    opened = [Opened(place, source, image, keys or ()) for image in found]
    for each in opened:
        _ = later or each.tree
    return opened


def put_variant(
    base: Opened,
    writer: Sink,
    name: str,
    tree: Tree,
    blobs: Sequence[Descriptor],
    *,
    metas: Mapping[str, bytes],
    annotations: Mapping[str, str],
    history: Sequence[str] = (),
    others: Mapping[str, bytes] | None = None,
    readers: Sequence[Recipient] = (),
) -> Descriptor:
    """Stores an image that is another one with other layers, under a name. The blobs must be there.

    All else is kept, but for ``subject``: what the first image was made of does not refer to this one.

    Args:
        blobs: its layers below the bootstrap; none if its blobs are in a storage backend.
        metas: blob id -> ``blob.meta`` file; those of blobs that the image does not have are left out.
        annotations: of the bootstrap layer, besides those that every one has.
        history: what each blob beyond those of ``base`` is, for the history of the config.
        others: more files of the bootstrap layer.
        readers: for whom it is encrypted.
    """
    from nydus.build.layer import write_bootstrap

    ids = {blob.digest.partition(":")[2] for blob in blobs} or {blob.id for blob in tree.blobs}
    kept = {blob_id: data for blob_id, data in metas.items() if blob_id in ids}
    packed, diff_id = bootstrap_layer(write_bootstrap(tree), kept, others)
    manifest = base.found.manifest
    if manifest.media_type == model.DOCKER_MANIFEST:
        stored = writer.put_blob(packed, model.DOCKER_LAYER_GZIP)
    else:
        stored = put_bootstrap(writer, packed, readers)
    version = {model.NYDUS_FS_VERSION: str(tree.version)}
    before = manifest.layers[-1].annotations
    kept_marks = {key: before[key] for key in (PREFETCH_BLOB, COMMITTED_BLOBS) if key in before}
    marks = {**stored.annotations, model.NYDUS_BOOTSTRAP: "true", **version, **kept_marks, **annotations}
    raw = _config(base.found.raw_config, [*(blob.digest for blob in blobs), diff_id], history)
    changed = msgspec.structs.replace(
        manifest,
        config=writer.put_blob(raw, manifest.config.media_type or model.OCI_CONFIG),
        layers=(*blobs, msgspec.structs.replace(stored, annotations=marks)),
        subject=None,
        annotations={**(manifest.annotations or {}), **version},
    )
    return writer.put_manifest(name, model.encode(changed), changed.media_type)


def _config(raw: bytes, diff_ids: Sequence[str], history: Sequence[str]) -> bytes:
    config: dict[str, Any] = json.loads(raw)
    config["rootfs"] = {"type": "layers", "diff_ids": list(diff_ids)}
    entries = list(config.get("history") or [])
    added = [{"created_by": f"nydusify {text.partition(':')[0]}", "comment": text} for text in history]
    if entries:
        last = len(entries) - (entries[-1].get("comment") == "Nydus Bootstrap Layer")
        config["history"] = [*entries[:last], *added, *entries[last:]]
    return model.encode(config)


def store_blob(path: Path, writer: Sink, *, encrypted: bool = False) -> Descriptor:
    """Stores a Nydus blob from a file, unless it is there; returns the layer that it is.

    Args:
        encrypted: its chunks are.

    Raises:
        BackendError: it cannot be stored.
    """
    with open(path, "rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        size = file.seek(0, os.SEEK_END)
        if not writer.has_blob(digest):
            file.seek(0)
            with writer.upload() as upload:
                while piece := file.read(_PIECE):
                    upload.write(piece)
                upload.commit(digest)
    return Descriptor(
        media_type=model.NYDUS_BLOB,
        digest=digest,
        size=size,
        annotations={
            model.NYDUS_BLOB_ANNOTATION: "true",
            **({model.NYDUS_ENCRYPTED_BLOB: "true"} if encrypted else {}),
        },
    )
