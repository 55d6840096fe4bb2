"""The containers of a containerd: which image they run, where their changes are, holding them still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from nydus.errors import ConfigError, NydusError
from nydus.snapshotter.api import containers_pb2, images_pb2, snapshots_pb2, task_pb2, tasks_pb2
from nydus.snapshotter.api.containers_pb2_grpc import ContainersStub
from nydus.snapshotter.api.images_pb2_grpc import ImagesStub
from nydus.snapshotter.api.snapshots_pb2_grpc import SnapshotsStub
from nydus.snapshotter.api.tasks_pb2_grpc import TasksStub
from nydus.snapshotter.pull import ContainerdError

_MAX_MESSAGE = 16 << 20
_TIMEOUT = 60.0
_TOLD = 5


@dataclass(frozen=True, slots=True)
class Container:
    """One container.

    Attributes:
        image: name of its image record.
        digest: of what that record refers to now; "" if it is gone.
        pid: of its first process; 0 if it does not run.
        paused: it is held still already.
        upper: the folder with what it changed, as overlayfs has it.
    """

    id: str
    image: str
    digest: str
    pid: int
    paused: bool
    upper: Path


class Containers:
    """A connection to containerd in one namespace. A context manager.

    Raises (all methods):
        ContainerdError: containerd refused, or cannot be reached; the text is its own.
    """

    def __init__(self, address: Path, namespace: str) -> None:
        if not address.exists():
            raise ContainerdError(f"{address}: containerd does not listen there")
        self._namespace = namespace
        self._channel = grpc.insecure_channel(
            f"unix:{address.absolute()}", options=[("grpc.max_receive_message_length", _MAX_MESSAGE)]
        )
        self._metadata = [("containerd-namespace", namespace)]
        self._containers, self._images = ContainersStub(self._channel), ImagesStub(self._channel)
        self._snapshots, self._tasks = SnapshotsStub(self._channel), TasksStub(self._channel)

    def __enter__(self) -> Containers:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def find(self, name: str) -> Container:
        """The container whose id is ``name``, or the only one whose id begins so (or that nerdctl calls so).

        Raises:
            ConfigError: there is none, or there are several.
        """
        everything = list(
            self._call(self._containers.List, containers_pb2.ListContainersRequest()).containers
        )
        found = [each for each in everything if each.id == name]
        found = found or [each for each in everything if each.labels.get("nerdctl/name") == name]
        found = found or [each for each in everything if each.id.startswith(name)]
        if len(found) != 1 or not name:
            ids = ", ".join(each.id[:20] for each in (found or everything)[:_TOLD])
            what = f"{len(found)} containers match" if found else "no container matches"
            raise ConfigError(
                f"{what} {name!r} in the namespace {self._namespace!r}; there are: {ids or 'none'}"
            )
        record = found[0]
        process = self._process(record.id)
        running = process is not None and process.status in (
            task_pb2.RUNNING,
            task_pb2.PAUSED,
            task_pb2.PAUSING,
        )
        return Container(
            record.id,
            record.image,
            self._digest(record.image),
            process.pid if process is not None and running else 0,
            process is not None and process.status in (task_pb2.PAUSED, task_pb2.PAUSING),
            self._upper(record.snapshotter, record.snapshot_key),
        )

    @contextmanager
    def paused(self, container: Container) -> Iterator[None]:
        """Holds a running container still for the time of a ``with`` block; it goes on whatever happens."""
        if not container.pid or container.paused:
            yield
            return
        self._call(self._tasks.Pause, tasks_pb2.PauseTaskRequest(container_id=container.id))
        try:
            yield
        finally:
            self._call(self._tasks.Resume, tasks_pb2.ResumeTaskRequest(container_id=container.id))

    def _process(self, container_id: str) -> Any:
        try:
            return self._call(self._tasks.Get, tasks_pb2.GetRequest(container_id=container_id)).process
        except ContainerdError as error:
            if missing(error):
                return None
            raise

    def _digest(self, image: str) -> str:
        try:
            answer = self._call(self._images.Get, images_pb2.GetImageRequest(name=image))
        except ContainerdError as error:
            if missing(error):
                return ""
            raise
        return str(answer.image.target.digest)

    def _upper(self, snapshotter: str, key: str) -> Path:
        request = snapshots_pb2.MountsRequest(snapshotter=snapshotter, key=key)
        for mount in self._call(self._snapshots.Mounts, request).mounts:
            for option in mount.options:
                if option.startswith("upperdir="):
                    return Path(option.removeprefix("upperdir="))
        raise NydusError(f"snapshot {key} of {snapshotter} is no overlay: what was changed cannot be told")

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, metadata=self._metadata, timeout=_TIMEOUT)
        except grpc.RpcError as error:
            raise ContainerdError(f"containerd: {error.details()}") from error


def missing(error: ContainerdError) -> bool:
    """Whether what was asked for is not there."""
    cause = error.__cause__
    return isinstance(cause, grpc.RpcError) and cause.code() == grpc.StatusCode.NOT_FOUND
