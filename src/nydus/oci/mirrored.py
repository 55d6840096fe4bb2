"""An image that is read from the mirrors of its registry first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from nydus.errors import BackendError
from nydus.oci.auth import Credentials, docker_credentials
from nydus.oci.model import Descriptor
from nydus.oci.place import RegistryPlace, Source, Stream
from nydus.oci.transport import Policy

if TYPE_CHECKING:
    from nydus.oci.registry import Repository

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Host:
    """Where else a registry can be read.

    Attributes:
        url: ``scheme://host[:port]``.
        headers: (name, value) pairs for every request.
        ca: PEM files to trust there.
    """

    url: str
    headers: tuple[tuple[str, str], ...] = ()
    ca: tuple[str, ...] = ()
    skip_verify: bool = False

    def credentials(self) -> Credentials | None:
        """Those of this host, never those of the registry that it stands for."""
        return docker_credentials(self.url.partition("://")[2])

    def repository(self, name: str) -> Repository:
        from nydus.oci.registry import Registry

        scheme, _, host = self.url.partition("://")
        registry = Registry(
            host,
            plain_http=scheme == "http",
            skip_verify=self.skip_verify,
            ca_certs=self.ca,
            credentials=self.credentials(),
            headers=dict(self.headers),
            policy=Policy(connect_timeout=5.0, attempts=1),
        )
        return registry.repository(name)


@dataclass(frozen=True, slots=True)
class MirroredPlace(RegistryPlace):
    """An image in a registry that has mirrors. Only reading uses them, in their order, then the registry.

    Attributes:
        server: read from there instead of the registry itself; None if not.
    """

    mirrors: tuple[Host, ...] = ()
    server: Host | None = None

    def open(self) -> Source:
        name = self.reference.repository
        own = self.server.repository(name) if self.server else self.repository()
        return Mirrored([*(mirror.repository(name) for mirror in self.mirrors), own])


class Mirrored:
    """Several repositories with the same content; each question goes to the first that can answer it.

    What a mirror says is checked by digest as everywhere. A tag may name another image in a mirror than in
    the registry: that is for whoever configures mirrors to know. A mirror that cannot be reached is not asked
    again. Errors are those of the last repository.
    """

    def __init__(self, repositories: Sequence[Repository]) -> None:
        self._repositories = list(repositories)
        self._homes: dict[str, Repository] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return str(self._repositories[-1])

    def _first(self, ask: Callable[[Repository], T]) -> T:
        for repository in self._repositories[:-1]:
            try:
                return ask(repository)
            except BackendError as error:
                if error.status is None and not error.permanent:
                    with self._lock:
                        self._repositories = [each for each in self._repositories if each is not repository]
        return ask(self._repositories[-1])

    def _home(self, digest: str) -> Repository:
        """The first repository that has a blob."""
        with self._lock:
            known = self._homes.get(digest)
        if known is not None:
            return known

        def ask(repository: Repository) -> Repository:
            repository.blob_size(digest)
            return repository

        home = self._first(ask)
        with self._lock:
            self._homes[digest] = home
        return home

    def manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        return self._first(lambda repository: repository.manifest(reference))

    def document(self, descriptor: Descriptor) -> bytes:
        return self._first(lambda repository: repository.document(descriptor))

    def blob(self, digest: str, size: int | None = None) -> Stream:
        return self._home(digest).blob(digest, size)

    def read_range(self, digest: str, offset: int, length: int) -> bytes:
        return self._home(digest).read_range(digest, offset, length)

    def blob_size(self, digest: str) -> int:
        return self._home(digest).blob_size(digest)

    def has_blob(self, digest: str) -> bool:
        try:
            self._home(digest)
        except BackendError as error:
            if error.status == 404:
                return False
            raise
        return True
