"""A daemon that reads from a registry which fails in every way: EIO, one log line, and right bytes after."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nydusd_process import Nydusd, localfs_config

from conftest import Image
from nydus.oci.registry import Registry

sys.path.insert(0, str(Path(__file__).parents[1] / "oci"))

from faulty import FaultyHandler, FaultyRegistry, blob_of, cut, hang_up, status

pytestmark = pytest.mark.root
WRONG = bytes(byte ^ 0x55 for byte in range(256))


@pytest.fixture
def server(image: Image, tmp_path: Path) -> Iterator[FaultyRegistry]:
    with FaultyRegistry(tmp_path / "registry") as made:
        with Registry(made.host, plain_http=True) as registry:
            registry.repository("a/b").put_blob(image.blob.read_bytes(), "application/octet-stream")
        yield made


def registry_config(host: str, cache: Path) -> dict[str, object]:
    backend = {"host": host, "repo": "a/b", "scheme": "http", "timeout": 1, "connect_timeout": 1}
    return {
        "device": {
            "id": "/",
            "backend": {"type": "registry", "config": backend},
            "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
        },
        "mode": "direct",
    }


def corrupted(handler: FaultyHandler) -> None:
    data = blob_of(handler)
    first, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    last = min(last, len(data) - 1)
    handler.reply(
        206, data[first : last + 1].translate(WRONG), {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
    )


def silent(handler: FaultyHandler) -> None:
    time.sleep(1.5)
    hang_up(handler)


FAULTS: dict[str, tuple[Callable[[FaultyHandler], None], str]] = {
    "401": (status(401, WWW_Authenticate='Basic realm="tests"'), "401"),
    "403": (status(403), "403"),
    "404": (status(404), "404"),
    "500": (status(500), "500"),
    "truncated": (cut(1000), ""),
    "corrupted": (corrupted, ""),
    "hangs up": (hang_up, ""),
    "silent": (silent, ""),
}


@pytest.mark.parametrize(
    ("fault", "moment"),
    [(fault, "later") for fault in FAULTS if fault != "silent"] + [("silent", "at once"), ("404", "at once")],
)
def test_a_registry_that_fails(
    image: Image, server: FaultyRegistry, tmp_path: Path, fault: str, moment: str
) -> None:
    answer, word = FAULTS[fault]

    def intercept(handler: FaultyHandler) -> bool:
        if "/blobs/" not in handler.path or handler.command == "HEAD":
            return False
        answer(handler)
        return True

    truth = {file: (image.source / file).read_bytes() for file in image.files}
    if moment == "at once":
        server.intercepts = [intercept]
    config = registry_config(server.host, tmp_path / "cache")
    with Nydusd.of(tmp_path, image.bootstrap, config) as daemon:
        assert sorted(path.name for path in daemon.mountpoint.iterdir())[-1] == "huge", "metadata is there"
        if moment == "later":
            assert (daemon.mountpoint / "d1/f1").read_bytes() == truth[Path("d1/f1")]
            server.intercepts = [intercept]
        began = time.monotonic()
        with pytest.raises(OSError) as caught:
            (daemon.mountpoint / "huge").read_bytes()
        assert caught.value.errno == errno.EIO
        assert time.monotonic() - began < 25, "hangs"
        errors = [line for line in daemon.log.read_text().splitlines() if " ERROR " in line]
        assert any(f"blob {image.blob.name} at offset " in line and word in line for line in errors)
        assert "Traceback" not in daemon.log.read_text()
        server.intercepts = []
        for file, expected in truth.items():
            assert (daemon.mountpoint / file).read_bytes() == expected, "nothing wrong was kept"
        assert daemon.stop() == 0
        assert daemon.mounts() == []


def test_a_registry_that_is_not_there(image: Image, server: FaultyRegistry, tmp_path: Path) -> None:
    config = registry_config("127.0.0.1:1", tmp_path / "cache")
    with Nydusd.of(tmp_path, image.bootstrap, config) as daemon:
        with pytest.raises(OSError) as caught:
            (daemon.mountpoint / "huge").read_bytes()
        assert caught.value.errno == errno.EIO
        assert f"blob {image.blob.name} at offset 0" in daemon.log.read_text()
        assert daemon.stop() == 0


def test_a_full_disk_costs_only_the_cache(image: Image, tmp_path: Path) -> None:
    disk, folder = tmp_path / "disk", tmp_path / "small"
    folder.mkdir()
    with disk.open("wb") as file:
        file.truncate(12 << 20)
    mkfs = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin")
    if mkfs is None:
        pytest.skip("mkfs.ext4 is not installed")
    subprocess.run([mkfs, "-q", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, folder], check=True)
    try:
        config = localfs_config(image.blobs, folder / "cache")
        with Nydusd.of(tmp_path, image.bootstrap, config) as daemon:
            for file in image.files:
                assert (daemon.mountpoint / file).read_bytes() == (image.source / file).read_bytes()
            warnings = [line for line in daemon.log.read_text().splitlines() if " WARN" in line]
            assert any("No space left on device" in line and str(folder) in line for line in warnings)
            assert len(warnings) < 10
            assert daemon.stop() == 0
            assert daemon.mounts() == [str(folder)]
    finally:
        subprocess.run(["umount", folder], check=True)
