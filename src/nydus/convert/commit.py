"""``nydusify commit``: a container's image with what the container changed."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from nydus.containerd.containers import Container, Containers
from nydus.convert.changes import Selection, write_folder, write_upper
from nydus.convert.copy import linkable_repository
from nydus.convert.opened import COMMITTED_BLOBS, Opened, open_nydus, put_variant, store_blob
from nydus.convert.progress import Progress, Silent
from nydus.convert.select import reference_name
from nydus.convert.target import require_target
from nydus.errors import ConfigError, NydusError
from nydus.oci.connections import held
from nydus.oci.model import Descriptor
from nydus.oci.place import Sink, SinkPlace, SourcePlace

if TYPE_CHECKING:
    from nydus.build.layer import BuildOptions, LayerResult
    from nydus.oci.encryption import PrivateKey, Recipient


@dataclass(frozen=True, slots=True)
class Committed:
    """What came of it.

    Attributes:
        layers: (what it holds, digest, size in bytes, chunks found in the base image) of each new blob.
        commits: blobs that commits have added to the image until now.
        paused: seconds that the container was held still.
    """

    descriptor: Descriptor
    layers: list[tuple[str, str, int, int]]
    commits: int
    paused: float


@dataclass(frozen=True, slots=True)
class _Part:
    """A new layer: what it is, its blob on disk, and what was built."""

    what: str
    path: Path
    result: LayerResult

    @property
    def known(self) -> int:
        """Chunks of its files that are in the base image already."""
        tree = self.result.tree
        foreign = [n for n, blob in enumerate(tree.blobs) if blob.id != self.result.blob_digest]
        return int(np.isin(tree.chunks["blob_index"], foreign).sum())


def commit(
    containers: Containers,
    container: Container,
    base: SourcePlace,
    target: SinkPlace,
    selection: Selection,
    work_dir: Path,
    *,
    maximum: int = 400,
    progress: Progress | None = None,
    keys: Sequence[PrivateKey] = (),
    readers: Sequence[Recipient] = (),
) -> Committed:
    """Stores what a container changed as more layers of its image.

    The container is held still only while its files are read; everything is sent afterwards.

    Args:
        base: the image that the container runs.
        work_dir: existing folder for the new blobs until they are stored.
        maximum: refuse if commits have added so many blobs already.
        keys: private keys, for an encrypted image.
        readers: for whom the new one is encrypted; only of an encrypted image, and then needed.

    Raises:
        NydusError: one line that says what is wrong and where; the target's tag is not there then.
    """
    progress = progress or Silent()
    name = reference_name(target)
    progress.note("pulling base bootstrap", image=base)
    opened = open_nydus(base, keys=keys)
    opened.require_readers(readers)
    if opened.elsewhere:
        raise ConfigError(
            f"{base}: its blobs are in a storage backend; run the container from a copy that has them "
            "(nydusify copy --source-backend-type)"
        )
    earlier = _committed(opened)
    if len(earlier) >= maximum:
        raise ConfigError(f"{base}: commits have added {len(earlier)} layers already, the limit is {maximum}")
    if selection.extra and not container.pid:
        raise ConfigError(f"container {container.id[:12]} does not run: --with-path needs its mounts")
    writer = target.open_sink()
    require_target(writer, target)
    opened.copy_to(writer, linkable_repository(base, target), progress)
    with tempfile.TemporaryDirectory(dir=work_dir, prefix="nydusify-") as folder:
        progress.note("committing changes", container=container.id)
        started = time.monotonic()
        with held(), containers.paused(container):
            parts = build_parts(
                opened, container.upper, f"/proc/{container.pid}/root", selection, Path(folder)
            )
        paused = time.monotonic() - started if container.pid else 0.0
        progress.note("pushing image", image=target)
        layers = {part.what: store_blob(part.path, writer, encrypted=opened.encrypted) for part in parts}
    descriptor = put_committed(opened, parts, layers, earlier, writer, name, readers)
    progress.note("pushed image", image=target)
    told = [(part.what, layers[part.what].digest, layers[part.what].size, part.known) for part in parts]
    return Committed(descriptor, told, len(earlier) + len(parts), paused)


def _committed(base: Opened) -> list[str]:
    text = base.found.manifest.layers[-1].annotations.get(COMMITTED_BLOBS, "")
    return [digest for digest in text.split(",") if digest]


def build_parts(base: Opened, upper: Path, root: str, selection: Selection, folder: Path) -> list[_Part]:
    """Builds the layers: first what was changed, then each extra path on top of it.

    Args:
        root: the container's root as it sees it.
        folder: for the blobs.
    """
    options = _options(base)
    parts = [
        _build("changes", lambda out: write_upper(str(upper), selection, out), options, folder / "upper")
    ]
    for number, path in enumerate(selection.extra):

        def write(out: IO[bytes], path: str = path) -> None:
            write_folder(root, path, selection, out)

        parts.append(_build(path, write, options, folder / f"mount-{number}"))
    return parts


def put_committed(
    base: Opened,
    parts: list[_Part],
    layers: dict[str, Descriptor],
    earlier: list[str],
    writer: Sink,
    name: str,
    readers: Sequence[Recipient] = (),
) -> Descriptor:
    """Stores the image of a base and new layers, whose blobs are there."""
    from nydus.build.merge import merge

    tree = merge([part.result.tree for part in parts], dictionary=base.tree, parent=base.tree)
    # What was changed last is the topmost layer, as in the images of the reference.
    added = [layers[part.what] for part in (*parts[1:], parts[0])]
    metas = dict(base.metas)
    if tree.version == 6:
        for part in parts:
            if meta := part.result.blob_meta:
                metas[part.result.blob_digest] = meta
    return put_variant(
        base,
        writer,
        name,
        tree,
        [*base.blobs, *added],
        metas=metas,
        annotations={COMMITTED_BLOBS: ",".join([*earlier, *(layer.digest for layer in added)])},
        history=[f"commit: {part.what}" for part in (*parts[1:], parts[0])],
        readers=readers,
    )


def _options(base: Opened) -> BuildOptions:
    """Layers built like those of the base, and referring to its chunks."""
    from nydus.build.layer import BuildOptions
    from nydus.build.merge import Whiteout
    from nydus.rafs.model import Compression, Digester, SuperFlag

    tree = base.tree
    if tree.flags & SuperFlag.TARFS:
        raise NydusError(f"{base.place}: an image whose blobs are tar archives cannot be committed to")
    encrypted = base.encrypted or any(blob.cipher for blob in tree.blobs)
    compression = tree.blobs[0].compression if tree.blobs else Compression.ZSTD
    return BuildOptions(
        version=tree.version,
        compression=Compression.ZSTD if compression == Compression.GZIP else compression,
        digester=Digester.SHA256 if tree.flags & SuperFlag.HASH_SHA256 else Digester.BLAKE3,
        chunk_size=tree.chunk_size,
        inline_meta=not encrypted,  # the bootstrap in a blob would tell everybody its key
        toc=tree.version == 6,
        aligned=tree.version == 6,
        encrypt=encrypted,
        owners=bool(tree.flags & SuperFlag.EXPLICIT_UID_GID),
        whiteout=Whiteout.NONE,
        dictionary=tree,
    )


def _build(what: str, write: Callable[[IO[bytes]], None], options: BuildOptions, path: Path) -> _Part:
    """Builds one layer from a tar archive that is written at the same time."""
    from nydus.build.layer import build_layer

    read_end, write_end = os.pipe()
    failed: list[BaseException] = []

    def run() -> None:
        with open(write_end, "wb") as out:
            try:
                write(out)
            except BrokenPipeError:
                pass
            except BaseException as error:
                failed.append(error)

    thread = threading.Thread(target=run, name="changes")
    try:
        with open(read_end, "rb") as source, open(path, "wb") as blob:
            thread.start()
            try:
                result = build_layer(source, blob.write, options, where=what)
                while source.read(1 << 16):
                    pass
            finally:
                source.close()
                thread.join()
    except (NydusError, OSError):
        if failed and not isinstance(failed[0], OSError):
            raise failed[0] from None
        raise
    if failed:
        raise failed[0]
    if result.blob is not None:
        result.blob.id = result.blob_digest  # in a registry it is found by that
    return _Part(what, path, result)
