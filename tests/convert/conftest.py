from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "oci"))

import docker_registry as real
from faulty import FaultyRegistry
from nydusify_command import Nydusify

from nydus.convert.copy import copy
from nydus.oci.place import ArchivePlace, RegistryPlace
from nydus.oci.reference import parse


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyRegistry]:
    with FaultyRegistry(tmp_path / "registry") as server:
        yield server


@pytest.fixture
def source(server: FaultyRegistry, vectors: Path) -> str:
    """The source image of the vectors, in the registry."""
    reference = f"{server.host}/small:latest"
    copy(ArchivePlace(vectors / "oci/source.tar"), RegistryPlace(parse(reference), plain_http=True))
    server.seen.clear()
    return reference


@pytest.fixture
def docker_registry(tmp_path: Path) -> Iterator[str]:
    """The host of an empty docker-registry that takes everybody."""
    if not shutil.which("docker-registry"):
        pytest.skip("docker-registry is not installed")
    with real.registry(tmp_path) as host:
        yield host


@pytest.fixture
def nydusify(tmp_path: Path) -> Nydusify:
    folder = tmp_path / "cwd"
    folder.mkdir()
    return Nydusify(folder)
