"""Conversion from registry to registry, beside a plain copy of the same image."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.figures import Figure
from bench.images import BenchImage
from bench.processes import timed
from nydus.demo.push import push
from nydus.errors import NydusError
from nydus.oci.registry import Registry

CONFIG = """\
version: 0.1
log: {{accesslog: {{disabled: true}}, level: error}}
storage: {{filesystem: {{rootdirectory: {root}}}}}
http: {{addr: "{address}"}}
"""
NYDUSIFY = Path(sys.executable).parent / "nydusify"


@contextmanager
def registry(folder: Path) -> Iterator[str]:
    """A registry in a process of its own: docker-registry if installed, else ours; yields ``host:port``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder.mkdir(parents=True)
    if program := shutil.which("docker-registry"):
        config = folder / "config.yml"
        config.write_text(CONFIG.format(root=folder / "data", address=address))
        command = [program, "serve", str(config)]
    else:
        nydus = Path(sys.executable).parent / "nydus"
        command = [str(nydus), "registry", str(folder / "data"), "--address", address]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(address)
        yield address
    finally:
        process.terminate()
        process.wait()


def _wait(address: str) -> None:
    host, _, port = address.partition(":")
    for _ in range(200):
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise NydusError(f"the registry did not start on {address}")


def run(image: BenchImage, folder: Path, repeats: int, say: Callable[[str], None]) -> list[Figure]:
    """``nydusify convert`` against ``skopeo copy``, alternating; every target is a new repository."""
    wall = Figure("conversion", "s", other_name="skopeo copy to dir:", most_ratio=4)
    cpu = Figure("conversion, CPU time", "s", other_name="skopeo copy to dir:")
    peak = Figure("conversion, largest process", "MB", other_name="skopeo copy to dir:")
    with registry(folder / "registry") as address:
        with Registry(address, plain_http=True) as client:
            push(image.layout, client.repository("bench/source"), "latest")
        source = f"{address}/bench/source:latest"
        for number in range(repeats):
            say(f"conversion {number + 1}/{repeats}")
            target = f"{address}/bench/target-{number}:nydus"
            plain = ["--plain-http"]
            ours = timed([NYDUSIFY, "convert", "--source", source, "--target", target, *plain, "--no-reuse"])
            for figure, value in ((wall, ours.wall), (cpu, ours.cpu), (peak, ours.peak)):
                figure.ours.append(value)
            if skopeo := shutil.which("skopeo"):
                copy = folder / f"copy-{number}"
                theirs = timed(
                    [skopeo, "copy", "--src-tls-verify=false", f"docker://{source}", f"dir:{copy}"]
                )
                for figure, value in ((wall, theirs.wall), (cpu, theirs.cpu), (peak, theirs.peak)):
                    figure.other.append(value)
                shutil.rmtree(copy)
    return [wall, cpu, peak]
