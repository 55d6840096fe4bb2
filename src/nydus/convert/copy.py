"""Images from one place to another as they are."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import msgspec

from nydus.convert.progress import COPY, LayerProgress, Progress, Silent
from nydus.convert.select import Image, reference_name, select
from nydus.errors import BackendError
from nydus.oci import model
from nydus.oci.model import Descriptor, Platform
from nydus.oci.place import RegistryPlace, Sink, SinkPlace, Source, SourcePlace
from nydus.oci.retry import wait_to_retry

_PIECE = 1 << 20
_AT_ONCE = 4
_ATTEMPTS = 3
_PAUSE = 1.0


@dataclass(slots=True)
class Copied:
    """What a copy did; bytes.

    ``present`` is what the target had already (or could link from another of its repositories).
    """

    descriptor: Descriptor
    blobs: int = 0
    sent: int = 0
    present: int = 0


def copy(
    source: SourcePlace,
    target: SinkPlace,
    progress: Progress | None = None,
    platforms: Sequence[Platform] | None = None,
) -> Copied:
    """Copies an image; every document keeps its bytes and so its digest.

    Args:
        platforms: None copies all, with the index. Of an index, one platform gives its plain manifest,
            several, or the two halves of a merged index, give an index of them.

    Raises:
        NydusError: what is wrong and where; the target's tag is written last, so it is not there then.
    """
    progress = progress or Silent()
    name = reference_name(target)
    reader, writer = source.open(), target.open_sink()
    progress.note(f"pulling image {source}")
    index, images = select(
        reader, source.target, str(source), platforms, attestations=platforms is None, nydus=True
    )
    progress.note(f"copying image {source}")
    copied = _copy_blobs(reader, writer, images, linkable_repository(source, target), progress)
    for image in images:
        reference = (
            name if index is None or len(images) == 1 != len(index.manifests) else image.descriptor.digest
        )
        copied.descriptor = writer.put_manifest(reference, image.raw_manifest, image.manifest.media_type)
    if index is not None and (len(images) > 1 or len(index.manifests) == 1):
        if len(images) == len(index.manifests):
            _, data = reader.manifest(source.target)
        else:
            chosen = tuple(image.descriptor for image in images)
            data = model.encode(msgspec.structs.replace(index, manifests=chosen))
        copied.descriptor = writer.put_manifest(name, data, index.media_type)
    progress.note(f"copied image {target}")
    return copied


def linkable_repository(source: SourcePlace, target: SinkPlace) -> str:
    """The repository to link blobs from, if both are in the same registry."""
    if not (isinstance(source, RegistryPlace) and isinstance(target, RegistryPlace)):
        return ""
    same = source.reference.endpoint == target.reference.endpoint
    return source.reference.repository if same else ""


def _copy_blobs(
    reader: Source, writer: Sink, images: Sequence[Image], repository: str, progress: Progress
) -> Copied:
    blobs: dict[str, Descriptor] = {}
    for image in images:
        for blob in (*image.manifest.layers, image.manifest.config):
            if not blob.urls or reader.has_blob(blob.digest):  # foreign layers stay where they are
                blobs.setdefault(blob.digest, blob)
        for digest in model.data_layers(image.manifest):
            if digest not in blobs and reader.has_blob(digest):  # a copy by other tools has left them behind
                blobs[digest] = Descriptor(digest=digest, size=reader.blob_size(digest))
    sent = copy_blobs(reader, writer, list(blobs.values()), repository, progress)
    present = sum(blob.size for blob in blobs.values()) - sent
    return Copied(images[0].descriptor, len(blobs), sent, present)


def copy_blobs(
    reader: Source, writer: Sink, blobs: Sequence[Descriptor], repository: str, progress: Progress
) -> int:
    """Copies several blobs at the same time, each as :func:`copy_blob` does; returns bytes sent."""
    states = [LayerProgress(n, blob.digest, blob.size) for n, blob in enumerate(blobs, 1)]
    progress.layers(states, COPY)
    stopped = threading.Event()
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1) * 2, "copy") as pool:
        pending = {
            pool.submit(copy_blob, reader, writer, state, repository, progress, stopped) for state in states
        }
        try:
            return sum(done.result() for done in as_completed(pending))
        except BaseException:
            stopped.set()
            for waiting in pending:
                waiting.cancel()
            raise


def _send(
    reader: Source, writer: Sink, state: LayerProgress, progress: Progress, stopped: threading.Event
) -> None:
    state.state, state.downloaded = "working", 0
    stream = reader.blob(state.digest, state.size)
    try:
        with writer.upload() as upload:
            while piece := stream.read(_PIECE):
                if stopped.is_set():
                    raise BackendError("stopped", permanent=True)
                upload.write(piece)
                state.downloaded += len(piece)
                state.built, state.uploaded = state.downloaded, upload.sent
                progress.changed(state)
            upload.commit(state.digest)
    finally:
        stream.close()


def copy_blob(
    reader: Source,
    writer: Sink,
    state: LayerProgress,
    repository: str = "",
    progress: Progress | None = None,
    stopped: threading.Event | None = None,
) -> int:
    """Copies one blob unless the target has it, or can link it from ``repository``; returns bytes sent.

    A blob whose way is interrupted is copied again, a few times.
    """
    progress, stopped = progress or Silent(), stopped or threading.Event()
    if writer.has_blob(state.digest) or (repository and writer.mount_blob(state.digest, repository)):
        sent = 0
    else:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                _send(reader, writer, state, progress, stopped)
                break
            except BackendError as error:
                if not wait_to_retry(error, attempt, _ATTEMPTS, _PAUSE * attempt, stopped=stopped):
                    raise
        sent = state.size
    state.state, state.downloaded, state.built, state.uploaded = "done", state.size, state.size, sent
    state.reused = not sent
    progress.changed(state)
    return sent
