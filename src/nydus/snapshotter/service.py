"""The snapshots service over gRPC: messages in and out, and the status codes containerd relies on."""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from nydus.errors import NydusError
from nydus.snapshotter import labels as label
from nydus.snapshotter.api import snapshots_pb2 as wire
from nydus.snapshotter.api import types_pb2 as types
from nydus.snapshotter.api.snapshots_pb2_grpc import SnapshotsServicer, add_SnapshotsServicer_to_server
from nydus.snapshotter.errors import SnapshotError
from nydus.snapshotter.mounts import Mount
from nydus.snapshotter.snapshotter import Snapshotter
from nydus.snapshotter.store import Snapshot

log = logging.getLogger(__name__)

WORKERS = 64
MAX_MESSAGE = 16 << 20
_BLOCK = 100

Context = grpc.ServicerContext


class SnapshotsService(SnapshotsServicer):  # type: ignore[misc]
    """containerd's ``Snapshots`` service."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def Prepare(self, request: Any, context: Context) -> Any:
        made = _call(
            context,
            "Prepare",
            request,
            self._snapshotter.prepare,
            request.key,
            request.parent,
            dict(request.labels),
        )
        return wire.PrepareSnapshotResponse(mounts=map(_mount, made))

    def View(self, request: Any, context: Context) -> Any:
        made = _call(
            context,
            "View",
            request,
            self._snapshotter.view,
            request.key,
            request.parent,
            dict(request.labels),
        )
        return wire.ViewSnapshotResponse(mounts=map(_mount, made))

    def Mounts(self, request: Any, context: Context) -> Any:
        made = _call(context, "Mounts", request, self._snapshotter.mounts, request.key)
        return wire.MountsResponse(mounts=map(_mount, made))

    def Commit(self, request: Any, context: Context) -> Any:
        _call(
            context,
            "Commit",
            request,
            self._snapshotter.commit,
            request.name,
            request.key,
            dict(request.labels),
        )
        return Empty()

    def Remove(self, request: Any, context: Context) -> Any:
        _call(context, "Remove", request, self._snapshotter.remove, request.key)
        return Empty()

    def Stat(self, request: Any, context: Context) -> Any:
        return wire.StatSnapshotResponse(
            info=_info(_call(context, "Stat", request, self._snapshotter.stat, request.key))
        )

    def Update(self, request: Any, context: Context) -> Any:
        info, paths = request.info, list(request.update_mask.paths)
        snapshot = _call(
            context, "Update", request, self._snapshotter.update, info.name, dict(info.labels), paths
        )
        return wire.UpdateSnapshotResponse(info=_info(snapshot))

    def List(self, request: Any, context: Context) -> Iterator[Any]:
        found = _call(context, "List", request, self._snapshotter.find, list(request.filters))
        for start in range(0, len(found), _BLOCK):
            yield wire.ListSnapshotsResponse(info=map(_info, found[start : start + _BLOCK]))

    def Usage(self, request: Any, context: Context) -> Any:
        size, inodes = _call(context, "Usage", request, self._snapshotter.usage, request.key)
        return wire.UsageResponse(size=size, inodes=inodes)

    def Cleanup(self, request: Any, context: Context) -> Any:
        _call(context, "Cleanup", request, self._snapshotter.cleanup)
        return Empty()


def create_server(snapshotter: Snapshotter, address: Path, *, uid: int = 0, gid: int = 0) -> grpc.Server:
    """A server on a UNIX socket, ready to be started.

    Raises:
        NydusError: something other than a dead socket is at ``address``.
    """
    server = grpc.server(
        ThreadPoolExecutor(WORKERS, "grpc"),
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
            ("grpc.so_reuseport", 0),
        ],
    )
    add_SnapshotsServicer_to_server(SnapshotsService(snapshotter), server)
    address.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_dead_socket(address)
    if not server.add_insecure_port(f"unix:{address}"):
        raise NydusError(f"{address}: cannot listen")
    address.chmod(0o600)
    os.chown(address, uid, gid)
    return server


def _remove_dead_socket(address: Path) -> None:
    try:
        if not stat.S_ISSOCK(address.lstat().st_mode):
            raise NydusError(f"{address} is there and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(address))
        except OSError:
            address.unlink(missing_ok=True)
        else:
            raise NydusError(f"{address}: another snapshotter serves there")


def _call(context: Context, name: str, request: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run one call; what goes wrong becomes the status of the answer."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s %s", name, _shown(request))
    try:
        return function(*arguments)
    except SnapshotError as error:
        code, text = grpc.StatusCode[error.code], str(error)
    except (NydusError, OSError, sqlite3.Error) as error:
        code, text = grpc.StatusCode.UNKNOWN, str(error)
    except Exception as error:
        log.exception("%s failed", name)
        code, text = grpc.StatusCode.UNKNOWN, f"{type(error).__name__}: {error}"
    if code not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS):
        log.error("%s: %s", name, text)
    context.abort(code, text)


def _shown(request: Any) -> str:
    shown = type(request)()
    shown.CopyFrom(request)
    for labels in (getattr(shown, "labels", None), getattr(getattr(shown, "info", None), "labels", None)):
        for secret in label.SECRETS:
            if labels and secret in labels:
                labels[secret] = "***"
    return str(shown).replace("\n", " ")


def _mount(mount: Mount) -> Any:
    return types.Mount(type=mount.type, source=mount.source, options=mount.options)


def _info(snapshot: Snapshot) -> Any:
    info = wire.Info(
        name=snapshot.name, parent=snapshot.parent, kind=int(snapshot.kind), labels=snapshot.labels
    )
    info.created_at.FromNanoseconds(snapshot.created)
    info.updated_at.FromNanoseconds(snapshot.updated)
    return info
