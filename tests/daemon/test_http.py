"""The API socket when the machine runs out of things."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path

import pytest

from nydus.daemon.client import DaemonClient, DaemonError
from nydus.daemon.http import HttpServer, Response


class Exhausted(socket.socket):
    """Says twice that there are no descriptors left."""

    failures = 2

    def accept(self) -> tuple[socket.socket, object]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_the_api_survives_a_lack_of_descriptors_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "api.sock"
    with Exhausted(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        HttpServer(listener, lambda request: Response(200, b'{"state": "RUNNING"}')).start()
        client = DaemonClient(path, timeout=5)
        assert client.state() == "RUNNING"

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(DaemonError):
                client.state()
        assert client.state() == "RUNNING"
