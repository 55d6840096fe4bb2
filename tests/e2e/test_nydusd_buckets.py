"""A daemon whose blobs are in an object store."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import closing
from pathlib import Path

import pytest
from nydusd_process import Nydusd

import nydus

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from objectstore_server import SECRET, ObjectStoreServer

pytestmark = pytest.mark.root

FILES = {f"file{number}": os.urandom(3 << 20) for number in range(6)}


@pytest.mark.parametrize("kind", ["s3", "oss"])
def test_a_successor_reads_on(tmp_path: Path, kind: str) -> None:
    """The client of the store has threads, which a fork would lose: each worker makes its own."""
    for folder in ("root", "blobs"):
        (tmp_path / folder).mkdir()
    for name, data in FILES.items():
        (tmp_path / "root" / name).write_bytes(data)
    nydus.create(str(tmp_path / "root"), str(tmp_path / "blobs")).save(tmp_path / "bootstrap")
    with closing(ObjectStoreServer()) as server:
        for blob in (tmp_path / "blobs").iterdir():
            server.objects[f"images/nydus/{blob.name}"] = blob.read_bytes()
        cache = {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}}
        config = {"device": {"backend": {"type": kind, "config": server.config()}, "cache": cache}}
        with Nydusd.of(tmp_path / "daemon", tmp_path / "bootstrap", config) as daemon:
            for number, (name, data) in enumerate(FILES.items()):
                if number % 2:
                    assert daemon.worker
                    os.kill(daemon.worker, signal.SIGKILL)
                assert (daemon.mountpoint / name).read_bytes() == data
            assert daemon.client.metrics("backend")["backend_type"] == kind
            assert SECRET not in str(daemon.client.info())
            assert daemon.stop() == 0
            assert SECRET not in daemon.log.read_text()
            assert not daemon.mounts()
