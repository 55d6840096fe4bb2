"""Certificates of registries, in the folders where Docker, Podman and skopeo have them, too.

A folder named like the registry (``host[:port]``) holds CA certificates (``*.crt``), and pairs of client
certificates and keys (``NAME.cert``, ``NAME.key``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nydus.errors import ConfigError
from nydus.oci.auth import home

_FOLDERS = ("/etc/containers/certs.d", "/etc/docker/certs.d")


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files for one registry.

    Attributes:
        ca: trusted besides those of the system.
        client: (certificate, key) to show to the registry.
    """

    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = ()


def certificates(host: str) -> Certificates:
    """What this user, or else this machine, has for a registry; the first folder of its name counts.

    Raises:
        ConfigError: a client certificate without key, or a folder that cannot be read.
    """
    for base in ((home() or Path("/")) / ".config/containers/certs.d", *map(Path, _FOLDERS)):
        try:
            there = (base / host).is_dir()
        except OSError as error:
            raise ConfigError(f"{base / host}: {error.strerror}") from error
        if there:
            return certificates_in(base / host)
    return Certificates()


def certificates_in(folder: Path) -> Certificates:
    """What a folder holds.

    Raises:
        ConfigError: a client certificate without key, or the folder cannot be read.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
    client = []
    for name in names:
        if not name.endswith(".cert"):
            continue
        key = f"{name.removesuffix('.cert')}.key"
        if key not in names:
            raise ConfigError(f"{folder / name}: its key {key} is missing")
        client.append((str(folder / name), str(folder / key)))
    return Certificates(tuple(str(folder / n) for n in names if n.endswith(".crt")), tuple(client))
