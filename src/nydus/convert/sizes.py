"""How much an image takes up, and how much of it a container waits for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nydus.oci.model import Descriptor, Manifest

if TYPE_CHECKING:
    from nydus.rafs.model import Tree


@dataclass(frozen=True, slots=True)
class Start:
    """What must be there before a container starts, of one platform; bytes.

    Attributes:
        size: config and bootstrap.
        image: all of the Nydus image, with its data wherever they are.
        source: all of the source image, which would have to be there otherwise.
    """

    size: int
    image: int
    source: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What configs, layers and blobs take up, in bytes; each is counted once.

    Attributes:
        source: the images that were converted.
        target: all that the new image needs, wherever it is. Of this:
        kept: layers of the source, which hold the data (oci-ref, model artifacts) or are the other half of an
            index (merge-platform).
        backend: blobs in the storage backend.
        source_listed, target_listed: sums of all sizes that the manifests of the source, and of the Nydus
            images alone, say; what the reference tells.
        start: None of what does not start lazily. Of several platforms the one with the most to fetch.
    """

    source: int
    target: int
    kept: int = 0
    backend: int = 0
    source_listed: int = 0
    target_listed: int = 0
    start: Start | None = None


def blobs_of(manifest: Manifest) -> list[Descriptor]:
    """Config and layers."""
    return [manifest.config, *manifest.layers]


def total(*groups: Iterable[Descriptor]) -> int:
    """Bytes of distinct blobs."""
    return sum(_distinct(*groups).values())


def listed(manifests: Iterable[Manifest]) -> int:
    """Bytes of all that manifests list; what is listed twice counts twice."""
    return sum(blob.size for manifest in manifests for blob in blobs_of(manifest))


def _distinct(*groups: Iterable[Descriptor]) -> dict[str, int]:
    return {blob.digest: blob.size for group in groups for blob in group}


def unlisted(*images: tuple[Manifest, Tree]) -> int:
    """Bytes of the data of Nydus images that are in blobs which their manifests do not list."""
    sizes: dict[str, int] = {}
    for manifest, tree in images:
        layers = {layer.digest for layer in manifest.layers}
        sizes |= {blob.id: blob.compressed_size for blob in tree.blobs if f"sha256:{blob.id}" not in layers}
    return sum(sizes.values())


def measure(
    sources: Sequence[Manifest],
    manifests: Sequence[Manifest],
    data: Sequence[Sequence[Descriptor]],
    originals: Sequence[Manifest] = (),
    *,
    in_backend: bool = False,
) -> Sizes:
    """Sizes of images and of the Nydus images that they became.

    Args:
        sources, manifests: of each platform, before and after; the last layer after is the bootstrap.
        data: of each platform, the blobs with its data that its manifest does not list.
        originals: manifests of ordinary images that the target has, too.
        in_backend: ``data`` are in a storage backend; else beside the image.
    """
    target = _distinct(*data, *map(blobs_of, [*manifests, *originals]))
    of_source = {layer.digest for manifest in sources for layer in manifest.layers}
    starts = [
        Start(
            manifest.config.size + manifest.layers[-1].size,
            total(blobs_of(manifest), blobs),
            total(blobs_of(source)),
        )
        for source, manifest, blobs in zip(sources, manifests, data, strict=True)
    ]
    return Sizes(
        source=total(*map(blobs_of, sources)),
        target=sum(target.values()),
        kept=sum(size for digest, size in target.items() if digest in of_source),
        backend=total(*data) if in_backend else 0,
        source_listed=listed(sources),
        target_listed=listed(manifests),
        start=max(starts, key=lambda start: start.size),
    )
