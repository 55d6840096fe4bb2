"""HTTP/1.1 over a UNIX socket, as much of it as the daemon's API needs."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote

log = logging.getLogger(__name__)

_MAX_HEAD = 16 << 10
_MAX_BODY = 2 << 20
_MAX_CONNECTIONS = 256
_REASONS = {200: "OK", 204: "No Content", 400: "Bad Request", 404: "Not Found", 500: "Internal Server Error"}


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Response:
    """``after`` runs when the answer is on its way."""

    status: int
    body: bytes = b""
    after: Callable[[], None] | None = None


class BadRequest(Exception):
    """Bytes that are no request; ``status`` answers them."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class HttpServer:
    """Answers each connection in a thread of its own, so that a slow request keeps nobody waiting.

    Args:
        listener: a listening socket.
        handle: makes the answer; must not raise.
    """

    def __init__(self, listener: socket.socket, handle: Callable[[Request], Response]) -> None:
        self._listener, self._handle = listener, handle
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)

    def start(self) -> None:
        threading.Thread(target=self._accept, name="api", daemon=True).start()

    def _accept(self) -> None:
        while True:
            self._slots.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                log.error("the API socket: %s", error)
                self._slots.release()
                if error.errno in (errno.EBADF, errno.EINVAL):
                    return
                time.sleep(0.1)  # out of descriptors or memory, for the moment
                continue
            try:
                threading.Thread(target=self._serve, args=(connection,), name="api-call", daemon=True).start()
            except RuntimeError as error:
                log.error("the API socket: %s", error)
                connection.close()
                self._slots.release()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as stream:
                while True:
                    connection.settimeout(300)  # between requests of one connection
                    try:
                        parsed = _read(stream.readline, stream.read)
                    except BadRequest as error:
                        _send(connection, Response(error.status, str(error).encode()), close=True)
                        return
                    if parsed is None:
                        return
                    request, close = parsed
                    response = self._handle(request)
                    _send(connection, response, close=close)
                    if response.after is not None:
                        response.after()
                    if close:
                        return
        except OSError:
            pass  # the client went away
        finally:
            self._slots.release()


def _read(readline: Callable[[int], bytes], read: Callable[[int], bytes]) -> tuple[Request, bool] | None:
    """The next request and whether it is the last; None at the end."""
    line = readline(_MAX_HEAD)
    if not line.strip():
        return None
    parts = line.decode("latin-1").split()
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise BadRequest(400, "not an HTTP/1.1 request")
    method, target, version = parts
    headers: dict[str, str] = {}
    size = len(line)
    while True:
        line = readline(_MAX_HEAD)
        size += len(line)
        if size > _MAX_HEAD:
            raise BadRequest(431, "the request's head is too large")
        if not line.strip():
            break
        key, _, value = line.decode("latin-1").partition(":")
        headers[key.strip().lower()] = value.strip()
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = _read_chunked(readline, read)
    else:
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > _MAX_BODY:
            raise BadRequest(413 if length.isdigit() else 400, f"Content-Length {length} is not acceptable")
        body = read(int(length))
        if len(body) != int(length):
            raise BadRequest(400, "the body is cut off")
    path, _, query = target.partition("?")
    close = headers.get("connection", "").lower() == "close" or version == "HTTP/1.0"
    return Request(method.upper(), unquote(path), dict(parse_qsl(query, keep_blank_values=True)), body), close


def _read_chunked(readline: Callable[[int], bytes], read: Callable[[int], bytes]) -> bytes:
    body = b""
    while True:
        text = readline(64).partition(b";")[0].strip()
        try:
            size = int(text, 16)
        except ValueError:
            raise BadRequest(400, "invalid chunk size") from None
        if size < 0 or len(body) + size > _MAX_BODY:
            raise BadRequest(413, "the body is too large")
        if size == 0:
            while readline(_MAX_HEAD).strip():
                pass
            return body
        body += read(size)
        readline(2)


def _send(connection: socket.socket, response: Response, *, close: bool) -> None:
    lines = [
        f"HTTP/1.1 {response.status} {_REASONS.get(response.status, '')}",
        "Server: Nydus API",
        f"Connection: {'close' if close else 'keep-alive'}",
    ]
    if response.status != 204:
        lines += ["Content-Type: application/json", f"Content-Length: {len(response.body)}"]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + response.body)
