"""One contract for all backends, and what each does with the faults of its kind."""

from __future__ import annotations

import base64
import hashlib
import http.client
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from objectstore_server import ObjectStoreServer
from storage_blobs import cache_of, make_blob, read

from nydus.errors import BackendError, ConfigError
from nydus.oci.registry import Registry
from nydus.oci.server import RegistryServer
from nydus.storage import backends
from nydus.storage.backend import Backend

DATA = random.Random(3).randbytes(300_000)
ID = hashlib.sha256(DATA).hexdigest()
UNKNOWN = "0" * 64


class Peer:
    """A small HTTP server whose answers a test chooses: an origin, a mirror, or a forward proxy."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] = blob_answer
        peer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                peer.requests.append((self.command, self.path, dict(self.headers)))
                peer.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for key, value in headers.items():
        handler.send_header(key.replace("_", "-"), value)
    if "Content_Length" not in headers:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def blob_answer(handler: BaseHTTPRequestHandler) -> None:
    if not handler.path.endswith(f"sha256:{ID}"):
        return send(handler, 404, b'{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown"}]}')
    wanted = handler.headers.get("Range")
    if wanted is None:
        return send(handler, 200, DATA)
    first, last = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
    if last >= len(DATA):
        return send(handler, 416)
    send(handler, 206, DATA[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(DATA)}")


def status_answer(status: int, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: send(handler, status, b"no", **headers)


def hanging_answer(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(3)
    handler.close_connection = True


def short_answer(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 206, DATA[:10], Content_Range=f"bytes 0-99/{len(DATA)}")


def broken_answer(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 206, DATA[:10], Content_Range=f"bytes 0-99/{len(DATA)}", Content_Length="100")
    handler.close_connection = True


def lying_answer(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 206, DATA[:100], Content_Range=f"bytes 500-599/{len(DATA)}")


def proxy_answer(handler: BaseHTTPRequestHandler) -> None:
    """Does what the absolute address says."""
    parts = urlsplit(handler.path)
    with closing(http.client.HTTPConnection(parts.netloc, timeout=5)) as origin:
        origin.request(handler.command, parts.path, headers=dict(handler.headers))
        answer = origin.getresponse()
        headers = {
            k.replace("-", "_"): v for k, v in answer.getheaders() if k in ("Content-Range", "Content-Length")
        }
        send(handler, answer.status, answer.read(), **headers)


@pytest.fixture
def peer() -> Iterator[Peer]:
    with closing(Peer()) as result:
        yield result


@pytest.fixture
def proxy() -> Iterator[Peer]:
    with closing(Peer()) as result:
        result.answer = proxy_answer
        yield result


def config_of(peer: Peer, **more: object) -> dict[str, object]:
    return {"scheme": "http", "host": peer.host, "repo": "a/b", "timeout": 1, "connect_timeout": 1, **more}


@contextmanager
def localfs(tmp_path: Path, peer: Peer, proxy: Peer) -> Iterator[Backend]:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / ID).touch()  # empty: look further
    (tmp_path / "two" / ID).write_bytes(DATA)
    yield backends.create("localfs", {"dir": str(tmp_path / "one"), "alt_dirs": [str(tmp_path / "two")]})


@contextmanager
def embedded(tmp_path: Path, peer: Peer, proxy: Peer) -> Iterator[Backend]:
    with RegistryServer(tmp_path / "registry") as server:
        with Registry(server.host, plain_http=True) as registry:
            registry.repository("a/b").put_blob(DATA, "application/octet-stream")
        yield backends.create("registry", {"scheme": "http", "host": server.host, "repo": "a/b"})


@contextmanager
def direct(tmp_path: Path, peer: Peer, proxy: Peer) -> Iterator[Backend]:
    yield backends.create("registry", config_of(peer))


@contextmanager
def proxied(tmp_path: Path, peer: Peer, proxy: Peer) -> Iterator[Backend]:
    yield backends.create("registry", config_of(peer, proxy={"url": f"http://{proxy.host}"}))
    assert proxy.requests


@contextmanager
def dead_mirror(tmp_path: Path, peer: Peer, proxy: Peer) -> Iterator[Backend]:
    yield backends.create("registry", config_of(peer, mirrors=[{"host": "http://127.0.0.1:1"}]))


@contextmanager
def object_store(kind: str) -> Iterator[Backend]:
    with closing(ObjectStoreServer()) as server:
        server.objects[f"images/nydus/{ID}"] = DATA
        yield backends.create(kind, server.config())


@contextmanager
def s3(tmp_path: Path, peer: Peer, proxy: Peer) -> Iterator[Backend]:
    with object_store("s3") as backend:
        yield backend


@contextmanager
def oss(tmp_path: Path, peer: Peer, proxy: Peer) -> Iterator[Backend]:
    with object_store("oss") as backend:
        yield backend


@pytest.fixture(params=[localfs, embedded, direct, proxied, dead_mirror, s3, oss], ids=lambda f: f.__name__)
def backend(request: pytest.FixtureRequest, tmp_path: Path, peer: Peer, proxy: Peer) -> Iterator[Backend]:
    with request.param(tmp_path, peer, proxy) as result:
        with closing(result):
            result.read(ID, 0, 1)
            yield result


class TestContract:
    def test_exactly_the_bytes(self, backend: Backend) -> None:
        rng = random.Random(1)
        for _ in range(20):
            offset = rng.randrange(len(DATA))
            size = rng.randrange(len(DATA) - offset + 1)
            assert backend.read(ID, offset, size) == DATA[offset : offset + size]
        assert backend.read(ID, 0, len(DATA)) == DATA
        assert backend.read(ID, len(DATA) - 1, 1) == DATA[-1:]
        assert backend.read(ID, 5, 0) == b""

    def test_size(self, backend: Backend) -> None:
        assert backend.size(ID) == len(DATA)
        with pytest.raises(BackendError):
            backend.size(UNKNOWN)

    @pytest.mark.parametrize("offset,size", [(len(DATA) - 1, 2), (len(DATA), 1), (1 << 40, 10)])
    def test_beyond_the_end(self, backend: Backend, offset: int, size: int) -> None:
        with pytest.raises(BackendError):
            backend.read(ID, offset, size)
        assert backend.read(ID, 1, 3) == DATA[1:4]

    @pytest.mark.parametrize("name", [UNKNOWN, "../x", "a/b", "", ".", "x\0y"])
    def test_no_such_blob(self, backend: Backend, name: str) -> None:
        with pytest.raises(BackendError) as caught:
            backend.read(name, 0, 1)
        assert caught.value.permanent

    def test_many_threads(self, backend: Backend) -> None:
        wrong: list[object] = []

        def reader(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(10):
                offset = rng.randrange(len(DATA) - 1000)
                try:
                    if backend.read(ID, offset, 1000) != DATA[offset : offset + 1000]:
                        wrong.append(offset)
                except BackendError as error:
                    wrong.append(error)

        threads = [threading.Thread(target=reader, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_counters(self, backend: Backend) -> None:
        before = backend.metrics.json()
        backend.read(ID, 0, 5000)
        with pytest.raises(BackendError):
            backend.read(UNKNOWN, 0, 5000)
        after = backend.metrics.json()
        assert after["read_count"] == before["read_count"] + 2
        assert after["read_errors"] == before["read_errors"] + 1
        assert after["read_amount_total"] == before["read_amount_total"] + 5000
        assert after["read_count_block_size_dist"][2] == 1
        assert sum(map(sum, after["read_latency_sizes_dist"])) == after["read_count"] - after["read_errors"]

    def test_closed(self, backend: Backend) -> None:
        backend.close()
        backend.close()
        with pytest.raises(BackendError):
            backend.read(ID, 0, 1)


# localfs


def test_localfs_one_file_for_all(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(DATA)
    backend = backends.create("localfs", {"blob_file": str(tmp_path / "blob")})
    assert backend.read("whatever", 3, 4) == DATA[3:7]


def test_localfs_says_what_is_wrong(tmp_path: Path) -> None:
    backend = backends.create("localfs", {"dir": str(tmp_path)})
    with pytest.raises(BackendError, match=f"{ID}: no such file"):
        backend.read(ID, 0, 1)
    (tmp_path / ID).write_bytes(DATA[:100])
    with pytest.raises(BackendError, match="truncated, expected 50 bytes at offset 0x50, got 20") as caught:
        backend.read(ID, 80, 50)
    assert not caught.value.permanent
    (tmp_path / ID).unlink()
    (tmp_path / ID).write_bytes(DATA)  # whole now, and a new file
    assert backend.read(ID, 80, 50) == DATA[80:130]
    (tmp_path / UNKNOWN).mkdir()
    with pytest.raises(BackendError, match="not a regular file"):
        backend.read(UNKNOWN, 0, 1)


# registry


@pytest.mark.parametrize(
    "answer", [status_answer(500), short_answer, broken_answer, lying_answer, hanging_answer]
)
def test_registry_faults_are_not_permanent(
    peer: Peer, answer: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    peer.answer = answer
    backend = backends.create("registry", config_of(peer))
    started = time.monotonic()
    with closing(backend):
        with pytest.raises(BackendError) as caught:
            backend.read(ID, 0, 100)
        assert not caught.value.permanent
        assert time.monotonic() - started < 2.5
        peer.answer = blob_answer
        assert backend.read(ID, 0, 100) == DATA[:100]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_registry_refusals_are_permanent(peer: Peer, status: int) -> None:
    peer.answer = status_answer(status)
    with closing(backends.create("registry", config_of(peer))) as backend:
        with pytest.raises(BackendError) as caught:
            backend.read(ID, 0, 100)
    assert caught.value.permanent
    assert caught.value.status == status


def test_registry_auth(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    good = base64.b64encode(b"me:secret").decode()

    def guarded(handler: BaseHTTPRequestHandler) -> None:
        if handler.headers.get("Authorization") == f"Basic {good}":
            return blob_answer(handler)
        send(handler, 401, b"", WWW_Authenticate='Basic realm="x"')

    peer.answer = guarded
    with closing(backends.create("registry", config_of(peer, auth=good))) as backend:
        assert backend.read(ID, 0, 10) == DATA[:10]
    with closing(backends.create("registry", config_of(peer))) as backend:
        with pytest.raises(BackendError):
            backend.read(ID, 0, 10)
        backend.set_auth(good)  # type: ignore[attr-defined]
        assert backend.read(ID, 0, 10) == DATA[:10]
    monkeypatch.setenv("IMAGE_PULL_AUTH", good)
    with closing(backends.create("registry", config_of(peer, auth="b3RoZXI6b3RoZXI="))) as backend:
        assert backend.read(ID, 0, 10) == DATA[:10]


def test_registry_token(peer: Peer) -> None:
    with closing(backends.create("registry", config_of(peer, registry_token="abc"))) as backend:
        backend.read(ID, 0, 10)
    assert peer.requests[0][2]["Authorization"] == "Bearer abc"


def test_redirects_to_another_host(peer: Peer, proxy: Peer) -> None:
    """The other host gets no credentials; ``blob_redirected_host`` replaces its name."""
    proxy.answer = blob_answer
    peer.answer = lambda handler: send(handler, 307, Location=f"http://storage.invalid/x/sha256:{ID}?sig=1")
    good = base64.b64encode(b"me:secret").decode()
    config = config_of(peer, auth=good, blob_redirected_host=proxy.host, blob_url_scheme="http")
    with closing(backends.create("registry", config)) as backend:
        proxy.answer = lambda handler: (
            setattr(handler, "path", handler.path.split("?")[0]),
            blob_answer(handler),
        )[1]
        assert backend.read(ID, 7, 10) == DATA[7:17]
        assert backend.read(ID, 0, 10) == DATA[:10]
    assert len(peer.requests) == 1
    assert not any("Authorization" in headers for _, _, headers in proxy.requests)


def test_a_mirror_may_be_a_part_of_another_registry(peer: Peer, proxy: Peer) -> None:
    proxy.answer = blob_answer
    mirror = {"host": f"http://{proxy.host}/v2/project/", "namespace": "example.com:5000"}
    with closing(backends.create("registry", config_of(peer, mirrors=[mirror]))) as backend:
        backend.read(ID, 0, 10)
    repository = config_of(peer)["repo"]
    path = f"/v2/project/{repository}/blobs/sha256:{ID}?ns=example.com%3A5000"
    assert proxy.requests[0][1] == path


def test_mirrors_are_tried_in_order(peer: Peer, proxy: Peer, caplog: pytest.LogCaptureFixture) -> None:
    proxy.answer = blob_answer
    mirrors = [
        {"host": "http://127.0.0.1:1", "failure_limit": 2, "health_check_interval": 0.3},
        {"host": f"http://{proxy.host}", "headers": {"X-Origin": "here"}},
    ]
    with closing(backends.create("registry", config_of(peer, mirrors=mirrors))) as backend:
        with caplog.at_level(logging.WARNING):
            for _ in range(4):
                assert backend.read(ID, 0, 10) == DATA[:10]
        assert caplog.text.count("is left out") == 1
        assert not peer.requests
        assert proxy.requests[0][2]["X-Origin"] == "here"
        proxy.answer = status_answer(503)
        assert backend.read(ID, 0, 10) == DATA[:10]
        assert len(peer.requests) == 1
        assert "X-Origin" not in peer.requests[0][2]


def test_wrong_bytes_of_a_mirror_are_asked_for_elsewhere(
    peer: Peer, proxy: Peer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blob = make_blob([4096, 70000, 5])

    def answer(change: int) -> Callable[[BaseHTTPRequestHandler], None]:
        stored = bytes(byte ^ change for byte in blob.stored)

        def reply(handler: BaseHTTPRequestHandler) -> None:
            first, last = (int(x) for x in handler.headers["Range"].removeprefix("bytes=").split("-"))
            where = f"bytes {first}-{last}/{len(stored)}"
            send(handler, 206, stored[first : last + 1], Content_Range=where)

        return reply

    peer.answer, proxy.answer = answer(0), answer(1)
    config = config_of(peer, mirrors=[{"host": f"http://{proxy.host}"}])
    with closing(backends.create("registry", config)) as backend:
        cache = cache_of(tmp_path, blob, backend)
        assert read(cache, 0, cache.length) == blob.image
        cache.close()
    assert len(proxy.requests) == 1 and peer.requests
    assert caplog.text.count("wrong bytes came") == 1


@pytest.mark.parametrize(
    "answer", [status_answer(500), status_answer(403), status_answer(429), hanging_answer]
)
def test_a_bad_proxy_is_passed_by(
    peer: Peer, proxy: Peer, answer: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    proxy.answer = answer
    config = config_of(peer, proxy={"url": f"http://{proxy.host}", "check_interval": 30})
    with closing(backends.create("registry", config)) as backend:
        for _ in range(3):
            assert backend.read(ID, 0, 10) == DATA[:10]
    assert len(proxy.requests) == 1  # not again for its check interval


def test_no_fallback_means_none(peer: Peer, proxy: Peer) -> None:
    proxy.answer = status_answer(500)
    config = config_of(peer, proxy={"url": f"http://{proxy.host}", "fallback": False})
    with closing(backends.create("registry", config)) as backend:
        for _ in range(2):
            with pytest.raises(BackendError):
                backend.read(ID, 0, 10)
    assert len(proxy.requests) == 2
    assert not peer.requests


# Configuration


@pytest.mark.parametrize(
    "kind,config,message",
    [
        ("nfs", {}, "unknown backend type 'nfs'"),
        ("localfs", {}, "one of 'blob_file' and 'dir'"),
        ("localfs", {"dir": 5}, r"localfs backend: Expected `str`, got `int` - at `\$.dir`"),
        ("s3", {"region": "x"}, "missing required field `bucket_name`"),
        ("s3", {"bucket_name": "x"}, "'region' must not be empty"),
        ("s3", {"bucket_name": "x", "region": "y", "access_key_id": "z"}, "go together"),
        ("s3", {"bucket_name": "x", "region": "y", "ca_cert_files": ["z"]}, "are not supported"),
        ("oss", {"bucket_name": "x"}, "'endpoint' must not be empty"),
        ("oss", {"bucket_name": "x", "endpoint": "y", "scheme": "ftp"}, "'scheme' is 'ftp'"),
        ("registry", {"repo": "x"}, "missing required field `host`"),
        ("registry", {"host": "", "repo": "x"}, "must not be empty"),
        ("registry", {"host": "h", "repo": "x", "scheme": "ftp"}, "'scheme' is 'ftp'"),
        ("registry", {"host": "h", "repo": "x", "auth": "!!"}, "'auth' is not base64"),
        ("registry", {"host": "h", "repo": "x", "mirrors": [{"host": "ftp://x"}]}, "mirror 'host'"),
        ("registry", {"host": "h", "repo": "x", "timeout": "5s"}, r"at `\$.timeout`"),
    ],
)
def test_configuration_errors(kind: str, config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backends.create(kind, config)


def test_unknown_keys_are_named_without_their_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backends.create("localfs", {"dir": str(tmp_path), "colour": "secret", "blob_file": None})
    assert "colour" in caplog.text
    assert "secret" not in caplog.text


def test_passwords_in_addresses_are_not_logged(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="nydus")
    away = "http://me:swordfish@127.0.0.1:1"
    config = config_of(peer, proxy={"url": away}, mirrors=[{"host": away, "failure_limit": 1}])
    backend = backends.create("registry", config)
    peer.answer = blob_answer
    assert backend.read(ID, 0, 5) == DATA[:5]
    assert "127.0.0.1:1" in caplog.text
    assert "swordfish" not in caplog.text
    with pytest.raises(ConfigError) as refused:
        backends.create("registry", config_of(peer, mirrors=[{"host": "ftp://me:swordfish@a/"}]))
    assert "swordfish" not in str(refused.value)
