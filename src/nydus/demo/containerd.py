"""A containerd of our own: private root, state and socket; the nydus snapshotter is plugged in."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from nydus.demo.cri import Cri, CriError
from nydus.errors import NydusError
from nydus.oci.registry import Repository
from nydus.snapshotter.daemons import Daemon, detach

_CONFIG = """\
version = 2
root = "{root}/root"
state = "{root}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
                    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]

[grpc]
  address = "{address}"

[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{sandbox_image}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{root}/cni"
    conf_dir = "{root}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    disable_snapshot_annotations = false
    discard_unpacked_layers = false
"""
_PLUGIN = """
[proxy_plugins.nydus]
  type = "snapshot"
  address = "{snapshotter_address}"
"""


class PrivateSnapshotter:
    """Our snapshotter as a process: a context manager that leaves no daemon and no mount behind.

    Args:
        root: its root; missing or empty, with a short path.
        options: more of its command line.
    """

    def __init__(self, root: Path, *options: str) -> None:
        self.root, self.options = root, options
        self.address = root.with_name(root.name + ".sock")
        self.log_file = root.with_name(root.name + ".log")
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrivateSnapshotter:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start it and wait until it serves.

        Raises:
            NydusError: it ended, or does not serve in time; the text has its last line.
        """
        with open(self.log_file, "ab") as log:
            said = log.tell()
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "nydus.cli.containerd_nydus_grpc"),
                    *("--root", str(self.root), "--address", str(self.address), "--log-to-stdout"),
                    *self.options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + 30
        while b"serving on" not in self.log_file.read_bytes()[said:]:
            if self.process.poll() is not None or time.monotonic() > end:
                raise NydusError(f"the snapshotter does not serve: {_last_line(self.log_file)}")
            time.sleep(0.01)

    def stop(self) -> None:
        """End the process in order; daemons and their mounts stay."""
        _end(self.process)
        self.process = None

    def daemons(self) -> list[Daemon]:
        """The daemons that are there."""
        return [
            Daemon(
                path,
                self.root / "mnt" / path.parent.name,
                self.root / "logs" / path.parent.name / "nydusd.log",
            )
            for path in sorted(self.root.glob("socket/*/api.sock"))
        ]

    def close(self) -> None:
        """End it and everything it started."""
        self.stop()
        for daemon in self.daemons():
            daemon.stop()
        detach(self.root)


class PrivateContainerd:
    """A containerd in ``root``: a context manager that leaves no process, mount or container behind.

    Args:
        root: an empty or missing directory that overlayfs can use; its path is short, sockets lie in it.
        snapshotter_address: socket of the nydus snapshotter, which becomes the CRI's; None for overlayfs.
        sandbox_image: the pods' own image, see :func:`push_pause_image`.
    """

    def __init__(self, root: Path, snapshotter_address: Path | None = None, *, sandbox_image: str) -> None:
        self.root = root
        self.address = self.cri_address = root / "containerd.sock"
        self.snapshotter = "nydus" if snapshotter_address else "overlayfs"
        self.log_file = root / "containerd.log"
        self._process: subprocess.Popen[bytes] | None = None
        root.mkdir(parents=True, exist_ok=True)
        (root / "cni").mkdir(exist_ok=True)
        text = _CONFIG.format(
            root=root, address=self.address, sandbox_image=sandbox_image, snapshotter=self.snapshotter
        )
        if snapshotter_address:
            text += _PLUGIN.format(snapshotter_address=snapshotter_address)
        (root / "config.toml").write_text(text)
        self.cri = Cri(self.cri_address, root / "pods")

    def __enter__(self) -> PrivateContainerd:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start it and wait until its CRI answers.

        Raises:
            NydusError: it is not installed, or ended; the text has its last line.
        """
        program = shutil.which("containerd")
        if program is None:
            raise NydusError("containerd is not installed (Debian: apt-get install containerd runc)")
        # Debian keeps runc where users' paths do not look.
        environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
        with open(self.log_file, "ab") as log:
            self._process = subprocess.Popen(
                [program, "--config", str(self.root / "config.toml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        end = time.monotonic() + 30
        while True:
            try:
                self.cri.wait(0)
                return
            except CriError:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise NydusError(f"containerd does not serve: {_last_line(self.log_file)}") from None
                time.sleep(0.05)

    def ctr(
        self, *arguments: str, program: str = "ctr", namespace: str = "k8s.io", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run ``ctr`` (or ``ctr-remote``) against it, in the CRI's namespace or another.

        Raises:
            NydusError: it failed and ``check`` is set; the text is its own.
        """
        command = [program, "--address", str(self.address), "--namespace", namespace, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
        if check and done.returncode:
            raise NydusError(f"{program} {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def collect_garbage(self) -> None:
        """Have it remove what no image or container refers to, now."""
        # Deleting with "synchronous" runs a collection before the answer; any lease will do.
        self.ctr("leases", "create", "--id", "collect")
        self.ctr("leases", "delete", "--sync", "collect")

    def stop(self) -> None:
        """Stop the process; containers go on."""
        _end(self._process)
        self._process = None

    def close(self) -> None:
        """Remove all pods, stop it, end its shims and unmount what is left below its root."""
        for pod in list(self.cri.pods):
            with suppress(CriError):
                pod.remove()
        self.cri.close()
        self.stop()
        for pid in self._shims():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        detach(self.root)

    def _shims(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if b"containerd-shim" in words[0] and os.fsencode(self.address) in words:
                        found.append(int(entry.name))
        return found


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it said nothing"


def push_pause_image(repository: Repository, tag: str = "latest") -> None:
    """Push an image that does nothing, for pods: a static busybox that sleeps.

    Raises:
        NydusError: there is no busybox.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise NydusError("busybox is not installed (Debian: apt-get install busybox-static)")
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        entry = tarfile.TarInfo("sleep")  # busybox acts by its name
        entry.mode, entry.size = 0o755, Path(busybox).stat().st_size
        with open(busybox, "rb") as file:
            archive.addfile(entry, file)
    layer = repository.put_blob(
        gzip.compress(tar.getvalue(), 1, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip"
    )
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine),
        "os": "linux",
        "config": {"Entrypoint": ["/sleep", "2147483647"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(tar.getvalue()).hexdigest()}"]},
    }
    described = repository.put_blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json")
    media_type = "application/vnd.oci.image.manifest.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": {"mediaType": described.media_type, "digest": described.digest, "size": described.size},
        "layers": [{"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}],
    }
    repository.put_manifest(tag, json.dumps(manifest).encode(), media_type)
