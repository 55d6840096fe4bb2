"""HTTP to one registry: pooled connections, sign-in, time limits, retries, one clear error per failure."""

from __future__ import annotations

import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import IO, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
    SSLError,
    TimeoutError,
)

from nydus import __version__
from nydus.errors import BackendError
from nydus.oci.auth import Authorizer, Credentials, error_words, parse_challenges, shown
from nydus.oci.connections import interrupted, watch
from nydus.oci.retry import PATIENCE, wait_to_retry

T = TypeVar("T")
Body = bytes | IO[bytes] | Iterable[bytes] | None

REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TOO_MANY = frozenset({408, 429, 500, 502, 503, 504})
#: What to try.
_HINTS = {
    401: "log in with `docker login`, or check the repository name",
    403: "this account may not do that: log in with another (`docker login`), or check the repository name",
    429: "too many requests: log in with `docker login` if that raises the limit, or try again later",
}
_ERROR_BODY = 64 << 10
#: Seconds for what is still to be said by a command that was interrupted.
_LAST_WAIT = 2.0
_PIECE = 1 << 20
#: The time limit of a socket is for all that it is given at once, however much that is.
_SENT_AT_ONCE = 256 << 10
_SIZE = re.compile(r"[0-9]{1,18}")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Policy:
    """How long one operation may take, and how often it is tried; times in seconds.

    Attributes:
        connect_timeout: for a connection, TLS included.
        read_timeout: between two pieces of an answer.
        attempts: how often an operation is tried at most.
        pause: before the second attempt; doubles each time. A registry may ask for more (Retry-After).
        total: of one operation with all of its attempts (the time to stream a whole blob does not count).
            Also the most that a registry may ask to be left alone for.
    """

    connect_timeout: float = 5.0
    read_timeout: float = 15.0
    attempts: int = 4
    pause: float = 0.2
    total: float = PATIENCE

    def delay(self, tried: int) -> float:
        """Seconds to wait after so many attempts; not the same for all, so that they do not come at once."""
        return self.pause * 2.0 ** (tried - 1) * random.uniform(0.75, 1.25)


class Transport:
    """The connections to one registry. Thread-safe; must not be carried over a fork.

    Args:
        host: ``host[:port]`` of the registry.
        plain_http: speak http. There is no other way to make it do so.
        skip_verify: accept any TLS certificate.
        ca_certs: PEM files trusted besides those of the system.
        client_certs: PEM files (certificate, key) to show to a registry that asks who we are.
        credentials: sent only to ``host`` and its token server, and only when asked for.
        proxy: URL of an HTTP proxy, or "".
        headers: sent along with every request to ``host``.
    """

    def __init__(
        self,
        host: str,
        *,
        plain_http: bool = False,
        skip_verify: bool = False,
        ca_certs: Iterable[str] = (),
        client_certs: Iterable[tuple[str, str]] = (),
        credentials: Credentials | None = None,
        policy: Policy | None = None,
        proxy: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.host = host
        self._headers = dict(headers or {})
        self.policy = policy or Policy()
        self.base = f"{'http' if plain_http else 'https'}://{host}"
        self.plain_http = plain_http
        options: dict[str, object] = {"num_pools": 16, "maxsize": 32, "retries": False}
        if not plain_http or skip_verify or ca_certs:
            options["ssl_context"] = _tls(skip_verify, ca_certs, client_certs)
        if skip_verify:
            options["assert_hostname"] = False
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # it was asked for
        self._pool: urllib3.PoolManager = watch(
            _through(proxy, options) if proxy else urllib3.PoolManager(**options)  # type: ignore[arg-type]
        )
        self._authorizer = Authorizer(host, credentials, self._send_token_request, allow_http=plain_http)
        # The first request finds out what sign-in the registry wants; the others wait for it rather than
        # all being refused at once.
        self._greeted = False
        self._greeting = threading.Lock()

    def close(self) -> None:
        self._pool.clear()

    def url(self, base: str, location: str) -> str:
        """Resolves a Location header.

        A registry behind a TLS proxy may answer with its own inner http address: on the same host that is
        read as https. Going down to http on another host is refused.

        Raises:
            BackendError: no location, not http(s), or a downgrade.
        """
        try:
            found = urljoin(base, location)
            parts = urlsplit(found)
            usable = bool(location and parts.hostname) and parts.port != 0
        except ValueError:  # brackets that do not match, or an impossible port
            usable = False
        if not usable or parts.scheme not in ("http", "https"):
            raise BackendError(f"{self.host}: bad redirect to {shown(location)!r}", permanent=True)
        if parts.scheme == "http" and urlsplit(base).scheme == "https":
            if parts.hostname == urlsplit(base).hostname and parts.port in (None, 80, urlsplit(base).port):
                netloc = urlsplit(base).netloc.rpartition("@")[2]
                return parts._replace(scheme="https", netloc=netloc).geturl()
            raise BackendError(
                f"{self.host}: refused a redirect from https to {shown(found)!r} over http", permanent=True
            )
        return found

    def at_home(self, url: str) -> bool:
        """Whether a URL is the registry's own, so that credentials may be sent there."""
        return _origin(self.base) == _origin(url)

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: Body = None,
        *,
        read_timeout: float | None = None,
        streaming: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        """Sends one request as it is and returns the answer with its body unread.

        Raises:
            BackendError: there was no answer.
        """
        wait = read_timeout or self.policy.read_timeout
        if interrupted.is_set():
            if method != "DELETE":  # which tells a registry to forget an upload
                raise BackendError(f"{self.host}: interrupted", permanent=True)
            wait = _LAST_WAIT
        # urllib3 uses the connect timeout for sending, too.
        timeout = urllib3.Timeout(connect=wait if streaming else self.policy.connect_timeout, read=wait)
        own = self._headers if self.at_home(url) else {}
        sent = {"User-Agent": f"pynydus/{__version__}", **own, **headers}
        if isinstance(body, bytes) and len(body) > _SENT_AT_ONCE:
            sent["Content-Length"] = str(len(body))
            body = _pieces(body)
        try:
            return self._pool.request(
                method,
                url,
                headers=sent,
                body=body,
                timeout=timeout,
                redirect=False,
                preload_content=False,
                decode_content=False,
                chunked=streaming,
            )
        except (HTTPError, OSError) as error:
            raise self.failure(error, url) from error
        except (ValueError, UnicodeError) as error:  # what urllib3 says of a URL that cannot be one
            raise BackendError(f"{self.host}: bad address {shown(url)!r}", permanent=True) from error

    def request(
        self,
        method: str,
        url: str,
        scope: str,
        headers: Mapping[str, str] | None = None,
        body: Body = None,
        *,
        ok: Iterable[int],
        read_timeout: float | None = None,
        streaming: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        """Sends one request to the registry, signed in as it asks for.

        Args:
            url: absolute, or a path that starts with ``/``.
            scope: what a token must allow, e.g. ``repository:app:pull``.
            ok: the statuses that are no error.
            streaming: ``body`` is an iterator that can be sent only once.

        Raises:
            BackendError: no answer, or another status; it quotes the registry.
        """
        if not self._greeted and not streaming:
            with self._greeting:
                if not self._greeted:
                    try:
                        return self._request(method, url, scope, headers, body, ok, read_timeout, streaming)
                    finally:
                        self._greeted = True
        return self._request(method, url, scope, headers, body, ok, read_timeout, streaming)

    def _request(
        self,
        method: str,
        url: str,
        scope: str,
        headers: Mapping[str, str] | None,
        body: Body,
        ok: Iterable[int],
        read_timeout: float | None,
        streaming: bool,
    ) -> urllib3.BaseHTTPResponse:
        if url.startswith("/"):
            url = self.base + url
        refused = 0
        while True:
            sent = self._authorizer.header(scope) if self.at_home(url) else None
            signed = {**(headers or {}), **({"Authorization": sent} if sent else {})}
            response = self.send(method, url, signed, body, read_timeout=read_timeout, streaming=streaming)
            if response.status == 401 and refused < 2 and self.at_home(url):
                challenges = parse_challenges(response.headers.getlist("WWW-Authenticate"))
                refused += 1
                if self._authorizer.challenged(challenges, scope, sent):
                    if streaming:  # whoever makes the body may try again, with a new token
                        error = self.refusal(response, method, url)
                        raise BackendError(str(error), status=401)
                    self.discard(response)
                    continue
            if response.status not in ok:
                raise self.refusal(response, method, url)
            return response

    def attempt(self, operation: Callable[[], T]) -> T:
        """Calls an operation again while it fails in a way that may pass, within the limits of the policy.

        Raises:
            BackendError: the last failure.
        """
        deadline = time.monotonic() + self.policy.total
        for tried in range(1, self.policy.attempts + 1):
            try:
                return operation()
            except BackendError as error:
                pause, left = self.policy.delay(tried), deadline - time.monotonic()
                if pause > left or not wait_to_retry(
                    error, tried, self.policy.attempts, pause, patience=left
                ):
                    raise
        raise AssertionError("unreachable")

    def read(self, response: urllib3.BaseHTTPResponse, size: int, deadline: float = float("inf")) -> bytes:
        """Reads ``size`` bytes of a body, fewer where it ends before.

        Raises:
            BackendError: the connection broke, or the deadline (of ``time.monotonic``) passed.
        """
        pieces: list[bytes] = []
        left = size
        try:
            while left:
                piece = response.read1(min(left, _PIECE), decode_content=False)
                if not piece:
                    break
                pieces.append(piece)
                left -= len(piece)
                if time.monotonic() > deadline:
                    raise BackendError(f"{self.host}: answered too slowly, gave up after {size - left} bytes")
        except (HTTPError, OSError) as error:
            response.close()
            raise self.failure(error, response.url or "") from error
        except BackendError:
            response.close()
            raise
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_all(self, response: urllib3.BaseHTTPResponse, limit: int) -> bytes:
        """Reads a whole small body and gives the connection back.

        Raises:
            BackendError: it is larger than ``limit`` bytes, or the connection broke.
        """
        data = self.read(response, limit + 1, time.monotonic() + self.policy.total)
        if len(data) > limit:
            response.close()
            raise BackendError(f"{self.host}: the answer is larger than {limit} bytes", permanent=True)
        response.release_conn()
        return data

    def discard(self, response: urllib3.BaseHTTPResponse) -> None:
        """Drops a body; the connection is kept if that costs little."""
        length = content_length(response)
        if length is not None and length <= _ERROR_BODY:
            try:
                response.drain_conn()
                return
            except (HTTPError, OSError):
                pass
        response.close()

    def refusal(self, response: urllib3.BaseHTTPResponse, method: str, url: str) -> BackendError:
        """The error for an answer with a bad status, in the registry's own words; drops the answer."""
        try:
            body = self.read(response, _ERROR_BODY, time.monotonic() + self.policy.read_timeout)
        except BackendError:
            body = b""
        response.close()
        status = response.status
        parts = urlsplit(shown(url))
        words = error_words(body) or response.reason or ""
        wait = _retry_after(response.headers.get("Retry-After", "")) if status in _TOO_MANY else 0.0
        message = f"{parts.netloc}: {method} {_shorten(parts.path)}: {status} {words}".rstrip()
        if status == 401 and self._authorizer.user and self.at_home(url):
            message += f"; the sign-in data of {self._authorizer.user} were refused"
        if hint := _HINTS.get(status, ""):
            message += f"; {hint}"
        if wait > self.policy.total:
            message += f"; it asks to be left alone for {wait:.0f} s"
        permanent = status not in _TOO_MANY and (400 <= status < 500 or status < 300)
        return BackendError(message, permanent=permanent, status=status, retry_after=wait)

    def failure(self, error: Exception, url: str) -> BackendError:
        """The error for a request without an answer."""
        host = urlsplit(shown(url)).netloc or self.host
        if isinstance(error, ProxyError):
            return BackendError(f"{host}: the proxy failed: {error.original_error}")
        if isinstance(error, NameResolutionError):
            return BackendError(f"{host}: unknown host name")
        if isinstance(error, SSLError | ssl.SSLError):
            text = str(error)
            if isinstance(error, SSLError) and error.args:
                text = str(error.args[0])
            lowered = text.lower()
            if "wrong_version" in lowered or "wrong version" in lowered or "record layer" in lowered:
                return BackendError(
                    f"{host}: does not speak TLS; is it a plain http registry? (--plain-http)", permanent=True
                )
            if "certificate" in lowered:
                reason = re.sub(r".*certificate verify failed: ?", "", text).split(" (_ssl")[0]
                if "self" in reason or "issuer" in reason:
                    reason += f"; a private CA belongs in /etc/containers/certs.d/{host}/NAME.crt"
                return BackendError(f"{host}: its TLS certificate is not trusted: {reason}", permanent=True)
            return BackendError(f"{host}: TLS failed: {text}")
        if isinstance(error, NewConnectionError):
            cause = error.__cause__ or error.__context__
            reason = (cause.strerror or str(cause)) if isinstance(cause, OSError) else str(error)
            return BackendError(f"{host}: cannot connect: {reason}")
        if isinstance(error, ConnectTimeoutError):
            return BackendError(f"{host}: no connection within {self.policy.connect_timeout:g} s")
        if isinstance(error, TimeoutError):
            return BackendError(f"{host}: no answer within {self.policy.read_timeout:g} s")
        return BackendError(f"{host}: the connection broke: {_reason(error)}")

    def _send_token_request(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None
    ) -> tuple[int, bytes]:
        response = self.send(method, url, headers, body)
        return response.status, self.read_all(response, 1 << 20)


def content_length(response: urllib3.BaseHTTPResponse) -> int | None:
    """What an answer says of the size of its body; None if that is no size."""
    text = response.headers.get("Content-Length", "")
    return int(text) if _SIZE.fullmatch(text) else None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def _through(proxy: str, options: dict[str, object]) -> urllib3.ProxyManager:
    """Connections through a proxy, signed in with the user and password of its URL."""
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        headers = urllib3.make_headers(proxy_basic_auth=f"{user}:{password}") if user else None
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        return urllib3.ProxyManager(url, proxy_headers=headers, **options)  # type: ignore[arg-type]
    except (HTTPError, ValueError) as error:
        where = proxy.rpartition("@")[2]
        raise BackendError(f"cannot use the proxy {where!r}: {error}", permanent=True) from error


def _pieces(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), _SENT_AT_ONCE):
        yield body[start : start + _SENT_AT_ONCE]


def _reason(error: BaseException) -> str:
    inner = error.args[-1] if error.args and isinstance(error.args[-1], BaseException) else None
    return _reason(inner) if inner else (str(error) or type(error).__name__)


def _shorten(path: str) -> str:
    return re.sub(r"(sha256:[0-9a-f]{12})[0-9a-f]{52}", r"\1…", path)


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header, 0 if there is none."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _tls(
    skip_verify: bool, ca_certs: Iterable[str], client_certs: Iterable[tuple[str, str]]
) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for path in ca_certs:
        try:
            context.load_verify_locations(cafile=path)
        except (OSError, ssl.SSLError) as error:
            raise BackendError(f"{path}: not a usable CA certificate: {error}", permanent=True) from error
    for certificate, key in client_certs:
        try:
            # Without the function OpenSSL would ask for the password of a key on the terminal.
            context.load_cert_chain(certificate, key, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            raise BackendError(
                f"{certificate}: not a usable client certificate: {error}", permanent=True
            ) from error
    if skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
