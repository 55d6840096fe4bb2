"""Documents of the OCI image specification and Docker's schema 2, and the annotations of Nydus images.

Field order is that of the Go structures, so that a document written here has the bytes that Go tools give it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, TypeVar

import msgspec

from nydus.errors import FormatError
from nydus.oci.reference import DIGEST

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
NYDUS_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"
NYDUS_CONFIG = "application/vnd.nydus.image.config.v1+json"
NYDUS_MANIFEST = "application/vnd.nydus.image.manifest.v1+json"

MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_INDEX})

_MODEL = re.compile(r"application/vnd\.(cnai|cncf)\.model\.manifest\.v1\+json")
#: Annotations of layers and manifests (oci-image facts: a prefix of containerd, so that they become labels).
_PREFIX = "containerd.io/snapshot/nydus-"
NYDUS_ENCRYPTED_BLOB = _PREFIX + "encrypted-blob"
NYDUS_BLOB_ANNOTATION = _PREFIX + "blob"
NYDUS_BOOTSTRAP = _PREFIX + "bootstrap"
NYDUS_FS_VERSION = _PREFIX + "fs-version"
NYDUS_REF = _PREFIX + "ref"
NYDUS_EMPTY_LAYER = _PREFIX + "empty-layer"
NYDUS_SOURCE_DIGEST = _PREFIX + "source-digest"
NYDUS_SOURCE_REFERENCE = _PREFIX + "source-reference"
NYDUS_BUILDER_VERSION = _PREFIX + "builder-version"
NYDUS_CACHE_VERSION = _PREFIX + "cache-version"
UNCOMPRESSED = "containerd.io/uncompressed"

#: The largest manifest, index or config that is read; registries refuse larger manifests anyway.
MAX_DOCUMENT = 8 << 20

Digest = Annotated[str, msgspec.Meta(pattern=r"^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$")]
Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Platform(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """An operating system and processor, ``os/architecture[/variant]``."""

    architecture: str = ""
    os: str = ""
    os_version: str = msgspec.field(default="", name="os.version")
    os_features: tuple[str, ...] = msgspec.field(default=(), name="os.features")
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, rename="camel"):
    """What a document says of another: its type, digest and size in bytes."""

    media_type: str = ""
    digest: Digest
    size: Size
    urls: tuple[str, ...] = ()
    annotations: dict[str, str] = {}
    data: str = ""
    platform: Platform | None = None
    artifact_type: str = ""


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, rename="camel"):
    """The manifest of one image: a config and its layers, lowest first."""

    schema_version: int
    media_type: str = ""
    artifact_type: str = ""
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    annotations: dict[str, str] | None = None


class Index(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, rename="camel"):
    """A list of manifests, one for each platform (also Docker's manifest list)."""

    schema_version: int
    media_type: str = ""
    artifact_type: str = ""
    manifests: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    annotations: dict[str, str] | None = None


class History(msgspec.Struct, omit_defaults=True):
    """The fields of a history entry that we read or write."""

    created: str = ""
    created_by: str = ""
    comment: str = ""
    empty_layer: bool = False


class RootFS(msgspec.Struct):
    type: str
    diff_ids: tuple[Digest, ...]


class ImageConfig(msgspec.Struct, omit_defaults=True):
    """The fields of an image config that we read; see :func:`edit_config` for changing one."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    rootfs: RootFS = msgspec.field(default_factory=lambda: RootFS("layers", ()))
    history: tuple[History, ...] | None = ()
    config: dict[str, Any] | None = None

    @property
    def platform(self) -> Platform:
        return Platform(architecture=self.architecture, os=self.os, variant=self.variant)


def data_layers(manifest: Manifest) -> list[str]:
    """Digests of the ordinary layers that an image is an index over (oci-ref): they hold its data."""
    found = (layer.annotations.get(NYDUS_REF, "") for layer in manifest.layers)
    return list(dict.fromkeys(digest for digest in found if DIGEST.fullmatch(digest)))


def is_model(manifest: Manifest) -> bool:
    """Whether a manifest is one of a model artifact (CNCF ModelPack), with a Nydus bootstrap or without."""
    return bool(_MODEL.fullmatch(manifest.artifact_type))


T = TypeVar("T")


def decode(data: bytes, kind: type[T], where: str) -> T:
    """Decodes one JSON document.

    Raises:
        FormatError: it is no JSON, or a key has the wrong type; the message names the key.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"not a valid {kind.__name__.lower()}: {error}", where=where) from error


def decode_image(data: bytes, media_type: str, where: str) -> Manifest | Index:
    """Decodes a manifest or an index, whichever the document is.

    A document without ``mediaType`` is what its content type says; one without both is judged by its keys.

    Raises:
        FormatError: neither of the two, or Docker's schema 1.
    """
    head = decode(data, dict[str, msgspec.Raw], where)
    version = bytes(head.get("schemaVersion", b"none")).strip()
    if version != b"2":
        raise FormatError(
            "unsupported manifest", where=where, expected="schemaVersion 2", found=version.decode()
        )
    named = decode(bytes(head["mediaType"]), str, where) if "mediaType" in head else ""
    kind = named or media_type
    if kind in INDEX_TYPES or (kind not in MANIFEST_TYPES and "manifests" in head):
        index = decode(data, Index, where)
        return (
            index if index.media_type else msgspec.structs.replace(index, media_type=_known(kind, OCI_INDEX))
        )
    if kind in MANIFEST_TYPES or "layers" in head:
        manifest = decode(data, Manifest, where)
        if manifest.media_type:
            return manifest
        return msgspec.structs.replace(manifest, media_type=_known(kind, OCI_MANIFEST))
    raise FormatError(f"neither an image manifest nor an index: {kind or 'no media type'}", where=where)


def _known(kind: str, otherwise: str) -> str:
    return kind if kind in MANIFEST_TYPES | INDEX_TYPES else otherwise


def encode(document: object) -> bytes:
    """Compact JSON, the form whose digest is taken."""
    return msgspec.json.encode(document)


def digest(data: bytes) -> str:
    """``sha256:<hex>`` of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def describe(data: bytes, media_type: str, **more: Any) -> Descriptor:
    """The descriptor of a document."""
    return Descriptor(media_type=media_type, digest=digest(data), size=len(data), **more)
