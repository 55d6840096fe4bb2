"""containerd's ``hosts.toml`` directories: where else, and how, a registry can be reached."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from nydus.errors import ConfigError

_HUB = "index.docker.io"


class Mirror(msgspec.Struct, frozen=True, kw_only=True):
    """One ``[host."URL"]`` table. ``url`` has no path; ``ca`` are file paths."""

    url: str
    headers: dict[str, str] = {}
    ca: tuple[str, ...] = ()
    skip_verify: bool = False
    ping_url: str = ""
    health_check_interval: float = 5
    failure_limit: int = 5


class Hosts(msgspec.Struct, frozen=True):
    """One ``hosts.toml``: the mirrors in file order and, if given, the URL of the registry itself."""

    server: str = ""
    mirrors: tuple[Mirror, ...] = ()


def load(directory: Path, host: str) -> Hosts:
    """What ``directory`` says about the registry ``host`` (``name[:port]``); empty if nothing.

    Raises:
        ConfigError: the file that applies cannot be understood.
    """
    names = [_HUB, "docker.io"] if host in (_HUB, "docker.io", "registry-1.docker.io") else [host]
    for name in [form for each in names for form in (each.replace(":", "_") + "_", each)] + ["_default"]:
        path = directory / name / "hosts.toml"
        if path.is_file():
            return _parse(path)
    return Hosts()


def _parse(path: Path) -> Hosts:
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    server, tables = document.get("server", ""), document.get("host", {})
    if not isinstance(server, str) or not isinstance(tables, dict):
        raise ConfigError(f"{path}: server must be a string and host a table")
    mirrors = tuple(
        _mirror(path, url, table)
        for url, table in tables.items()
        if not isinstance(table, dict) or "pull" in table.get("capabilities", ["pull"])
    )
    return Hosts(server=_origin(path, server) if server else "", mirrors=mirrors)


def _mirror(path: Path, url: str, table: dict[str, Any]) -> Mirror:
    try:
        headers = {
            key: value if isinstance(value, str) else value[0]
            for key, value in table.get("header", {}).items()
        }
        ca = table.get("ca", ())
        values: dict[str, Any] = {key: table[key] for key in _PLAIN if key in table}
        document = {
            "url": _origin(path, url),
            "headers": headers,
            "ca": [str(path.parent / name) for name in ([ca] if isinstance(ca, str) else ca)],
            **values,
        }
        return msgspec.convert(document, Mirror)
    except (msgspec.ValidationError, AttributeError, LookupError, TypeError) as error:
        raise ConfigError(f'{path}: host."{url}": {error}') from None


_PLAIN = ("skip_verify", "ping_url", "health_check_interval", "failure_limit")


def _origin(path: Path, url: str) -> str:
    """``scheme://host[:port]``; without a scheme it is https."""
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{path}: {url!r} is not the URL of a registry")
    return f"{parts.scheme}://{parts.netloc}"
