"""A proxy in front of a real registry that goes wrong when and how a test says."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_PIECE = 64 << 10
#: Of one connection only. All else passes as it is, Host too, so that a registry names this address.
_OWN = {"connection", "transfer-encoding", "keep-alive"}


@dataclass
class Seen:
    """One request, when it came (of ``time.monotonic``), and the status of its answer (0: there was none)."""

    method: str
    path: str
    headers: dict[str, str]
    at: float = field(default_factory=time.monotonic)
    status: int = 0


Fault = Callable[["Exchange"], None]


@dataclass
class _Rule:
    fault: Fault
    method: str
    path: re.Pattern[str]
    signed: bool
    left: int


@dataclass
class FaultyProxy:
    """Passes requests on to a registry at ``to``, but those that a rule picks go wrong.

    Attributes:
        seen: all requests, in the order of their arrival.
        hits: how often a rule was applied.
    """

    to: str
    seen: list[Seen] = field(default_factory=list)
    hits: int = 0
    _rules: list[_Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> FaultyProxy:
        handler = type("Handler", (Exchange,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(
        self, fault: Fault, method: str = "GET", path: str = "", *, times: int = 1, signed: bool = False
    ) -> None:
        """Has the next requests go wrong whose method and path (regular expressions) are such.

        Args:
            signed: only those with credentials.
        """
        self._rules.append(_Rule(fault, method, re.compile(path), signed, times))

    def fault_for(self, seen: Seen) -> Fault:
        with self._lock:
            for rule in self._rules:
                if not rule.left or (rule.signed and "Authorization" not in seen.headers):
                    continue
                if re.fullmatch(rule.method, seen.method) and rule.path.search(seen.path):
                    rule.left -= 1
                    self.hits += 1
                    return rule.fault
        return Exchange.forward


class Exchange(BaseHTTPRequestHandler):
    """One request, which a fault may answer, pass on, or break off."""

    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy
    seen: Seen

    def _do(self) -> None:
        self.seen = Seen(self.command, self.path, dict(self.headers.items()))
        self.proxy.seen.append(self.seen)
        self._body = self._read_body()
        try:
            self.proxy.fault_for(self.seen)(self)
        except (OSError, http.client.HTTPException):
            self.break_off()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _do

    def log_message(self, *_: object) -> None:
        pass

    def _read_body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, _PIECE))
            if not piece:
                raise ConnectionError
            left -= len(piece)
            yield piece

    def ask(self, after: int | None = None) -> tuple[http.client.HTTPResponse, bytes]:
        """What the registry answers; after so many bytes of the request both ways break."""
        there = http.client.HTTPConnection(self.proxy.to, timeout=30)
        headers = {key: value for key, value in self.headers.items() if key.lower() not in _OWN}

        def pieces() -> Iterator[bytes]:
            passed = 0
            for piece in self._body:
                yield piece
                passed += len(piece)
                if after is not None and passed > after:
                    reset(there.sock)
                    raise ConnectionError

        with contextlib.closing(there):
            body = pieces() if self.command in ("PATCH", "PUT", "POST") else None
            chunked = body is not None and "Content-Length" not in self.headers
            if chunked:
                headers["Transfer-Encoding"] = "chunked"
            there.request(self.command, self.path, body, headers, encode_chunked=chunked)
            answer = there.getresponse()
            return answer, answer.read()

    def send(
        self, status: int, headers: dict[str, str], body: bytes = b"", length: int | None = None
    ) -> None:
        """Answers; ``length`` is what the answer says of its body."""
        self.seen.status = status
        self.send_response_only(status)
        for key, value in headers.items():
            if key.lower() not in _OWN and key.lower() != "content-length":
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.wfile.flush()
        if length is not None and length != len(body):
            self.close_connection = True

    def forward(self) -> None:
        answer, body = self.ask()
        length = int(answer.headers.get("Content-Length") or 0) if self.command == "HEAD" else None
        self.send(answer.status, dict(answer.headers.items()), body, length)

    def break_off(self) -> None:
        """As if the machine had gone."""
        self.close_connection = True
        reset(self.connection)


def reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)


# Faults


def refuse(status: int, **headers: str) -> Fault:
    """Reads the request and answers it without the registry."""

    def fault(exchange: Exchange) -> None:
        for _ in exchange._body:
            pass
        exchange.send(status, {key.replace("_", "-"): value for key, value in headers.items()})

    return fault


def reset_at(after: int) -> Fault:
    """Resets the connection when so many bytes of the request, or else of the answer, have passed."""

    def fault(exchange: Exchange) -> None:
        answer, body = exchange.ask(after)
        exchange.send(answer.status, dict(answer.headers.items()), body[:after], len(body))
        exchange.break_off()

    return fault


def cut(after: int, pause: float = 0) -> Fault:
    """Sends so many bytes of the answer, waits (seconds), and ends the connection."""

    def fault(exchange: Exchange) -> None:
        answer, body = exchange.ask()
        exchange.send(answer.status, dict(answer.headers.items()), body[:after], len(body))
        time.sleep(pause)

    return fault


def stall(after: int) -> Fault:
    """Sends so many bytes of the answer and nothing more until the client goes."""

    def fault(exchange: Exchange) -> None:
        answer, body = exchange.ask()
        exchange.send(answer.status, dict(answer.headers.items()), body[:after], len(body))
        exchange.connection.settimeout(30)
        exchange.connection.recv(1)

    return fault


def corrupt(at: int) -> Fault:
    """Changes one bit of the answer."""

    def fault(exchange: Exchange) -> None:
        answer, body = exchange.ask()
        at_ = at % len(body)
        body = body[:at_] + bytes([body[at_] ^ 1]) + body[at_ + 1 :]
        exchange.send(answer.status, dict(answer.headers.items()), body)

    return fault


def lie(by: int) -> Fault:
    """Says of the answer that it has so many bytes more or less than it has."""

    def fault(exchange: Exchange) -> None:
        answer, body = exchange.ask()
        exchange.send(answer.status, dict(answer.headers.items()), body, len(body) + by)

    return fault


def endless(exchange: Exchange) -> None:
    """Answers with a document of 2 TB."""
    exchange.send(200, {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}, b"{", 2 << 40)
    while True:
        exchange.wfile.write(b" " * _PIECE)


def wait(seconds: float) -> Fault:
    """Passes the request on late."""

    def fault(exchange: Exchange) -> None:
        time.sleep(seconds)
        exchange.forward()

    return fault


def redirect(host: str) -> Fault:
    """Sends the client to the same path at another host."""

    def fault(exchange: Exchange) -> None:
        exchange.send(307, {"Location": f"http://{host}{exchange.path}"})

    return fault
