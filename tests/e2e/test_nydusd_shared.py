"""Images that have a blob in common share its file; what each knows of it outlives a worker."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nydusd_process import Nydusd, localfs_config

pytestmark = pytest.mark.root

SIZE = 300_000


class Family:
    """``whole`` has the files a and b of a layer; ``part`` replaces a, and so only uses b of that layer."""

    def __init__(self, folder: Path) -> None:
        dice = random.Random(3)
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True)
        self.content = {name: dice.randbytes(SIZE) for name in ("a", "b", "new a")}
        lower = self._layer(folder / "lower", {"a": self.content["a"], "b": self.content["b"]})
        (self.blob,) = self.blobs.iterdir()
        upper = self._layer(folder / "upper", {"a": self.content["new a"]})
        self.whole, self.part = folder / "whole", folder / "part"
        run("merge", "--bootstrap", str(self.whole), str(lower))
        run("merge", "--bootstrap", str(self.part), str(lower), str(upper))

    def _layer(self, folder: Path, files: dict[str, bytes]) -> Path:
        source, bootstrap = folder / "source", folder / "bootstrap"
        source.mkdir(parents=True)
        for name, data in files.items():
            (source / name).write_bytes(data)
        run(
            "create",
            str(source),
            "--bootstrap",
            str(bootstrap),
            "--blob-dir",
            str(self.blobs),
            "--compressor",
            "none",
        )
        newest = max(self.blobs.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return bootstrap.rename(folder / newest.name)  # how a merge learns the id of the blob


def run(*arguments: str) -> None:
    program = "from nydus.cli.nydus_image import main; main()"
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path / "images")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Nydusd]:
    with Nydusd(tmp_path) as running:
        yield running


def replace_worker(daemon: Nydusd) -> None:
    os.kill(daemon.worker or 0, signal.SIGKILL)


def test_a_successor_verifies_what_any_image_knows(family: Family, daemon: Nydusd, tmp_path: Path) -> None:
    config = localfs_config(family.blobs, tmp_path / "cache")
    daemon.client.mount("/part", family.part, config)  # the one that describes the blob to the successor
    daemon.client.mount("/whole", family.whole, config)
    data = family.blob.read_bytes()
    at = data.index(family.content["a"])
    with family.blob.open("r+b") as file:
        file.seek(at)
        file.write(b"wrong")
    replace_worker(daemon)
    assert (daemon.mountpoint / "part/b").read_bytes() == family.content["b"]
    with pytest.raises(OSError) as caught:
        (daemon.mountpoint / "whole/a").read_bytes()
    assert caught.value.errno == errno.EIO
    with family.blob.open("r+b") as file:
        file.seek(at)
        file.write(data[at : at + 5])
    assert (daemon.mountpoint / "whole/a").read_bytes() == family.content["a"]


def test_a_successor_needs_no_bootstrap_of_an_image_that_is_gone(
    family: Family, daemon: Nydusd, tmp_path: Path
) -> None:
    config = localfs_config(family.blobs, tmp_path / "cache")
    daemon.client.mount("/part", family.part, config)
    daemon.client.mount("/whole", family.whole, config)
    daemon.client.umount("/part")
    family.part.unlink()
    for _ in range(2):
        replace_worker(daemon)
        assert (daemon.mountpoint / "whole/b").read_bytes() == family.content["b"]
    assert (daemon.mountpoint / "whole/a").read_bytes() == family.content["a"]
