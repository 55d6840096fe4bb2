"""The demo: its image is real and reproducible, its figures come from what moved."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from nydus.demo.image import COMMAND, ENV, DemoImage, build


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
