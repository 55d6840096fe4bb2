"""The kinds of image sources, and their configuration (nydusd.md 2.3 to 2.8)."""

from __future__ import annotations

from typing import Any

from nydus.errors import ConfigError
from nydus.storage.backend import Backend


def create(kind: str, config: dict[str, Any]) -> Backend:
    """The backend that ``backend.type`` and ``backend.config`` of a daemon configuration describe.

    Unknown keys are reported in the log and otherwise ignored, as callers write keys for other versions.

    Raises:
        ConfigError: an unknown kind, or a key that is missing or has the wrong type.
    """
    # One import for each kind: a daemon on local files should not wait for an HTTP client.
    if kind == "localfs":
        from nydus.storage.backends.localfs import LocalFs
        from nydus.storage.config import LocalFsConfig, convert

        local = convert("localfs", config, LocalFsConfig)
        return LocalFs(blob_file=local.blob_file, dir=local.dir, alt_dirs=tuple(local.alt_dirs))
    if kind == "registry":
        from nydus.storage.backends.registry import RegistryBackend
        from nydus.storage.config import RegistryConfig, convert

        return RegistryBackend(convert("registry", config, RegistryConfig))
    if kind in ("s3", "oss"):
        from nydus.storage.backends.objectstore import ObjectStore
        from nydus.storage.config import ObjectStoreConfig, convert

        return ObjectStore(kind, convert(kind, config, ObjectStoreConfig))
    raise ConfigError(f"unknown backend type {kind!r} (known: localfs, oss, registry, s3)")
