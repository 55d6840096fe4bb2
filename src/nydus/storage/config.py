"""Typed forms of ``backend.config``; keys and defaults are those of nydusd.md 2.3 to 2.8."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import msgspec

from nydus.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)


class LocalFsConfig(msgspec.Struct):
    blob_file: str = ""
    dir: str = ""
    alt_dirs: list[str] = []


class ProxyConfig(msgspec.Struct):
    """A forward proxy, e.g. a P2P daemon."""

    url: str = ""
    ping_url: str = ""
    fallback: bool = True
    check_interval: float = 5
    use_http: bool = False
    check_pause_elapsed: float = 300


class MirrorConfig(msgspec.Struct):
    """Another host, tried before the origin; the path of its address, if any, takes the place of ``/v2``.

    ``namespace`` is the registry that it stands for, which it is then told (``?ns=``). ``skip_verify`` is for
    it alone.
    """

    host: str
    namespace: str = ""
    skip_verify: bool = False
    headers: dict[str, str] = {}
    auth_through: bool = False
    ping_url: str = ""
    health_check_interval: float = 5
    failure_limit: int = 5


class RegistryConfig(msgspec.Struct):
    """``timeout`` and ``connect_timeout`` are seconds; 0 is no limit."""

    host: str
    repo: str
    scheme: str = "https"
    auth: str | None = None
    registry_token: str | None = None
    skip_verify: bool = False
    ca_cert_files: list[str] = []
    timeout: float = 5
    connect_timeout: float = 5
    retry_limit: int = 0
    blob_url_scheme: str = ""
    blob_redirected_host: str = ""
    proxy: ProxyConfig = msgspec.field(default_factory=ProxyConfig)
    mirrors: list[MirrorConfig] = []


class ObjectStoreConfig(msgspec.Struct):
    """Of ``s3`` and ``oss``; ``checksum_algorithm`` and ``region`` are for the former only."""

    bucket_name: str
    endpoint: str = ""
    region: str = ""
    scheme: str = "https"
    object_prefix: str = ""
    access_key_id: str = ""
    access_key_secret: str = ""
    checksum_algorithm: str = ""
    skip_verify: bool = False
    ca_cert_files: list[str] = []
    timeout: float = 5
    connect_timeout: float = 5
    retry_limit: int = 0
    proxy: ProxyConfig = msgspec.field(default_factory=ProxyConfig)


def convert(kind: str, config: dict[str, Any], form: type[T]) -> T:
    """A document as a typed object.

    Raises:
        ConfigError: names the key and the expected type.
    """
    known = set(form.__struct_fields__)
    unknown = [key for key in config if key not in known]
    if unknown:
        log.warning("%s backend: ignoring unknown configuration keys: %s", kind, ", ".join(sorted(unknown)))
    # Callers write null for what they have no value for.
    given = {key: value for key, value in config.items() if key in known and value is not None}
    try:
        return msgspec.convert(given, form)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise ConfigError(f"{kind} backend: {error}") from None
