"""containerd's ``hosts.toml`` directories: where else, and how, a registry can be reached.

What the files may say is described in containerd's ``docs/hosts.md``; ``ping_url``, ``health_check_interval``
and ``failure_limit`` are what nydus-snapshotter reads besides.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec

from nydus.durations import duration
from nydus.errors import ConfigError
from nydus.oci.auth import shown
from nydus.oci.certificates import certificates_in

_HUB = "index.docker.io"
_CAPABILITIES = frozenset({"pull", "resolve", "push"})
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE = re.compile(r"[\t -~]*")
_URL = re.compile(r"[!-~]+")
_LONGEST = 86400.0  # a socket cannot wait for any number of seconds


class Host(msgspec.Struct, frozen=True):
    """A place where a registry can be read.

    Attributes:
        url: ``scheme://host[:port]``; "" is the registry itself, however that is reached.
        path: of the API there.
        resolve: may be asked what a tag means.
        headers: (name, value) pairs for every request.
        ca: PEM files to trust there.
        client: PEM files (certificate, key) to show there.
        proxy: URL of the proxy to it; "" is that of the environment.
        connect_timeout: seconds.
    """

    url: str
    path: str = "/v2"
    resolve: bool = True
    headers: tuple[tuple[str, str], ...] = ()
    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = ()
    skip_verify: bool = False
    proxy: str = ""
    connect_timeout: float = 5.0
    ping_url: str = ""
    health_check_interval: Annotated[float, msgspec.Meta(ge=0, le=_LONGEST)] = 5
    failure_limit: int = 5

    @property
    def plain_http(self) -> bool:
        return self.url.startswith("http://")

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def name(self) -> str:
        """``host[:port]``."""
        return self.url.partition("://")[2]

    @property
    def address(self) -> str:
        """The URL of the API, whose path is left out where it is the usual one."""
        return self.url if self.path == "/v2" else self.url + self.path

    @property
    def for_mirror(self) -> bool:
        """Whether nydusd can use it as a mirror."""
        return bool(self.path) and not (self.client or self.proxy)

    @property
    def for_origin(self) -> bool:
        """Whether nydusd can use it as the registry."""
        return self.path == "/v2" and not (self.client or self.headers)


class Hosts(msgspec.Struct, frozen=True):
    """What a directory says about a registry.

    Attributes:
        server: how the registry itself, or what takes its place, is reached; None if nothing is said.
        mirrors: what is asked before, in this order.
        unused: keys that mean nothing here, to be warned of.
    """

    server: Host | None = None
    mirrors: tuple[Host, ...] = ()
    unused: tuple[str, ...] = ()


def load(directory: Path, host: str) -> Hosts:
    """What ``directory`` says about the registry ``host`` (``name[:port]``).

    The first folder that exists counts: ``name_port_``, ``name:port``, ``_default``. Without a ``hosts.toml``
    it may hold certificates, as :mod:`nydus.oci.certificates` describes.

    Raises:
        ConfigError: the file that applies cannot be understood, or be used.
    """
    names = [_HUB, "docker.io"] if host in (_HUB, "docker.io", "registry-1.docker.io") else [host]
    name, colon, port = host.rpartition(":")
    if colon and port.isdigit():
        names.insert(0, f"{name}_{port}_")
    try:
        folders = (directory / each for each in [*names, "_default"])
        folder = next((each for each in folders if each.is_dir()), None)
        if folder is None:
            return Hosts()
        if (folder / "hosts.toml").is_file():
            return _read(folder / "hosts.toml")
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    found = certificates_in(folder)
    return Hosts(Host("", ca=found.ca, client=found.client) if found.ca or found.client else None)


def _read(path: Path) -> Hosts:
    try:
        document = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    server, tables = document.pop("server", ""), document.pop("host", {})
    if not isinstance(server, str) or not isinstance(tables, dict):
        raise ConfigError(f"{path}: server must be a string and host a table")
    unused: list[str] = []
    mirrors = []
    for url, table in tables.items():
        if not url:
            raise ConfigError(f"{path}: a host without address")
        if mirror := _host(path, url, table, unused):
            mirrors.append(mirror)
    itself = None
    if server or document:
        itself = _host(path, server, document, unused)
        if itself is None:
            raise ConfigError(f"{path}: nothing can be read from a server without the capability pull")
    return Hosts(itself, tuple(mirrors), tuple(unused))


def _host(path: Path, url: str, table: object, unused: list[str]) -> Host | None:
    """A ``[host."URL"]`` table, or the top of the file; None if nothing can be read there."""
    where = f'{path}: host."{shown(url)}"' if url else str(path)
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: is not a table")
    try:
        found: dict[str, Any] = {key: table[key] for key in _PLAIN if key in table}
        override = msgspec.convert(table.get("override_path", False), bool)
        capabilities = msgspec.convert(table.get("capabilities", []), list[str]) or sorted(_CAPABILITIES)
        headers = msgspec.convert(table.get("header", {}), dict[str, str | list[str]])
        ca = msgspec.convert(_several(table.get("ca", [])), list[str])
        client = msgspec.convert(_several(table.get("client", [])), list[str | list[str]])
        timeout = msgspec.convert(table.get("dial_timeout", ""), str)
        proxy = msgspec.convert(table.get("proxy", ""), str)
        found |= {
            "headers": [
                (name, value if isinstance(value, str) else ", ".join(value))
                for name, value in headers.items()
            ],
            "ca": [_file(path.parent, name) for name in ca],
            "client": [_pair(path.parent, names) for names in client],
        }
        if not all(_NAME.fullmatch(name) and _VALUE.fullmatch(value) for name, value in found["headers"]):
            raise ConfigError("header: is not one that can be sent")
        if timeout and (seconds := duration(timeout)):
            found["connect_timeout"] = min(seconds, _LONGEST)
        if proxy:
            found["proxy"] = _proxy(proxy)
        found["url"], found["path"] = _address(url, override) if url else ("", "/v2")
        wrong = {each.lower() for each in capabilities} - _CAPABILITIES
        if wrong:
            raise ConfigError(f"unknown capability {min(wrong)!r}")
        found["resolve"] = "resolve" in map(str.lower, capabilities)
        host = msgspec.convert(found, Host)
    except (msgspec.ValidationError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from None
    unused += [f"{where}: {key} has no effect" for key in table if key not in _KNOWN]
    return host if "pull" in map(str.lower, capabilities) else None


_PLAIN = ("skip_verify", "ping_url", "health_check_interval", "failure_limit")
_KNOWN = {
    *(*_PLAIN, "capabilities", "header", "ca", "client", "override_path", "dial_timeout", "proxy"),
}


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _file(folder: Path, name: str) -> str:
    if not name or "\0" in name:
        raise ConfigError(f"{name!r} is not the name of a file")
    return str(folder / name)


def _pair(folder: Path, names: str | list[str]) -> tuple[str, str]:
    """Certificate and key: two files, or one with both."""
    certificate, *more = [names] if isinstance(names, str) else names or [""]
    if len(more) > 1:
        raise ConfigError("client: is neither a file nor a pair of files")
    return _file(folder, certificate), _file(folder, (more and more[0]) or certificate)


def _address(url: str, override: bool) -> tuple[str, str]:
    """``scheme://host[:port]`` and the path of the API; without a scheme it is https."""
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        usable = usable and bool(_URL.fullmatch(url))
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError("is not the URL of a registry")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError("its address must not have a user, a query or a fragment")
    path = posixpath.normpath("/" + parts.path.strip("/")).rstrip("/")
    if not override and not path.endswith("/v2"):
        path += "/v2"
    return f"{parts.scheme}://{parts.netloc}", path


def _proxy(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.path in ("", "/") and not parts.query and not parts.fragment
        usable = usable and parts.port != 0 and bool(_URL.fullmatch(url))
    except ValueError:
        usable = False
    if not usable or parts.scheme not in ("http", "https"):
        raise ConfigError("proxy: is not the URL of an http or https proxy")
    return url
