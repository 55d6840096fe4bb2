from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import QUICK, FaultyRegistry

from nydus.oci.registry import Registry


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyRegistry]:
    with FaultyRegistry(tmp_path / "registry") as server:
        yield server


@pytest.fixture
def registry(server: FaultyRegistry) -> Iterator[Registry]:
    with Registry(server.host, plain_http=True, policy=QUICK) as registry:
        yield registry
