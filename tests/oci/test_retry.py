"""When a registry asks to be left alone for a while, and what is said of failures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import QUICK, FaultyRegistry, Times, is_blob, status

from nydus.errors import BackendError
from nydus.oci.registry import Registry, Repository

DATA = bytes(range(256)) * 64


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyRegistry]:
    with FaultyRegistry(tmp_path) as server:
        yield server


@pytest.fixture
def repository(server: FaultyRegistry) -> Iterator[Repository]:
    with Registry(server.host, plain_http=True, policy=QUICK) as registry:
        yield registry.repository("a")


@pytest.fixture
def digest(repository: Repository, server: FaultyRegistry) -> str:
    digest = repository.put_blob(DATA, "application/octet-stream").digest
    server.seen.clear()
    return digest


def test_a_stream_waits_as_long_as_it_is_asked_to(
    repository: Repository, server: FaultyRegistry, digest: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.intercepts.append(Times(1, is_blob, status(429, Retry_After="0.4")))
    with repository.blob(digest, len(DATA)) as stream:
        assert stream.read() == DATA
    (line,) = caplog.messages
    assert "429 made to fail" in line and line.endswith("trying again in 0.4 s (2 of 3)")


@pytest.mark.parametrize("code", [429, 503])
def test_a_stream_does_not_wait_for_ever(
    repository: Repository,
    server: FaultyRegistry,
    digest: str,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    server.intercepts.append(Times(9, is_blob, status(code, Retry_After="3600")))
    with repository.blob(digest, len(DATA)) as stream:
        with pytest.raises(BackendError, match="it asks to be left alone for 3600 s") as caught:
            stream.read()
    assert caught.value.retry_after == 3600 and not caught.value.permanent
    assert len(server.paths("GET")) == 1 and not caplog.messages


@pytest.mark.parametrize(
    "when",
    ["soon", "-1", "nan", "Mon, 01 Jan 2020 00:00:00 +99999999999999", "Mon, 01 Jan 9999999999 00:00:00 GMT"],
)
def test_a_time_that_cannot_be_counts_as_none(
    repository: Repository, server: FaultyRegistry, digest: str, when: str
) -> None:
    server.intercepts.append(Times(1, is_blob, status(503, Retry_After=when)))
    assert repository.read_range(digest, 0, 9) == DATA[:9]


def test_an_upload_waits_as_long_as_it_is_asked_to(
    repository: Repository, server: FaultyRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    data = bytes(6 << 20)
    server.intercepts.append(Times(1, lambda h: h.command == "PATCH", status(429, Retry_After="0.4")))
    described = repository.put_blob(data, "application/octet-stream")
    assert repository.blob_size(described.digest) == len(data)
    assert any("trying again in 0.4 s" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (401, "docker login"),
        (403, "this account may not do that: log in with another"),
        (429, "too many requests: log in with `docker login`"),
    ],
)
def test_a_refusal_says_what_to_try(
    repository: Repository, server: FaultyRegistry, digest: str, code: int, words: str
) -> None:
    server.intercepts.append(Times(99, is_blob, status(code)))
    with pytest.raises(BackendError, match=f"{code} made to fail.*; .*{words}"):
        repository.read_range(digest, 0, 1)


def test_a_probe_leaves_nothing(repository: Repository, server: FaultyRegistry) -> None:
    repository.probe()
    assert [method for method, *_ in server.seen] == ["POST", "DELETE"]
    server.intercepts.append(Times(9, lambda h: h.command == "POST", status(403)))
    with pytest.raises(BackendError, match="403"):
        repository.probe()
