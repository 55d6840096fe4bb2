"""A nydusd of a test, which leaves nothing behind whatever happens to the test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from nydus.daemon.client import DaemonClient
from nydus.mount import syscalls, table


def localfs_config(blobs: Path, cache: Path, **more: object) -> dict[str, object]:
    """A v1 document for blobs in a directory."""
    return {
        "device": {
            "id": "/",
            "backend": {"type": "localfs", "config": {"dir": str(blobs)}},
            "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
        },
        "mode": "direct",
        **more,
    }


class Nydusd:
    """Runs ``nydusd`` in a folder of its own.

    Args:
        folder: for the mountpoint ``mnt``, the API socket and the log.
        arguments: added to ``--mountpoint`` and ``--apisock``.
    """

    def __init__(self, folder: Path, *arguments: str, wait: bool = True, name: str = "") -> None:
        self.folder = folder
        self.mountpoint = folder / "mnt"
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        self.socket = folder / f"api{name}.sock"
        self.log = folder / f"log{name}.txt"
        self.client = DaemonClient(self.socket, timeout=20)
        command = [sys.executable, "-m", "nydus.cli.nydusd", "--mountpoint", str(self.mountpoint)]
        command += ["--apisock", str(self.socket), *arguments]
        with self.log.open("ab") as log:
            # If the test's process is killed the daemon ends as if by a user.
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: syscalls.die_with_parent(signal.SIGTERM),
            )
        self.wait = wait

    @classmethod
    def of(cls, folder: Path, bootstrap: Path, config: dict[str, object], *arguments: str) -> Nydusd:
        """One image, mounted at once."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "config.json"
        file.write_text(json.dumps(config))
        return cls(folder, "--bootstrap", str(bootstrap), "--config", str(file), *arguments)

    def __enter__(self) -> Nydusd:
        if self.wait:
            try:
                self.started()
            except BaseException:
                self.clean()
                raise
        return self

    def started(self, *states: str) -> None:
        end = time.monotonic() + 20
        while not self.socket.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"nydusd did not start: {self.log.read_text()}")
            time.sleep(0.005)
        self.client.wait(*states)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clean()

    def clean(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while syscalls.detach(self.mountpoint):
            pass

    @property
    def worker(self) -> int | None:
        """The process that serves now."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        children = [int(text) for text in path.read_text().split()]
        return children[-1] if children else None

    def stop(self, timeout: float = 10) -> int:
        """Ends it as a user would; returns the exit status."""
        self.process.terminate()
        return self.process.wait(timeout)

    def mounts(self) -> list[str]:
        """What is mounted in its folder."""
        root = str(self.folder.resolve())
        return [mount.path for mount in table.read() if mount.path.startswith(root)]
