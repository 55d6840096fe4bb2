"""The demo: its image is real and reproducible, its figures come from what moved, nothing stays behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from nydus.demo import run as demo
from nydus.demo.image import COMMAND, ENV, DemoImage, build
from nydus.demo.report import Speed


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> DemoImage:
    return build(tmp_path_factory.mktemp("demo") / "image")


def test_image_is_an_oci_layout_of_useful_size(image: DemoImage) -> None:
    index = json.loads((image.layout / "index.json").read_text())
    blobs = image.layout / "blobs" / "sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_bytes())
    sizes = {f"sha256:{path.name}": path.stat().st_size for path in blobs.iterdir()}
    assert len(manifest["layers"]) >= 3
    assert all(sizes[layer["digest"]] == layer["size"] for layer in manifest["layers"])
    assert image.size > 20_000_000
    assert image.files > 2000


def test_image_is_reproducible(image: DemoImage, tmp_path: Path) -> None:
    assert build(tmp_path / "again").manifest == image.manifest


@pytest.mark.root
def test_image_runs_in_a_chroot(image: DemoImage, tmp_path: Path) -> None:
    for layer in image.layers:
        with tarfile.open(image.layout / "blobs" / "sha256" / layer.digest[7:]) as tar:
            tar.extractall(tmp_path, filter="tar")
    done = subprocess.run(
        ["/usr/sbin/chroot", str(tmp_path), *COMMAND],
        env=dict(entry.split("=", 1) for entry in ENV),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "the data is intact" in done.stdout, done.stderr


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the demo's workspace, afterwards empty again and named by no mount and no process.

    Sockets lie in the workspace, for which pytest's own folders are too deep.
    """
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/var/tmp"))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    end = time.monotonic() + 5
    while (left := leftovers(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []
    folder.rmdir()


def leftovers(folder: Path) -> list[str]:
    """Files in ``folder``, mounts below it and processes that name it."""
    found = [path.name for path in folder.iterdir()]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text(errors="replace")
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


@pytest.mark.root
@pytest.mark.parametrize("containerd", [False, pytest.param(True, marks=pytest.mark.containerd)])
def test_lazy_start_moves_less_and_nothing_stays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: Path,
    containerd: bool,
) -> None:
    if containerd and not (shutil.which("containerd") and shutil.which("busybox")):
        pytest.skip("containerd or busybox is not installed")
    monkeypatch.setattr(demo, "SPEEDS", (Speed("full speed", None), Speed("20 MB/s", 20_000_000)))
    measured = demo.run(tmp_path / "demo.png", Console(file=sys.stdout, width=130), containerd=containerd)
    assert [one.way for one in measured] == ["lazy", "ordinary"] * 2
    for lazy, ordinary in (measured[:2], measured[2:]):
        assert "the data is intact" in lazy.output
        assert lazy.output == ordinary.output
        assert lazy.fetched < ordinary.fetched / 2
        assert lazy.disk < ordinary.disk / 2
        assert 0 < lazy.ready < lazy.first_output
        assert lazy.samples[-1][1] == lazy.fetched
    assert measured[2].first_output < measured[3].first_output / 2
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "demo.png") in capsys.readouterr().out
    assert leftovers(place) == []


@pytest.mark.root
@pytest.mark.parametrize(
    "moment",
    ["making an image", "converting", "lazy, full speed", "ordinary, full"],
    ids=lambda text: text[:5],
)
def test_interrupted_demo_leaves_nothing(tmp_path: Path, place: Path, moment: str) -> None:
    script = (
        "import sys; from pathlib import Path; from rich.console import Console; from nydus.demo import run\n"
        "begin = run.Steps.step\n"
        "def step(self, title, total=None): print(title, flush=True); return begin(self, title, total)\n"
        "run.Steps.step = step\n"
        "run.run(Path(sys.argv[1]), Console(stderr=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "demo.png")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if moment in line:
                break
        else:
            pytest.fail(f"the demo never said {moment!r}")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    assert list(place.iterdir()) == []


def test_refuses_without_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nydus.errors import NydusError

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NydusError, match="run it as root"):
        demo.run(tmp_path / "demo.png", Console())
