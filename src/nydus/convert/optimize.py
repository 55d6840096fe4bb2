"""``nydusify optimize``: an image whose first reads lie in a blob of their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nydus.convert.backend import BackendPlace
from nydus.convert.copy import linkable_repository
from nydus.convert.documents import BOOTSTRAP
from nydus.convert.opened import PREFETCH_BLOB, open_nydus, put_variant, store_blob
from nydus.convert.progress import Progress, Silent
from nydus.convert.select import reference_name
from nydus.convert.target import require_target
from nydus.errors import ConfigError
from nydus.oci.model import Descriptor, Platform
from nydus.oci.place import SinkPlace, SourcePlace

if TYPE_CHECKING:
    from nydus.build.optimize import Optimized
    from nydus.oci.encryption import PrivateKey, Recipient
    from nydus.rafs.model import BlobInfo, Tree

#: In the bootstrap layer: the trace that the image was optimized with.
_PREFETCH_FILES = "image/prefetch.files"


@dataclass(frozen=True, slots=True)
class OptimizedImage:
    """What came of it; sizes in bytes.

    Attributes:
        files: of the trace that are in the image; ``missing`` are not.
        blob, size, chunks: id (hex), size and chunks of the new blob; "" and 0 if there was nothing for it.
        sent: bytes of other blobs that had to be copied.
    """

    descriptor: Descriptor
    files: int
    missing: list[str]
    blob: str = ""
    size: int = 0
    chunks: int = 0
    sent: int = 0


def optimize(
    source: SourcePlace,
    target: SinkPlace,
    trace: bytes,
    trace_name: str,
    platform: Platform | None,
    work_dir: Path,
    progress: Progress | None = None,
    backend: BackendPlace | None = None,
    *,
    keys: Sequence[PrivateKey] = (),
    readers: Sequence[Recipient] = (),
) -> OptimizedImage:
    """Puts what a trace names into one more blob, and has the whole image in the target.

    Args:
        trace: see :func:`nydus.convert.trace.read_trace`.
        work_dir: existing folder for the new blob until it is stored.
        backend: where the blobs are read. An image that does not list its blobs gets the new one there, too.
        keys: private keys, for an encrypted image.
        readers: for whom the new one is encrypted; only of an encrypted image, and then needed.

    Raises:
        NydusError: one line that says what is wrong and where; the target's tag is not there then.
    """
    from nydus import image as images
    from nydus.build import optimize as build
    from nydus.convert.trace import read_trace, resolve

    progress = progress or Silent()
    name = reference_name(target)
    progress.note("pulling bootstrap", image=source)
    base = open_nydus(source, platform, keys=keys)
    base.require_readers(readers)
    if base.elsewhere and backend is None:
        raise ConfigError(
            f"{source}: its blobs are in a storage backend; say which with --source-backend-type"
        )
    files, missing = resolve(read_trace(trace, trace_name, base.files[BOOTSTRAP]), base.tree)
    if not files:
        raise ConfigError(f"{trace_name}: names no file of {source}")
    writer = target.open_sink()
    require_target(writer, target)
    sent = base.copy_to(writer, linkable_repository(source, target), progress)
    progress.note("optimizing image", image=source)
    with tempfile.TemporaryDirectory(dir=work_dir, prefix="nydusify-") as folder, ExitStack() as stack:
        blobs = stack.enter_context(closing(backend.open())) if backend else base.backend
        with closing(images.open(base.tree, blobs)) as image:
            made = build.optimize(image, files, folder)
        if made.blob is None:
            raise ConfigError(f"{trace_name}: no file of it has data in {source}")
        progress.note("pushing image", image=target)
        path = Path(folder) / made.blob.id
        sink = backend.open_sink() if backend and base.elsewhere else writer
        layer = store_blob(path, sink, encrypted=base.encrypted)
        metas = {**base.metas, **_table(made.blob, path)} if base.tree.version == 6 else {}
    _fetch_first(made, base.tree, [file.path for file in files])
    descriptor = put_variant(
        base,
        writer,
        name,
        made.tree,
        [] if base.elsewhere else [*base.blobs, layer],
        metas=metas,
        annotations={PREFETCH_BLOB: made.blob.id},
        history=[] if base.elsewhere else ["optimize: what is read first"],
        others={_PREFETCH_FILES: trace},
        readers=readers,
    )
    progress.note("pushed image", image=target)
    return OptimizedImage(
        descriptor, len(files), missing, made.blob.id, layer.size, made.blob.chunk_count, sent
    )


def _table(blob: BlobInfo, path: Path) -> dict[str, bytes]:
    """The ``blob.meta`` file of a blob on disk."""
    from nydus.rafs import blobmeta

    with open(path, "rb") as file:
        descriptor = file.fileno()

        def read(offset: int, size: int) -> bytes:
            return os.pread(descriptor, size, offset)

        return {blob.id: blobmeta.to_cache_file(blobmeta.load(blob, read, path.name, path.stat().st_size))}


def _fetch_first(made: Optimized, old: Tree, paths: list[str]) -> None:
    """Names the files in the prefetch table, before what was there."""
    rows = [made.tree.find(os.fsencode(path)) for path in paths]
    made.tree.prefetch = list(dict.fromkeys([*(row for row in rows if row is not None), *old.prefetch]))
