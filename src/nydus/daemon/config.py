"""The daemon configuration: the reference's v1 JSON document (nydusd.md §2.1), typed.

Unknown keys are named in a warning and ignored, because callers write documents for other versions too. A key
of the wrong type, or a missing one, is a :class:`ConfigError` that names it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from nydus.errors import ConfigError

log = logging.getLogger(__name__)

_MAX_BYTES = 1 << 20
_MAX_AMPLIFY = 0x1000_0000
_IGNORED = {"warmup", "id_mapping", "readahead", "readahead_sec"}
_SECRETS = {
    "auth",
    "registry_token",
    "access_key_id",
    "access_key_secret",
    "encryption_key",
    "password",
    "headers",
}


class BackendConfig(msgspec.Struct):
    type: str
    config: dict[str, Any]


class CacheConfig(msgspec.Struct):
    type: Literal["blobcache", "filecache", "fscache", "dummycache", ""] = ""
    compressed: bool = False
    validate: bool = False
    config: dict[str, Any] | None = None

    @property
    def work_dir(self) -> Path:
        return Path(str((self.config or {}).get("work_dir") or "."))


class DeviceConfig(msgspec.Struct):
    backend: BackendConfig
    id: str = ""
    cache: CacheConfig = msgspec.field(default_factory=CacheConfig)
    external_backends: list[dict[str, Any]] = []


class PrefetchConfig(msgspec.Struct):
    enable: bool = False
    threads_count: int = 8
    merging_size: int = 1 << 20
    bandwidth_rate: int = 0
    prefetch_all: bool = True
    stream_prefetch: bool = False


class DaemonConfig(msgspec.Struct):
    """One image's configuration. Sizes are bytes, ``bandwidth_rate`` bytes a second (0: no limit)."""

    device: DeviceConfig
    mode: Literal["direct", "cached"] = "direct"
    digest_validate: bool = False
    iostats_files: bool = False
    enable_xattr: bool = False
    access_pattern: bool = False
    latest_read_files: bool = False
    amplify_io: int = 1 << 20
    fs_prefetch: PrefetchConfig = msgspec.field(default_factory=PrefetchConfig)

    def public(self) -> dict[str, Any]:
        """The v2 form that the API shows; every credential is blanked."""
        device, prefetch = self.device, self.fs_prefetch
        kinds = ("localdisk", "localfs", "oss", "s3", "registry", "http-proxy")
        backend: dict[str, Any] = {"type": device.backend.type, **dict.fromkeys(kinds)}
        backend[device.backend.type] = redact(device.backend.config)
        ahead = {
            "enable": prefetch.enable,
            "threads": prefetch.threads_count,
            "batch_size": prefetch.merging_size,
            "bandwidth_limit": prefetch.bandwidth_rate,
            "prefetch_all": prefetch.prefetch_all,
            "stream_prefetch": prefetch.stream_prefetch,
        }
        cache = {
            "type": device.cache.type,
            "compressed": device.cache.compressed,
            "validate": device.cache.validate,
            "prefetch": ahead,
            "filecache": {
                "work_dir": str(device.cache.work_dir),
                "disable_indexed_map": False,
                "enable_encryption": False,
                "enable_convergent_encryption": False,
                "encryption_key": "",
            },
            "fscache": None,
        }
        rafs = {
            "mode": self.mode,
            "batch_size": self.amplify_io,
            "validate": self.digest_validate,
            "enable_xattr": self.enable_xattr,
            "iostats_files": self.iostats_files,
            "access_pattern": self.access_pattern,
            "latest_read_files": self.latest_read_files,
            "prefetch": ahead,
        }
        return {
            "version": 2,
            "id": device.id,
            "backend": backend,
            "external_backends": [redact(external) for external in device.external_backends],
            "cache": cache,
            "rafs": rafs,
            "overlay": None,
        }


def parse(text: str | bytes, where: str = "configuration") -> DaemonConfig:
    """Reads a v1 document.

    The environment's ``IMAGE_PULL_AUTH`` (base64 of ``user:password``) overrides ``auth`` of a registry.

    Raises:
        ConfigError: not JSON, too large, or a key that is missing or has the wrong type or value.
    """
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{where}: larger than {_MAX_BYTES} bytes")
    try:
        document = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{where}: expected an object, got {type(document).__name__}")
    if document.get("version") == 2:
        raise ConfigError(f"{where}: version 2 documents are not supported yet; write a version 1 document")
    document = _without_nulls(document)
    try:
        config = msgspec.convert(document, DaemonConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
    unknown = sorted(set(_unknown(document, DaemonConfig)) - _IGNORED)
    if unknown:
        log.warning("%s: ignoring unknown keys: %s", where, ", ".join(unknown))
    _check(config, where)
    auth = os.environ.get("IMAGE_PULL_AUTH")
    if auth and config.device.backend.type == "registry":
        config.device.backend.config["auth"] = auth
    return config


def backend_type(text: str) -> str:
    """The type of the backend in a document that may have any other faults; empty where it has none."""
    try:
        found = msgspec.json.decode(text)["device"]["backend"]["type"]
    except (msgspec.DecodeError, KeyError, TypeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


def read(path: Path) -> DaemonConfig:
    """Reads a document from a file."""
    return parse(read_text(path), str(path))


def read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES + 1).decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the configuration is not UTF-8") from None


def for_localfs(directory: Path) -> str:
    """The document that ``--localfs-dir`` stands for: blobs and cache in one directory."""
    document = {
        "device": {
            "id": "/",
            "backend": {"type": "localfs", "config": {"dir": str(directory)}},
            "cache": {"type": "filecache", "config": {"work_dir": str(directory)}},
        },
        "mode": "direct",
        "enable_xattr": True,
    }
    return msgspec.json.encode(document).decode()


def redact(value: Any) -> Any:
    """The value with every credential in it blanked."""
    if isinstance(value, dict):
        return {
            key: ("" if item else item) if key in _SECRETS else redact(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [redact(item) for item in value]
    if isinstance(value, str) and "://" in value and "@" in value:  # credentials inside a URL
        scheme, _, rest = value.partition("://")
        authority, slash, path = rest.partition("/")
        return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"
    return value


def _check(config: DaemonConfig, where: str) -> None:
    limits = [
        ("amplify_io", config.amplify_io, 0, _MAX_AMPLIFY),
        ("fs_prefetch.merging_size", config.fs_prefetch.merging_size, 0, _MAX_AMPLIFY),
        ("fs_prefetch.threads_count", config.fs_prefetch.threads_count, 0, 1024),
        ("fs_prefetch.bandwidth_rate", config.fs_prefetch.bandwidth_rate, 0, 1 << 62),
    ]
    if config.fs_prefetch.enable:
        limits.append(("fs_prefetch.threads_count", config.fs_prefetch.threads_count, 1, 1024))
    for key, value, low, high in limits:
        if not low <= value <= high:
            raise ConfigError(f"{where}: {key} is {value}, not between {low} and {high}")
    work_dir = (config.device.cache.config or {}).get("work_dir", "")
    if not isinstance(work_dir, str):
        raise ConfigError(f"{where}: device.cache.config.work_dir is not a string")
    if config.device.cache.compressed:
        raise ConfigError(
            f"{where}: device.cache.compressed is not supported: EROFS reads uncompressed blobs"
        )


def _without_nulls(value: Any) -> Any:
    """Callers write null for what they have no value for."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _unknown(document: dict[str, Any], form: type[msgspec.Struct], prefix: str = "") -> list[str]:
    names = []
    fields = {field.name: field.type for field in msgspec.structs.fields(form)}
    for key, value in document.items():
        if key not in fields:
            names.append(prefix + key)
        elif (
            isinstance(value, dict)
            and isinstance(fields[key], type)
            and issubclass(fields[key], msgspec.Struct)
        ):
            names += _unknown(value, fields[key], f"{prefix}{key}.")
    return names
