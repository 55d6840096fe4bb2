"""Blobs as objects of a bucket: S3 and OSS (nydusd.md 2.5), read by daemons, written by conversions.

The protocols are OpenDAL's, which signs, knows the providers' ways to find credentials, and sends large
objects in parts.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import re
import secrets
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from nydus.errors import BackendError, ConfigError
from nydus.storage.backend import MeteredBackend
from nydus.storage.config import ObjectStoreConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from opendal import Operator
    from opendal.file import File

log = logging.getLogger(__name__)

T = TypeVar("T")

_BLOB_ID = re.compile(r"[0-9a-f]{64}")
_NO_LIMIT = 300.0
#: An object up to this size is sent in one request, under its name; a larger one in parts of this size.
_PART = 16 << 20
_AT_ONCE = 4


class ObjectStore(MeteredBackend):
    """The blobs of a bucket, each named ``object_prefix`` + blob id. Thread-safe.

    The client starts threads of its own, so it is made when it is first used: never before a fork.

    Args:
        kind: ``s3`` or ``oss``.

    Raises:
        ConfigError: a value that cannot be used; the text names the key.
    """

    def __init__(self, kind: str, config: ObjectStoreConfig) -> None:
        super().__init__(kind)
        self._kind, self._config = kind, config
        self._options = _options(kind, config)
        self._lock = threading.Lock()
        self._operator: Operator | None = None
        self._closed = False

    def __str__(self) -> str:
        return f"{self._kind} bucket {self._config.bucket_name}"

    @property
    def operator(self) -> Operator:
        """The client. Raises BackendError after :meth:`close`."""
        with self._lock:
            if self._closed:
                raise BackendError(f"{self._kind} backend is closed", permanent=True)
            if self._operator is None:
                from opendal import Operator
                from opendal.layers import TimeoutLayer

                limit = self._config.timeout or _NO_LIMIT
                try:
                    plain = Operator(self._kind, **self._options)
                except Exception as error:  # OpenDAL's errors have no common base
                    raise ConfigError(f"{self._kind} backend: {_head(error)}") from None
                self._operator = plain.layer(TimeoutLayer(timeout=limit, io_timeout=limit))
            return self._operator

    def ask(self, what: str, action: Callable[[], T]) -> T:
        """Calls the client; its errors become ours."""
        try:
            return action()
        except BackendError:
            raise
        except Exception as error:  # OpenDAL's errors have no common base
            raise self._error(what, error) from None

    def _error(self, what: str, error: Exception) -> BackendError:
        names = {"NotFound": 404, "PermissionDenied": 403, "RateLimited": 429}
        status, temporary = names.get(type(error).__name__), "(temporary)" in str(error).partition("\n")[0]
        return BackendError(f"{self}: {what}: {_head(error)}", permanent=not temporary, status=status)

    def path(self, name: str) -> str:
        """The key of the object with this name."""
        return self._config.object_prefix + name

    def _blob(self, blob_id: str) -> str:
        if not _BLOB_ID.fullmatch(blob_id):
            raise BackendError(f"blob {blob_id[:80]!r} is not named by its sha256", permanent=True)
        return self.path(blob_id)

    def _read(self, blob_id: str, offset: int, size: int) -> bytes:
        path, operator = self._blob(blob_id), self.operator
        data: bytes = self.ask(
            f"{path}: {size} bytes at offset {offset:#x}",
            lambda: operator.read(path, offset=offset, size=size),
        )
        return data

    def size(self, blob_id: str) -> int:
        path, operator = self._blob(blob_id), self.operator
        return self.ask(path, lambda: int(operator.stat(path).content_length))

    def upload(self, *, replace: bool = True) -> ObjectUpload:
        """Begins an object whose name is known only at its end.

        Args:
            replace: write it even if an object of its name is there.
        """
        return ObjectUpload(self, self._config.object_prefix, replace)

    def close(self) -> None:
        with self._lock:
            self._closed, self._operator = True, None


class ObjectUpload:
    """An object that is being written; the methods are those of :class:`nydus.oci.upload.Upload`.

    A large one goes under a temporary name, in parts while it is made, and is then copied to its name by the
    store itself: the name is the digest, which nobody knows before the end.

    Raises (all methods):
        BackendError: the store refused it, or could not be reached.
    """

    def __init__(self, store: ObjectStore, prefix: str, replace: bool) -> None:
        self._store, self._replace = store, replace
        self._aside = f"{prefix}.upload-{secrets.token_hex(16)}"
        self._held: list[bytes] = []
        self._size = self.sent = 0
        self._file: File | None = None
        self._finished = False

    def __enter__(self) -> ObjectUpload:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            self.cancel()

    def write(self, data: bytes) -> None:
        self._held.append(bytes(data))
        self._size += len(data)
        if self._size - self.sent > _PART:
            self._send()

    def _send(self) -> None:
        operator, piece = self._store.operator, b"".join(self._held)
        self._held.clear()

        def send() -> None:
            if self._file is None:
                self._file = operator.open(self._aside, "wb", chunk=_PART, concurrent=_AT_ONCE)
            self._file.write(piece)

        self._store.ask(self._aside, send)
        self.sent = self._size

    def commit(self, digest: str) -> None:
        """Ends the blob and gives it its name, the hexadecimal part of ``digest``."""
        self.commit_as(digest.partition(":")[2])

    def commit_as(self, name: str) -> None:
        """Ends the object and gives it a name, before which the prefix is put."""
        path, operator = self._store.path(name), self._store.operator
        if not self._replace and self._length(path) == self._size:
            self.cancel()
        elif self._file is None:
            body = b"".join(self._held)
            self._store.ask(path, lambda: operator.write(path, body))
        else:
            self._send()
            self._store.ask(self._aside, self._file.close)
            self._store.ask(path, lambda: self._rename(path))
        self._finished, self.sent = True, self._size
        if (found := self._length(path)) != self._size:
            raise BackendError(f"{self._store}: {path} has {found} bytes, {self._size} were written")

    def _length(self, path: str) -> int:
        """Bytes of an object; -1 if there is none."""
        try:
            return self._store.ask(path, lambda: int(self._store.operator.stat(path).content_length))
        except BackendError as error:
            if error.status == 404:
                return -1
            raise

    def _rename(self, path: str) -> None:
        operator = self._store.operator
        try:
            operator.copy(self._aside, path)
        except Exception as error:  # stores copy only up to some size (5 GB) themselves
            log.info("%s cannot copy %s itself, so it is sent again: %s", self._store, path, _head(error))
            with operator.open(self._aside, "rb") as source:
                target = operator.open(path, "wb", chunk=_PART, concurrent=_AT_ONCE)
                while piece := source.read(_PART):
                    target.write(piece)
                target.close()
        operator.delete(self._aside)

    def cancel(self) -> None:
        """Forgets what was sent."""
        self._finished = True
        self._held.clear()
        if self._file is not None:
            # Ending the parts makes an object of them, which can be deleted: there is no other way to them.
            file, self._file = self._file, None
            for step in (file.close, lambda: self._store.operator.delete(self._aside)):
                with contextlib.suppress(Exception):
                    step()


def _options(kind: str, config: ObjectStoreConfig) -> dict[str, str]:
    """The settings of OpenDAL's service."""

    def wrong(what: str) -> ConfigError:
        return ConfigError(f"{kind} backend: {what}")

    if not config.bucket_name:
        raise wrong("'bucket_name' must not be empty")
    if config.scheme not in ("http", "https"):
        raise wrong(f"'scheme' is {config.scheme!r}, not http or https")
    if bool(config.access_key_id) != bool(config.access_key_secret):
        raise wrong("'access_key_id' and 'access_key_secret' go together")
    if config.skip_verify or config.ca_cert_files:
        raise wrong("'skip_verify' and 'ca_cert_files' are not supported; add the CA to those of the system")
    if config.proxy.url:
        if not config.proxy.fallback:
            raise wrong("'proxy' without fallback is not supported")
        log.warning("%s backend: 'proxy' is not supported; reading directly", kind)
    options: dict[str, Any] = {"bucket": config.bucket_name, "root": "/"}
    endpoint = config.endpoint
    if kind == "s3":
        if not config.region:
            raise wrong("'region' must not be empty")
        endpoint = endpoint or f"s3.{config.region}.amazonaws.com"
        options |= {"region": config.region, "secret_access_key": config.access_key_secret}
        if config.checksum_algorithm:
            options["checksum_algorithm"] = config.checksum_algorithm.lower()
        if config.access_key_id:  # then nothing of the environment may have a say
            options |= {"disable_config_load": "true", "disable_ec2_metadata": "true"}
    else:
        if not endpoint:
            raise wrong("'endpoint' must not be empty")
        options["access_key_secret"] = config.access_key_secret
        if _is_address(endpoint):  # which cannot have a bucket before it
            options["addressing_style"] = "path"
    options["access_key_id"] = config.access_key_id
    options["endpoint"] = endpoint if "://" in endpoint else f"{config.scheme}://{endpoint}"
    return {key: value for key, value in options.items() if value}


def _is_address(endpoint: str) -> bool:
    host = endpoint.partition("://")[2] or endpoint
    try:
        ipaddress.ip_address(host.rpartition(":")[0].strip("[]") if ":" in host else host)
    except ValueError:
        return False
    return True


def _head(error: Exception) -> str:
    """What went wrong, in OpenDAL's words, without the traces that it adds."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    kind, _, message = lines[0].partition(" => ")
    words = [kind.partition(" (")[0]] if not kind.startswith("Unexpected") else []
    words += [message] if message else []
    if "Source:" in lines[:-1]:
        words.append(lines[lines.index("Source:") + 1].strip())
    return ": ".join(words)
