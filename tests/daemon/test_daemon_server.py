"""Requests and events that come at the same time."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nydus.daemon import api, server
from nydus.daemon.devices import Devices
from nydus.daemon.http import Request
from nydus.daemon.instance import Instance
from nydus.daemon.options import Options
from nydus.daemon.server import RUNNING, Daemon
from nydus.daemon.state import InstanceState, State
from nydus.errors import NydusError
from nydus.mount import erofs, table


def instance(number: int, path: Path) -> Instance:
    state = InstanceState(number, f"/{number}", str(path), "boot", "{}", None, "", "blobfs", "", mounted=True)
    image: Any = SimpleNamespace(close=lambda: None)
    return Instance(state, image, mount_id=1_000_000 + number)


def test_a_mount_made_while_the_table_is_read_is_not_taken_for_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = Daemon(Options(tmp_path))
    daemon.state = RUNNING
    daemon._instances[1] = instance(1, tmp_path / "1")

    def read() -> list[table.Mount]:
        daemon._instances[2] = instance(2, tmp_path / "2")
        return []

    monkeypatch.setattr(server.table, "read", read)
    daemon.check_mounts()
    assert list(daemon.instances()) == ["/2"]


def test_the_end_waits_for_a_mount_that_is_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = Daemon(Options(tmp_path))
    daemon.state = RUNNING
    unmounted: list[str] = []
    monkeypatch.setattr(erofs, "umount", unmounted.append)

    def mount() -> None:
        with daemon._claim("/1"):
            begun.set()
            time.sleep(0.3)
            daemon._instances[1] = instance(1, tmp_path / "1")

    begun = threading.Event()
    thread = threading.Thread(target=mount)
    thread.start()
    begun.wait()
    daemon.stop()
    thread.join()
    assert unmounted == [str(tmp_path / "1")]


class FakeFs:
    """As much of BlobFs as the table of files needs."""

    mount = 0

    def __init__(self) -> None:
        self.removed: list[int] = []

    def add(self, node: int, size: int, label: str, source: object, handles: object = ()) -> Any:
        return SimpleNamespace(node=node, size=size, label=label, handles=handles)

    def remove(self, node: int) -> None:
        self.removed.append(node)


def test_a_file_is_not_given_up_when_a_mount_has_just_asked_for_it() -> None:
    image: Any = SimpleNamespace(
        key=lambda blob: f"key {blob}",
        open_cache=lambda blob: None,
        release_cache=lambda blob: None,
        device_size=lambda blob: 4096,
        blobs=[SimpleNamespace(id="a")],
    )
    devices = Devices()
    fs: Any = FakeFs()
    devices.blobfs = fs
    file = devices.get(image, 0, 1)
    # The first instance is gone, the second shares the file; the kernel has not opened it yet.
    assert devices.get(image, 0, 2) is file
    give_up, owners = devices.collect(set(), {2})
    give_up()
    assert (fs.removed, owners) == ([], {1})
    give_up, owners = devices.collect(set(), set())
    give_up()
    assert (fs.removed, owners) == ([file.node], set())


def test_a_successor_uses_no_number_of_its_predecessor_again() -> None:
    """The kernel may still have pages of a file of which the successor was not told."""
    image: Any = SimpleNamespace(
        key=lambda blob: f"key {blob}",
        open_cache=lambda blob: None,
        release_cache=lambda blob: None,
        device_size=lambda blob: 4096,
        blobs=[SimpleNamespace(id="a")] * 10,
    )
    nodes = []
    for _ in range(3):
        devices = Devices()
        fs: Any = FakeFs()
        devices.blobfs = fs
        nodes += [devices.get(image, blob, 1).node for blob in range(10)]
    assert nodes == sorted(set(nodes)) and nodes[0] > 1


def test_a_failed_takeover_holds_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Daemon(Options(tmp_path, supervisor=tmp_path / "sock"))
    device, other = os.pipe()
    monkeypatch.setattr(api.transfer, "pull", lambda path: (State(), (device, other)))

    def refuse(*_: object) -> None:
        raise NydusError("two images disagree")

    monkeypatch.setattr(daemon, "restore", refuse)
    handler: Any = api.ApiServer(daemon, None, None)  # type: ignore[arg-type]
    assert handler.handle(Request("PUT", "/api/v1/daemon/fuse/takeover", {}, b"")).status == 500
    for descriptor in (device, other):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_run_time_values_are_shown_without_credentials(tmp_path: Path) -> None:
    daemon = Daemon(Options(tmp_path))
    daemon._runtime["/1"] = {"registry_auth": "dTpw", "proxy_url": "http://user:swordfish@proxy:80/x"}
    assert daemon.runtime("/1") == {"registry_auth": "", "proxy_url": "http://proxy:80/x"}
