from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty import (
    QUICK,
    BasicAuth,
    FaultyHandler,
    FaultyRegistry,
    Times,
    TokenAuth,
    cut,
    hang_up,
    is_blob,
    status,
    whole,
)

from nydus.errors import BackendError
from nydus.oci import model
from nydus.oci.registry import Registry, Repository

SMALL = os.urandom(100_000)
LARGE = os.urandom(9 << 20)


def put(repository: Repository, data: bytes) -> str:
    return repository.put_blob(data, model.OCI_LAYER).digest


@pytest.fixture
def repository(registry: Registry) -> Repository:
    return registry.repository("demo/app")


def test_blobs_go_up_and_come_down(repository: Repository) -> None:
    for data in (b"", SMALL, LARGE):
        digest = put(repository, data)
        assert repository.blob_size(digest) == len(data)
        assert repository.blob(digest, len(data)).read() == data
    for offset, length in ((0, 1), (12345, 3 << 20), (len(LARGE) - 5, 5), (7, 0)):
        assert repository.read_range(digest, offset, length) == LARGE[offset : offset + length]


def test_an_upload_of_unknown_length_is_streamed(repository: Repository, server: FaultyRegistry) -> None:
    with repository.upload() as upload:
        for start in range(0, len(LARGE), 300_000):
            upload.write(LARGE[start : start + 300_000])
        upload.commit(model.digest(LARGE))
    assert repository.blob(model.digest(LARGE)).read() == LARGE
    assert [method for method, *_ in server.seen if method != "GET"] == ["POST", "PATCH", "PUT"]


def spans(server: FaultyRegistry) -> list[str]:
    return [headers["Content-Range"] for method, _, headers in server.seen if method == "PATCH"]


def chunked(server: FaultyRegistry, data: bytes, chunk_size: int) -> None:
    """Uploads in chunks, in pieces of another size, and reads it back."""
    with Registry(server.host, plain_http=True, policy=QUICK, push_chunk_size=chunk_size) as registry:
        repository = registry.repository("demo/chunked")
        with repository.upload() as upload:
            for start in range(0, len(data), 300_000):
                upload.write(data[start : start + 300_000])
            upload.commit(model.digest(data))
        assert upload.sent == len(data)
        assert repository.blob(model.digest(data)).read() == data


def test_an_upload_in_chunks(server: FaultyRegistry) -> None:
    chunked(server, LARGE[:5_500_000], 2_000_000)
    assert spans(server) == ["0-1999999", "2000000-3999999", "4000000-5499999"]


def test_a_registry_says_how_small_chunks_may_be(server: FaultyRegistry) -> None:
    def ask_for_more(handler: FaultyHandler) -> bool:
        if handler.command == "POST":
            start = handler._start
            handler._start = lambda code, size, more: start(  # type: ignore[method-assign]
                code, size, {**more, "OCI-Chunk-Min-Length": "3000000"}
            )
        return False

    server.intercepts.append(ask_for_more)
    chunked(server, LARGE[:5_500_000], 1_000_000)
    assert spans(server) == ["0-2999999", "3000000-5499999"]


def take_and_hang_up(count: int) -> Callable[[FaultyHandler], None]:
    """Stores the first bytes of a request, then breaks the connection."""

    def answer(handler: FaultyHandler) -> None:
        session = handler.registry.store.sessions[handler.path.rpartition("/")[2]]
        session.add(handler.rfile.read(count))
        handler.connection.shutdown(socket.SHUT_RDWR)
        hang_up(handler)

    return answer


@pytest.mark.parametrize("stored", [0, 500_000, 2_000_000])
def test_an_interrupted_upload_goes_on_where_it_broke(server: FaultyRegistry, stored: int) -> None:
    def second(handler: FaultyHandler) -> bool:
        return handler.headers.get("Content-Range", "").startswith("2000000-")

    server.intercepts.append(Times(1, second, take_and_hang_up(stored)))
    chunked(server, LARGE[:5_500_000], 2_000_000)
    again = [] if stored == 2_000_000 else [f"{2_000_000 + stored}-3999999"]
    assert spans(server) == ["0-1999999", "2000000-3999999", *again, "4000000-5499999"]
    assert len(server.paths("POST")) == 1


def streamed(repository: Repository, count: int) -> bytes:
    """Uploads some MiB as a stream, and returns them; slowly, so that a break comes while it runs."""
    data = random.Random(count).randbytes(count << 20)
    with repository.upload() as upload:
        for start in range(0, len(data), 1 << 20):
            upload.write(data[start : start + (1 << 20)])
        upload.commit(model.digest(data))
    assert upload.sent == len(data)
    return data


@pytest.mark.parametrize("stored", [0, 700_000, 9 << 20])
def test_an_interrupted_stream_goes_on_where_it_broke(
    repository: Repository, server: FaultyRegistry, stored: int
) -> None:
    def take_chunks(handler: FaultyHandler) -> None:
        session = handler.registry.store.sessions[handler.path.rpartition("/")[2]]
        taken = 0
        for piece in handler.body():
            session.add(piece[: stored - taken])
            taken += len(piece)
            if taken >= stored:
                break
        handler.connection.shutdown(socket.SHUT_RDWR)
        hang_up(handler)

    server.intercepts.append(Times(1, lambda h: h.command == "PATCH", take_chunks))
    data = streamed(repository, 12)
    assert repository.blob(model.digest(data)).read() == data
    assert len(server.paths("POST")) == 1
    begins = [
        headers.get("Content-Range", "-").split("-")[0]
        for method, _, headers in server.seen
        if method == "PATCH"
    ]
    assert begins[:2] == ["", str(stored)]


def test_a_stream_of_which_too_much_is_lost(
    repository: Repository, server: FaultyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_and_lose(handler: FaultyHandler) -> None:
        for taken, _ in enumerate(handler.body()):
            if taken > 200:
                break
        handler.connection.shutdown(socket.SHUT_RDWR)
        hang_up(handler)

    monkeypatch.setattr("nydus.oci.upload._KEPT", 1 << 20)
    server.intercepts.append(Times(1, lambda h: h.command == "PATCH", take_and_lose))
    with pytest.raises(BackendError, match=r"cannot go on: expected") as caught:
        streamed(repository, 64)
    assert not caught.value.permanent, "whoever makes the blob can make it again"


def test_an_answer_to_a_stream_that_was_lost(repository: Repository, server: FaultyRegistry) -> None:
    def lose(handler: FaultyHandler) -> None:
        session = handler.registry.store.sessions[handler.path.rpartition("/")[2]]
        for piece in handler.body():
            session.add(piece)
        hang_up(handler)

    server.intercepts.append(Times(1, lambda h: h.command == "PATCH", lose))
    data = streamed(repository, 8)
    assert repository.blob(model.digest(data)).read() == data
    assert len(server.paths("PATCH")) == 1


def test_an_answer_that_was_lost_and_a_busy_registry(server: FaultyRegistry) -> None:
    server.intercepts.append(Times(2, lambda h: h.command == "PATCH", status(503, Retry_After="0")))
    chunked(server, LARGE[:5_500_000], 2_000_000)
    assert len(spans(server)) == 5


def test_a_registry_that_forgot_an_upload(server: FaultyRegistry) -> None:
    def forget(handler: FaultyHandler) -> None:
        handler.registry.store.sessions.clear()
        status(502)(handler)

    server.intercepts.append(
        Times(1, lambda h: h.headers.get("Content-Range", "").startswith("2000000-"), forget)
    )
    with pytest.raises(BackendError, match="404 upload unknown"):
        chunked(server, LARGE[:5_500_000], 2_000_000)


def test_an_abandoned_upload_leaves_nothing(repository: Repository, server: FaultyRegistry) -> None:
    with pytest.raises(RuntimeError), repository.upload() as upload:
        upload.write(LARGE)
        raise RuntimeError
    deadline = time.monotonic() + 5
    while list(server.store.uploads.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(server.store.uploads.iterdir())
    assert not repository.has_blob(model.digest(LARGE))


def test_a_wrong_digest_is_refused_by_the_registry(repository: Repository) -> None:
    with pytest.raises(BackendError, match="DIGEST_INVALID"), repository.upload() as upload:
        upload.write(SMALL)
        upload.commit(model.digest(b"other"))


def test_a_failing_upload_stops_the_writer(repository: Repository, server: FaultyRegistry) -> None:
    server.intercepts.append(lambda h: h.command == "PATCH" and (status(500)(h), True)[1])
    with pytest.raises(BackendError, match=r"made to fail|broke"), repository.upload() as upload:
        for _ in range(100):
            upload.write(LARGE)
    assert upload._sender is not None and not upload._sender.is_alive()


def test_mounting_from_another_repository(registry: Registry, repository: Repository) -> None:
    digest = put(repository, SMALL)
    other = registry.repository("other")
    assert not other.has_blob(digest)
    assert other.mount_blob(digest, "demo/app")
    assert other.blob(digest).read() == SMALL
    assert not other.mount_blob(model.digest(b"unknown"), "demo/app")


def test_manifests(repository: Repository) -> None:
    config = repository.put_blob(b"{}", model.OCI_CONFIG)
    manifest = model.Manifest(schema_version=2, media_type=model.OCI_MANIFEST, config=config, layers=())
    data = model.encode(manifest)
    stored = repository.put_manifest("v1", data, model.OCI_MANIFEST)
    assert repository.manifest("v1") == (stored, data)
    assert repository.manifest(stored.digest) == (stored, data)
    assert repository.has_manifest("v1") and not repository.has_manifest("v2")
    with pytest.raises(BackendError, match=r"404 manifest unknown.*MANIFEST_UNKNOWN") as caught:
        repository.manifest("v2")
    assert caught.value.status == 404 and caught.value.permanent
    layer = model.Descriptor(media_type=model.OCI_LAYER, digest=model.digest(b"?"), size=1)
    broken = model.Manifest(schema_version=2, config=config, layers=(layer,))
    with pytest.raises(BackendError, match="MANIFEST_BLOB_UNKNOWN"):
        repository.put_manifest("v3", model.encode(broken), model.OCI_MANIFEST)


def test_referrers_by_api_and_by_tag(repository: Repository, server: FaultyRegistry) -> None:
    config = repository.put_blob(b"{}", model.OCI_CONFIG)
    subject = model.describe(b"some manifest", model.OCI_MANIFEST)
    manifest = model.Manifest(schema_version=2, config=config, layers=(), subject=subject)
    stored = repository.put_manifest("r", model.encode(manifest), model.OCI_MANIFEST)
    (found,) = repository.referrers(subject.digest)
    assert (found.digest, found.artifact_type) == (stored.digest, model.OCI_CONFIG)
    server.intercepts.append(lambda h: "/referrers/" in h.path and (status(404)(h), True)[1])
    assert repository.referrers(subject.digest) == []
    index = model.Index(schema_version=2, media_type=model.OCI_INDEX, manifests=(stored,))
    repository.put_manifest(subject.digest.replace(":", "-"), model.encode(index), model.OCI_INDEX)
    assert [found.digest for found in repository.referrers(subject.digest)] == [stored.digest]


# Damage


def test_a_corrupted_blob_is_never_given_out_as_whole(repository: Repository, server: FaultyRegistry) -> None:
    digest = put(repository, SMALL)
    path = server.store.blobs / digest.partition(":")[2]
    path.write_bytes(SMALL[:-1] + bytes([SMALL[-1] ^ 1]))
    with pytest.raises(BackendError, match=f"corrupted blob: expected {digest}") as caught:
        repository.blob(digest, len(SMALL)).read()
    assert caught.value.permanent


@pytest.mark.parametrize("size", [len(SMALL) - 1, len(SMALL) + 1])
def test_a_blob_of_another_size_is_refused(repository: Repository, size: int) -> None:
    digest = put(repository, SMALL)
    with pytest.raises(BackendError, match=r"truncated|larger than"):
        repository.blob(digest, size).read()


def test_a_corrupted_manifest_is_refused(repository: Repository, server: FaultyRegistry) -> None:
    digest = model.digest(b"{}")
    server.intercepts.append(lambda h: "/manifests/" in h.path and (h.reply(200, b"[]"), True)[1])
    with pytest.raises(BackendError, match="corrupted manifest"):
        repository.manifest(digest)


def test_a_huge_manifest_is_refused(repository: Repository, server: FaultyRegistry) -> None:
    server.intercepts.append(lambda h: "/manifests/" in h.path and (h.reply(200, bytes(9 << 20)), True)[1])
    with pytest.raises(BackendError, match="larger than 8388608 bytes"):
        repository.manifest("v1")


def test_a_stream_goes_on_where_the_connection_broke(repository: Repository, server: FaultyRegistry) -> None:
    digest = put(repository, LARGE)
    server.intercepts += [Times(1, is_blob, cut(3 << 20)), Times(1, is_blob, hang_up)]
    assert repository.blob(digest, len(LARGE)).read() == LARGE
    assert sum("Range" in headers for method, _, headers in server.seen if method == "GET") == 2


def test_a_stream_that_never_gets_further_fails(repository: Repository, server: FaultyRegistry) -> None:
    digest = put(repository, SMALL)
    server.intercepts.append(Times(99, is_blob, cut(1000)))
    with pytest.raises(BackendError, match="broke"):
        repository.blob(digest, len(SMALL)).read()


def test_ranges_are_exact(repository: Repository, server: FaultyRegistry) -> None:
    digest = put(repository, SMALL)
    with pytest.raises(BackendError, match="asked for bytes 99999-100000") as caught:
        repository.read_range(digest, len(SMALL) - 1, 2)
    assert caught.value.permanent
    with pytest.raises(BackendError, match="416"):
        repository.read_range(digest, len(SMALL), 1)
    server.intercepts.append(Times(99, is_blob, cut(1000)))
    with pytest.raises(BackendError):
        repository.read_range(digest, 10, 5000)


def test_a_registry_without_ranges(repository: Repository, server: FaultyRegistry) -> None:
    digest = put(repository, LARGE)
    server.intercepts.append(Times(99, is_blob, whole))
    assert repository.read_range(digest, 5 << 20, 1000) == LARGE[5 << 20 :][:1000]
    with pytest.raises(BackendError, match=r"ends before|got 0"):
        repository.read_range(digest, len(LARGE) + 5, 1)


def test_a_wrong_content_range_is_refused(repository: Repository, server: FaultyRegistry) -> None:
    digest = put(repository, SMALL)

    def shifted(handler: FaultyHandler) -> None:
        handler.reply(206, SMALL[:10], {"Content-Range": f"bytes 0-9/{len(SMALL)}"})

    server.intercepts.append(Times(99, is_blob, shifted))
    with pytest.raises(BackendError, match="asked for bytes 5-14"):
        repository.read_range(digest, 5, 10)


# Load and outages


def test_bursts_of_server_errors_are_ridden_out(repository: Repository, server: FaultyRegistry) -> None:
    digest = put(repository, SMALL)
    server.intercepts += [Times(1, is_blob, status(503)), Times(1, is_blob, hang_up)]
    assert repository.read_range(digest, 0, 10) == SMALL[:10]
    server.intercepts.append(Times(99, is_blob, status(500)))
    with pytest.raises(BackendError, match=r"500 made to fail \(TEST\)") as caught:
        repository.read_range(digest, 0, 10)
    assert not caught.value.permanent
    assert len(server.paths("GET")) == 6


def test_retry_after_is_obeyed(repository: Repository, server: FaultyRegistry) -> None:
    digest = put(repository, SMALL)
    server.intercepts.append(Times(1, is_blob, status(429, Retry_After="0.5")))
    started = time.monotonic()
    assert repository.read_range(digest, 0, 10) == SMALL[:10]
    assert 0.5 <= time.monotonic() - started < 2
    server.intercepts.append(Times(9, is_blob, status(429, Retry_After="3600")))
    with pytest.raises(BackendError, match="429"):  # longer than the operation may take
        repository.read_range(digest, 0, 10)


def test_what_is_refused_is_not_asked_again(repository: Repository, server: FaultyRegistry) -> None:
    digest = put(repository, SMALL)
    server.seen.clear()
    server.intercepts.append(Times(9, is_blob, status(403)))
    with pytest.raises(BackendError, match="403") as caught:
        repository.read_range(digest, 0, 10)
    assert caught.value.permanent and caught.value.status == 403
    assert len(server.seen) == 1


def test_a_stalled_registry_is_given_up(repository: Repository, server: FaultyRegistry) -> None:
    digest = put(repository, SMALL)
    over = threading.Event()
    server.intercepts.append(Times(9, is_blob, lambda handler: over.wait(10)))
    started = time.monotonic()
    with pytest.raises(BackendError, match="no answer within 1 s"):
        repository.read_range(digest, 0, 10)
    assert time.monotonic() - started < 5
    over.set()


def test_unreachable_and_wrong_hosts() -> None:
    for host, words in (("127.0.0.1:1", "Connection refused"), ("no.such.host.invalid", "unknown host name")):
        with Registry(host, plain_http=True, policy=QUICK) as registry:
            with pytest.raises(BackendError, match=words):
                registry.repository("a").manifest("x")


def test_plain_http_is_never_chosen_by_itself(server: FaultyRegistry) -> None:
    with Registry(server.host, policy=QUICK) as registry:
        with pytest.raises(BackendError, match=r"does not speak TLS.*--plain-http"):
            registry.repository("a").manifest("x")
    assert server.seen == []


def test_connections_are_kept(repository: Repository, server: FaultyRegistry) -> None:
    digest = put(repository, SMALL)
    ports = set()
    server.intercepts.append(lambda h: ports.add(h.client_address[1]))
    for offset in range(50):
        repository.read_range(digest, offset, 10)
    assert len(ports) == 1


# Sign-in


def test_basic_auth(tmp_path: Path) -> None:
    with FaultyRegistry(tmp_path, BasicAuth("me", "secret")) as server:
        with Registry(server.host, plain_http=True, credentials=("me", "secret"), policy=QUICK) as registry:
            put(registry.repository("a"), SMALL)
        assert sum("Authorization" not in headers for *_, headers in server.seen) == 1
        for wrong in (("me", "wrong"), None):
            server.seen.clear()
            with Registry(server.host, plain_http=True, credentials=wrong, policy=QUICK) as registry:
                with pytest.raises(BackendError, match=r"401 .*docker login") as caught:
                    registry.repository("a").manifest("x")
            assert caught.value.permanent and caught.value.status == 401
            assert len(server.seen) <= 2


@pytest.mark.parametrize("post", [False, True])
def test_tokens(tmp_path: Path, post: bool) -> None:
    auth = TokenAuth("me", "secret", post=post)
    with FaultyRegistry(tmp_path, auth) as server:
        with Registry(server.host, plain_http=True, credentials=("me", "secret"), policy=QUICK) as registry:
            digest = put(registry.repository("a"), LARGE)
            assert registry.repository("a").blob(digest).read() == LARGE
            assert registry.repository("b").mount_blob(digest, "a")
        assert auth.refused <= 2
        with Registry(server.host, plain_http=True, credentials=("me", "wrong"), policy=QUICK) as registry:
            with pytest.raises(BackendError, match=r"token server .* refused .*incorrect username"):
                registry.repository("a").manifest("x")


def test_many_threads_fetch_one_token(tmp_path: Path) -> None:
    auth = TokenAuth()
    with (
        FaultyRegistry(tmp_path, auth) as server,
        Registry(server.host, plain_http=True, policy=QUICK) as registry,
    ):
        repository = registry.repository("a")
        digest = put(repository, SMALL)
        auth.requests.clear()
        auth.refused = 0
        with Registry(server.host, plain_http=True, policy=QUICK) as second, ThreadPoolExecutor(16) as pool:
            reader = second.repository("a")
            assert set(
                pool.map(lambda i: reader.read_range(digest, i, 1) == SMALL[i : i + 1], range(64))
            ) == {True}
        assert len(auth.requests) == 1 and auth.refused == 1


def test_tokens_are_renewed(tmp_path: Path) -> None:
    auth = TokenAuth(lifetime=1)
    with (
        FaultyRegistry(tmp_path, auth) as server,
        Registry(server.host, plain_http=True, policy=QUICK) as registry,
    ):
        repository = registry.repository("a")
        digest = put(repository, SMALL)
        refused = auth.refused
        time.sleep(1.1)
        assert repository.read_range(digest, 0, 10) == SMALL[:10]
        assert auth.refused == refused  # renewed before it was refused
        auth.revoke()
        assert repository.read_range(digest, 0, 10) == SMALL[:10]
        assert auth.refused == refused + 1


def test_a_token_server_without_tls_is_refused() -> None:
    from nydus.oci.auth import Authorizer, Challenge, Credentials

    asked: list[str] = []

    def send(method: str, url: str, headers: dict[str, str], body: bytes | None) -> tuple[int, bytes]:
        asked.append(url)
        return 200, b'{"token":"t"}'

    authorizer = Authorizer("r.io", Credentials("a", "b"), send, allow_http=False)
    authorizer.challenged([Challenge("bearer", {"realm": "http://r.io/token"})], "s", None)
    with pytest.raises(BackendError, match="not https"):
        authorizer.header("s")
    assert asked == []


# Redirects


@pytest.fixture
def elsewhere(tmp_path: Path) -> FaultyRegistry:
    return FaultyRegistry(tmp_path / "elsewhere")


def test_redirects_to_another_host(tmp_path: Path, server: FaultyRegistry, elsewhere: FaultyRegistry) -> None:
    signature = ["1"]

    def redirect(handler: FaultyHandler) -> None:
        handler.reply(
            307, b"", {"Location": f"http://{elsewhere.host}{handler.path}?signature={signature[0]}"}
        )

    def expired(handler: FaultyHandler) -> bool:
        if f"signature={signature[0]}" in handler.path:
            return False
        status(403)(handler)
        return True

    with elsewhere, Registry(server.host, plain_http=True, credentials=("u", "p"), policy=QUICK) as registry:
        with Registry(elsewhere.host, plain_http=True) as other:
            digest = put(other.repository("a"), SMALL)
        elsewhere.seen.clear()
        elsewhere.intercepts.append(expired)
        server.intercepts += [BasicAuth("u", "p"), Times(99, is_blob, redirect)]
        repository = registry.repository("a")
        for offset in range(5):
            assert repository.read_range(digest, offset, 10) == SMALL[offset : offset + 10]
        assert len(server.seen) == 2  # refused once, then redirected once: the location is kept
        assert all("Authorization" not in headers for *_, headers in elsewhere.seen)
        signature[0] = "2"
        assert repository.read_range(digest, 0, 10) == SMALL[:10]
        assert len(server.seen) == 3
        assert repository.blob(digest, len(SMALL)).read() == SMALL


def test_redirect_loops_and_downgrades(repository: Repository, server: FaultyRegistry) -> None:
    digest = put(repository, SMALL)

    def loop(handler: FaultyHandler) -> None:
        handler.reply(302, b"", {"Location": handler.path})

    server.intercepts.append(Times(99, is_blob, loop))
    with pytest.raises(BackendError, match="more than 5 redirects"):
        repository.read_range(digest, 0, 1)
    transport = Registry("r.io").transport
    assert transport.url("https://r.io/v2/x", "http://r.io/upload?a=b") == "https://r.io/upload?a=b"
    assert transport.url("https://r.io:444/v2/x", "http://r.io/u") == "https://r.io:444/u"
    assert transport.url("https://[::1]:5000/v2/x", "http://[::1]/u") == "https://[::1]:5000/u"
    for location in ("http://evil.io/x", "file:///etc/passwd", ""):
        with pytest.raises(BackendError, match="redirect"):
            transport.url("https://r.io/v2/x", location)
