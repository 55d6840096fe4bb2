"""What is kept of daemons for their successors, and let go of."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path
from typing import cast

import pytest

from nydus.daemon.client import DaemonClient, DaemonError
from nydus.snapshotter.keeper import Keeper


class Dying:
    """A daemon that is killed when it has handed over, before it says so."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def send_state(self) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._path))
            socket.send_fds(connection, [b"half a st"], [self._descriptor])
        raise DaemonError("no answer")


def test_descriptors_of_a_daemon_that_dies_handing_over_are_let_go(tmp_path: Path) -> None:
    """Readers wait for as long as somebody has them open."""
    keeper = Keeper(tmp_path)
    read, write = os.pipe()
    daemon = Dying(keeper.socket_path("d"), write)
    with pytest.raises(DaemonError):
        keeper.receive("d", cast(DaemonClient, daemon))
    os.close(write)
    assert "d" not in keeper
    assert select.select([read], [], [], 0)[0], "somebody still has the other end open"
    assert os.read(read, 1) == b""
    os.close(read)
