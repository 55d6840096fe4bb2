"""The daemon's HTTP API, in the reference's routes and JSON (nydusd.md §3 and appendix A)."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

import nydus
from nydus.daemon import metrics, transfer
from nydus.daemon.events import events
from nydus.daemon.http import HttpServer, Request, Response
from nydus.daemon.logs import set_level
from nydus.daemon.server import READY, RUNNING, Daemon, NotFound, WrongState
from nydus.errors import NydusError

if TYPE_CHECKING:
    from nydus.daemon.worker import Stop

log = logging.getLogger(__name__)


class _Mount(msgspec.Struct):
    source: str
    config: str
    fs_type: str = "rafs"
    prefetch_files: list[str] | None = None


class _Remount(msgspec.Struct):
    source: str
    config: str | None = None
    fs_type: str = "rafs"


class _Settings(msgspec.Struct):
    log_level: str | None = None


@dataclass(frozen=True, slots=True)
class _Refusal(Exception):
    status: int
    message: str


_Handler = Callable[[Request], Any]


class ApiServer:
    """Serves the API of one daemon.

    Args:
        daemon: what the requests are for.
        listener: the listening UNIX socket.
        stop: ends the daemon.
    """

    def __init__(self, daemon: Daemon, listener: socket.socket, stop: Stop) -> None:
        self._daemon, self._stop = daemon, stop
        self._http = HttpServer(listener, self.handle)
        self._started = threading.Lock()
        self._routes: dict[str, dict[str, _Handler]] = {
            "/api/v1/daemon": {"GET": self._info, "PUT": self._configure_daemon},
            "/api/v2/daemon": {"GET": self._info_short, "PUT": self._configure_daemon},
            "/api/v1/daemon/backend": {"GET": self._backend_info},
            "/api/v1/daemon/events": {"GET": lambda request: events.json()},
            "/api/v1/daemon/start": {"PUT": self._start},
            "/api/v1/daemon/exit": {"PUT": self._exit},
            "/api/v1/daemon/fuse/sendfd": {"PUT": self._send_state},
            "/api/v1/daemon/fuse/takeover": {"PUT": self._take_over},
            "/api/v1/mount": {"POST": self._mount, "PUT": self._remount, "DELETE": self._umount},
            "/api/v1/config": {"GET": self._get_config, "PUT": self._put_config},
            "/api/v1/metrics": {"GET": self._metrics},
            "/api/v1/metrics/files": {"GET": self._metrics_files},
            "/api/v1/metrics/pattern": {"GET": self._metrics_pattern},
            "/api/v1/metrics/backend": {"GET": self._metrics_backend},
            "/api/v1/metrics/blobcache": {"GET": self._metrics_blobcache},
            "/api/v1/metrics/inflight": {"GET": lambda request: metrics.inflight(daemon)},
            "/api/v2/blobs": {"GET": _blobs, "PUT": _blobs, "DELETE": _blobs},
        }

    def start(self) -> None:
        self._http.start()

    def handle(self, request: Request) -> Response:
        """The answer to a request; never raises."""
        try:
            methods = self._routes.get(request.path.rstrip("/"))
            if methods is None:
                raise _Refusal(404, "NoRoute")
            handler = methods.get(request.method)
            if handler is None:
                raise _Refusal(400, f"InvalidMethod: {request.method} {request.path}")
            answer = handler(request)
            if isinstance(answer, Response):
                return answer
            if answer is None:
                return Response(204)
            return Response(200, msgspec.json.encode(answer))
        except _Refusal as refusal:
            return _error(refusal.status, refusal.message)
        except WrongState as error:
            kind = "Upgrade" if str(error) == "Takeover" else "Configure"
            return _error(400, f'{kind}(DaemonAbnormal(UnexpectedEvent("{error}")))')
        except NydusError as error:
            log.warning("%s %s: %s", request.method, request.path, error)
            return _error(500, str(error))
        except Exception as error:
            log.exception("defect in %s %s", request.method, request.path)
            return _error(500, f"internal error: {type(error).__name__}")

    # The daemon

    def _info_short(self, request: Request) -> dict[str, Any]:
        options = self._daemon.options
        version = f"v{nydus.__version__}"
        return {
            "version": {
                "package_ver": version,
                "git_commit": version,
                "build_time": "",
                "profile": "release",
                "rustc": "",
            },
            "id": options.id,
            "supervisor": str(options.supervisor) if options.supervisor else None,
            "state": self._daemon.state,
            "backend_collection": None,
        }

    def _info(self, request: Request) -> dict[str, Any]:
        instances = {}
        for mountpoint, instance in self._daemon.instances().items():
            state = instance.state
            instances[mountpoint] = {
                "backend_type": "Rafs",
                "mountpoint": mountpoint,
                "mounted_time": state.mounted_time,
                "config": instance.image.config.public(),
                # Not in the reference:
                "provider": state.provider,
                "provider_reason": state.reason,
                "plain_blobs": len(instance.image.blobs) - len(state.nodes),
            }
        return {**self._info_short(request), "backend_collection": instances}

    def _configure_daemon(self, request: Request) -> None:
        settings = _body(request, _Settings)
        if settings.log_level is not None and not set_level(settings.log_level):
            raise _Refusal(500, "Configure(ResponsePayloadType)")

    def _backend_info(self, request: Request) -> dict[str, Any]:
        mountpoint = _query(request, "mountpoint")
        try:
            return metrics.superblock(self._daemon.instance(mountpoint))
        except NotFound as error:
            raise _Refusal(500, f'FsBackendInfo(Metrics(Daemon(Other("{error}"))))') from None

    def _start(self, request: Request) -> None:
        with self._started:
            self._daemon.resume()

    def _exit(self, request: Request) -> Response:
        if self._daemon.state not in (READY, RUNNING):
            raise WrongState("Exit")
        # Without a controller nobody could serve the mounts any more.
        keep = self._daemon.held
        return Response(204, after=lambda: self._stop.request(keep_mounts=keep))

    def _send_state(self, request: Request) -> None:
        supervisor = self._daemon.options.supervisor
        if supervisor is None:
            raise NydusError("sendfd needs a daemon with --supervisor")
        blobfs = self._daemon.devices.blobfs
        descriptors = [fd for fd in (blobfs.device, blobfs.mount) if fd >= 0] if blobfs is not None else []
        transfer.push(supervisor, self._daemon.snapshot(), descriptors)
        self._daemon.held = True
        self._daemon.report()

    def _take_over(self, request: Request) -> None:
        supervisor = self._daemon.options.supervisor
        if supervisor is None:
            raise NydusError("takeover needs a daemon with --supervisor")
        if self._daemon.state != "INIT":
            raise WrongState("Takeover")
        state, descriptors = transfer.pull(supervisor)
        try:
            self._daemon.restore(state, *descriptors)
        except BaseException:
            # An open /dev/fuse that nobody reads keeps readers waiting for ever.
            blobfs = self._daemon.devices.blobfs
            if blobfs is None or blobfs.device not in descriptors:
                for descriptor in descriptors:
                    if descriptor is not None:
                        os.close(descriptor)
            raise
        self._daemon.held = True
        self._daemon.report()

    # Mounts

    def _mount(self, request: Request) -> None:
        mountpoint, body = _query(request, "mountpoint"), _body(request, _Mount)
        if body.fs_type != "rafs":
            raise NydusError(f"only 'rafs' is supported, but {body.fs_type} was specified")
        try:
            self._daemon.mount(mountpoint, body.source, body.config, body.prefetch_files)
        except WrongState:
            raise
        except NydusError as error:
            raise _mount_refusal(error) from error

    def _remount(self, request: Request) -> None:
        mountpoint, body = _query(request, "mountpoint"), _body(request, _Remount)
        try:
            config = body.config or self._daemon.instance(mountpoint).state.config
            self._daemon.remount(mountpoint, body.source, config)
        except NydusError as error:
            raise _mount_refusal(error) from error

    def _umount(self, request: Request) -> None:
        try:
            self._daemon.umount(_query(request, "mountpoint"))
        except NydusError as error:
            raise _mount_refusal(error) from error

    # Run-time configuration

    def _get_config(self, request: Request) -> dict[str, str]:
        return self._daemon.runtime(request.query.get("id"))

    def _put_config(self, request: Request) -> None:
        self._daemon.configure(_query(request, "id"), _body(request, dict[str, str]))

    # Counters

    def _metrics(self, request: Request) -> dict[str, Any]:
        return metrics.file_system(self._daemon, self._one(request))

    def _metrics_files(self, request: Request) -> Any:
        self._one(request)
        return [] if request.query.get("latest") == "true" else {}

    def _metrics_pattern(self, request: Request) -> list[Any]:
        self._one(request)
        return []  # which file is read is the kernel's business

    def _metrics_backend(self, request: Request) -> dict[str, Any]:
        return metrics.backend(self._daemon, self._one(request))

    def _metrics_blobcache(self, request: Request) -> dict[str, Any]:
        wanted = request.query.get("id")
        by_id = {
            instance.image.config.device.id: mountpoint
            for mountpoint, instance in self._daemon.instances().items()
        }
        mountpoint = by_id.get(wanted or "") or self._one(request)
        return metrics.blobcache(self._daemon, mountpoint)

    def _one(self, request: Request) -> str:
        """The mountpoint that a request for counters means."""
        instances = self._daemon.instances()
        wanted = request.query.get("id")
        if wanted is None and len(instances) == 1:
            return next(iter(instances))
        if wanted not in instances:
            raise _Refusal(404, "GlobalMetrics(Metrics(Stats(NoCounter)))")
        return wanted


def _blobs(request: Request) -> None:
    if request.method == "DELETE":
        if "domain_id" not in request.query and "blob_id" in request.query:
            return
        if "domain_id" not in request.query:
            raise _Refusal(
                400, "QueryString(\"'domain_id' or 'blob_id' should be specified in query string\")"
            )
    raise _Refusal(501, "blobs are not managed by a fuse daemon")


def _query(request: Request, key: str) -> str:
    value = request.query.get(key)
    if not value:
        raise _Refusal(400, f"QueryString(\"'{key}' should be specified in query string\")")
    return value


def _body(request: Request, form: Any) -> Any:
    try:
        return msgspec.json.decode(request.body, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Refusal(400, f'ParseBody(Error("{error}"))') from None


def _mount_refusal(error: NydusError) -> _Refusal:
    return _Refusal(500, f'Mount(MountFilesystem(Other("{error}")))')


def _error(status: int, message: str) -> Response:
    return Response(status, msgspec.json.encode({"code": "UNDEFINED", "message": message}))
