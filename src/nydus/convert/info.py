"""What kind of image this is, and what a person would ask about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nydus.convert.documents import BOOTSTRAP, read_bootstrap_layer
from nydus.convert.select import Image
from nydus.convert.sizes import unlisted
from nydus.oci import model
from nydus.oci.encryption import ENCRYPTED
from nydus.oci.place import Source

if TYPE_CHECKING:
    from nydus.oci.encryption import PrivateKey


@dataclass(slots=True)
class Info:
    """One image of one platform.

    Attributes:
        kind: ``oci``, ``nydus``, ``oci-ref`` (an index over ordinary layers) ``storage-backend`` (blobs
            are elsewhere), ``model`` (a model artifact) or ``nydus-model`` (one that can be mounted).
        size: bytes of all layers and the config; ``data`` of the layers with file data.
        start_size: config and bootstrap, which must be there before a container starts.
        elsewhere: data that the manifest does not list, but the bootstrap: layers of the source (oci-ref), or
            blobs in a storage backend, up to the end of what is in their files.
        total_size: all of it.
        layers: what the manifest lists.
        encrypted: the bootstrap is; without a key nothing is known of what is in it.
        fs_version, entries, files, file_size, chunks, chunk_size, compressor: of a Nydus image's bootstrap;
            ``file_size`` is what the files hold together, ``shared_size`` how much of it is stored only once
            although it occurs several times.
        prefetch: paths that are fetched first.
    """

    reference: str
    digest: str
    platform: str
    kind: str
    size: int
    layers: list[dict[str, Any]]
    encrypted: bool = False
    data: int = 0
    start_size: int = 0
    elsewhere: int = 0
    total_size: int = 0
    fs_version: int = 0
    entries: int = 0
    files: int = 0
    file_size: int = 0
    shared_size: int = 0
    chunks: int = 0
    chunk_size: int = 0
    compressor: str = ""
    bootstrap_size: int = 0
    prefetch: list[str] = field(default_factory=list)
    source_reference: str = ""
    source_digest: str = ""
    builder: str = ""


def describe(found: Image, reader: Source, reference: str, keys: Sequence[PrivateKey] = ()) -> Info:
    """Looks at one image; of a Nydus image reads the bootstrap, never a blob.

    Raises:
        FormatError: the bootstrap is damaged.
        BackendError: it cannot be read.
    """
    manifest, annotations = found.manifest, found.manifest.annotations or {}
    layers = [
        {"digest": layer.digest, "size": layer.size, "type": layer.media_type, "role": _role(layer)}
        for layer in manifest.layers
    ]
    info = Info(reference, found.descriptor.digest, str(found.platform), _kind(found), found.size, layers)
    info.data = sum(layer.size for layer in manifest.layers if model.NYDUS_BOOTSTRAP not in layer.annotations)
    info.source_reference = annotations.get(model.NYDUS_SOURCE_REFERENCE, "")
    info.source_digest = annotations.get(model.NYDUS_SOURCE_DIGEST, "")
    info.builder = annotations.get(model.NYDUS_BUILDER_VERSION, "")
    info.encrypted = manifest.layers[-1].media_type.endswith(ENCRYPTED) if manifest.layers else False
    if found.is_nydus and (keys or not info.encrypted):
        _read_bootstrap(info, found, reader, keys)
    info.start_size = info.size - info.data if found.is_nydus else info.size
    info.total_size = info.size + info.elsewhere
    return info


def _kind(found: Image) -> str:
    if model.is_model(found.manifest):
        return "nydus-model" if found.is_nydus else "model"
    if not found.is_nydus:
        return "oci"
    blobs = found.manifest.layers[:-1]
    if blobs and all(model.NYDUS_REF in layer.annotations for layer in blobs):
        return "oci-ref"
    return "nydus" if len(found.manifest.layers) > 1 else "storage-backend"


def _role(layer: model.Descriptor) -> str:
    if model.NYDUS_BOOTSTRAP in layer.annotations:
        return "bootstrap"
    if reference := layer.annotations.get(model.NYDUS_REF):
        return f"index of {reference}"
    return "blob" if model.NYDUS_BLOB_ANNOTATION in layer.annotations else "layer"


def _read_bootstrap(info: Info, found: Image, reader: Source, keys: Sequence[PrivateKey]) -> None:
    import numpy as np

    from nydus import rafs

    where = f"{info.reference}: bootstrap layer"
    files, _ = read_bootstrap_layer(reader, found.manifest.layers[-1], where, keys)
    tree = rafs.read(files[BOOTSTRAP], f"{info.reference}: {BOOTSTRAP}")
    nodes = tree.nodes
    owners = nodes[nodes["link"] == np.arange(len(nodes))]
    regular = owners[owners["mode"] & 0o170000 == 0o100000]
    chunks = tree.chunks
    if len(chunks):
        chunks = chunks[np.unique(chunks[["blob_index", "index"]], return_index=True)[1]]
    info.elsewhere = unlisted((found.manifest, tree))
    info.fs_version, info.entries, info.files = tree.version, len(tree), len(regular)
    info.file_size = int(regular["size"].sum())
    info.shared_size = max(0, info.file_size - int(chunks["usize"].sum(dtype=np.int64)))
    info.chunks, info.chunk_size = len(chunks), tree.chunk_size
    info.compressor = ", ".join(sorted({blob.compression.name.lower() for blob in tree.blobs})) or "none"
    info.bootstrap_size = len(files[BOOTSTRAP])
    info.prefetch = [tree.path(row).decode(errors="replace") for row in tree.prefetch]
