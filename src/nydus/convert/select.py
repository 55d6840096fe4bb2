"""Which manifests of an image are meant."""

from __future__ import annotations

import platform as machine
from collections.abc import Sequence
from dataclasses import dataclass

from nydus.errors import ConfigError, FormatError, NydusError
from nydus.oci import model
from nydus.oci.model import Descriptor, ImageConfig, Index, Manifest, Platform
from nydus.oci.place import RegistryPlace, SinkPlace, Source

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_ATTESTATION = "vnd.docker.reference.type"


@dataclass(frozen=True, slots=True)
class Image:
    """One image of one platform as it is in its source.

    Attributes:
        descriptor: of the manifest; with the platform that its index gives.
        raw_manifest, raw_config: the documents as they are stored.
    """

    descriptor: Descriptor
    manifest: Manifest
    raw_manifest: bytes
    config: ImageConfig
    raw_config: bytes

    @property
    def is_nydus(self) -> bool:
        """Whether its last layer is a bootstrap."""
        return bool(self.manifest.layers) and model.NYDUS_BOOTSTRAP in self.manifest.layers[-1].annotations

    @property
    def platform(self) -> Platform:
        """What the index says, else what the config says."""
        return self.descriptor.platform or self.config.platform

    @property
    def size(self) -> int:
        """Bytes of config and layers."""
        return self.manifest.config.size + sum(layer.size for layer in self.manifest.layers)


def host_platform() -> Platform:
    name = machine.machine()
    return Platform(os="linux", architecture=_ARCHITECTURES.get(name, name))


def parse_platform(text: str) -> Platform:
    """Reads ``os/architecture[/variant]``.

    Raises:
        ConfigError: it is something else.
    """
    parts = text.strip().split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ConfigError(f"platform {text!r} is not os/architecture[/variant]")
    architecture = _ARCHITECTURES.get(parts[1], parts[1])
    return Platform(os=parts[0], architecture=architecture, variant=parts[2] if len(parts) == 3 else "")


def matches(found: Platform, wanted: Platform) -> bool:
    """Whether an image is for a platform; a wanted platform without variant takes any (arm64 is arm64/v8)."""
    return (found.os, found.architecture) == (wanted.os, wanted.architecture) and (
        not wanted.variant or found.variant == wanted.variant or {found.variant, wanted.variant} == {"", "v8"}
    )


def select(
    source: Source,
    reference: str,
    where: str,
    platforms: Sequence[Platform] | None,
    *,
    attestations: bool = False,
    nydus: bool = False,
    exact: bool = True,
) -> tuple[Index | None, list[Image]]:
    """Reads the manifests and configs of the images wanted.

    Args:
        reference: tag or digest.
        where: name of the image, for messages.
        platforms: None is all; () is this machine's where there is a choice: a single manifest is taken
            whatever its platform is.
        nydus: of each platform take the Nydus manifest of a merged index, too.
        attestations: with all platforms, take what is no image (signatures, Nydus manifests) too.
        exact: a single manifest must be for the platforms, too.

    Returns:
        The index, None where the reference is a single manifest, and the images in its order.

    Raises:
        ConfigError: no image for a wanted platform; the message lists those there are.
        FormatError: a document is wrong.
        BackendError: a document cannot be read.
    """
    descriptor, data = source.manifest(reference)
    document = model.decode_image(data, descriptor.media_type, where)
    if isinstance(document, Manifest):
        single = _image(source, descriptor, data, document, where)
        there_is = single.config.platform  # many artifacts do not say what they are for
        lacking = [each for each in platforms or () if there_is.architecture and not matches(there_is, each)]
        if exact and lacking:
            asked = ", ".join(map(str, lacking))
            raise ConfigError(f"{where}: no image for {asked}; it is one for {there_is}")
        return None, [single]
    entries = [entry for entry in document.manifests if attestations or _is_image(entry, nydus)]
    chosen: list[Descriptor] = []
    if platforms is None:
        chosen = entries
    else:
        for wanted in platforms or (host_platform(),):
            found = [entry for entry in entries if entry.platform and matches(entry.platform, wanted)]
            if not found:
                there = ", ".join(sorted({str(entry.platform) for entry in entries if entry.platform}))
                raise ConfigError(f"{where}: no image for {wanted}; there are: {there or 'none'}")
            best = [entry for entry in found if entry.platform and entry.platform.variant == wanted.variant]
            first, *others = best or found
            halves = [first, *(entry for entry in others if nydus and _variant(entry) == _variant(first))]
            chosen += [entry for entry in halves if entry not in chosen]
        chosen.sort(key=entries.index)
    if not chosen:
        raise ConfigError(f"{where}: the index has no images")
    images: list[Image] = []
    for entry in chosen:
        _, data = source.manifest(entry.digest)
        if len(data) != entry.size:
            what = f"wrong size of manifest {entry.digest}"
            raise FormatError(what, where=where, expected=entry.size, found=len(data))
        inner = model.decode_image(data, entry.media_type, f"{where}@{entry.digest}")
        if isinstance(inner, Index):
            raise FormatError("an index within an index is not supported", where=where)
        images.append(_image(source, entry, data, inner, f"{where}@{entry.digest}"))
    return document, images


def _variant(entry: Descriptor) -> str:
    variant = entry.platform.variant if entry.platform else ""
    return "" if variant == "v8" else variant


def _is_image(entry: Descriptor, nydus: bool) -> bool:
    """BuildKit puts attestations, and we Nydus manifests, beside the images of an index."""
    if _ATTESTATION in entry.annotations or (entry.artifact_type == model.NYDUS_MANIFEST and not nydus):
        return False
    return not (entry.platform and entry.platform.os == "unknown")


def _image(source: Source, descriptor: Descriptor, data: bytes, manifest: Manifest, where: str) -> Image:
    raw = source.document(manifest.config)
    try:
        config = model.decode(raw, ImageConfig, f"{where}: config")
    except NydusError:
        if not manifest.layers:
            raise FormatError("no container image: it has no layers", where=where) from None
        raise
    return Image(descriptor, manifest, data, config, raw)


def reference_name(target: SinkPlace) -> str:
    """The name under which an image is stored.

    Raises:
        ConfigError: it is a digest, which is known only afterwards.
    """
    if isinstance(target, RegistryPlace):
        if target.reference.digest:
            raise ConfigError(f"{target}: the target must be a tag, not a digest")
        return target.reference.tag
    return target.target or "latest"
