"""The configuration each image gives its daemon: the template with the image's registry filled in."""

from __future__ import annotations

import base64
import copy
import ipaddress
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nydus.errors import ConfigError
from nydus.oci import hosts
from nydus.oci.auth import docker_credentials
from nydus.oci.reference import Reference
from nydus.snapshotter import labels as label

log = logging.getLogger(__name__)

SECRET_KEYS = ("auth", "registry_token", "access_key_id", "access_key_secret")
_SIGN_IN = ("authorization", "proxy-authorization", "cookie")

_DEFAULT: dict[str, Any] = {
    "device": {"backend": {"type": "registry", "config": {}}, "cache": {"type": "blobcache"}},
    "mode": "direct",
    "enable_xattr": True,
    # Only what the image asks for; the whole of it would compete with the reads that a start waits for.
    "fs_prefetch": {"enable": True, "prefetch_all": False},
}


class Template:
    """A daemon configuration (v1 JSON) to be filled in for each image; its other keys are kept as they are.

    Args:
        path: the document, or None for a default: registry backend, blob cache, no whole-image prefetch.
        cache_dir: the blob cache of all images.
        mirrors_dir: containerd's registry host directories, or None.
        skip_verify: do not verify the registries' certificates.

    Raises:
        ConfigError: the document is not one for a file-system daemon.
    """

    def __init__(
        self,
        path: Path | None,
        cache_dir: Path,
        mirrors_dir: Path | None = None,
        *,
        skip_verify: bool = False,
    ) -> None:
        self._cache_dir, self._mirrors_dir, self._skip_verify = cache_dir, mirrors_dir, skip_verify
        self._document = _DEFAULT
        if path is not None:
            try:
                self._document = json.loads(path.read_bytes())
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}") from None
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}: not JSON: {error}") from None
        try:
            self.backend = str(self._document["device"]["backend"]["type"])
            self._document["device"]["backend"].setdefault("config", {})
            self._document["device"].setdefault("cache", {"type": "blobcache"})
        except (KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path}: no device.backend.type: not a daemon configuration") from None

    def fill(self, instance: str, reference: Reference | None, labels: Mapping[str, str]) -> dict[str, Any]:
        """The document for one image.

        Args:
            instance: what the daemon calls the mount, e.g. ``/12``.
            reference: the image; None only where the backend is no registry.
            labels: of the snapshot that holds the bootstrap; they may carry credentials.
        """
        document = copy.deepcopy(self._document)
        device = document["device"]
        device["id"] = instance
        cache = device["cache"]
        cache["config"] = {**(cache.get("config") or {}), "work_dir": str(self._cache_dir)}
        if self.backend == "registry":
            if reference is None:
                raise ConfigError("the image's reference is unknown")
            config = device["backend"]["config"] = dict(device["backend"]["config"] or {})
            self._fill_registry(config, reference)
            config.update(_credentials(reference, labels))
        return document

    def _fill_registry(self, config: dict[str, Any], reference: Reference) -> None:
        host = reference.endpoint
        config["host"], config["repo"] = host, reference.repository
        if self._skip_verify:
            config["skip_verify"] = True
        found = hosts.load(self._mirrors_dir, reference.host) if self._mirrors_dir else hosts.Hosts()
        for text in found.unused:
            log.warning("%s", text)
        authorities: list[str] = list(config.get("ca_cert_files") or [])

        def trust(place: hosts.Host, *, itself: bool = True) -> None:
            authorities.extend(path for path in place.ca if path not in authorities)
            if itself and place.skip_verify:
                config["skip_verify"] = True

        if server := found.server:
            if server.url:
                config["scheme"], config["host"] = server.scheme, server.name
            if not server.for_origin:
                raise ConfigError(
                    f"hosts.toml of {host}: nydusd cannot use path, client or header of the server"
                )
            if server.proxy:
                config["proxy"] = {"url": server.proxy, "fallback": False}
            trust(server)
        others = []
        for mirror in found.mirrors:
            if mirror.name == config["host"] and mirror.for_origin and not mirror.proxy:
                # Not another place but how the registry itself, or what takes its place, is reached.
                trust(mirror)
                config["scheme"] = mirror.scheme
            elif mirror.for_mirror:
                trust(mirror, itself=False)
                others.append(
                    {
                        "host": mirror.address,
                        "namespace": "" if mirror.name == host else reference.host,
                        "skip_verify": mirror.skip_verify,
                        "headers": dict(mirror.headers),
                        "ping_url": mirror.ping_url,
                        "health_check_interval": mirror.health_check_interval,
                        "failure_limit": mirror.failure_limit,
                    }
                )
            else:
                log.warning("%s: nydusd cannot use client or proxy of a mirror; left out", mirror.url)
        if others:
            config["mirrors"] = others
        if authorities:
            config["ca_cert_files"] = authorities
        if "scheme" not in config and is_loopback(host):
            # As containerd does.
            config["scheme"] = "http"


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a configuration so that only we can read it, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).rename(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def without_secrets(document: dict[str, Any]) -> dict[str, Any]:
    """A copy that may be shown."""
    document = copy.deepcopy(document)
    config = document["device"]["backend"].get("config") or {}
    for key in SECRET_KEYS:
        config.pop(key, None)
    if isinstance(proxy := config.get("proxy"), dict) and "url" in proxy:
        scheme, mark, rest = str(proxy["url"]).rpartition("://")
        proxy["url"] = f"{scheme}{mark}{rest.rpartition('@')[2]}"
    for mirror in config.get("mirrors") or []:
        headers = mirror.get("headers") or {}
        mirror["headers"] = {name: headers[name] for name in headers if name.lower() not in _SIGN_IN}
    return document


def _credentials(reference: Reference, labels: Mapping[str, str]) -> dict[str, str]:
    """The labels', else those of Docker's configuration, else none (the template's own then stay)."""
    user, secret = labels.get(label.USERNAME, ""), labels.get(label.SECRET, "")
    token = ""
    if not secret:
        found = docker_credentials(reference.host)
        if found is not None:
            user, secret, token = found.username, found.password, found.registry_token
    elif not user:
        token, secret = secret, ""
    if token:
        return {"registry_token": token}
    if user and secret:
        return {"auth": base64.b64encode(f"{user}:{secret}".encode()).decode()}
    return {}


def is_loopback(host: str) -> bool:
    """A registry on this machine, which containerd asks over plain http."""
    name = host.rsplit(":", 1)[0].strip("[]") if not host.endswith("]") else host.strip("[]")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
