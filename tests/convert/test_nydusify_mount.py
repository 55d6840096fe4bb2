"""``nydusify mount``: what it shows, and that it leaves nothing, however it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty import FaultyRegistry

from nydus.convert.copy import copy
from nydus.convert.opened import open_nydus, put_variant
from nydus.daemon.client import DaemonClient
from nydus.oci import model
from nydus.oci.archive import write_archive
from nydus.oci.layout import Layout
from nydus.oci.place import ArchivePlace, LayoutPlace, RegistryPlace
from nydus.oci.reference import parse

pytestmark = [pytest.mark.vectors, pytest.mark.root]


@pytest.fixture(params=["v6-zstd", "v5-zstd"])
def image(server: FaultyRegistry, vectors: Path, request: pytest.FixtureRequest) -> str:
    reference = f"{server.host}/small:nydus"
    place = RegistryPlace(parse(reference), plain_http=True)
    copy(ArchivePlace(vectors / f"oci/{request.param}.tar"), place)
    return reference


def start(folder: Path, reference: str, *more: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [Path(sys.executable).with_name("nydusify"), "mount", "--target", reference, "--plain-http",
         "--json", "--quiet", *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, start_new_session=True,
    )  # fmt: skip


def mounted(process: subprocess.Popen[str]) -> dict[str, object]:
    """Waits for the mount; what the command says of it."""
    assert process.stdout
    line = process.stdout.readline()
    assert line, process.communicate(timeout=30)[1]
    found: dict[str, object] = json.loads(line)
    return found


def processes(folder: Path) -> list[str]:
    """The command lines of processes that have to do with a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if str(folder) in words or (entry / "cwd").resolve() == folder:
                    found.append(words)
        except OSError:
            pass
    return found


def nothing_is_left(folder: Path) -> None:
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    deadline = time.monotonic() + 5
    while left := processes(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert list(folder.iterdir()) == []


def by_sigterm(process: subprocess.Popen[str]) -> None:
    process.terminate()


def by_ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def by_losing_the_terminal(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGHUP)


@pytest.mark.parametrize(("end", "code"), [(by_sigterm, 0), (by_ctrl_c, 0), (by_losing_the_terminal, 129)])
def test_a_mount_and_its_end(
    image: str, tmp_path: Path, end: Callable[[subprocess.Popen[str]], None], code: int
) -> None:
    folder = tmp_path / "cwd"
    with start(folder, image) as process:
        try:
            found = mounted(process)
            mountpoint = folder / "image-fs"
            assert found["mountpoint"] == str(mountpoint) and os.path.ismount(mountpoint)
            names = sorted(path.name for path in mountpoint.iterdir())
            assert {"a", "hard2"} <= set(names)
            files = [path for path in mountpoint.rglob("*") if path.is_file() and not path.is_symlink()]
            assert sum(len(path.read_bytes()) for path in files) > 1000
            work = folder / "tmp"
            assert found["work_dir"] == str(work)
            assert sorted(path.name for path in work.iterdir()) == [
                "fs", "nydus_bootstrap", "nydus_config.json", "nydus_manifest.json"
            ]  # fmt: skip
            assert json.loads((work / "nydus_manifest.json").read_bytes())["layers"]
            assert json.loads((work / "nydus_config.json").read_bytes())["os"] == "linux"
            assert {"nydus_api.sock", "nydus_blobs", "nydusd_config.json"} <= {
                path.name for path in (work / "fs").iterdir()
            }
            assert (work / "fs/nydus_api.sock").resolve() == Path(str(found["api_socket"])).resolve()
            assert DaemonClient(str(found["api_socket"])).state() == "RUNNING"
        finally:
            end(process)
            stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == code and stdout == ""
        assert "Traceback" not in stderr and (code or stderr == "")
    nothing_is_left(folder)


def test_folders_that_were_there_stay(image: str, tmp_path: Path) -> None:
    folder = tmp_path / "cwd"
    (folder / "here").mkdir(parents=True)
    (folder / "here/file").write_text("hidden meanwhile")
    (folder / "work").mkdir()
    (folder / "work/mine").write_text("")
    with start(folder, image, "--mount-path", "here", "--work-dir", "work") as process:
        mounted(process)
        assert not (folder / "here/file").exists()
        by_sigterm(process)
        process.communicate(timeout=30)
    assert (folder / "here/file").read_text() == "hidden meanwhile"
    assert [path.name for path in (folder / "work").iterdir()] == ["mine"]
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("delay", [0.6, 0.9, 1.2])
def test_an_end_while_it_starts(image: str, tmp_path: Path, delay: float) -> None:
    folder = tmp_path / "cwd"
    with start(folder, image) as process:
        time.sleep(delay)
        by_sigterm(process)
        stderr = process.communicate(timeout=30)[1]
        assert "Traceback" not in stderr
    nothing_is_left(folder)


def test_a_daemon_that_is_killed(image: str, tmp_path: Path) -> None:
    folder = tmp_path / "cwd"
    with start(folder, image) as process:
        pid = mounted(process)["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        stderr = process.communicate(timeout=30)[1]
        assert process.returncode == 1
        assert "nydusd ended with status -9" in stderr and "Traceback" not in stderr
    nothing_is_left(folder)


def test_other_files_beside_the_bootstrap(image: str, tmp_path: Path) -> None:
    """None of them takes its place, whatever it is called."""
    place = RegistryPlace(parse(image), plain_http=True)
    opened = open_nydus(place)
    others = {"other/image.boot": b"not this one", "image/new\nline": b"", ".": b""}
    put_variant(
        opened,
        place.open_sink(),
        "others",
        opened.tree,
        opened.blobs,
        metas={},
        annotations={},
        others=others,
    )
    folder = tmp_path / "cwd"
    with start(folder, image.replace(":nydus", ":others")) as process:
        try:
            mounted(process)
        finally:
            process.terminate()
            assert process.communicate(timeout=30)[1] == ""
    nothing_is_left(folder)


def test_an_image_that_cannot_be_mounted(server: FaultyRegistry, image: str, tmp_path: Path) -> None:
    place = RegistryPlace(parse(image), plain_http=True)
    _, data = place.open().manifest("nydus")
    document = json.loads(data)
    del document["layers"][-1]["annotations"]
    place.open_sink().put_manifest("plain", json.dumps(document).encode(), model.OCI_MANIFEST)
    folder = tmp_path / "cwd"
    with start(folder, f"{server.host}/small:plain") as process:
        stderr = process.communicate(timeout=30)[1]
        assert process.returncode == 1 and "is not a Nydus image" in stderr
    nothing_is_left(folder)


@pytest.mark.parametrize("name", ["v6-zstd.tar", "v5-zstd.tar.gz", "layout", "oci-ref.tar.zst"])
def test_images_in_files(vectors: Path, tmp_path: Path, name: str) -> None:
    folder, path = tmp_path / "cwd", tmp_path / name
    image = name.partition(".")[0]
    layout = path if name == "layout" else tmp_path / "made"
    source = ArchivePlace(vectors / f"oci/{'v6-zstd' if name == 'layout' else image}.tar")
    copy(source, LayoutPlace(layout, "latest"))
    if name == "oci-ref.tar.zst":  # the vector's layers are in the image it was made of
        copy(ArchivePlace(vectors / "oci/source.tar"), LayoutPlace(tmp_path / "source"))
        for blob in (tmp_path / "source/blobs/sha256").iterdir():
            (layout / "blobs/sha256" / blob.name).write_bytes(blob.read_bytes())
    if name != "layout":
        write_archive(Layout(layout), path, parse("r.io/app:latest"))
    with start(folder, f"file://{path}") as process:
        try:
            mounted(process)
            assert (folder / "image-fs/a").is_dir() or (folder / "image-fs/a").exists()
            files = [each for each in (folder / "image-fs").rglob("*") if each.is_file()]
            assert sum(len(each.read_bytes()) for each in files if not each.is_symlink()) > 1000
        finally:
            process.terminate()
            stderr = process.communicate(timeout=30)[1]
        assert process.returncode == 0 and stderr == ""
    nothing_is_left(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_end_while_an_archive_is_unpacked(vectors: Path, tmp_path: Path, number: signal.Signals) -> None:
    folder, layout = tmp_path / "cwd", tmp_path / "made"
    copy(ArchivePlace(vectors / "oci/v6-zstd.tar"), LayoutPlace(layout, "latest"))
    big = layout / "blobs/sha256" / ("0" * 64)
    with open(big, "wb") as file:
        file.truncate(3 << 30)
    path = tmp_path / "big.tar.zst"
    write_archive(Layout(layout), path, parse("r.io/app:latest"))
    with start(folder, f"file://{path}") as process:
        deadline = time.monotonic() + 30
        while not list((folder / "tmp").glob("nydusify-*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        stderr = process.communicate(timeout=30)[1]
        assert process.returncode == 128 + number and "Traceback" not in stderr
    nothing_is_left(folder)


def test_a_work_folder_is_for_one_mount(image: str, tmp_path: Path) -> None:
    folder = tmp_path / "cwd"
    with start(folder, image) as process:
        try:
            mounted(process)
            with start(folder, image, "--mount-path", "second") as other:
                assert "another mount uses it" in other.communicate(timeout=30)[1]
                assert other.returncode == 1
            assert os.path.ismount(folder / "image-fs") and (folder / "tmp/nydus_bootstrap").exists()
        finally:
            process.terminate()
            process.communicate(timeout=30)
    nothing_is_left(folder)
    (folder / "tmp/fs").mkdir(parents=True)
    (folder / "tmp/fs/mine").write_text("")
    with start(folder, image) as process:
        assert "has something called fs" in process.communicate(timeout=30)[1]
    assert (folder / "tmp/fs/mine").exists() and not (folder / "image-fs").exists()


def test_a_mount_after_one_that_was_killed(image: str, tmp_path: Path) -> None:
    folder = tmp_path / "cwd"
    with start(folder, image) as process:
        found = mounted(process)
        pid, socket = found["pid"], Path(str(found["api_socket"]))
        process.kill()
        process.communicate(timeout=30)
    with start(folder, image) as process:  # the daemon lives on
        assert "another mount uses it" in process.communicate(timeout=30)[1]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while os.path.ismount(folder / "image-fs"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with start(folder, image) as process:
        try:
            mounted(process)
        finally:
            process.terminate()
            assert process.communicate(timeout=30)[1] == ""
    assert list((folder / "tmp").iterdir()) == [] and list((folder / "image-fs").iterdir()) == []
    if not socket.is_relative_to(folder):  # of the first, where this folder's name is too long
        shutil.rmtree(socket.parent)
