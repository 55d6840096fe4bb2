"""What goes wrong in the middle of things, and answers that lie."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import pytest
from faulty import (
    QUICK,
    FaultyHandler,
    FaultyRegistry,
    Times,
    TokenAuth,
    blob_of,
    cut,
    hang_up,
    is_blob,
    status,
)

from nydus.convert.copy import copy
from nydus.errors import BackendError, NydusError
from nydus.oci import model
from nydus.oci.model import Descriptor, Manifest
from nydus.oci.place import RegistryPlace
from nydus.oci.reference import parse
from nydus.oci.registry import Registry, Repository
from nydus.oci.transport import Policy

LARGE = os.urandom(1 << 20) * 12


@pytest.fixture
def tokens(server: FaultyRegistry) -> TokenAuth:
    auth = TokenAuth("u", "p")
    server.intercepts.append(auth)
    return auth


@pytest.fixture
def repository(server: FaultyRegistry) -> Iterator[Repository]:
    with Registry(server.host, plain_http=True, credentials=("u", "p"), policy=QUICK) as registry:
        yield registry.repository("a")


def put(repository: Repository, data: bytes) -> str:
    return repository.put_blob(data, "application/octet-stream").digest


def before(server: FaultyRegistry, method: str, action: Callable[[], object], path: str = "/blobs/") -> None:
    """Does something before the first such request is answered."""
    done: list[bool] = []

    def intercept(handler: FaultyHandler) -> bool:
        if not done and handler.command == method and path in handler.path:
            done.append(True)
            action()
        return False

    server.intercepts.insert(0, intercept)


# Sign-in that ends in between


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_token_that_ends_during_an_upload(
    server: FaultyRegistry, tokens: TokenAuth, repository: Repository, method: str
) -> None:
    put(repository, b"first")
    before(server, method, tokens.revoke)
    digest = put(repository, LARGE)
    assert repository.blob(digest, len(LARGE)).read() == LARGE


def test_a_token_that_ends_before_the_stream(
    server: FaultyRegistry, tokens: TokenAuth, repository: Repository
) -> None:
    put(repository, b"first")
    before(server, "PATCH", tokens.revoke)
    with repository.upload() as upload:
        for start in range(0, len(LARGE), 1 << 20):
            upload.write(LARGE[start : start + (1 << 20)])
        upload.commit(model.digest(LARGE))
    assert repository.blob(model.digest(LARGE), len(LARGE)).read() == LARGE


def test_a_token_that_ends_during_a_download(
    server: FaultyRegistry, tokens: TokenAuth, repository: Repository
) -> None:
    digest = put(repository, LARGE)

    def end(handler: FaultyHandler) -> None:
        cut(5 << 20)(handler)
        tokens.revoke()

    server.intercepts.append(Times(2, is_blob, end))
    assert repository.blob(digest, len(LARGE)).read() == LARGE


def test_credentials_that_are_withdrawn(
    server: FaultyRegistry, tokens: TokenAuth, repository: Repository
) -> None:
    digest = put(repository, LARGE)
    server.intercepts.append(Times(1, is_blob, cut(1000)))
    before(server, "GET", lambda: (tokens.revoke(), setattr(tokens, "_basic", "nobody")), "sha256")
    with pytest.raises(BackendError) as caught:
        repository.blob(digest, len(LARGE)).read()
    assert caught.value.permanent and caught.value.status == 401


# Answers that lie


def lie(length: int) -> Callable[[FaultyHandler], None]:
    """The whole blob with another Content-Length; the connection ends with it."""

    def answer(handler: FaultyHandler) -> None:
        data = blob_of(handler)
        handler._start(200, len(data) + length, {})
        handler.wfile.write(data[: len(data) + min(length, 0)])
        handler.wfile.flush()
        handler.close_connection = True

    return answer


@pytest.mark.parametrize("length", [-1, 1, 1 << 40])
@pytest.mark.parametrize("told", [True, False])
def test_a_content_length_that_is_wrong_for_ever(
    server: FaultyRegistry, repository: Repository, length: int, told: bool
) -> None:
    data = LARGE[:100_000]
    digest = put(repository, data)
    server.intercepts.append(Times(99, is_blob, lie(length)))
    with pytest.raises(BackendError):
        repository.blob(digest, len(data) if told else None).read()
    server.intercepts.clear()
    assert repository.blob(digest, len(data)).read() == data


@pytest.mark.parametrize("length", ["-5", "many", "", "1, 2", "99999999999999999999999"])
def test_a_content_length_that_is_no_number(
    server: FaultyRegistry, repository: Repository, length: str
) -> None:
    digest = put(repository, b"data")

    def answer(handler: FaultyHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", length)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(b"data")
        handler.close_connection = True

    server.intercepts.append(Times(99, lambda handler: "sha256" in handler.path, answer))
    for ask in (lambda: repository.blob_size(digest), lambda: repository.blob(digest, 4).read()):
        try:
            result = ask()
        except NydusError:
            continue
        assert result == b"data" or result in (4, 99999999999999999999999)


def test_a_manifest_that_names_a_huge_one(server: FaultyRegistry, repository: Repository) -> None:
    """A config may not be larger than a document, whatever the registry would send."""
    huge = Descriptor(media_type=model.OCI_CONFIG, digest=model.digest(b"x"), size=1 << 50)
    with pytest.raises(BackendError, match="larger than"):
        repository.document(huge)
    assert not server.paths("GET") or all("blobs/sha256" not in path for path in server.paths("GET"))


def test_endless_headers_and_errors(server: FaultyRegistry, repository: Repository) -> None:
    def many(handler: FaultyHandler) -> None:
        handler.send_response(200)
        for number in range(500):
            handler.send_header(f"X-{number}", "x")
        handler.end_headers()
        handler.close_connection = True

    digest = put(repository, b"data")
    server.intercepts.append(Times(99, is_blob, many))
    with pytest.raises(BackendError):
        repository.blob(digest, 4).read()
    server.intercepts[-1] = Times(99, is_blob, lambda h: h.reply(400, b"x" * (10 << 20)))
    with pytest.raises(BackendError) as caught:
        repository.read_range(digest, 0, 4)
    assert len(str(caught.value)) < 2000


# A whole image through a registry that fails all the time


def put_image(repository: Repository) -> Manifest:
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
    layers = [LARGE[start:] for start in (0, 1, 2 << 20, 11 << 20)]
    config["rootfs"] = {"type": "layers", "diff_ids": [model.digest(layer) for layer in layers]}
    manifest = Manifest(
        schema_version=2,
        media_type=model.OCI_MANIFEST,
        config=repository.put_blob(json.dumps(config).encode(), model.OCI_CONFIG),
        layers=tuple(repository.put_blob(layer, model.OCI_LAYER) for layer in layers),
    )
    repository.put_manifest("v1", model.encode(manifest), model.OCI_MANIFEST)
    return manifest


class Unreliable:
    """Answers each request wrongly the first time it is made, in one way after the other."""

    def __init__(self, *ways: Callable[[FaultyHandler], object]) -> None:
        self._ways, self._known, self.count = ways, set[str](), 0

    def __call__(self, handler: FaultyHandler) -> bool:
        key = f"{handler.command} {handler.path.partition('?')[0]}"
        if "/uploads/" in key:
            key = handler.command  # each upload has an address of its own
        if key in self._known:
            return False
        self._known.add(key)
        self._ways[self.count % len(self._ways)](handler)
        self.count += 1
        return True


def test_an_image_through_a_registry_that_fails_all_the_time(tmp_path: Path, server: FaultyRegistry) -> None:
    with FaultyRegistry(tmp_path / "other") as other:
        with Registry(server.host, plain_http=True) as registry:
            put_image(registry.repository("a"))
        faults = Unreliable(status(503), status(429, Retry_After="0"), hang_up, status(500))
        server.intercepts.append(faults)
        more = Unreliable(hang_up, status(502), status(429, Retry_After="0"), status(504))
        other.intercepts.append(more)

        def place(host: str) -> RegistryPlace:
            return RegistryPlace(parse(f"{host}/a:v1"), plain_http=True, policy=QUICK)

        copied = copy(place(server.host), place(other.host))
        assert faults.count >= 6 and more.count >= 6
        other.intercepts.clear()
        found, _ = place(other.host).open().manifest("v1")
        assert found.digest == copied.descriptor.digest
        for blob in other.store.blobs.iterdir():
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


# Other hosts


def test_an_upload_that_is_sent_elsewhere(
    tmp_path: Path, server: FaultyRegistry, tokens: TokenAuth, repository: Repository
) -> None:
    """Storage elsewhere gets the blob, and none of our credentials."""
    put(repository, b"first")
    with FaultyRegistry(tmp_path / "other") as other:

        def elsewhere(handler: FaultyHandler) -> bool:
            if handler.command != "POST":
                return False
            with closing(http.client.HTTPConnection(other.host)) as there:
                there.request("POST", "/v2/a/blobs/uploads/")
                location = there.getresponse().headers["Location"]
            handler.reply(202, b"", {"Location": f"http://{other.host}{location}"})
            return True

        server.intercepts.append(elsewhere)
        for data in (b"small", LARGE):
            put(repository, data)
            path = other.store.blobs / hashlib.sha256(data).hexdigest()
            assert path.read_bytes() == data
        assert len(other.seen) >= 3
        assert not any("Authorization" in headers for *_, headers in other.seen)


class Slow:
    """A stream that gives 8 MB in a second."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def read1(self, size: int) -> bytes:
        data: bytes = self._stream.read1(min(size, 64 << 10))  # type: ignore[attr-defined]
        time.sleep(len(data) / 8e6)
        return data


def test_a_large_request_over_a_slow_link(server: FaultyRegistry) -> None:
    """The time limit is for standing still, not for the whole body."""

    def slow(handler: FaultyHandler) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        handler.rfile = Slow(handler.rfile)  # type: ignore[assignment]

    server.intercepts.append(lambda handler: handler.command == "PATCH" and bool(slow(handler)))
    policy = Policy(connect_timeout=0.5, attempts=1)
    with Registry(server.host, plain_http=True, policy=policy, push_chunk_size=24 << 20) as registry:
        put(registry.repository("a"), LARGE * 2)
    assert (server.store.blobs / hashlib.sha256(LARGE * 2).hexdigest()).read_bytes() == LARGE * 2


def test_a_body_that_stalls(server: FaultyRegistry, repository: Repository) -> None:
    """It is given up after the time between two pieces, and goes on from there."""
    digest = put(repository, LARGE)

    def stall(handler: FaultyHandler) -> None:
        handler._start(200, len(LARGE), {})
        handler.wfile.write(LARGE[: 3 << 20])
        handler.wfile.flush()
        time.sleep(1.5)  # QUICK waits for one second
        handler.close_connection = True

    server.intercepts.append(Times(1, is_blob, stall))
    started = time.monotonic()
    assert repository.blob(digest, len(LARGE)).read() == LARGE
    assert 0.9 < time.monotonic() - started < 5
    asked = [headers.get("Range") for method, path, headers in server.seen if method == "GET"]
    assert asked[-1] == f"bytes={3 << 20}-"
