"""containerd's content store and image records, through its API."""

from __future__ import annotations

from pathlib import Path

import grpc

from nydus.containerd.containers import missing
from nydus.oci import model
from nydus.oci.model import Descriptor
from nydus.oci.place import Source
from nydus.snapshotter.api import content_pb2, images_pb2
from nydus.snapshotter.pull import Client, ContainerdError


class Contents(Client):
    """The content store and image records alone, without a snapshotter."""

    def __init__(self, address: Path, namespace: str) -> None:
        super().__init__(address, namespace, "")

    def target(self, image: str) -> Descriptor | None:
        """What the record of an image refers to; None if there is no such record."""
        try:
            found = self._call(self._images.Get, images_pb2.GetImageRequest(name=image)).image.target
        except ContainerdError as error:
            if missing(error):
                return None
            raise
        return Descriptor(media_type=found.media_type, digest=found.digest, size=found.size)

    def size(self, digest: str) -> int | None:
        """The bytes of a blob; None if it is not there."""
        try:
            return int(self._call(self._content.Info, content_pb2.InfoRequest(digest=digest)).info.size)
        except ContainerdError as error:
            if missing(error):
                return None
            raise

    def read(self, digest: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a blob, more than none."""
        request = content_pb2.ReadContentRequest(digest=digest, offset=offset, size=size)
        try:
            return b"".join(part.data for part in self._content.Read(request, metadata=self._metadata))
        except grpc.RpcError as error:
            raise ContainerdError(error.details()) from error

    def put(self, name: str, source: Source, reference: str = "") -> Descriptor:
        """Stores an image with all it refers to, and a record of it."""
        with self._lease():
            top, data = source.manifest(reference)
            self._put(top, data, source)
            self._record(name, top, {})
        return top

    def _put(self, described: Descriptor, data: bytes, source: Source) -> None:
        document = model.decode_image(data, described.media_type, described.digest)
        references = {}
        if isinstance(document, model.Index):
            for i, entry in enumerate(document.manifests):
                if source.has_blob(entry.digest):
                    self._put(entry, source.manifest(entry.digest)[1], source)
                    references[f"containerd.io/gc.ref.content.m.{i}"] = entry.digest
        else:
            references["containerd.io/gc.ref.content.config"] = document.config.digest
            self._fetch(document.config, source)
            for i, layer in enumerate(document.layers):
                references[f"containerd.io/gc.ref.content.l.{i}"] = layer.digest
                self._fetch(layer, source)
            for i, digest in enumerate(model.data_layers(document)):
                if source.has_blob(digest):
                    references[f"containerd.io/gc.ref.content.d.{i}"] = digest
                    self._fetch(Descriptor(digest=digest, size=source.blob_size(digest)), source)
        self._store(described, data, references)
