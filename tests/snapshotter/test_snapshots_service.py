"""The snapshots service over a real gRPC connection: messages, and the status codes containerd relies on."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from nydus.errors import NydusError
from nydus.snapshotter import labels as label
from nydus.snapshotter.api import snapshots_pb2 as wire
from nydus.snapshotter.api.snapshots_pb2_grpc import SnapshotsStub
from nydus.snapshotter.config import load
from nydus.snapshotter.database import Database
from nydus.snapshotter.images import Images
from nydus.snapshotter.service import create_server
from nydus.snapshotter.snapshotter import Snapshotter
from nydus.snapshotter.store import Store
from nydus.snapshotter.template import Template

CHAIN = "sha256:" + "a" * 64


class NoDaemons:
    """No image can be mounted here."""

    def spawn(self, argv: list[str], *, log: object = None) -> int:
        raise NydusError("no daemons in this test")

    def exit_status(self, pid: int) -> int | None:
        return 1


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[SnapshotsStub]:
    with tempfile.TemporaryDirectory(prefix="sock-") as directory:
        address = Path(directory) / "deep" / "s.sock"
        config, _ = load(None, {"root": str(tmp_path)})
        database = Database(tmp_path / "metadata.db")
        store = Store(database, tmp_path / "snapshots")
        images = Images(config, database, store, NoDaemons(), Template(None, config.cache_dir))
        server = create_server(Snapshotter(config, store, images), address)
        server.start()
        assert address.stat().st_mode & 0o777 == 0o600
        options = [("grpc.max_receive_message_length", 16 << 20)]
        with grpc.insecure_channel(f"unix:{address}", options=options) as channel:
            yield SnapshotsStub(channel)
        server.stop(None).wait()
        images.close()
        database.close()


def code(call: Any, request: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        answer = call(request)
        list(answer) if hasattr(answer, "__iter__") else None
    return caught.value.code()


def prepare(key: str, parent: str = "", **labels: str) -> Any:
    return wire.PrepareSnapshotRequest(
        snapshotter="nydus",
        key=key,
        parent=parent,
        labels={k.replace("__", "/"): v for k, v in labels.items()},
    )


def test_the_handshake_of_a_lazy_layer(stub: SnapshotsStub) -> None:
    request = wire.PrepareSnapshotRequest(
        key=f"k8s.io/1/extract-1-x {CHAIN}", labels={label.TARGET: CHAIN, label.BLOB: "true", "a": "b"}
    )
    with pytest.raises(grpc.RpcError) as caught:
        stub.Prepare(request)
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert caught.value.details() == f'target snapshot "{CHAIN}": already exists'
    wanted = f'labels."{label.TARGET}"=={CHAIN},parent==""'
    (message,) = stub.List(wire.ListSnapshotsRequest(filters=[wanted]))
    (info,) = message.info
    assert (info.name, info.kind, info.parent) == (CHAIN, wire.COMMITTED, "")
    assert info.labels == {label.TARGET: CHAIN, label.BLOB: "true", "a": "b"}
    assert info.created_at.seconds > 1_700_000_000
    assert stub.Stat(wire.StatSnapshotRequest(key=CHAIN)).info == info
    assert code(stub.Prepare, request) == grpc.StatusCode.ALREADY_EXISTS


def test_codes(stub: SnapshotsStub) -> None:
    unknown, exists = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS
    stub.Prepare(prepare("active"))
    stub.Prepare(prepare("base-key"))
    stub.Commit(wire.CommitSnapshotRequest(name="base", key="base-key"))
    stub.View(wire.ViewSnapshotRequest(key="view", parent="base"))
    assert code(stub.Prepare, prepare("active")) == exists
    assert code(stub.Prepare, prepare("x", "nobody")) == unknown
    assert code(stub.Prepare, prepare("x", "active")) == grpc.StatusCode.INVALID_ARGUMENT
    assert code(stub.View, wire.ViewSnapshotRequest(key="x", parent="nobody")) == unknown
    assert code(stub.Mounts, wire.MountsRequest(key="nobody")) == unknown
    assert code(stub.Mounts, wire.MountsRequest(key="base")) == grpc.StatusCode.FAILED_PRECONDITION
    assert code(stub.Commit, wire.CommitSnapshotRequest(name="y", key="nobody")) == unknown
    assert code(stub.Commit, wire.CommitSnapshotRequest(name="base", key="active")) == exists
    view = wire.CommitSnapshotRequest(name="y", key="view")
    assert code(stub.Commit, view) == grpc.StatusCode.FAILED_PRECONDITION
    assert code(stub.Stat, wire.StatSnapshotRequest(key="nobody")) == unknown
    assert code(stub.Usage, wire.UsageRequest(key="nobody")) == unknown
    assert code(stub.Remove, wire.RemoveSnapshotRequest(key="nobody")) == unknown
    assert code(stub.Remove, wire.RemoveSnapshotRequest(key="base")) == grpc.StatusCode.FAILED_PRECONDITION
    update = wire.UpdateSnapshotRequest(info=wire.Info(name="nobody"))
    assert code(stub.Update, update) == unknown
    update = wire.UpdateSnapshotRequest(info=wire.Info(name="base"), update_mask=FieldMask(paths=["parent"]))
    assert code(stub.Update, update) == grpc.StatusCode.INVALID_ARGUMENT
    assert code(stub.List, wire.ListSnapshotsRequest(filters=["=="])) == grpc.StatusCode.INVALID_ARGUMENT
    stub.Cleanup(wire.CleanupRequest())


def test_an_image_that_cannot_be_mounted_leaves_no_record(stub: SnapshotsStub) -> None:
    stub.Prepare(prepare("meta-key"))
    labels = {label.BOOTSTRAP: "true", label.IMAGE_REF: "localhost:5000/a"}
    stub.Commit(wire.CommitSnapshotRequest(name="meta", key="meta-key", labels=labels))
    assert code(stub.Prepare, prepare("container", "meta")) == grpc.StatusCode.NOT_FOUND
    assert code(stub.Stat, wire.StatSnapshotRequest(key="container")) == grpc.StatusCode.NOT_FOUND


def test_usage_and_update(stub: SnapshotsStub) -> None:
    mounts = stub.Prepare(prepare("a")).mounts
    assert (mounts[0].type, list(mounts[0].options)) == ("bind", ["rw", "rbind"])
    (Path(mounts[0].source) / "file").write_bytes(bytes(10_000))
    usage = stub.Usage(wire.UsageRequest(key="a"))
    assert usage.size >= 12288
    assert usage.inodes == 2
    stub.Commit(wire.CommitSnapshotRequest(name="A", key="a", labels={"x": "1"}))
    assert stub.Usage(wire.UsageRequest(key="A")) == usage
    info = wire.Info(name="A", labels={"y": "2"})
    answer = stub.Update(wire.UpdateSnapshotRequest(info=info, update_mask=FieldMask(paths=["labels.y"])))
    assert answer.info.labels == {"x": "1", "y": "2"}


def test_many_records_come_in_blocks(stub: SnapshotsStub) -> None:
    assert list(stub.List(wire.ListSnapshotsRequest())) == []
    for i in range(150):
        with pytest.raises(grpc.RpcError):
            stub.Prepare(prepare("x", **{label.TARGET: f"s{i}", label.BLOB: ""}))
    assert [len(message.info) for message in stub.List(wire.ListSnapshotsRequest())] == [100, 50]


def test_a_large_request_passes(stub: SnapshotsStub) -> None:
    labels = {f"containerd.io/snapshot/{i}": "x" * 4000 for i in range(2000)}
    stub.Prepare(wire.PrepareSnapshotRequest(key="a", labels=labels))
    assert len(stub.Stat(wire.StatSnapshotRequest(key="a")).info.labels) == 2000


def test_calls_overlap(stub: SnapshotsStub) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(5):
                key = f"{number}-{i}"
                stub.Prepare(prepare(key))
                stub.Commit(wire.CommitSnapshotRequest(name=f"c{key}", key=key))
                stub.Prepare(prepare(f"w{key}", f"c{key}"))
                stub.Remove(wire.RemoveSnapshotRequest(key=f"w{key}"))
                stub.Cleanup(wire.CleanupRequest())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sum(len(message.info) for message in stub.List(wire.ListSnapshotsRequest())) == 80


def test_addresses_that_cannot_be_taken(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="sock-") as directory:
        plain = Path(directory) / "file"
        plain.touch()
        with pytest.raises(NydusError, match="not a socket"):
            create_server(None, plain)  # type: ignore[arg-type]
        taken = Path(directory) / "taken"
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(taken))
            other.listen()
            with pytest.raises(NydusError, match="another snapshotter"):
                create_server(None, taken)  # type: ignore[arg-type]
        create_server(None, taken).stop(None)  # type: ignore[arg-type]
