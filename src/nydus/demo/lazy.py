"""The lazy way to a container: fetch the bootstrap, mount it through a running nydusd."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from nydus.daemon.client import DaemonClient
from nydus.errors import NydusError
from nydus.oci import model
from nydus.oci.registry import Repository
from nydus.snapshotter.daemons import detach

STOP_SECONDS = 20


class Daemon:
    """A ``nydusd`` that waits for mounts; leaving the context unmounts everything and ends it.

    Args:
        folder: existing folder for its socket, log and mountpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.mountpoint = folder / "mnt"
        self.mountpoint.mkdir()
        self.log = folder / "nydusd.log"
        socket = folder / "api.sock"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "nydus.cli.nydusd",
                    "--mountpoint",
                    self.mountpoint,
                    "--apisock",
                    socket,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.client = DaemonClient(socket)

    def __enter__(self) -> Daemon:
        try:
            self.client.wait("RUNNING", timeout=30)
        except NydusError as error:
            self.__exit__()
            lines = self.log.read_text(errors="replace").strip().splitlines()
            raise NydusError(f"nydusd did not start: {lines[-1] if lines else error}") from error
        return self

    def mount(self, name: str, bootstrap: Path, config: dict[str, Any]) -> Path:
        """Mount an image as ``name``; returns its root folder."""
        self.client.mount(f"/{name}", bootstrap, config)
        return self.mountpoint / name

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        detach(self.mountpoint)


def fetch_bootstrap(repository: Repository, tag: str, folder: Path) -> Path:
    """Unpack the bootstrap layer of a Nydus image into ``folder``; returns the bootstrap.

    Raises:
        NydusError: the image is not a Nydus image, or its last layer is not what it says.
    """
    manifest = model.decode(repository.manifest(tag)[1], model.Manifest, f"{repository}:{tag}")
    repository.document(manifest.config)
    layer = manifest.layers[-1]
    if model.NYDUS_BOOTSTRAP not in layer.annotations:
        raise NydusError(f"{repository}:{tag} is not a Nydus image")
    with repository.blob(layer.digest, layer.size) as stream:
        with tarfile.open(fileobj=stream, mode="r|gz") as tar:
            tar.extractall(folder, filter="data")
    return folder / "image" / "image.boot"


def registry_config(host: str, repository: str, cache: Path) -> dict[str, Any]:
    """A nydusd configuration: read from a plain-http registry, keep what was read in ``cache``."""
    return {
        "device": {
            "backend": {
                "type": "registry",
                "config": {"scheme": "http", "host": host, "repo": repository, "timeout": 30},
            },
            "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
        },
        "mode": "direct",
        "digest_validate": False,
        "fs_prefetch": {"enable": False},
    }
