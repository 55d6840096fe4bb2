"""``nydusify chunkdict generate``: an image of the chunks that several images share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from nydus.convert.backend import BackendPlace
from nydus.convert.copy import linkable_repository
from nydus.convert.layers import readable
from nydus.convert.opened import Opened, open_each, put_variant
from nydus.convert.progress import Progress, Silent
from nydus.convert.select import reference_name
from nydus.errors import ConfigError, NydusError
from nydus.oci import model
from nydus.oci.model import Descriptor, Platform
from nydus.oci.place import SinkPlace, SourcePlace

if TYPE_CHECKING:
    from nydus.rafs.model import Array, Tree


@dataclass(frozen=True, slots=True)
class Share:
    """What one image has in common with the others; bytes as they are stored.

    Attributes:
        chunks, size: distinct chunks of the image.
        shared_chunks, shared_size: those of them that are in the dictionary.
    """

    image: str
    platform: str
    chunks: int
    size: int
    shared_chunks: int
    shared_size: int


@dataclass(slots=True)
class Dictionary:
    """What came of it.

    Attributes:
        descriptor: of the image in the target; None without a target.
        chunks, size: of the dictionary, stored bytes.
        blobs: ids (hex) of the blobs that hold them.
        stored, needed: bytes of all chunks as the images store them now, and if each were stored once.
    """

    chunks: int
    size: int
    blobs: list[str]
    stored: int
    needed: int
    images: list[Share] = field(default_factory=list)
    descriptor: Descriptor | None = None


def generate(
    sources: Sequence[SourcePlace],
    target: SinkPlace | None,
    platforms: Sequence[Platform] | None,
    work_dir: Path,
    progress: Progress | None = None,
    backend: BackendPlace | None = None,
) -> Dictionary:
    """Makes a dictionary of the chunks that at least two images have, for conversions to refer to.

    Args:
        target: gets it as an image, with the blobs it refers to; None to have it in the work folder only.
        platforms: None is all; each platform of a source counts as an image.
        work_dir: gets documents and bootstrap of each source, the dictionary (``chunkdict_bootstrap``), all
            chunks as an SQLite database (``database.db``) and a report. Kept.
        backend: where the blobs of sources are that do not list them. The dictionary in the target then does
            not list any, and serves conversions into the same backend.

    Raises:
        ConfigError: a source is no Nydus image, or its blobs are not where they should be.
        NydusError: they were built with different options, or cannot be read.
    """
    from nydus.build import chunkdict as build
    from nydus.build.layer import write_bootstrap
    from nydus.build.output import write_file

    progress = progress or Silent()
    name = reference_name(target) if target else ""
    images: list[Opened] = []
    for place in sources:
        progress.note("pulling bootstrap", image=place)
        found = open_each(place, platforms, keys=None)
        for image in found:
            if target is not None:
                _check(image, backend)
            _dump(image, work_dir, len(found) > 1)
        images += found
    if len(images) < 2:
        raise ConfigError("a chunk dictionary needs at least two images")
    progress.note("generating chunk dictionary", images=len(images))
    named = [_named(image) for image in images]
    tree = build.generate(named)
    build.write_database(str(work_dir / "database.db"), named)
    write_file(str(work_dir / "chunkdict_bootstrap"), write_bootstrap(tree))
    result = _measure(images, tree)
    if target is not None:
        result.descriptor = _push(images, tree, target, name, progress, backend)
    document = dataclasses.asdict(result)
    document["descriptor"] = msgspec.to_builtins(result.descriptor)
    write_file(str(work_dir / "nydus_bootstrap_output.json"), json.dumps(document, indent=2).encode() + b"\n")
    return result


def _check(image: Opened, backend: BackendPlace | None) -> None:
    if image.elsewhere and not backend:
        raise ConfigError(f"{image.place}: its blobs are in a storage backend; say which with --backend-type")
    if backend and any(model.NYDUS_REF in layer.annotations for layer in image.blobs):
        raise ConfigError(f"{image.place}: oci-ref cannot be used with a storage backend")


def _named(image: Opened) -> Any:
    from nydus.build.chunkdict import Source

    return Source.of_path(f"/{_folder(image)}/bootstrap", image.tree)


def _folder(image: Opened) -> str:
    return str(image.place).strip("/").replace("/", ":")


def _dump(image: Opened, work_dir: Path, several: bool) -> None:
    folder = work_dir / _folder(image)
    if several:
        folder = folder / str(image.found.platform).replace("/", "-")
    try:
        (folder / "nydus_bootstrap").mkdir(parents=True, exist_ok=True)
        (folder / "nydus_manifest.json").write_bytes(image.found.raw_manifest)
        (folder / "nydus_config.json").write_bytes(image.found.raw_config)
        for path, data in image.files.items():
            (folder / "nydus_bootstrap" / Path(path).name).write_bytes(data)
    except OSError as error:
        raise NydusError(f"{error.filename}: {error.strerror}") from error


def _measure(images: Sequence[Opened], tree: Tree) -> Dictionary:
    known, sizes = _distinct(tree)
    shares = []
    everything: list[tuple[Array, Array]] = []
    stored: dict[str, int] = {}
    for image in images:
        digests, size = _distinct(image.tree)
        shared = np.isin(digests, known)
        shares.append(
            Share(
                str(image.place),
                str(image.found.platform),
                len(digests),
                int(size.sum()),
                int(shared.sum()),
                int(size[shared].sum()),
            )
        )
        everything.append((digests, size))
        for number, blob in enumerate(image.tree.blobs):
            mine = image.tree.chunks[image.tree.chunks["blob_index"] == number]
            _, rows = np.unique(mine["index"], return_index=True)
            stored[blob.id] = max(stored.get(blob.id, 0), int(mine["csize"][rows].sum(dtype=np.int64)))
    _, first = np.unique(np.concatenate([digests for digests, _ in everything]), return_index=True)
    needed = int(np.concatenate([size for _, size in everything])[first].sum())
    ids = [blob.id for blob in tree.blobs]
    return Dictionary(len(known), int(sizes.sum()), ids, sum(stored.values()), needed, shares)


def _distinct(tree: Tree) -> tuple[Array, Array]:
    """The distinct digests of a tree, and the stored size of each."""
    digests = np.ascontiguousarray(tree.chunks["digest"]).view("S32").reshape(-1)
    values, rows = np.unique(digests, return_index=True)
    return values, tree.chunks["csize"][rows].astype(np.int64)


def _push(
    images: Sequence[Opened],
    tree: Tree,
    target: SinkPlace,
    name: str,
    progress: Progress,
    backend: BackendPlace | None,
) -> Descriptor:
    writer = target.open_sink()
    sink = backend.open_sink() if backend else writer
    layers: list[Descriptor] = []
    metas: dict[str, bytes] = {}
    progress.note("pushing image", image=target)
    for blob in tree.blobs:
        home, layer = _home(images, blob.id)
        if layer:
            link_from = "" if backend else linkable_repository(home.place, target)
            home.copy_to(sink, link_from, Silent(), [layer])
            layers += [] if backend else [layer]
        elif backend:
            with readable(backend, sink) as stored:
                if not stored.has_blob(f"sha256:{blob.id}"):
                    raise ConfigError(f"{home.place}: its blob {blob.id} is not in {backend}")
        digest = layer.digest if layer else f"sha256:{blob.id}"
        metas |= {key: data for key, data in home.metas.items() if f"sha256:{key}" == digest}
    base = _without_origin(images[0])
    history = [f"chunkdict generate: blob with shared chunks {layer.digest[7:19]}" for layer in layers]
    made = put_variant(base, writer, name, tree, layers, metas=metas, annotations={}, history=history)
    progress.note("pushed image", image=target)
    return made


def _home(images: Sequence[Opened], blob_id: str) -> tuple[Opened, Descriptor | None]:
    """An image that has a blob, and the layer through which; None if it is in a storage backend."""
    for image in images:
        if layer := image.layer_of(f"sha256:{blob_id}"):
            return image, layer
    for image in images:
        if image.elsewhere and any(blob.id == blob_id for blob in image.tree.blobs):
            return image, None
    raise NydusError(f"blob {blob_id} of the dictionary is in no manifest")


def _without_origin(image: Opened) -> Opened:
    """The image without what tells that it was made of one other image."""
    found = image.found
    config: dict[str, Any] = json.loads(found.raw_config)
    config["history"] = [{"created_by": "Nydus Converter", "comment": "Nydus Bootstrap Layer"}]
    origin = (model.NYDUS_SOURCE_DIGEST, model.NYDUS_SOURCE_REFERENCE)
    annotations = {k: v for k, v in (found.manifest.annotations or {}).items() if k not in origin}
    manifest = msgspec.structs.replace(found.manifest, annotations=annotations)
    changed = dataclasses.replace(found, manifest=manifest, raw_config=model.encode(config))
    return dataclasses.replace(image, found=changed)
