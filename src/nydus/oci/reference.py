"""Image references as Docker and containerd write them: ``[host[:port]/]path[:tag][@digest]``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nydus.errors import ConfigError

DEFAULT_HOST = "docker.io"
DEFAULT_TAG = "latest"

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
PATH = re.compile(rf"{_PART}(?:/{_PART})*")
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


@dataclass(frozen=True, slots=True)
class Reference:
    """One image in one registry, in normalised form: ``host`` and ``tag`` are filled in.

    ``tag`` is empty only where a digest was given without one.
    """

    host: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """``host/repository``."""
        return f"{self.host}/{self.repository}"

    @property
    def target(self) -> str:
        """What to ask the registry for: the digest where there is one, else the tag."""
        return self.digest or self.tag

    @property
    def endpoint(self) -> str:
        """The ``host[:port]`` that serves the registry API; differs from ``host`` for Docker Hub only."""
        return "registry-1.docker.io" if self.host == DEFAULT_HOST else self.host

    def with_digest(self, digest: str) -> Reference:
        """The same repository, by digest only."""
        return replace(self, tag="", digest=digest)

    def with_tag(self, tag: str) -> Reference:
        """The same repository under another tag."""
        if not TAG.fullmatch(tag):
            raise ConfigError(f"{tag!r} is not a valid tag")
        return replace(self, tag=tag, digest="")

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{tag}{digest}"


def parse(text: str) -> Reference:
    """Parses and normalises a reference: ``ubuntu`` is ``docker.io/library/ubuntu:latest``.

    Raises:
        ConfigError: the text is not a reference; the message says why.
    """

    def wrong(why: str) -> ConfigError:
        return ConfigError(f"invalid image reference {text!r}: {why}")

    rest = text
    if not rest:
        raise wrong("it is empty")
    if "://" in rest:
        raise wrong("it must not have a scheme")
    rest, at, digest = rest.partition("@")
    if at and not DIGEST.fullmatch(digest):
        raise wrong("its digest is not sha256:<64 hex digits>")
    slash, colon = rest.rfind("/"), rest.rfind(":")
    tag = ""
    if colon > slash:
        rest, tag = rest[:colon], rest[colon + 1 :]
        if not TAG.fullmatch(tag):
            raise wrong("its tag must be 1 to 128 letters, digits, '_', '.' or '-'")
    head, slash_found, path = rest.partition("/")
    if slash_found and ("." in head or ":" in head or head == "localhost" or head != head.lower()):
        host = head
    else:
        host, path = DEFAULT_HOST, rest
    if not _HOST.fullmatch(host):
        raise wrong(f"{host!r} is not a host name")
    if host == "index.docker.io":
        host = DEFAULT_HOST
    if host == DEFAULT_HOST and "/" not in path:
        path = f"library/{path}"
    if len(path) > 255:
        raise wrong("its repository name is longer than 255 characters")
    if not PATH.fullmatch(path):
        raise wrong("its repository name must be lower-case words joined by '/', '.', '_' or '-'")
    if not tag and not digest:
        tag = DEFAULT_TAG
    return Reference(host, path, tag, digest)
