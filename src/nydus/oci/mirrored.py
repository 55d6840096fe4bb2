"""An image that is read from the mirrors of its registry first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from nydus.errors import BackendError
from nydus.oci import hosts
from nydus.oci.auth import Credentials, docker_credentials
from nydus.oci.blobstream import BlobStream
from nydus.oci.certificates import Certificates, certificates
from nydus.oci.hosts import Host
from nydus.oci.model import Descriptor
from nydus.oci.place import RegistryPlace, Source, Stream, proxy_for
from nydus.oci.transport import Policy

if TYPE_CHECKING:
    from nydus.oci.registry import Repository

T = TypeVar("T")

#: A mirror that has answered may fail to do so this often, one after the other, before it is given up.
_PATIENCE = 3


def mirrored(place: RegistryPlace, directory: Path) -> tuple[RegistryPlace, tuple[str, ...]]:
    """The same image, read as the ``hosts.toml`` files below a directory say.

    What ``place`` says of the registry itself (http, certificates, sign-in data) counts as well.

    Returns:
        The place, and what in the files is not understood.

    Raises:
        ConfigError: a file is wrong.
    """
    found = hosts.load(directory, place.reference.host)
    if not (found.mirrors or found.server):
        return place, found.unused
    ways = [each for host in found.mirrors for each in _tls_first(host)]
    server = None
    if found.server:
        *before, server = _tls_first(_filled(place, found.server))
        ways += before
    return (
        MirroredPlace(
            place.reference,
            place.plain_http or bool(server and server.plain_http and _is(place, server)),
            place.insecure,
            place.credentials,
            place.proxy,
            place.policy,
            place.certificates,
            place.push_chunk_size,
            mirrors=tuple(ways),
            server=server,
        ),
        found.unused,
    )


def _is(place: RegistryPlace, host: Host) -> bool:
    """Whether a host is the registry itself."""
    return host.name in (place.reference.host, place.reference.endpoint)


def _filled(place: RegistryPlace, server: Host) -> Host:
    """The registry itself, as both the user and the file say; what takes its place as it is."""
    if server.url and not _is(place, server):
        return server
    plain = place.plain_http or server.plain_http
    return msgspec.structs.replace(
        server,
        url=f"{'http' if plain else 'https'}://{place.reference.endpoint}",
        skip_verify=server.skip_verify or place.insecure,
    )


def _tls_first(host: Host) -> list[Host]:
    """The same host, and before it with TLS if the file says how to use that though the address is http."""
    told = host.ca or host.client or host.skip_verify
    if not (host.plain_http and told) or host.name.endswith(":80"):
        return [host]
    return [msgspec.structs.replace(host, url=f"https://{host.name}"), host]


@dataclass(frozen=True, slots=True)
class MirroredPlace(RegistryPlace):
    """An image in a registry that has mirrors. Only reading uses them, in their order, then the registry.

    Attributes:
        server: read from there instead of the registry itself; None if not.
    """

    mirrors: tuple[Host, ...] = ()
    server: Host | None = None

    def open(self) -> Source:
        own = self._at(self.server, self.policy or Policy()) if self.server else self.repository()
        quick = Policy(attempts=1)
        return Mirrored([(self._at(host, quick), host.resolve) for host in self.mirrors], own)

    def credentials_of(self, host: Host) -> Credentials | None:
        """Those of this host; those of the registry only if it is the registry."""
        return self.credentials if _is(self, host) else docker_credentials(host.name)

    def namespace_of(self, host: Host) -> str:
        """What a host that is not the registry itself is told to stand for; "" for none."""
        return "" if _is(self, host) else self.reference.host

    def _at(self, host: Host, policy: Policy) -> Repository:
        from nydus.oci.registry import Registry

        itself = _is(self, host)
        tls = Certificates()
        if not host.plain_http:
            tls = self.certificates if itself else certificates(host.name)
        registry = Registry(
            host.name,
            plain_http=host.plain_http,
            skip_verify=host.skip_verify or (itself and self.insecure),
            ca_certs=(*tls.ca, *host.ca),
            client_certs=(*tls.client, *host.client),
            credentials=self.credentials_of(host),
            headers=dict(host.headers),
            proxy=host.proxy or proxy_for("http" if host.plain_http else "https", host.name),
            policy=replace(policy, connect_timeout=host.connect_timeout),
            root=host.path,
            namespace=self.namespace_of(host),
        )
        return registry.repository(self.reference.repository)


@dataclass(slots=True)
class _Mirror:
    """One mirror, and what is known of it.

    Attributes:
        resolve: may be asked what a tag means.
        patience: how many failures to answer are left to it.
        lacking: digests that it does not have, or not rightly.
    """

    repository: Repository
    resolve: bool = True
    patience: int = 1
    lacking: set[str] = field(default_factory=set)

    def failed(self, digest: str, error: BackendError) -> None:
        if digest:
            self.lacking.add(digest)
        if error.status is None:
            self.patience -= 1


class Mirrored:
    """Several repositories with the same content; each question goes to the first that can answer it.

    What a mirror says is checked by digest as everywhere, and a mirror that failed with a blob, in whatever
    way, is not asked for that blob again. A tag may name another image in a mirror than in the registry: that
    is for whoever configures mirrors to know. A mirror that cannot be reached is given up. Errors are those
    of the registry.

    Args:
        mirrors: with each, whether it may be asked what a tag means.
        registry: is asked at last.
    """

    def __init__(self, mirrors: Sequence[tuple[Repository, bool]], registry: Repository) -> None:
        self._mirrors = [_Mirror(repository, resolve) for repository, resolve in mirrors]
        self._registry = registry

    def __str__(self) -> str:
        return str(self._registry)

    def _usable(self, digest: str) -> Iterator[_Mirror]:
        for mirror in self._mirrors:
            if mirror.patience > 0 and (digest not in mirror.lacking if digest else mirror.resolve):
                yield mirror

    def _ask(self, digest: str, ask: Callable[[Repository], T]) -> T:
        """The first answer; without a digest the question is what a tag means."""
        for mirror in self._usable(digest):
            try:
                found = ask(mirror.repository)
            except BackendError as error:
                mirror.failed(digest, error)
            else:
                mirror.patience = _PATIENCE
                return found
        return ask(self._registry)

    def manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        digest = reference if ":" in reference else ""
        return self._ask(digest, lambda repository: repository.manifest(reference))

    def document(self, descriptor: Descriptor) -> bytes:
        return self._ask(descriptor.digest, lambda repository: repository.document(descriptor))

    def blob(self, digest: str, size: int | None = None) -> Stream:
        def first() -> Repository:
            return next((mirror.repository for mirror in self._usable(digest)), self._registry)

        began = 0

        def another(failed: Repository, position: int, error: BackendError) -> Repository | None:
            nonlocal began
            for mirror in self._mirrors:
                if mirror.repository is failed:
                    if position > began:
                        mirror.patience = _PATIENCE
                    mirror.failed(digest, error)
                    began = position
                    return first()
            return None

        return BlobStream(first(), digest, size, another)

    def read_range(self, digest: str, offset: int, length: int) -> bytes:
        return self._ask(digest, lambda repository: repository.read_range(digest, offset, length))

    def blob_size(self, digest: str) -> int:
        return self._ask(digest, lambda repository: repository.blob_size(digest))

    def has_blob(self, digest: str) -> bool:
        try:
            self.blob_size(digest)
        except BackendError as error:
            if error.status == 404:
                return False
            raise
        return True
