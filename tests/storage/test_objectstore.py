"""Writing to S3 and OSS, and their faults; reading is part of the contract in test_backends.py."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from objectstore_server import KEY, SECRET, Handler, ObjectStoreServer, rclone_server

from nydus.errors import BackendError
from nydus.storage import backends
from nydus.storage.backends.objectstore import ObjectStore

SMALL = os.urandom(100_000)
LARGE = os.urandom(1 << 20) * 40


@pytest.fixture
def server() -> Iterator[ObjectStoreServer]:
    with closing(ObjectStoreServer()) as server:
        yield server


def store_of(server: ObjectStoreServer, kind: str = "s3", **more: str) -> ObjectStore:
    store = backends.create(kind, server.config(**more))
    assert isinstance(store, ObjectStore)
    return store


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def put(store: ObjectStore, data: bytes, *, replace: bool = True) -> None:
    with store.upload(replace=replace) as upload:
        for start in range(0, len(data), 300_000):
            upload.write(data[start : start + 300_000])
        upload.commit(digest_of(data))
    assert upload.sent == len(data)


@pytest.mark.parametrize("kind", ["s3", "oss"])
@pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=["empty", "small", "large"])
def test_objects_get_the_name_of_their_digest(server: ObjectStoreServer, kind: str, data: bytes) -> None:
    with closing(store_of(server, kind)) as store:
        put(store, data)
        name = digest_of(data).partition(":")[2]
        assert server.objects == {f"images/nydus/{name}": data}
        assert server.uploads == {}
        assert store.size(name) == len(data)


def test_what_is_there_is_written_again_only_when_told(server: ObjectStoreServer) -> None:
    with closing(store_of(server)) as store:
        for data in (SMALL, LARGE):
            put(store, data)
            name = f"images/nydus/{digest_of(data).partition(':')[2]}"
            server.objects[name] = bytes(len(data))
            put(store, data, replace=False)
            assert server.objects[name] == bytes(len(data))
            put(store, data)
            assert server.objects[name] == data
    assert len(server.objects) == 2


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_an_abandoned_upload_leaves_nothing(server: ObjectStoreServer, data: bytes) -> None:
    with closing(store_of(server)) as store:
        with pytest.raises(KeyError), store.upload() as upload:
            upload.write(data)
            raise KeyError
    assert server.objects == {} and server.uploads == {}


def test_a_store_that_does_not_copy(server: ObjectStoreServer) -> None:
    def refuse(handler: Handler) -> bool:
        if handler.headers.get("x-amz-copy-source"):
            handler.refuse(400, "InvalidRequest")
            return True
        return False

    server.fault = refuse
    with closing(store_of(server)) as store:
        put(store, LARGE)
    assert list(server.objects.values()) == [LARGE]


def fail(status: int) -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        handler.refuse(status, "Made")
        return True

    return fault


def hang(handler: Handler) -> bool:
    time.sleep(2)
    handler.close_connection = True
    return True


def cut(handler: Handler) -> bool:
    handler.reply(206, b"abc", Content_Range="bytes 0-99/1000", Content_Length="100")
    handler.close_connection = True
    return True


@pytest.mark.parametrize(
    ("fault", "permanent"),
    [(fail(500), False), (fail(503), False), (hang, False), (cut, False), (fail(403), True)],
    ids=["500", "503", "hang", "cut", "403"],
)
def test_faults(server: ObjectStoreServer, fault: Callable[[Handler], bool], permanent: bool) -> None:
    name = digest_of(SMALL).partition(":")[2]
    server.objects[f"images/nydus/{name}"] = SMALL
    server.fault = fault
    config = {**server.config(), "timeout": 1}
    with closing(backends.create("s3", config)) as store:
        with pytest.raises(BackendError) as caught:
            store.read(name, 0, 100)
        assert caught.value.permanent == permanent
        assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
        server.fault = None
        assert store.read(name, 0, 100) == SMALL[:100]


def test_requests_are_signed_with_the_given_key(server: ObjectStoreServer) -> None:
    with closing(store_of(server, access_key_id="OTHER")) as store:
        with pytest.raises(BackendError) as caught:
            store.size("0" * 64)
    assert caught.value.permanent and caught.value.status == 403


def test_words(server: ObjectStoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys may also come from where the providers' tools look for them."""
    name = digest_of(SMALL).partition(":")[2]
    server.objects[f"images/nydus/{name}"] = SMALL
    config = server.config()
    with closing(backends.create("s3", {**config, "endpoint": "127.0.0.1:1"})) as store:
        with pytest.raises(BackendError, match=f"s3 bucket images: nydus/{name}: .*Connection refused"):
            store.size(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    del config["access_key_id"], config["access_key_secret"]
    with closing(backends.create("s3", config)) as store:
        with pytest.raises(BackendError, match="credential") as caught:
            store.size(name)
        assert caught.value.permanent
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with closing(backends.create("s3", config)) as store:
        assert store.size(name) == len(SMALL)


def test_an_upload_that_is_refused(server: ObjectStoreServer) -> None:
    server.fault = fail(403)
    with closing(store_of(server)) as store:
        for data in (SMALL, LARGE):
            with pytest.raises(BackendError, match="PermissionDenied"):
                put(store, data)
    assert server.objects == {}


# A real server, which checks every signature


@pytest.fixture
def rclone(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The configuration of a bucket ``images`` of rclone's S3 server."""
    with rclone_server(tmp_path) as config:
        yield config


@pytest.mark.slow
def test_a_real_s3_server(rclone: dict[str, str], tmp_path: Path) -> None:
    store = backends.create("s3", rclone)
    assert isinstance(store, ObjectStore)
    with closing(store):
        for data in (SMALL, LARGE):
            put(store, data)
            name = digest_of(data).partition(":")[2]
            assert store.size(name) == len(data)
            for offset, size in ((0, len(data)), (1, 1), (len(data) - 7, 7), (4096, 90_000)):
                assert store.read(name, offset, size) == data[offset : offset + size]
            with pytest.raises(BackendError):
                store.read(name, len(data) - 5, 10)
            assert store.read(name, 1, 3) == data[1:4]
        with pytest.raises(BackendError) as caught:
            store.read("0" * 64, 0, 1)
        assert caught.value.permanent and caught.value.status == 404
        with pytest.raises(KeyError), store.upload() as upload:
            upload.write(LARGE)
            raise KeyError
        kept = sorted(path.name for path in (tmp_path / "root/images/nydus").iterdir())
        assert kept == sorted(digest_of(data).partition(":")[2] for data in (SMALL, LARGE))
    with closing(backends.create("s3", {**rclone, "access_key_secret": "wrong"})) as stranger:
        with pytest.raises(BackendError) as caught:
            stranger.size(digest_of(SMALL).partition(":")[2])
        assert caught.value.permanent
