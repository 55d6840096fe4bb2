"""A node for tests: an embedded registry, our snapshotter as a process, a real containerd in front of it."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType

from nydus.convert.copy import copy
from nydus.demo.containerd import PrivateContainerd, PrivateSnapshotter, push_pause_image
from nydus.demo.cri import Container, Pod
from nydus.oci.place import ArchivePlace, registry_place
from nydus.oci.reference import parse
from nydus.oci.registry import Registry
from nydus.oci.server import RegistryServer
from nydus.snapshotter.daemons import mounts_below

LIST = ("snapshots", "--snapshotter", "nydus", "ls")
NAMES = ("containerd", "runc", "ctr", "busybox")


class Node:
    """Everything below one short directory. A context manager that checks that nothing is left of it."""

    def __init__(self, mode: str = "dedicated", *options: str) -> None:
        self.mode = mode
        # pytest's own directories are too deep for sockets; a directory on the same disk is not.
        self.directory = Path(tempfile.mkdtemp(prefix="node-"))
        self.root = self.directory / "s"
        self.snapshotter = PrivateSnapshotter(self.root, "--daemon-mode", mode, *options)
        self.server = RegistryServer(self.directory / "registry")
        self.host = self.server.host
        self.containerd = PrivateContainerd(
            self.directory / "c", self.snapshotter.address, sandbox_image=f"{self.host}/pause:latest"
        )
        self.cri = self.containerd.cri
        self._connected = False

    def __enter__(self) -> Node:
        self.server.__enter__()
        with Registry(self.host, plain_http=True) as registry:
            push_pause_image(registry.repository("pause"))
        self.start_snapshotter()
        self.containerd.start()
        self._connected = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.containerd.close()
            self.snapshotter.close()
            left = [str(path) for path in mounts_below(self.directory)]
            running = self.processes()
        finally:
            self.server.__exit__(kind, error, trace)
        shutil.rmtree(self.directory, ignore_errors=bool(left))
        if error is None:
            assert left == [], "mounts were left"
            assert running == {}, "processes were left"

    # The snapshotter

    def start_snapshotter(self) -> None:
        self.snapshotter.start()
        if self._connected:
            self.wait_for_containerd()

    def wait_for_containerd(self) -> None:
        """containerd tries to connect to a snapshotter that was away only now and then."""
        end = time.monotonic() + 20
        while self.containerd.ctr(*LIST, check=False).returncode:
            assert time.monotonic() < end, "containerd does not come back to the snapshotter"
            time.sleep(0.1)

    def kill_snapshotter(self) -> None:
        assert self.snapshotter.process is not None
        self.snapshotter.process.kill()
        self.snapshotter.process.wait()

    # Images and containers

    def push(self, archive: Path, tag: str) -> str:
        """Push an OCI archive to the repository ``run``; returns its reference."""
        reference = f"{self.host}/run:{tag}"
        copy(ArchivePlace(archive), registry_place(parse(reference), plain_http=True))
        return reference

    def run(self, reference: str, *command: str) -> tuple[int, str]:
        """Pull and run an image through the CRI; the exit code and what it printed."""
        self.cri.pull(reference)
        pod = self.cri.pod()
        container = pod.run(reference, command)
        code = container.wait()
        output = container.output()
        pod.remove()
        return code, output

    def start(self, reference: str, *command: str) -> tuple[Pod, Container]:
        """Pull an image and start a container that stays."""
        self.cri.pull(reference)
        pod = self.cri.pod()
        return pod, pod.run(reference, command or ("/bin/sh", "-c", "while :; do sleep 1; done"))

    def remove_images(self) -> None:
        for image in self.cri.image_ids():
            self.cri.remove_image(image)
        self.containerd.collect_garbage()

    # What is there

    def daemon_sockets(self) -> list[Path]:
        return sorted(self.root.glob("socket/*/api.sock"))

    def image_mounts(self) -> list[Path]:
        return mounts_below(self.root / "mnt")

    def processes(self) -> dict[int, str]:
        """Processes, other than ours, whose command line or open mounts name this node."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                except OSError:
                    continue
                if str(self.directory) in command:
                    found[int(entry.name)] = command
        return found

    def files(self) -> set[str]:
        """Every file below the snapshotter's root but its database and lock."""
        return {
            str(path.relative_to(self.root))
            for path in self.root.rglob("*")
            if not path.is_dir() and not path.name.startswith("metadata.db") and path.name != "lock"
        }


def missing() -> list[str]:
    """The programs these tests need and this machine lacks."""
    return [name for name in NAMES if shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin") is None]
