"""A client of containerd that pulls as its CRI does: it asks the snapshotter before it downloads a layer.

``ctr`` of containerd 1.6 downloads everything first and sends no labels: no lazy snapshotter can help it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from nydus.convert.select import Image, select
from nydus.errors import FormatError, NydusError
from nydus.oci import model
from nydus.oci.model import Descriptor, Platform
from nydus.oci.place import Source
from nydus.oci.reference import Reference
from nydus.snapshotter import labels as label
from nydus.snapshotter.api import content_pb2, diff_pb2, images_pb2, leases_pb2, snapshots_pb2, types_pb2
from nydus.snapshotter.api.content_pb2_grpc import ContentStub
from nydus.snapshotter.api.diff_pb2_grpc import DiffStub
from nydus.snapshotter.api.images_pb2_grpc import ImagesStub
from nydus.snapshotter.api.leases_pb2_grpc import LeasesStub
from nydus.snapshotter.api.snapshots_pb2_grpc import SnapshotsStub

PARALLEL = 3
_PIECE = 1 << 20
_MAX_LABEL = 4096
_EXPIRY = 24 * 3600
_MAX_MESSAGE = 16 << 20


class ContainerdError(NydusError):
    """containerd refused; the text is its own."""


@dataclass
class Pulled:
    """What a pull did: ``lazy`` of ``layers`` need no download, ``fetched`` bytes were downloaded."""

    digest: str
    layers: int
    lazy: int = 0
    fetched: int = 0


class Client:
    """A connection to containerd in one namespace. A context manager.

    Args:
        address: its UNIX socket.
        namespace: whose images.
        snapshotter: name of the snapshotter plugin.
    """

    def __init__(self, address: Path, namespace: str, snapshotter: str) -> None:
        if not address.exists():
            raise ContainerdError(f"{address}: containerd does not listen there")
        self._snapshotter = snapshotter
        self._channel = grpc.insecure_channel(
            f"unix:{address}", options=[("grpc.max_receive_message_length", _MAX_MESSAGE)]
        )
        self._metadata = [("containerd-namespace", namespace)]
        self._content, self._diff = ContentStub(self._channel), DiffStub(self._channel)
        self._images, self._leases = ImagesStub(self._channel), LeasesStub(self._channel)
        self._snapshots = SnapshotsStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def pull(
        self,
        reference: Reference,
        source: Source,
        *,
        platform: Platform | None = None,
        image_labels: Mapping[str, str] | None = None,
        said: Callable[[str], None] = lambda line: None,
    ) -> Pulled:
        """Pull and unpack one image; ``said`` hears one line for each layer.

        Raises:
            NydusError: containerd, the registry or the image; the text is that of whoever refused.
        """
        name = str(reference)
        index, (image,) = select(source, reference.target, name, (platform,) if platform else ())
        with self._lease():
            top = image.descriptor
            if index is not None:
                top, data = source.manifest(reference.target)
                children = {
                    f"containerd.io/gc.ref.content.m.{i}": entry.digest
                    for i, entry in enumerate(index.manifests)
                    if entry.digest == image.descriptor.digest
                }
                self._store(top, data, children)
            references = {"containerd.io/gc.ref.content.config": image.manifest.config.digest}
            for i, layer in enumerate(image.manifest.layers):
                references[f"containerd.io/gc.ref.content.l.{i}"] = layer.digest
            self._store(image.descriptor, image.raw_manifest, references)
            self._store(image.manifest.config, image.raw_config, {})
            result = Pulled(image.descriptor.digest, len(image.manifest.layers))
            chain = self._unpack(name, image, source, result, said)
            self._label(
                image.manifest.config.digest, f"containerd.io/gc.ref.snapshot.{self._snapshotter}", chain
            )
            self._record(name, top, image_labels or {})
        return result

    # Layers

    def _unpack(
        self, name: str, image: Image, source: Source, result: Pulled, said: Callable[[str], None]
    ) -> str:
        """Bring every layer into the snapshotter, lowest first. Returns the chain ID of the top one."""
        layers, diff_ids = image.manifest.layers, image.config.rootfs.diff_ids
        if len(layers) != len(diff_ids):
            raise FormatError(
                "layers and diff_ids differ in number", where=name, expected=len(layers), found=len(diff_ids)
            )
        downloads: dict[int, Future[int]] = {}
        parent = chain = ""
        with ThreadPoolExecutor(PARALLEL, "layer") as executor:
            try:
                for i, (layer, diff_id) in enumerate(zip(layers, diff_ids, strict=True)):
                    parent, chain = chain, _chain_id(chain, diff_id)
                    key = f"extract-{time.time_ns() % 10**9}-{secrets.token_urlsafe(3)} {chain}"
                    mounts = self._prepare(key, parent, chain, _labels(name, image, i))
                    if mounts is None:
                        result.lazy += 1
                        said(f"{layer.digest}: lazy, {layer.size} bytes stay in the registry")
                        continue
                    try:
                        if not downloads:
                            # The snapshotter does not take this one: the ones above will be wanted too.
                            for j, above in enumerate(layers[i:], i):
                                if label.BLOB not in above.annotations:
                                    downloads[j] = executor.submit(self._fetch, above, source)
                        if i not in downloads:
                            downloads[i] = executor.submit(self._fetch, layer, source)
                        result.fetched += downloads[i].result()
                        self._apply(layer, diff_id, mounts)
                        self._commit(key, chain, _labels(name, image, i))
                    except BaseException:
                        with suppress(NydusError):
                            self._remove(key)
                        raise
                    said(f"{layer.digest}: unpacked, {layer.size} bytes")
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise
        return chain

    def _prepare(self, key: str, parent: str, chain: str, labels: dict[str, str]) -> Sequence[Any] | None:
        """The mounts to unpack a layer on; None if the snapshotter has it, or needs no download of it."""
        if self._has_snapshot(chain):
            return None
        request = snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=self._snapshotter, key=key, parent=parent, labels={**labels, label.TARGET: chain}
        )
        try:
            answer = self._call(self._snapshots.Prepare, request)
        except ContainerdError as error:
            if _code(error) == grpc.StatusCode.ALREADY_EXISTS and self._has_snapshot(chain):
                return None
            raise
        mounts: Sequence[Any] = answer.mounts
        return mounts

    def _has_snapshot(self, chain: str) -> bool:
        request = snapshots_pb2.StatSnapshotRequest(snapshotter=self._snapshotter, key=chain)
        try:
            self._call(self._snapshots.Stat, request)
        except ContainerdError as error:
            if _code(error) == grpc.StatusCode.NOT_FOUND:
                return False
            raise
        return True

    def _apply(self, layer: Descriptor, diff_id: str, mounts: Sequence[Any]) -> None:
        request = diff_pb2.ApplyRequest(diff=_descriptor(layer), mounts=mounts)
        applied = self._call(self._diff.Apply, request).applied.digest
        if applied != diff_id:
            raise FormatError(
                f"layer {layer.digest} is not the one of the config", expected=diff_id, found=applied
            )

    def _commit(self, key: str, chain: str, labels: dict[str, str]) -> None:
        request = snapshots_pb2.CommitSnapshotRequest(
            snapshotter=self._snapshotter, name=chain, key=key, labels={**labels, label.TARGET: chain}
        )
        try:
            self._call(self._snapshots.Commit, request)
        except ContainerdError as error:
            if _code(error) != grpc.StatusCode.ALREADY_EXISTS:
                raise
            self._remove(key)

    def _remove(self, key: str) -> None:
        request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=self._snapshotter, key=key)
        self._call(self._snapshots.Remove, request)

    # Content

    def _fetch(self, layer: Descriptor, source: Source) -> int:
        """Download a layer into the content store, unless it is there; the bytes downloaded."""
        if self._has_content(layer.digest):
            return 0
        stream = source.blob(layer.digest, layer.size)
        try:
            self._write(layer, iter(lambda: stream.read(_PIECE), b""), {})
        finally:
            stream.close()
        return layer.size

    def _store(self, descriptor: Descriptor, data: bytes, labels: Mapping[str, str]) -> None:
        if not self._has_content(descriptor.digest):
            self._write(descriptor, iter([data]), labels)
        for key, value in labels.items():
            self._label(descriptor.digest, key, value)

    def _has_content(self, digest: str) -> bool:
        try:
            self._call(self._content.Info, content_pb2.InfoRequest(digest=digest))
        except ContainerdError as error:
            if _code(error) == grpc.StatusCode.NOT_FOUND:
                return False
            raise
        return True

    def _write(self, descriptor: Descriptor, pieces: Iterator[bytes], labels: Mapping[str, str]) -> None:
        ref = f"pynydus-{os.getpid()}-{descriptor.digest}"
        common = {"ref": ref, "total": descriptor.size, "expected": descriptor.digest}

        def requests() -> Iterator[Any]:
            offset = 0
            for piece in pieces:
                yield content_pb2.WriteContentRequest(
                    action=content_pb2.WRITE, offset=offset, data=piece, **common
                )
                offset += len(piece)
            yield content_pb2.WriteContentRequest(
                action=content_pb2.COMMIT, offset=offset, labels=labels, **common
            )

        try:
            for _ in self._stream(self._content.Write, requests()):
                pass
        except ContainerdError as error:
            if _code(error) != grpc.StatusCode.ALREADY_EXISTS:
                raise

    def _label(self, digest: str, key: str, value: str) -> None:
        request = content_pb2.UpdateRequest(
            info=content_pb2.Info(digest=digest, labels={key: value}),
            update_mask=FieldMask(paths=[f"labels.{key}"]),
        )
        self._call(self._content.Update, request)

    # Records

    def _record(self, name: str, target: Descriptor, labels: Mapping[str, str]) -> None:
        image = images_pb2.Image(name=name, labels=labels, target=_descriptor(target))
        try:
            self._call(self._images.Create, images_pb2.CreateImageRequest(image=image))
        except ContainerdError as error:
            if _code(error) != grpc.StatusCode.ALREADY_EXISTS:
                raise
            self._call(self._images.Update, images_pb2.UpdateImageRequest(image=image))

    @contextmanager
    def _lease(self) -> Iterator[None]:
        """Keeps what is stored from containerd's garbage collection until the image's record refers to it."""
        name = f"pynydus-{os.getpid()}-{secrets.token_hex(8)}"
        expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + _EXPIRY))
        self._call(
            self._leases.Create,
            leases_pb2.CreateRequest(id=name, labels={"containerd.io/gc.expire": expires}),
        )
        self._metadata.append(("containerd-lease", name))
        try:
            yield
        finally:
            self._metadata.pop()
            self._call(self._leases.Delete, leases_pb2.DeleteRequest(id=name))

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise ContainerdError(error.details()) from error

    def _stream(self, method: Any, requests: Iterator[Any]) -> Iterator[Any]:
        # An error of the source ends the request iterator, and gRPC would only say that it did.
        failed: list[BaseException] = []

        def guarded() -> Iterator[Any]:
            try:
                yield from requests
            except BaseException as error:
                failed.append(error)
                raise

        try:
            yield from method(guarded(), metadata=self._metadata)
        except grpc.RpcError as error:
            if failed:
                raise failed[0] from None
            raise ContainerdError(error.details()) from error


def _labels(name: str, image: Image, position: int) -> dict[str, str]:
    """What the snapshotter is told of a layer: its snapshot annotations, and what the CRI adds."""
    layer = image.manifest.layers[position]
    labels = {
        key: value for key, value in layer.annotations.items() if key.startswith("containerd.io/snapshot/")
    }
    above = ""
    for other in image.manifest.layers[position:]:
        longer = f"{above},{other.digest}" if above else other.digest
        if len(label.IMAGE_LAYERS) + len(longer) > _MAX_LABEL:
            break
        above = longer
    return labels | {
        label.IMAGE_REF: name,
        label.MANIFEST_DIGEST: image.descriptor.digest,
        label.LAYER_DIGEST: layer.digest,
        label.IMAGE_LAYERS: above,
    }


def _chain_id(parent: str, diff_id: str) -> str:
    if not parent:
        return diff_id
    return "sha256:" + hashlib.sha256(f"{parent} {diff_id}".encode()).hexdigest()


def _descriptor(descriptor: Descriptor) -> Any:
    return types_pb2.Descriptor(
        media_type=descriptor.media_type or model.OCI_MANIFEST,
        digest=descriptor.digest,
        size=descriptor.size,
        annotations=descriptor.annotations,
    )


def _code(error: ContainerdError) -> Any:
    return error.__cause__.code() if isinstance(error.__cause__, grpc.RpcError) else None
