"""The embedded registry and what must not harm it."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty import FaultyRegistry

from nydus.errors import BackendError, ConfigError
from nydus.oci.registry import Registry
from nydus.oci.server import RegistryServer
from nydus.oci.store import Session
from nydus.oci.transport import Policy


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads/precious").touch()
    with pytest.raises(ConfigError, match="holds something else"):
        RegistryServer(tmp_path)
    assert (tmp_path / "uploads/precious").exists()


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    with RegistryServer(tmp_path) as server:
        upload = Session(server.store.uploads)
        for address in ("127.0.0.1:0", server.host):
            with pytest.raises(ConfigError, match="in use"):
                RegistryServer(tmp_path, address)
        assert upload.path.exists()
        upload.drop()
    with RegistryServer(tmp_path):
        pass


@pytest.mark.parametrize("address", ["", "5000", "h:", "h:x", "127.0.0.1:65536", "127.0.0.1:-1"])
def test_a_wrong_address(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError):
        RegistryServer(tmp_path / "root", address)


@pytest.mark.parametrize(
    "request_",
    [
        b"PUT /v2/a/blobs/uploads/x HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"PUT /v2/a/blobs/uploads/x HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"PUT /v2/a/manifests/x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n",
        b"PUT /v2/a/manifests/x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_impossible_lengths(tmp_path: Path, request_: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with RegistryServer(tmp_path) as server:
        host, port = server.host.split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(request_)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RegistryServer(tmp_path) as server:
        repository = Registry(server.host, plain_http=True, policy=Policy(attempts=1)).repository("a")
        with monkeypatch.context() as patched:
            patched.setattr(Session, "add", full)
            for size in (10, 20 << 20):
                with pytest.raises(BackendError, match=r"507 .*No space left on device"):
                    with repository.upload() as upload:
                        upload.write(bytes(size))
                        upload.commit(f"sha256:{0:064}")
        assert list(server.store.uploads.iterdir()) == []
        repository.put_blob(b"x", "")


def test_an_upload_that_did_not_fit_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, file: object) -> None:
            self._file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def write(self, data: memoryview) -> int:
            if len(data) < 4:
                raise OSError(errno.ENOSPC, "full")
            return self._file.write(data[:4])  # type: ignore[attr-defined,no-any-return]

    session = Session(tmp_path)
    session.add(b"0123")
    file = session.file
    session.file = Full(file)  # type: ignore[assignment]
    with pytest.raises(OSError, match="full"):
        session.add(b"456789")
    session.file = file
    session.add(b"abc")
    assert session.size == 7
    assert session.path.read_bytes() == b"0123abc"
    session.drop()


def test_the_command_ends_when_told(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("nydus"), "registry", tmp_path / "r", "--address=127.0.0.1:0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    assert "serving" in process.stderr.readline()
    process.terminate()
    assert process.communicate(timeout=10)[1] == ""
    assert process.returncode == 0


def test_a_cancelled_upload_does_not_wait_for_a_registry_that_hangs(tmp_path: Path) -> None:
    import threading
    import time

    from nydus.oci.server import Handler

    hang, held = threading.Event(), threading.Event()

    class Hanging(Handler):
        def route(self) -> None:
            if self.command == "PATCH":
                held.set()
                hang.wait(30)
            super().route()

    class Server(RegistryServer):
        handler = Hanging

    with Server(tmp_path) as server:
        upload = Registry(server.host, plain_http=True).repository("a").upload()
        writing = threading.Thread(target=lambda: upload.write(bytes(8 << 20)))
        writing.start()
        assert held.wait(10)
        writing.join(10)
        started = time.monotonic()
        upload.cancel()
        assert time.monotonic() - started < 6
        hang.set()


def test_uploads_that_nobody_goes_on_with_are_dropped(
    server: FaultyRegistry, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nydus.oci.server._UPLOAD_SECONDS", 0.5)
    transport, path = registry.transport, "/v2/demo/blobs/uploads/"
    location = transport.request("POST", path, "", ok=(202,)).headers["Location"]
    for _ in range(4):
        time.sleep(0.25)
        transport.request("PATCH", location, "", {}, b"more", ok=(202,))
    assert list(server.store.uploads.iterdir())
    deadline = time.monotonic() + 10
    while list(server.store.uploads.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(BackendError, match="404 upload unknown"):
        transport.request("PATCH", location, "", {}, b"more", ok=(202,))
