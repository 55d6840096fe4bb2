"""Who we are to a registry: Docker's config file and helpers, and the tokens a registry hands out."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nydus.errors import BackendError, ConfigError

_HUB = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")
_HELPER_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user name and password, or one of the two token kinds a Docker config may hold.

    ``identity_token`` is exchanged for access tokens; ``registry_token`` is sent as it is.
    """

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:
        return f"Credentials({self.username or 'token'!r}, ***)"

    def basic(self) -> str:
        """The value of a Basic ``Authorization`` header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()

    @classmethod
    def from_base64(cls, text: str) -> Credentials:
        """Reads base64 of ``user:password``, the form of Docker's ``auth`` key.

        Raises:
            ConfigError: not base64, not UTF-8, or without a colon.
        """
        try:
            user, colon, password = base64.b64decode(text, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"credentials are not base64 of user:password: {error}") from error
        if not colon:
            raise ConfigError("credentials are not base64 of user:password: no colon in them")
        # Docker pads some passwords with NUL bytes.
        return cls(user, password.rstrip("\0"))


def shown(url: str) -> str:
    """An address as it may be printed: without a password, and without what a signed address ends with."""
    return re.sub(r"//.*@", "//", url.partition("?")[0])[:400]


def home() -> Path | None:
    """The user's home directory; None for a user without one, as in many containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def docker_credentials(host: str, config_dir: str | os.PathLike[str] | None = None) -> Credentials | None:
    """Looks up a registry in Docker's config file and credential helpers; None if it is not there.

    Raises:
        ConfigError: the file is no JSON, or a helper failed.
    """
    named = config_dir or os.environ.get("DOCKER_CONFIG")
    folder = Path(named) if named else (home() or Path("/")) / ".docker"
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a JSON object")
    keys = _HUB if host in _HUB else (host, f"https://{host}", f"http://{host}", f"https://{host}/v1/")
    helpers, auths = _table(config, "credHelpers"), _table(config, "auths")
    for key in keys:
        if isinstance(helper := helpers.get(key), str):
            return _ask_helper(helper, key)
    if isinstance(store := config.get("credsStore"), str) and store:
        for key in keys:
            if found := _ask_helper(store, key):
                return found
    stored = {key.rstrip("/").removesuffix("/v2"): value for key, value in auths.items()}
    for key in keys:
        entry = stored.get(key.rstrip("/"))
        if not isinstance(entry, dict):
            continue
        if token := entry.get("identitytoken"):
            return Credentials(username=str(entry.get("username", "")), identity_token=str(token))
        if token := entry.get("registrytoken"):
            return Credentials(registry_token=str(token))
        if auth := entry.get("auth"):
            try:
                return Credentials.from_base64(str(auth))
            except ConfigError as error:
                raise ConfigError(f"{path}: {key}: {error}") from error
        if user := entry.get("username"):
            return Credentials(str(user), str(entry.get("password", "")))
    return None


def _table(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _ask_helper(name: str, server: str) -> Credentials | None:
    """Runs ``docker-credential-NAME get``: the server on standard input, JSON on standard output."""
    import subprocess  # here, as it takes some ms to import

    command = f"docker-credential-{name}"
    if os.sep in name:
        raise ConfigError(f"credential helper {name!r} is not a plain name")
    try:
        done = subprocess.run(
            [command, "get"], input=server.encode(), capture_output=True, timeout=_HELPER_TIMEOUT, check=False
        )
    except FileNotFoundError as error:
        raise ConfigError(f"credential helper {command} is not in PATH") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"credential helper {command} gave no answer in {_HELPER_TIMEOUT:.0f} s") from error
    if done.returncode:
        words = (done.stdout + done.stderr).decode(errors="replace").strip()
        if "not found" in words:
            return None
        raise ConfigError(f"credential helper {command} failed for {server}: {words[:200]}")
    try:
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"credential helper {command} gave no Username and Secret") from error
    return Credentials(identity_token=secret) if user == "<token>" else Credentials(user, secret)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One entry of a ``WWW-Authenticate`` header; ``scheme`` in lower case."""

    scheme: str
    parameters: Mapping[str, str]


_SCHEME = re.compile(r"\s*,?\s*([A-Za-z][A-Za-z0-9!#$%&'*+.^_`|~-]*)(?=[\s,]|$)")
_PARAMETER = re.compile(r"\s*,?\s*([A-Za-z0-9_-]+)\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,\"]*))")


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """Splits ``WWW-Authenticate`` headers (RFC 9110, 11.6.1), leaving out what cannot be understood."""
    found: list[Challenge] = []
    for header in headers:
        position = 0
        while match := _SCHEME.match(header, position):
            scheme, position = match[1].lower(), match.end()
            parameters: dict[str, str] = {}
            while pair := _PARAMETER.match(header, position):
                value = re.sub(r"\\(.)", r"\1", pair[2]) if pair[2] is not None else pair[3]
                parameters.setdefault(pair[1].lower(), value)
                position = pair.end()
            found.append(Challenge(scheme, parameters))
    return found


#: Sends one request: (method, url, headers, body) -> (status, body). Given by the registry client.
Send = Callable[[str, str, dict[str, str], bytes | None], tuple[int, bytes]]


@dataclass(slots=True)
class _Token:
    header: str
    expires: float


class Authorizer:
    """The ``Authorization`` headers of one registry, for all its repositories and threads.

    Nothing is sent before the registry asks for it. Tokens are kept for each scope and fetched again a little
    before they end; threads that need the same token wait for the one that fetches it.

    Args:
        host: for messages.
        credentials: None for anonymous access.
        send: how token requests are sent.
        allow_http: a token server may be reached over plain http (only if the registry itself is).
    """

    def __init__(self, host: str, credentials: Credentials | None, send: Send, *, allow_http: bool) -> None:
        self._host, self._credentials, self._send, self._allow_http = host, credentials, send, allow_http
        #: Whose sign-in data are sent, "" without any.
        self.user = (repr(credentials.username) if credentials.username else "a token") if credentials else ""
        self._challenge: Challenge | None = None
        self._tokens: dict[str, _Token] = {}
        self._lock = threading.Lock()

    def header(self, scope: str) -> str | None:
        """The header to send now, None while the registry has not asked for one.

        Raises:
            BackendError: the token server refused, or could not be reached.
        """
        if self._credentials and self._credentials.registry_token:
            return f"Bearer {self._credentials.registry_token}"
        if self._challenge is None:
            return None
        return self._token(scope)

    def challenged(self, challenges: list[Challenge], scope: str, sent: str | None) -> bool:
        """Takes note of a 401. True if a new header is worth another try.

        Args:
            sent: the header that the refused request carried.
        """
        usable = [c for c in challenges if c.scheme == "bearer" and c.parameters.get("realm")]
        usable += [c for c in challenges if c.scheme == "basic"]
        if not usable or (self._credentials and self._credentials.registry_token):
            return False
        with self._lock:
            known, self._challenge = self._challenge, usable[0]
            held = self._tokens.get(scope)
            if held and held.header != sent:
                return True  # another thread has fetched a new one meanwhile
            self._tokens.pop(scope, None)
        if usable[0].scheme == "basic":
            return self._credentials is not None and sent != self._credentials.basic()
        return sent is None or known is not None

    def _token(self, scope: str) -> str | None:
        with self._lock:
            challenge = self._challenge
            if challenge is None:
                return None
            if challenge.scheme == "basic":
                return self._credentials.basic() if self._credentials else None
            held = self._tokens.get(scope)
            if held and time.monotonic() < held.expires:
                return held.header
            # Held while the token is fetched: one request however many threads wait for it.
            token = self._fetch(challenge, scope)
            self._tokens[scope] = token
            return token.header

    def _fetch(self, challenge: Challenge, scope: str) -> _Token:
        realm, service = challenge.parameters["realm"], challenge.parameters.get("service", "")
        try:
            parts = urlsplit(realm)
        except ValueError:
            raise BackendError(
                f"{self._host}: bad realm {shown(realm)!r}", permanent=True, status=401
            ) from None
        if parts.scheme != "https" and not (parts.scheme == "http" and self._allow_http):
            raise BackendError(
                f"{self._host}: refused to ask for a token at {shown(realm)!r}: not https",
                permanent=True,
                status=401,
            )
        fields = {"service": service, "scope": scope}
        started = time.monotonic()
        status, body = self._exchange(realm, fields)
        where = f"{self._host}: token server {urlsplit(shown(realm)).netloc}"
        if status != 200:
            words = error_words(body)
            raise BackendError(
                f"{where} refused {scope}: {status}{words and f' {words}'}",
                permanent=400 <= status < 500 and status != 429,
                status=401 if status in (400, 401, 403) else status,
            )
        try:
            answer = json.loads(body)
            value = answer.get("token") or answer.get("access_token")
            lifetime = float(answer.get("expires_in") or 60)
        except (ValueError, OverflowError, AttributeError, TypeError, RecursionError) as error:
            raise BackendError(f"{where} gave no valid JSON", permanent=True) from error
        if not isinstance(value, str) or not value or not value.isprintable():
            raise BackendError(f"{where} gave no token", permanent=True)
        # Stop using it early enough for a request that is just being sent.
        return _Token(f"Bearer {value}", started + max(lifetime * 0.8, lifetime - 20, 1.0))

    def _exchange(self, realm: str, fields: dict[str, str]) -> tuple[int, bytes]:
        from urllib.parse import urlencode

        mine = self._credentials
        form = dict(fields, client_id="pynydus")
        if mine and mine.identity_token:
            form |= {"grant_type": "refresh_token", "refresh_token": mine.identity_token}
            return self._post(realm, urlencode(form))
        headers = {"Authorization": mine.basic()} if mine else {}
        url = realm + ("&" if "?" in realm else "?") + urlencode({k: v for k, v in fields.items() if v})
        status, body = self._send("GET", url, headers, None)
        if status in (404, 405) and mine:
            form |= {"grant_type": "password", "username": mine.username, "password": mine.password}
            return self._post(realm, urlencode(form))
        return status, body

    def _post(self, realm: str, form: str) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._send("POST", realm, headers, form.encode())


def error_words(body: bytes) -> str:
    """What an error answer says, on one line of printable characters."""
    try:
        document = json.loads(body)
        if isinstance(errors := document.get("errors"), list) and errors:
            first = errors[0]
            text = (
                f"{first.get('message') or ''} ({first.get('code')})"
                if isinstance(first, dict)
                else str(first)
            )
        else:
            text = str(
                document.get("error_description") or document.get("details") or document.get("message") or ""
            )
    except (ValueError, AttributeError, RecursionError):
        text = body[:200].decode(errors="replace")
        if "<" in text:  # an HTML page of some proxy
            text = ""
    return "".join(c if c.isprintable() else " " for c in text).strip()[:300]
