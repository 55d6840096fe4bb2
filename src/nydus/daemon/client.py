"""A client of the daemon's HTTP API (nydusd.md §3): one connection for each call, safe for any thread."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nydus.errors import NydusError


class DaemonError(NydusError):
    """The daemon refused a request or cannot be reached.

    ``status`` is the HTTP status; None where there was no answer (not listening, died, timed out).
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class DaemonClient:
    """Calls the daemon that listens on a UNIX socket.

    Every method raises :class:`DaemonError` with the daemon's own words when it refuses.

    Args:
        socket_path: the ``--apisock`` of the daemon.
        timeout: seconds for one call.
    """

    def __init__(self, socket_path: Path | str, *, timeout: float = 30.0) -> None:
        self.socket_path = Path(socket_path)
        self.timeout = timeout

    def request(self, method: str, path: str, body: object = None, **query: str) -> Any:
        """One call; the decoded JSON answer, or None where there is no body."""
        target = path + "".join(
            ("&" if i else "?") + f"{key}={quote(value, safe='/')}"
            for i, (key, value) in enumerate(query.items())
        )
        payload = None if body is None else json.dumps(body).encode()
        connection = _UnixConnection(self.socket_path, self.timeout)
        try:
            connection.request(method, target, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise DaemonError(f"{self.socket_path}: no daemon listens there") from error
        except (OSError, HTTPException) as error:
            raise DaemonError(
                f"{self.socket_path}: {method} {path}: {error or type(error).__name__}"
            ) from error
        finally:
            connection.close()
        if response.status >= 300:
            raise DaemonError(_message(data), status=response.status)
        return json.loads(data) if data else None

    def info(self) -> dict[str, Any]:
        """``{version, id, supervisor, state, backend_collection: {mountpoint: instance}}``."""
        answer: dict[str, Any] = self.request("GET", "/api/v1/daemon")
        return answer

    def state(self) -> str:
        """INIT, READY, RUNNING or STOPPED."""
        return str(self.request("GET", "/api/v2/daemon")["state"])

    def wait(self, *states: str, timeout: float = 10.0) -> str:
        """Waits until the daemon answers and, if any are named, is in one of ``states``."""
        end = time.monotonic() + timeout
        while True:
            try:
                state = self.state()
                if not states or state in states:
                    return state
                problem = f"is {state}, not {' or '.join(states)}"
            except DaemonError as error:
                problem = str(error)
            if time.monotonic() > end:
                raise DaemonError(f"{self.socket_path}: {problem} after {timeout:g} s")
            time.sleep(0.005)

    def mount(
        self,
        mountpoint: str,
        bootstrap: Path | str,
        config: str | dict[str, Any],
        *,
        prefetch_files: Sequence[str] | None = None,
    ) -> None:
        """Mounts an image.

        Args:
            mountpoint: absolute path *inside* the daemon's mountpoint, e.g. ``/12``.
            bootstrap: the image's metadata file.
            config: the daemon configuration document (v1 JSON).
            prefetch_files: absolute paths to fetch ahead.
        """
        text = config if isinstance(config, str) else json.dumps(config)
        body: dict[str, Any] = {"fs_type": "rafs", "source": str(bootstrap), "config": text}
        if prefetch_files is not None:
            body["prefetch_files"] = list(prefetch_files)
        self.request("POST", "/api/v1/mount", body, mountpoint=mountpoint)

    def umount(self, mountpoint: str) -> None:
        self.request("DELETE", "/api/v1/mount", mountpoint=mountpoint)

    def start(self) -> None:
        """READY → RUNNING (only after a takeover)."""
        self.request("PUT", "/api/v1/daemon/start")

    def exit(self) -> None:
        """Ends the daemon. Mounts stay only if their state was pushed to the supervisor before."""
        self.request("PUT", "/api/v1/daemon/exit")

    def send_state(self) -> None:
        """Makes the daemon push its state and descriptors to the ``--supervisor`` socket."""
        self.request("PUT", "/api/v1/daemon/fuse/sendfd")

    def take_over(self) -> None:
        """Makes the daemon fetch state and descriptors from the ``--supervisor`` socket (INIT → READY)."""
        self.request("PUT", "/api/v1/daemon/fuse/takeover")

    def configure(self, mountpoint: str, values: dict[str, str]) -> None:
        """Changes run-time values of one mount, e.g. ``{"registry_auth": base64("user:password")}``."""
        self.request("PUT", "/api/v1/config", values, id=mountpoint)

    def metrics(self, kind: str = "", mountpoint: str | None = None) -> Any:
        """Counters; ``kind`` is "" (file system), ``backend``, ``blobcache``, ``inflight``, …"""
        path = "/api/v1/metrics" + (f"/{kind}" if kind else "")
        query = {} if mountpoint is None else {"id": mountpoint}
        return self.request("GET", path, **query)


def _message(data: bytes) -> str:
    try:
        return str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        return data.decode(errors="replace") or "the daemon refused without a word"
