"""Answers no honest registry, token server or proxy gives: one error, no traceback, no endless wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from nydus.convert.reuse import default_folder
from nydus.errors import BackendError
from nydus.oci.auth import docker_credentials
from nydus.oci.registry import Registry, Repository
from nydus.oci.transport import Policy, Transport

DIGEST = f"sha256:{0:064x}"
HUGE = "9" * 5000


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.answer(self)  # type: ignore[attr-defined]

    do_HEAD = do_POST = do_PUT = do_GET

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def _serving(answer: Callable[[_Handler], object]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.answer = answer  # type: ignore[attr-defined]
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _repository(host: str, **more: str) -> Repository:
    policy = Policy(connect_timeout=1, read_timeout=0.2, attempts=1)
    return Registry(host, plain_http=True, policy=policy, **more).repository("a")  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [HUGE, "-5", "five", "٣"])
def test_impossible_lengths(length: str) -> None:
    with _serving(
        lambda handler: handler.reply(200, Content_Length=length.encode().decode("latin-1"))
    ) as host:
        with pytest.raises(BackendError):
            _repository(host).blob_size(DIGEST)


def test_impossible_numbers() -> None:
    with _serving(lambda handler: handler.reply(404, Content_Length=HUGE)) as host:
        assert not _repository(host).has_manifest("x")
    with _serving(lambda handler: handler.reply(206, Content_Range=f"bytes {HUGE}-{HUGE}/{HUGE}")) as host:
        with pytest.raises(BackendError, match="asked for bytes 0-4"):
            _repository(host).read_range(DIGEST, 0, 5)


@pytest.mark.parametrize("lifetime", ["9" * 400, "[]", '"soon"', "NaN"])
def test_impossible_lifetimes_of_a_token(lifetime: str) -> None:
    def answer(handler: _Handler) -> None:
        if handler.path.startswith("/token"):
            return handler.reply(200, f'{{"token": "x", "expires_in": {lifetime}}}'.encode())
        return handler.reply(401, WWW_Authenticate=f'Bearer realm="http://{handler.headers["Host"]}/token"')

    with _serving(answer) as host, pytest.raises(BackendError):
        _repository(host).manifest("x")


def test_a_stream_that_drips() -> None:
    def answer(handler: _Handler) -> None:
        try:
            handler.reply(200, Content_Length="1000000")
            while True:
                handler.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            pass

    with _serving(answer) as host:
        started = time.monotonic()
        with pytest.raises(BackendError, match="too slowly"):
            _repository(host).blob(DIGEST, 1000000).read()
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("host", "url", "home"),
    [
        ("r.io", "https://r.io:443/v2/a", True),
        ("r.io:443", "https://r.io/v2/a", True),
        ("r.io", "https://R.IO/v2/a", True),
        ("r.io", "http://r.io:443/v2/a", False),
        ("r.io", "https://r.io:444/v2/a", False),
        ("r.io", "https://r.io@evil.io/v2/a", False),
        ("r.io", "https://evil.io/r.io", False),
    ],
)
def test_where_credentials_may_go(host: str, url: str, home: bool) -> None:
    assert Transport(host).at_home(url) is home


def test_a_proxy_that_wants_a_password() -> None:
    seen = []

    def answer(handler: _Handler) -> None:
        seen.append((handler.path, handler.headers["Proxy-Authorization"]))
        handler.reply(200, b"{}", Content_Length="2")

    with _serving(answer) as host:
        _repository("r.io", proxy=f"http://user:p%40ss@{host}").manifest("x")
        _repository("r.io", proxy=host).manifest("x")  # curl takes it without a scheme, so people write that
    assert seen == [("http://r.io/v2/a/manifests/x", wanted) for wanted in ("Basic dXNlcjpwQHNz", None)]


@pytest.mark.parametrize(
    "proxy", ["socks5://u:secret@h:1", "http://u:secret@[", "http://u:secret@127.0.0.1:1"]
)
def test_a_proxy_that_cannot_be_used(proxy: str) -> None:
    with pytest.raises(BackendError, match="proxy") as caught:
        _repository("r.io", proxy=proxy).manifest("x")
    assert "secret" not in str(caught.value)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    for name in ("DOCKER_CONFIG", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert docker_credentials("r.io") is None
    assert default_folder() is None
    (tmp_path / "config.json").mkdir()
    assert docker_credentials("r.io", tmp_path) is None


@pytest.mark.parametrize(
    "location",
    [
        "http://me:geheim@127.0.0.1:1/blob?signature=geheim",
        "ftp://me:geheim@127.0.0.1/blob?signature=geheim",
        "http://me:geheim@[::1/blob",
        "http://me:geheim@127.0.0.1:99999/blob",
    ],
)
def test_no_secret_of_a_redirect_is_told(location: str) -> None:
    with _serving(lambda handler: handler.reply(307, Location=location, Content_Length="0")) as host:
        with pytest.raises(BackendError) as caught:
            _repository(host).blob_size(DIGEST)
        assert "127.0.0.1" in str(caught.value) and "geheim" not in str(caught.value)
