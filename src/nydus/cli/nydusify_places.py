"""What the sub-commands of nydusify have in common: naming images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nydus.errors import ConfigError

if TYPE_CHECKING:
    from nydus.oci.model import Platform
    from nydus.oci.place import RegistryPlace, SourcePlace
    from nydus.oci.reference import Reference


def source_place(
    reference: str | None, archive: str | None, *, plain_http: bool, insecure: bool, option: str
) -> SourcePlace:
    """The image that ``--source``/``--target`` or the ``-archive`` option of the same name say.

    An archive may be a tar file or the folder of an OCI layout; ``containerd://NAMESPACE/REFERENCE`` is an
    image in containerd's content store.

    Raises:
        ConfigError: neither is given, or the reference is wrong.
    """
    from nydus.oci.place import ArchivePlace, LayoutPlace
    from nydus.oci.reference import parse

    if reference and reference.startswith("file://"):
        archive, reference = reference.removeprefix("file://"), None
    if archive:
        path = Path(archive)
        name = str(parse(reference)) if reference else ""
        return LayoutPlace(path, name=name) if path.is_dir() else ArchivePlace(path, name=name)
    if not reference:
        raise ConfigError(f"--{option} or --{option}-archive is needed")
    if reference.startswith("containerd://"):
        from nydus.containerd.store import containerd_place

        return containerd_place(reference)
    return source_registry(parse(reference), plain_http=plain_http, insecure=insecure)


#: Set by the option ``--hosts-dir``: directory of the ``hosts.toml`` files that say where to read images.
HOSTS_DIR = "NYDUSIFY_HOSTS_DIR"


def source_registry(reference: Reference, *, plain_http: bool, insecure: bool) -> RegistryPlace:
    """An image in a registry, read from the mirrors that the user has for it.

    Raises:
        ConfigError: a ``hosts.toml`` is wrong.
    """
    from nydus.oci.mirrored import Host, MirroredPlace
    from nydus.oci.place import registry_place

    place = registry_place(reference, plain_http=plain_http, insecure=insecure)
    folder = os.environ.get(HOSTS_DIR)
    if not folder:
        return place
    from nydus.snapshotter import mirrors

    if not Path(folder).is_dir():
        raise ConfigError(f"--hosts-dir {folder}: not a directory")
    hosts = mirrors.load(Path(folder), reference.host)
    if not (hosts.mirrors or hosts.server):
        return place
    scheme, _, server = hosts.server.partition("://")
    itself = server in ("", reference.host, reference.endpoint)
    return MirroredPlace(
        place.reference,
        place.plain_http or (itself and scheme == "http"),
        place.insecure,
        place.credentials,
        place.proxy,
        certificates=place.certificates,
        mirrors=tuple(
            Host(each.url, tuple(each.headers.items()), each.ca, each.skip_verify) for each in hosts.mirrors
        ),
        server=None if itself else Host(hosts.server),
    )


def backend_config(kind: str | None, text: str | None, file: str | None) -> tuple[str, dict[str, Any]] | None:
    """Type and configuration of a storage backend, as the three options of that say; None for none.

    Raises:
        ConfigError: not exactly one configuration, or it is no JSON object.
    """
    if not kind:
        return None
    if bool(text) == bool(file):
        raise ConfigError("--backend-type needs exactly one of --backend-config and --backend-config-file")
    try:
        config = json.loads(text or Path(file or "").read_bytes())
    except OSError as error:
        raise ConfigError(f"--backend-config-file {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--backend-config: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError("--backend-config: not a JSON object")
    return kind, config


def one_platform(text: str | None) -> Platform | None:
    """The platform that ``--platform`` says, if it is given."""
    from nydus.convert.select import parse_platform

    if not text:
        return None
    if "," in text:
        raise ConfigError(f"--platform {text!r}: exactly one platform is needed")
    return parse_platform(text)


def platforms(text: str | None, everything: bool) -> list[Platform] | None:
    """The platforms of ``--platform`` and ``--all-platforms``; None is all, [] this machine's."""
    from nydus.convert.select import parse_platform

    if everything:
        return None
    return [parse_platform(part) for part in (text or "").split(",") if part.strip()]
