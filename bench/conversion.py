"""Conversion from registry to registry, beside a plain copy of the same image."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.figures import Figure
from bench.images import BenchImage
from bench.processes import Cost, timed
from nydus.demo.push import push
from nydus.errors import NydusError
from nydus.oci import model
from nydus.oci.registry import Registry, Repository

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
    """``nydusify convert`` against ``skopeo copy``, alternating; every target is a new repository.

    Then the same again where there is little to do: all layers are known, or all but a small one on top.
    """
    copied = "skopeo copy to dir:"
    wall = Figure("conversion", "s", other_name=copied, most_ratio=4)
    cpu = Figure("conversion, CPU time", "s", other_name=copied)
    peak = Figure("conversion, largest process", "MB", other_name=copied)
    written = Figure("conversion, written to disk", "MB", other_name=copied)
    zran = Figure("conversion with --oci-ref", "s", other_name=copied, most_ratio=2)
    zran_cpu = Figure("conversion with --oci-ref, CPU time", "s", other_name=copied)
    zran_peak = Figure("conversion with --oci-ref, largest process", "MB", other_name=copied)
    first = "first conversion"
    same = Figure("conversion of the same image again", "s", other_name=first, least_ratio=10)
    cached = Figure("conversion again, by the build cache", "s", other_name=first, least_ratio=10)
    top = Figure("conversion with another top layer", "s", other_name=first, least_ratio=10)
    with registry(folder / "registry") as address:
        with Registry(address, plain_http=True) as client:
            repository = client.repository("bench/source")
            push(image.layout, repository, "latest")
            for number in range(repeats):
                add_layer(repository, "latest", f"top-{number}", b"%d\n" % number)
        source = f"{address}/bench/source"

        def convert(tag: str, target: str, *options: str) -> Cost:
            where = ["--source", f"{source}:{tag}", "--target", f"{address}/bench/{target}", "--plain-http"]
            return timed([NYDUSIFY, "convert", *where, *options])

        for number in range(repeats):
            say(f"conversion {number + 1}/{repeats}")
            ours = convert("latest", f"target-{number}:n", "--no-reuse")
            index = convert("latest", f"zran-{number}:n", "--no-reuse", "--oci-ref")
            skopeo, copy = shutil.which("skopeo"), folder / f"copy-{number}"
            origin = ["--src-tls-verify=false", f"docker://{source}:latest", f"dir:{copy}"]
            theirs = timed([skopeo, "copy", *origin]) if skopeo else None
            for figure, cost, name in (
                (wall, ours, "wall"),
                (cpu, ours, "cpu"),
                (peak, ours, "peak"),
                (written, ours, "written"),
                (zran, index, "wall"),
                (zran_cpu, index, "cpu"),
                (zran_peak, index, "peak"),
            ):
                figure.ours.append(getattr(cost, name))
                if theirs:
                    figure.other.append(getattr(theirs, name))
            shutil.rmtree(copy, ignore_errors=True)
            cache = ["--build-cache", f"{address}/bench/cache-{number}:c", "--no-reuse"]
            convert("latest", f"cached-{number}:n", *cache)
            convert("latest", f"again-{number}:n")
            for figure, cost in (
                (same, convert("latest", f"again-{number}:n")),
                (cached, convert("latest", f"cached-{number}:again", *cache)),
                (top, convert(f"top-{number}", f"again-{number}:top")),
            ):
                figure.ours.append(cost.wall)
                figure.other.append(ours.wall)
    return [wall, cpu, peak, written, zran, zran_cpu, zran_peak, same, cached, top]


def add_layer(repository: Repository, tag: str, new: str, data: bytes) -> None:
    """Tags an image that has one more layer than another, with one file in it."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        entry = tarfile.TarInfo("srv/top")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    descriptor, raw = repository.manifest(tag)
    manifest = json.loads(raw)
    config = json.loads(repository.document(model.decode(raw, model.Manifest, tag).config))
    layer = repository.put_blob(gzip.compress(tar.getvalue()), model.OCI_LAYER_GZIP)
    config["rootfs"]["diff_ids"].append(model.digest(tar.getvalue()))
    config.setdefault("history", []).append({"created_by": "bench"})
    stored = repository.put_blob(json.dumps(config).encode(), manifest["config"]["mediaType"])
    manifest["config"].update(digest=stored.digest, size=stored.size)
    manifest["layers"].append({"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size})
    repository.put_manifest(new, json.dumps(manifest).encode(), descriptor.media_type)
