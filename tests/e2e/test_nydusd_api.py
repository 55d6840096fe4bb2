"""The API as the reference's clients know it, and a daemon with many mounts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nydusd_process import Nydusd, localfs_config

from conftest import Image
from nydus.daemon.client import DaemonClient, DaemonError

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("daemon")


@pytest.fixture(scope="module")
def dedicated(image: Image, folder: Path) -> Iterator[Nydusd]:
    with Nydusd.of(folder, image.bootstrap, localfs_config(image.blobs, folder / "cache")) as daemon:
        (daemon.mountpoint / "huge").read_bytes()
        yield daemon


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Nydusd]:
    with Nydusd(tmp_path) as daemon:
        yield daemon
        assert daemon.stop() == 0
        assert daemon.mounts() == []


def refusal(
    client: DaemonClient, method: str, path: str, body: object = None, **query: str
) -> tuple[int, str]:
    with pytest.raises(DaemonError) as caught:
        client.request(method, path, body, **query)
    assert caught.value.status is not None
    return caught.value.status, str(caught.value)


def test_daemon_info(dedicated: Nydusd) -> None:
    info = dedicated.client.info()
    assert set(info) == {"version", "id", "supervisor", "state", "backend_collection"}
    assert set(info["version"]) == {"package_ver", "git_commit", "build_time", "profile", "rustc"}
    assert info["state"] == "RUNNING" and info["id"] is None
    instance = info["backend_collection"]["/"]
    assert instance["backend_type"] == "Rafs" and instance["mountpoint"] == "/"
    assert instance["provider"] == "blobfs" and instance["provider_reason"]
    assert set(instance["config"]) == {
        "version", "id", "backend", "external_backends", "cache", "rafs", "overlay",
    }  # fmt: skip
    assert dedicated.client.request("GET", "/api/v2/daemon")["backend_collection"] is None


def test_metrics_have_the_shapes_of_the_reference(dedicated: Nydusd) -> None:
    client = dedicated.client
    fs = client.metrics()
    assert fs == client.metrics(mountpoint="/")
    assert fs["id"] == "/" and fs["data_read"] >= 10 << 20 and fs["fop_hits"][4] > 0
    assert [len(fs[k]) for k in ("block_count_read", "fop_hits", "fop_errors", "read_latency_dist")] == [
        8, 15, 15, 8,
    ]  # fmt: skip
    backend = client.metrics("backend")
    assert backend["backend_type"] == "localfs" and backend["read_count"] > 0
    assert [len(row) for row in backend["read_latency_sizes_dist"]] == [8] * 8
    cache = client.metrics("blobcache")
    assert cache["underlying_files"] and cache["entries_count"] > 0
    assert client.metrics("inflight") is None
    assert client.metrics("pattern") == [] and client.metrics("files") == {}
    summary = client.request("GET", "/api/v1/daemon/backend", mountpoint="/")
    assert summary["magic"] == 3774210530 and summary["blob_device_table_count"] == 1
    assert client.request("GET", "/api/v1/daemon/events")["max_errors"] == 500


def test_refusals(dedicated: Nydusd) -> None:
    client = dedicated.client
    assert refusal(client, "GET", "/api/v1/nothing") == (404, "NoRoute")
    assert refusal(client, "PUT", "/api/v1/daemon", {"log_level": "loud"}) == (
        500,
        "Configure(ResponsePayloadType)",
    )
    assert refusal(client, "POST", "/api/v1/mount", [], mountpoint="/a")[0] == 400
    status, text = refusal(client, "POST", "/api/v1/mount", {"source": "x"}, mountpoint="/a")
    assert status == 400 and text.startswith("ParseBody") and "config" in text
    assert refusal(client, "POST", "/api/v1/mount", {}) == (
        400,
        "QueryString(\"'mountpoint' should be specified in query string\")",
    )
    body = {"source": "/nowhere", "config": "{}", "fs_type": "ext4"}
    status, text = refusal(client, "POST", "/api/v1/mount", body, mountpoint="/a")
    assert status == 500 and "ext4" in text
    assert refusal(client, "DELETE", "/api/v1/mount", mountpoint="/x")[0] == 500
    assert refusal(client, "PUT", "/api/v1/daemon/start") == (
        400,
        'Configure(DaemonAbnormal(UnexpectedEvent("Start")))',
    )
    assert refusal(client, "PUT", "/api/v1/daemon/fuse/sendfd")[0] == 500
    assert refusal(client, "GET", "/api/v1/metrics", id="/other")[0] == 404
    assert refusal(client, "GET", "/api/v1/daemon/backend", mountpoint="/other")[0] == 500
    assert refusal(client, "GET", "/api/v2/blobs", domain_id="d")[0] == 501
    assert refusal(client, "PUT", "/api/v1/config", {"colour": "red"}, id="/")[0] == 500


def test_the_log_level_changes(image: Image, shared: Nydusd, tmp_path: Path) -> None:
    config = localfs_config(image.blobs, tmp_path / "cache")
    shared.client.request("PUT", "/api/v1/daemon", {"log_level": "error"})
    shared.client.mount("/quiet", image.bootstrap, config)
    shared.client.request("PUT", "/api/v2/daemon", {"log_level": "info"})
    shared.client.mount("/told", image.bootstrap, config)
    log = shared.log.read_text()
    assert "/told" in log
    assert "/quiet" not in log


def test_a_mount_error_says_what_is_wrong(image: Image, shared: Nydusd, tmp_path: Path) -> None:
    client = shared.client
    config = localfs_config(image.blobs, tmp_path / "cache")

    def mount(config: object, source: Path | str = image.bootstrap, mountpoint: str = "/1") -> str:
        body = {"source": str(source), "config": config if isinstance(config, str) else json.dumps(config)}
        status, text = refusal(client, "POST", "/api/v1/mount", body, mountpoint=mountpoint)
        assert status == 500
        return text

    assert "/nowhere" in mount(config, "/nowhere")
    assert "not JSON" in mount("{")
    assert "device" in mount({"mode": "direct"})
    assert "amplify_io" in mount({**config, "amplify_io": -1})
    assert "mode" in mount({**config, "mode": "sideways"})
    assert "'s1'" in mount(config, mountpoint="s1")
    assert ".." in mount(config, mountpoint="/a/../b")
    unknown = json.loads(json.dumps(config))
    unknown["device"]["backend"]["type"] = "carrier-pigeon"
    assert "carrier-pigeon" in mount(unknown)
    assert list(shared.mountpoint.iterdir()) == []
    assert client.info()["backend_collection"] == {}


def test_many_mounts_come_and_go(image: Image, shared: Nydusd, tmp_path: Path) -> None:
    client = shared.client
    config = localfs_config(image.blobs, tmp_path / "cache")
    worker = shared.worker
    client.mount("/deep/er", image.bootstrap, config)
    descriptors = Path(f"/proc/{worker}/fd")
    before = len(list(descriptors.iterdir()))
    threads = [
        threading.Thread(target=client.mount, args=(f"/{n}", image.bootstrap, config)) for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(client.info()["backend_collection"]) == 21
    assert refusal(client, "GET", "/api/v1/metrics")[0] == 404
    assert client.metrics(mountpoint="/3")["id"] == "/3"
    assert "already exists" in refusal(
        client, "POST", "/api/v1/mount", {"source": str(image.bootstrap), "config": json.dumps(config)},
        mountpoint="/3",
    )[1]  # fmt: skip
    for mountpoint in ("/3/below", "/deep"):
        body = {"source": str(image.bootstrap), "config": json.dumps(config)}
        assert refusal(client, "POST", "/api/v1/mount", body, mountpoint=mountpoint)[0] == 500
    small = image.files[0]
    for number in range(20):
        assert (shared.mountpoint / str(number) / small).read_bytes() == (image.source / small).read_bytes()
        client.umount(f"/{number}")
    client.umount("/deep/er")
    assert list(shared.mountpoint.iterdir()) == []
    end = time.monotonic() + 5
    while len(list(descriptors.iterdir())) > before:  # the cache files, once the kernel has let go
        assert time.monotonic() < end, "descriptors leak"
        time.sleep(0.02)
    assert shared.worker == worker


def test_an_image_in_use_can_be_unmounted(image: Image, shared: Nydusd, tmp_path: Path) -> None:
    """Like a container's overlay does, an open file keeps what it needs after the unmount."""
    config = localfs_config(image.blobs, tmp_path / "cache")
    shared.client.mount("/1", image.bootstrap, config)
    with (shared.mountpoint / "1/huge").open("rb") as file:
        shared.client.umount("/1")
        assert not (shared.mountpoint / "1").exists()
        worker = shared.worker
        assert worker is not None
        os.kill(worker, 9)  # the successor must know of it as well
        assert file.read() == (image.source / "huge").read_bytes()


def test_a_complete_blob_is_given_to_the_kernel_as_it_is(
    image: Image, shared: Nydusd, tmp_path: Path
) -> None:
    config = localfs_config(image.blobs, tmp_path / "cache")
    client = shared.client
    client.mount("/1", image.bootstrap, config)
    for file in image.files:
        (shared.mountpoint / "1" / file).read_bytes()
    client.mount("/2", image.bootstrap, config)
    assert client.info()["backend_collection"]["/2"]["plain_blobs"] == 1
    read = client.metrics(mountpoint="/2")["data_read"]
    for file in image.files:
        assert (shared.mountpoint / "2" / file).read_bytes() == (image.source / file).read_bytes()
    assert client.metrics(mountpoint="/2")["data_read"] == read


@pytest.mark.parametrize("order", ["evil first", "good first"])
@pytest.mark.parametrize("registry", ["the same", "its own"])
def test_a_lying_image_does_not_spoil_a_blob_for_others(
    shared: Nydusd, tmp_path: Path, order: str, registry: str
) -> None:
    """It names the blob of another image, but has other digests, and maybe bytes that fit them."""

    def build(name: str, content: bytes) -> tuple[Path, Path]:
        source, blobs = tmp_path / name / "source", tmp_path / name / "blobs"
        source.mkdir(parents=True)
        blobs.mkdir()
        (source / "file").write_bytes(content)
        program = "from nydus.cli.nydus_image import main; main()"
        command = [sys.executable, "-c", program, "create", str(source), "--compressor", "none"]
        command += ["--bootstrap", str(tmp_path / name / "boot"), "--blob-dir", str(blobs)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        return tmp_path / name / "boot", next(blobs.iterdir())

    good, good_blob = build("good", b"good" * 100_000)
    evil, evil_blob = build("evil", b"evil" * 100_000)
    evil.write_bytes(evil.read_bytes().replace(evil_blob.name.encode(), good_blob.name.encode()))
    evil_blob.rename(evil_blob.with_name(good_blob.name))
    ours = localfs_config(good_blob.parent, tmp_path / "cache")
    theirs = ours if registry == "the same" else localfs_config(evil_blob.parent, tmp_path / "cache")

    def read(number: int) -> bytes:
        try:
            return (shared.mountpoint / str(number) / "file").read_bytes()
        except OSError:
            return b"an error"

    mounts = [(1, good, ours), (2, evil, theirs)]
    for number, bootstrap, config in mounts if order == "good first" else mounts[::-1]:
        shared.client.mount(f"/{number}", bootstrap, config)
    evil_bytes = b"an error" if registry == "the same" else b"evil" * 100_000
    for number in (2, 1) if order == "evil first" else (1, 2):
        assert read(number) == (b"good" * 100_000 if number == 1 else evil_bytes)
    # What is in the cache now, and is given to the kernel as it is.
    for number, bootstrap, config in mounts:
        shared.client.umount(f"/{number}")
        shared.client.mount(f"/{number}", bootstrap, config)
    assert (read(1), read(2)) == (b"good" * 100_000, evil_bytes)


def test_a_bootstrap_on_tmpfs_is_mounted(image: Image, shared: Nydusd, tmp_path: Path) -> None:
    memory = Path(f"/dev/shm/nydus-test-{os.getpid()}")
    memory.write_bytes(image.bootstrap.read_bytes())
    try:
        shared.client.mount("/1", memory, localfs_config(image.blobs, tmp_path / "cache"))
        assert (shared.mountpoint / "1/huge").read_bytes() == (image.source / "huge").read_bytes()
        assert [p.name for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")] == []
    finally:
        memory.unlink()


def test_credentials_are_not_shown(image: Image, shared: Nydusd, tmp_path: Path) -> None:
    config: dict[str, Any] = localfs_config(image.blobs, tmp_path / "cache")
    secret = "dXNlcjpwYXNzd29yZA=="
    config["device"]["backend"] = {
        "type": "registry",
        "config": {
            "host": "127.0.0.1:1", "repo": "a/b", "scheme": "http", "auth": secret,
            "proxy": {"url": "http://user:password@127.0.0.1:2"},
        },
    }  # fmt: skip
    shared.client.mount("/1", image.bootstrap, config)
    shared.client.configure("/1", {"registry_auth": secret})
    shown = json.dumps(shared.client.info()) + json.dumps(shared.client.request("GET", "/api/v1/config"))
    assert secret not in shown and "password" not in shown
    assert shared.client.request("GET", "/api/v1/config", id="/1") == {"registry_auth": ""}
    assert secret not in shared.log.read_text()


def test_prefetch_fills_the_cache_by_itself(image: Image, shared: Nydusd, tmp_path: Path) -> None:
    ahead = {"enable": True, "threads_count": 2, "prefetch_all": True}
    config = localfs_config(image.blobs, tmp_path / "cache", fs_prefetch=ahead)
    shared.client.mount("/1", image.bootstrap, config)
    end = time.monotonic() + 20
    while not shared.client.metrics("blobcache")["data_all_ready"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert shared.client.metrics("blobcache")["prefetch_data_amount"] > 1 << 20


def test_bytes_that_are_no_request_do_no_harm(dedicated: Nydusd) -> None:
    for data in (b"\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"\0" * 70000):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(dedicated.socket))
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            try:
                while client.recv(4096):
                    pass
            except ConnectionResetError:
                pass
    assert dedicated.client.state() == "RUNNING"


def test_nydusctl(dedicated: Nydusd, image: Image, shared: Nydusd, tmp_path: Path) -> None:
    def nydusctl(daemon: Nydusd, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = "from nydus.cli.nydusctl import main; main()"
        command = [sys.executable, "-c", program, "--sock", str(daemon.socket), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30)

    assert "RUNNING" in nydusctl(dedicated, "info").stdout
    assert json.loads(nydusctl(dedicated, "--raw", "info").stdout)["state"] == "RUNNING"
    for category in ("backend", "cache", "fsstats"):
        assert nydusctl(dedicated, "metrics", category).returncode == 0
    assert nydusctl(dedicated, "set", "log-level", "info").returncode == 0
    config = tmp_path / "c.json"
    config.write_text(json.dumps(localfs_config(image.blobs, tmp_path / "cache")))
    arguments = ["mount", "-s", str(image.bootstrap), "-c", str(config), "-m", "/1", "-t", "rafs"]
    assert nydusctl(shared, *arguments).returncode == 0
    again = nydusctl(shared, *arguments)
    assert again.returncode == 1 and len(again.stderr.splitlines()) == 1
    assert nydusctl(shared, "umount", "-m", "/1").returncode == 0
