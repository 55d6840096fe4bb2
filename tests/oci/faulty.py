"""A registry that misbehaves as a test tells it to."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from nydus.oci.server import Handler, RegistryServer
from nydus.oci.transport import Policy

#: Quick to fail, so that tests of failures are quick.
QUICK = Policy(connect_timeout=1, read_timeout=1, attempts=3, pause=0.01, total=5)

#: Looks at a request; True if it has answered it.
Intercept = Callable[["FaultyHandler"], bool]


class FaultyHandler(Handler):
    def route(self) -> None:
        registry = self.registry
        assert isinstance(registry, FaultyRegistry)
        registry.seen.append((self.command, self.path, dict(self.headers.items())))
        for intercept in list(registry.intercepts):
            if intercept(self):
                return
        super().route()


class FaultyRegistry(RegistryServer):
    """The embedded registry with hooks before its answers and a list of the requests it saw."""

    handler = FaultyHandler

    def __init__(self, root: Path, *intercepts: Intercept) -> None:
        self.intercepts = list(intercepts)
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        super().__init__(root)

    def paths(self, method: str) -> list[str]:
        return [path for found, path, _ in self.seen if found == method]


class Times:
    """Applies an intercept to the first ``count`` requests that ``wanted`` picks."""

    def __init__(
        self, count: int, wanted: Callable[[FaultyHandler], bool], intercept: Callable[..., Any]
    ) -> None:
        self.left, self._wanted, self._intercept = count, wanted, intercept

    def __call__(self, handler: FaultyHandler) -> bool:
        if self.left <= 0 or not self._wanted(handler):
            return False
        self.left -= 1
        self._intercept(handler)
        return True


def is_blob(handler: FaultyHandler) -> bool:
    return handler.command == "GET" and "/blobs/sha256:" in handler.path


def status(code: int, **headers: str) -> Callable[[FaultyHandler], None]:
    body = json.dumps({"errors": [{"code": "TEST", "message": "made to fail"}]}).encode()
    fields = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda handler: handler.reply(code, body, fields)


def hang_up(handler: FaultyHandler) -> None:
    handler.close_connection = True
    handler.connection.close()


def cut(after: int) -> Callable[[FaultyHandler], None]:
    """Sends only the first bytes of a blob, then hangs up."""

    def answer(handler: FaultyHandler) -> None:
        data = blob_of(handler)
        start = 0
        if span := handler.headers.get("Range"):
            start = int(span.removeprefix("bytes=").partition("-")[0])
        code, more = (
            (206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}) if start else (200, {})
        )
        handler._start(code, len(data) - start, more)
        handler.wfile.write(data[start : start + after])
        handler.wfile.flush()
        handler.close_connection = True

    return answer


def blob_of(handler: FaultyHandler) -> bytes:
    return (handler.registry.store.blobs / urlsplit(handler.path).path.rpartition(":")[2]).read_bytes()


def whole(handler: FaultyHandler) -> None:
    """Ignores Range."""
    handler.reply(200, blob_of(handler))


class BasicAuth:
    def __init__(self, user: str, password: str) -> None:
        self._wanted = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    def __call__(self, handler: FaultyHandler) -> bool:
        if handler.headers.get("Authorization") == self._wanted:
            return False
        status(401, WWW_Authenticate='Basic realm="tests"')(handler)
        return True


class TokenAuth:
    """Bearer tokens, handed out by the registry itself at ``/token``.

    Args:
        user, password: who may have one; "" is everybody.
        lifetime: seconds that tokens are good for.
        post: only the OAuth form is answered.
    """

    def __init__(self, user: str = "", password: str = "", lifetime: float = 300, post: bool = False) -> None:
        self._basic = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode() if user else ""
        self._user, self._password = user, password
        self._lifetime, self._post = lifetime, post
        self._lock = threading.Lock()
        self.issued: dict[str, tuple[str, float]] = {}
        self.requests: list[dict[str, str]] = []
        self.refused = 0

    def revoke(self) -> None:
        self.issued.clear()

    def __call__(self, handler: FaultyHandler) -> bool:
        parts = urlsplit(handler.path)
        if parts.path == "/token":
            self._answer(handler, parts.query)
            return True
        kind, _, token = handler.headers.get("Authorization", "").partition(" ")
        name = parts.path.removeprefix("/v2/").partition("/blobs")[0].partition("/manifests")[0]
        scope, expires = self.issued.get(token, ("", 0.0))
        allowed = any(part.startswith(f"repository:{name}:") for part in scope.split())
        if kind == "Bearer" and allowed and time.monotonic() < expires:
            return False
        self.refused += 1
        needed = "pull" if handler.command in ("GET", "HEAD") else "pull,push"
        realm = f"http://{handler.registry.host}/token"
        challenge = f'Bearer realm="{realm}",service="tests",scope="repository:{name}:{needed}"'
        status(401, WWW_Authenticate=challenge)(handler)
        return True

    def _answer(self, handler: FaultyHandler, query: str) -> None:
        body = b"".join(handler.body()).decode()
        fields = {key: values[0] for key, values in parse_qs(body or query).items()}
        self.requests.append(fields)
        if self._post:
            allowed = (
                handler.command == "POST"
                and fields.get("username") == self._user
                and fields.get("password") == self._password
            )
            if handler.command == "GET":
                return handler.reply(405)
        else:
            allowed = not self._basic or handler.headers.get("Authorization") == self._basic
        if not allowed:
            return handler.reply(401, json.dumps({"details": "incorrect username or password"}).encode())
        with self._lock:
            token = f"token{len(self.issued)}.{time.monotonic_ns()}"
            self.issued[token] = (fields.get("scope", ""), time.monotonic() + self._lifetime)
        answer = {"token": token, "expires_in": self._lifetime}
        return handler.reply(200, json.dumps(answer).encode())
