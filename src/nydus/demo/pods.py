"""The same starts under a real containerd and runc, by way of the CRI, in private directories."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from nydus.demo.containerd import PrivateContainerd, push_pause_image
from nydus.demo.cri import Container
from nydus.demo.report import Measurement, Speed
from nydus.demo.scene import NYDUS_TAG, OCI_TAG, REPOSITORY, disk_use
from nydus.errors import NydusError
from nydus.oci.registry import Registry
from nydus.oci.server import RegistryServer

PAUSE = "demo/pause"
START_SECONDS = 20
OUTPUT_SECONDS = 120


class Snapshotter:
    """Our snapshotter as a process; a context manager that ends it, its daemons and their mounts.

    Args:
        folder: existing, with a short path: sockets lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self.address = folder / "grpc.sock"
        self.log = folder / "snapshotter.log"
        config = folder / "config.toml"
        config.write_text(
            f'version = 1\nroot = "{folder / "root"}"\naddress = "{self.address}"\ncleanup_on_close = true\n'
        )
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", "from nydus.cli.containerd_nydus_grpc import main; main()"),
                    *("--config", str(config), "--log-to-stdout"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Snapshotter:
        end = time.monotonic() + START_SECONDS
        while not self.address.is_socket():
            if self.process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                lines = self.log.read_text(errors="replace").strip().splitlines()
                raise NydusError(
                    f"the snapshotter did not start: {lines[-1] if lines else 'it said nothing'}"
                )
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class PodScene:
    """Containers of a containerd that is new for each start, so that it knows no image."""

    def __init__(self, server: RegistryServer) -> None:
        self.server = server
        with Registry(server.host, plain_http=True) as registry:
            push_pause_image(registry.repository(PAUSE))

    def measure(self, way: str, speed: Speed, place: Path) -> Measurement:
        """See :class:`nydus.demo.scene.Scene`; counted from the pull, in a pod that runs already."""
        image = f"{self.server.host}/{REPOSITORY}:{NYDUS_TAG if way == 'lazy' else OCI_TAG}"
        with ExitStack() as stack:
            address = stack.enter_context(Snapshotter(place)).address if way == "lazy" else None
            containerd = stack.enter_context(
                PrivateContainerd(place / "c", address, sandbox_image=f"{self.server.host}/{PAUSE}:latest")
            )
            pod = containerd.cri.pod()
            before = disk_use(place)
            self.server.throttle_bytes_per_second = speed.limit
            self.server.reset_counters()
            start = time.monotonic()
            containerd.cri.pull(image)
            ready = time.monotonic()
            container = pod.run(image)
            output = first_output(container)
            first = time.monotonic()
            if code := container.wait():
                raise NydusError(f"the container ended with {code}: {container.output().strip() or output}")
            counters = self.server.counters
            self.server.throttle_bytes_per_second = None
            return Measurement(
                way,
                speed,
                ready - start,
                first - start,
                counters.bytes_sent,
                counters.requests,
                disk_use(place) - before,
                [(moment - start, sent) for moment, sent in counters.samples],
                container.output().strip(),
            )


def first_output(container: Container) -> str:
    """Wait until a container has printed something.

    Raises:
        NydusError: it does not.
    """
    end = time.monotonic() + OUTPUT_SECONDS
    while not (output := container.output()):
        if time.monotonic() > end:
            raise NydusError(f"the container printed nothing in {OUTPUT_SECONDS} s")
        time.sleep(0.002)
    return output
