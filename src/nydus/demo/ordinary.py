"""The ordinary way to a container: pull every layer, unpack every layer.

A process of its own (``python -m nydus.demo.ordinary``), so that it does not share an interpreter with
the registry it pulls from. It says ``ready`` once it is imported and then does one job, given as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from nydus.errors import NydusError
from nydus.oci import model
from nydus.oci.registry import Registry, Repository

PARALLEL_DOWNLOADS = 3  # as containerd does


@dataclass(frozen=True)
class Job:
    """Pull ``repository:tag`` from ``host`` over plain http into the existing ``folder``."""

    host: str
    repository: str
    tag: str
    folder: str


def pull(job: Job) -> list[Path]:
    """Download, check and unpack all layers; returns their folders, lowest first.

    Raises:
        NydusError: the registry refused, a digest is wrong, or tar failed.
    """
    folder = Path(job.folder)
    with Registry(job.host, plain_http=True) as registry, ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        repository = registry.repository(job.repository)
        manifest = model.decode(repository.manifest(job.tag)[1], model.Manifest, job.tag)
        repository.document(manifest.config)
        downloads = [pool.submit(_download, repository, layer, folder) for layer in manifest.layers]
        unpacked = []
        for number, download in enumerate(downloads):
            target = folder / f"layer-{number}"
            target.mkdir()
            done = subprocess.run(
                ["tar", "-xzpf", str(download.result()), "-C", str(target)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise NydusError(f"tar could not unpack layer {number}: {done.stderr.strip()}")
            unpacked.append(target)
        return unpacked


def _download(repository: Repository, layer: model.Descriptor, folder: Path) -> Path:
    path = folder / layer.digest.replace(":", "-")
    with repository.blob(layer.digest, layer.size) as stream, open(path, "xb") as file:
        while piece := stream.read(1 << 20):
            file.write(piece)
    return path


def main() -> None:
    print("ready", flush=True)
    try:
        job = Job(**json.loads(sys.stdin.readline() or "null"))
        layers = pull(job)
    except NydusError as error:
        sys.exit(str(error))
    print(json.dumps({"layers": [str(path) for path in layers], "ended": time.monotonic()}), flush=True)


class Puller:
    """Starts the process and waits until it is ready; a context manager that ends it and what it started."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nydus.demo.ordinary"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def pull(self, job: Job) -> list[Path]:
        """As the function :func:`pull`, over there."""
        output, errors = self.process.communicate(json.dumps(asdict(job)) + "\n")
        if self.process.returncode:
            raise NydusError((errors.strip().splitlines() or ["the pull was ended"])[-1])
        return [Path(path) for path in json.loads(output)["layers"]]

    def __enter__(self) -> Puller:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


if __name__ == "__main__":
    main()
