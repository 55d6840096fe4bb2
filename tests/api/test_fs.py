"""Images through fsspec."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import nydus

fsspec = pytest.importorskip("fsspec")

from nydus.fs import NydusFileSystem  # noqa: E402

DATA = bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a bootstrap and its blob."""
    root = tmp_path_factory.mktemp("rootfs")
    (root / "data").mkdir()
    (root / "data" / "table.csv").write_text("a,b\n1,2\n")
    (root / "data" / "big").write_bytes(DATA)
    (root / "current").symlink_to("data")
    (root / "data" / "link.csv").symlink_to("table.csv")
    (root / "lost").symlink_to("/nowhere")
    folder = tmp_path_factory.mktemp("image")
    nydus.create(root, folder, chunk_size=0x4000).save(folder / "boot")
    fsspec.register_implementation("nydus", NydusFileSystem, clobber=True)
    return folder


def test_url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with fsspec.open("nydus://data/table.csv::./boot", "rt") as file:
        assert file.read() == "a,b\n1,2\n"
    with fsspec.open(f"nydus://data/table.csv::{folder}/boot", "rt") as file:
        assert file.read() == "a,b\n1,2\n"
    with fsspec.open(f"nydus:///current/link.csv::file://{folder}/boot") as file:
        assert file.read() == b"a,b\n1,2\n"


def test_image_and_blobs_in_another_file_system(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/image/{path.name}", path.read_bytes())
    try:
        with fsspec.open("nydus://data/big::memory://image/boot") as file:
            assert file.read() == DATA
        other = NydusFileSystem(str(folder / "boot"), blobs="memory://image")
        assert other.cat_file("/data/big", 5, 10) == DATA[5:10]
    finally:
        memory.rm("/image", recursive=True)


def test_file_system(folder: Path) -> None:
    fs = NydusFileSystem(folder / "boot")
    assert fs.ls("/", detail=False) == ["/current", "/data", "/lost"]
    assert fs.find("/") == ["/current", "/data/big", "/data/link.csv", "/data/table.csv", "/lost"]
    assert fs.glob("/data/*.csv") == ["/data/link.csv", "/data/table.csv"]
    assert fs.info("/data/big")["size"] == len(DATA) and fs.isdir("/current") and not fs.isfile("/lost")
    assert fs.info("/data/link.csv") | {"islink": True, "destination": "table.csv", "size": 8} == fs.info(
        "/data/link.csv"
    )
    assert fs.cat_file("data/big", -10) == DATA[-10:]
    assert fs.cat_ranges(["/data/big"] * 2, [0, 100_000], [3, 100_004]) == [DATA[:3], DATA[100_000:100_004]]
    with fs.open("/data/big") as file:
        file.seek(1000)
        assert file.read(7) == DATA[1000:1007]
    with pytest.raises(FileNotFoundError):
        fs.open("/nothing")
    with pytest.raises(nydus.NydusError):
        fs.open("/data/big", "wb")
    with pytest.raises(nydus.NydusError, match="which image"):
        NydusFileSystem()


def test_download(folder: Path, tmp_path: Path) -> None:
    NydusFileSystem(folder / "boot").get("/data/", str(tmp_path / "out"), recursive=True)
    assert (tmp_path / "out" / "big").read_bytes() == DATA
    assert sorted(os.listdir(tmp_path / "out")) == ["big", "link.csv", "table.csv"]  # noqa: PTH208
