"""Blobs of a repository of an OCI registry (nydusd.md 2.3, 2.4, 2.7, 2.8)."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from nydus.errors import BackendError, ConfigError
from nydus.oci.auth import Credentials
from nydus.oci.registry import Registry, Repository
from nydus.oci.transport import Policy
from nydus.storage.backend import MeteredBackend
from nydus.storage.config import MirrorConfig, RegistryConfig

log = logging.getLogger(__name__)

T = TypeVar("T")

_BLOB_ID = re.compile(r"[0-9a-f]{64}")
#: A whole answer may take this many times longer than the time between two pieces of it.
_SLOW_LINK = 4
_NO_LIMIT = 300.0


class _Way:
    """One way to the blobs: through the proxy, to a mirror, or to the registry itself."""

    def __init__(
        self, name: str, connect: Callable[[], Registry], repository: str, pause: float, failures: int
    ) -> None:
        self.name = name
        self._connect, self._repository_name = connect, repository
        self._lock = threading.Lock()
        self._repository: Repository | None = None
        self._pause, self._limit = pause, failures
        self._failures = 0
        self._resting_until = 0.0

    @property
    def repository(self) -> Repository:
        """Made when it is first used: reading the system's certificates takes longer than a mount."""
        with self._lock:
            if self._repository is None:
                self._repository = self._connect().repository(self._repository_name)
            return self._repository

    def close(self) -> None:
        with self._lock:
            if self._repository is not None:
                self._repository.registry.close()

    @property
    def usable(self) -> bool:
        return time.monotonic() >= self._resting_until

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self, error: BackendError) -> None:
        """After enough failures in a row, rest: readers should not pay a time-out on every request."""
        self._failures += 1
        if self._failures >= self._limit:
            self._resting_until = time.monotonic() + self._pause
            log.warning("%s is left out for %g s: %s", self.name, self._pause, error)


class RegistryBackend(MeteredBackend):
    """Reads blobs by range: through the proxy and the mirrors in order, at last from the registry itself.

    A proxy or mirror that fails in whatever way is passed over for this request, and after repeated failures
    for its check interval. Without ``proxy.fallback`` only the proxy is asked. Mirrors that ask for it get
    the same credentials as the registry. A blob of which wrong bytes came is read from the registry alone.

    Raises:
        ConfigError: an unusable value; the text names the key.
    """

    def __init__(self, config: RegistryConfig) -> None:
        super().__init__("registry")
        if not config.host or not config.repo:
            raise ConfigError("registry backend: 'host' and 'repo' must not be empty")
        if config.scheme not in ("http", "https"):
            raise ConfigError(f"registry backend: 'scheme' is {config.scheme!r}, not http or https")
        self._config = config
        self._lock = threading.Lock()
        self._closed = False
        self._doubted: set[str] = set()
        self._ways = self._make_ways(os.environ.get("IMAGE_PULL_AUTH") or config.auth)

    def _make_ways(self, auth: str | None) -> list[_Way]:
        config = self._config
        credentials = _credentials(auth, config.registry_token)
        limit = config.timeout or _NO_LIMIT
        policy = Policy(
            connect_timeout=config.connect_timeout or _NO_LIMIT,
            read_timeout=limit,
            attempts=1,
            total=_SLOW_LINK * limit,
        )

        def registry(
            host: str,
            plain_http: bool,
            proxy: str = "",
            headers: dict[str, str] | None = None,
            root: str = "/v2",
            namespace: str = "",
            skip_verify: bool = False,
        ) -> Callable[[], Registry]:
            return lambda: Registry(
                host,
                plain_http=plain_http,
                skip_verify=config.skip_verify or skip_verify,
                ca_certs=config.ca_cert_files,
                credentials=credentials,
                policy=policy,
                proxy=proxy,
                headers=headers,
                redirect_scheme=config.blob_url_scheme,
                redirect_host=config.blob_redirected_host,
                root=root,
                namespace=namespace,
            )

        ways: list[_Way] = []
        plain = config.scheme == "http"
        if config.proxy.url:
            # With use_http the proxy sees the path, and speaks https to the registry for us.
            through = registry(config.host, plain or config.proxy.use_http, config.proxy.url)
            ways.append(
                _Way(
                    f"proxy {_shown(config.proxy.url)}", through, config.repo, config.proxy.check_interval, 1
                )
            )
            if not config.proxy.fallback:
                return ways
        for mirror in config.mirrors:
            host, mirror_plain, root = _mirror(mirror)
            ways.append(
                _Way(
                    f"mirror {_shown(mirror.host)}",
                    registry(
                        host,
                        mirror_plain,
                        headers=mirror.headers,
                        root=root,
                        namespace=mirror.namespace,
                        skip_verify=mirror.skip_verify,
                    ),
                    config.repo,
                    mirror.health_check_interval,
                    mirror.failure_limit,
                )
            )
        ways.append(_Way(config.host, registry(config.host, plain), config.repo, 0, 1 << 62))
        return ways

    def set_auth(self, auth: str) -> None:
        """Use other credentials (base64 of ``user:password``) from the next request on."""
        ways = self._make_ways(auth)
        with self._lock:
            old, self._ways = self._ways, ways
        for way in old:
            way.close()

    def _each(self, blob_id: str, ask: Callable[[Repository, str], T]) -> T:
        if not _BLOB_ID.fullmatch(blob_id):
            raise BackendError(f"blob {blob_id[:80]!r} is not named by its sha256", permanent=True)
        if self._closed:
            raise BackendError("registry backend is closed", permanent=True)
        ways = self._ways
        usable = [way for way in ways[:-1] if way.usable and blob_id not in self._doubted]
        for way in usable:
            try:
                result = ask(way.repository, f"sha256:{blob_id}")
                way.succeeded()
                return result
            except BackendError as error:
                log.info("blob %s: %s: %s; trying the next source", blob_id, way.name, error)
                if error.status not in (404, 416):  # says something of the blob, not of the way
                    way.failed(error)
        return ask(ways[-1].repository, f"sha256:{blob_id}")

    def _read(self, blob_id: str, offset: int, size: int) -> bytes:
        return self._each(blob_id, lambda repository, digest: repository.read_range(digest, offset, size))

    def size(self, blob_id: str) -> int:
        return self._each(blob_id, lambda repository, digest: repository.blob_size(digest))

    def doubt(self, blob_id: str) -> None:
        if blob_id not in self._doubted and len(self._ways) > 1:
            log.warning("blob %s: wrong bytes came; from now on it is read from the registry alone", blob_id)
        self._doubted.add(blob_id)

    def close(self) -> None:
        self._closed = True
        for way in self._ways:
            way.close()


def _credentials(auth: str | None, token: str | None) -> Credentials | None:
    if token:
        return Credentials(registry_token=token)
    if not auth:
        return None
    try:
        return Credentials.from_base64(auth)
    except ConfigError:
        raise ConfigError("registry backend: 'auth' is not base64 of user:password") from None


def _shown(url: str) -> str:
    """The address without a password, for the log."""
    scheme, mark, rest = url.rpartition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{mark}{authority.rpartition('@')[2]}{slash}{path}"


def _mirror(mirror: MirrorConfig) -> tuple[str, bool, str]:
    """``host[:port]``, whether it speaks plain http, and the path of the API there."""
    try:
        parts = urlsplit(mirror.host if "://" in mirror.host else f"https://{mirror.host}")
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"registry backend: mirror 'host' {_shown(mirror.host)!r} is not an http(s) address"
        )
    return parts.netloc.rpartition("@")[2], parts.scheme == "http", parts.path.rstrip("/") or "/v2"
