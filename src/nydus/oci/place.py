"""Where an image is: one description that another process can open again."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nydus.oci.auth import Credentials, docker_credentials
from nydus.oci.certificates import Certificates, certificates
from nydus.oci.model import Descriptor
from nydus.oci.reference import Reference
from nydus.oci.transport import Policy

if TYPE_CHECKING:
    from nydus.oci.registry import Repository


class Stream(Protocol):
    """A blob that is read once, checked against its digest at the end."""

    def read(self, size: int | None = -1, /) -> bytes: ...

    def close(self) -> None: ...


class Writer(Protocol):
    """A blob that is being written; see :class:`nydus.oci.upload.Upload`."""

    @property
    def sent(self) -> int: ...

    def write(self, data: bytes) -> None: ...

    def commit(self, digest: str) -> None: ...

    def cancel(self) -> None: ...

    def __enter__(self) -> Writer: ...

    def __exit__(self, *_: object) -> None: ...


class Source(Protocol):
    """What images are read from: a repository, a layout, an archive.

    Every method raises :class:`~nydus.errors.BackendError`.
    """

    def manifest(self, reference: str) -> tuple[Descriptor, bytes]: ...

    def document(self, descriptor: Descriptor) -> bytes: ...

    def blob(self, digest: str, size: int | None = None) -> Stream: ...

    def read_range(self, digest: str, offset: int, length: int) -> bytes: ...

    def blob_size(self, digest: str) -> int: ...

    def has_blob(self, digest: str) -> bool: ...


class Sink(Protocol):
    """What images are written to."""

    def has_blob(self, digest: str) -> bool: ...

    def mount_blob(self, digest: str, source: str) -> bool: ...

    def probe(self) -> None: ...

    def upload(self) -> Writer: ...

    def put_blob(self, data: bytes, media_type: str, **more: object) -> Descriptor: ...

    def put_manifest(self, reference: str, data: bytes, media_type: str) -> Descriptor: ...


class Store(Source, Sink, Protocol):
    """Both: a repository, a layout."""


@dataclass(frozen=True, slots=True)
class RegistryPlace:
    """An image in a registry.

    Args:
        plain_http, insecure: speak http; accept any TLS certificate.
        credentials: see :func:`registry_place`.
        push_chunk_size: bytes of one request of an upload; 0 streams.
    """

    reference: Reference
    plain_http: bool = False
    insecure: bool = False
    credentials: Credentials | None = None
    proxy: str = ""
    policy: Policy | None = None
    certificates: Certificates = field(default_factory=Certificates)
    push_chunk_size: int = 0

    @property
    def target(self) -> str:
        """What to ask for: tag or digest."""
        return self.reference.target

    def open(self) -> Source:
        return self.repository()

    def open_sink(self) -> Store:
        return self.repository()

    def repository(self) -> Repository:
        from nydus.oci.registry import Registry

        registry = Registry(
            self.reference.endpoint,
            plain_http=self.plain_http,
            skip_verify=self.insecure,
            ca_certs=self.certificates.ca,
            client_certs=self.certificates.client,
            credentials=self.credentials,
            proxy=self.proxy,
            policy=self.policy,
            push_chunk_size=self.push_chunk_size,
        )
        return registry.repository(self.reference.repository)

    def __str__(self) -> str:
        return str(self.reference)


@dataclass(frozen=True, slots=True)
class LayoutPlace:
    """An image in an OCI layout directory; ``name`` is what it is called in messages and annotations.

    ``image`` is the whole reference that the layout gets to know when the image is written.
    """

    path: Path
    target: str = ""
    name: str = ""
    image: str = ""

    def open(self) -> Source:
        from nydus.oci.layout import Layout

        return Layout(self.path)

    def open_sink(self) -> Store:
        from nydus.oci.layout import Layout

        return Layout(self.path, self.image).create()

    def __str__(self) -> str:
        return self.name or str(self.path)


@dataclass(frozen=True, slots=True)
class ArchivePlace:
    """The image of an archive, for reading.

    ``name`` is what the image is called in messages and annotations; the path if it has none. ``inflated``
    is a file with the contents of a compressed archive, which is otherwise inflated for each reader.
    """

    path: Path
    target: str = ""
    name: str = ""
    inflated: Path | None = None

    def open(self) -> Source:
        from nydus.oci.archive import open_archive

        return open_archive(self.path, self.inflated)

    def __str__(self) -> str:
        return self.name or str(self.path)


@dataclass(frozen=True, slots=True)
class ModelStorePlace:
    """A model in a folder of modctl's, for reading; ``name`` is its whole reference."""

    path: Path
    name: str

    @property
    def target(self) -> str:
        from nydus.oci.reference import parse

        return parse(self.name).target

    def open(self) -> Source:
        from nydus.oci.modelstore import ModelStore, StoredFiles
        from nydus.oci.reference import parse

        return ModelStore(StoredFiles(self.path), parse(self.name))

    def __str__(self) -> str:
        return self.name


SourcePlace = RegistryPlace | LayoutPlace | ArchivePlace | ModelStorePlace
SinkPlace = RegistryPlace | LayoutPlace


def registry_place(
    reference: Reference, *, plain_http: bool = False, insecure: bool = False, push_chunk_size: int = 0
) -> RegistryPlace:
    """An image in a registry, with the credentials, certificates and proxy that this user has for it.

    Raises:
        ConfigError: Docker's config file, a credential helper or a folder of certificates is broken.
    """
    credentials = docker_credentials(reference.host)
    proxy = proxy_for("http" if plain_http else "https", reference.endpoint)
    tls = Certificates() if plain_http else certificates(reference.endpoint)
    return RegistryPlace(reference, plain_http, insecure, credentials, proxy, None, tls, push_chunk_size)


def proxy_for(scheme: str, host: str) -> str:
    """The proxy of the environment for a host (HTTP_PROXY, HTTPS_PROXY, NO_PROXY), "" for none."""
    if not any(key.lower().endswith("_proxy") for key in os.environ):
        return ""
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    if proxy_bypass(host):
        return ""
    return proxies.get(scheme, "")
