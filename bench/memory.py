"""How much memory the conversion of large layers takes, all of its processes together; see ``--help``."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import click

from bench.conversion import NYDUSIFY, registry
from bench.processes import memory
from nydus.errors import NydusError
from nydus.oci import model
from nydus.oci.model import Descriptor
from nydus.oci.registry import Registry, Repository

_FILE = 1 << 20
_PATTERN = 4096
_SAMPLE_SECONDS = 0.1


def archive(number: int, size: int, pattern: int) -> Iterator[bytes]:
    """A tar archive with ``size`` bytes in files of 1 MiB; no two chunks are the same.

    Args:
        pattern: bytes after which the content of a file repeats: the fewer, the better it compresses.
    """
    for position in range(0, size, _FILE):
        entry = tarfile.TarInfo(f"layer-{number}/{position >> 28}/{position}")
        entry.size = _FILE
        seed = hashlib.shake_256(f"{number} {position}".encode()).digest(pattern)
        yield entry.tobuf(tarfile.GNU_FORMAT) + seed * (_FILE // pattern)
    yield bytes(10240)


def put_layer(repository: Repository, pieces: Iterator[bytes]) -> tuple[Descriptor, str]:
    """Compresses a layer on its way into a registry; its descriptor and diff id."""
    packed, plain, size = hashlib.sha256(), hashlib.sha256(), 0
    gzip = zlib.compressobj(1, wbits=31)
    with repository.upload() as upload:

        def put(data: bytes) -> None:
            nonlocal size
            packed.update(data)
            size += len(data)
            upload.write(data)

        for piece in pieces:
            plain.update(piece)
            put(gzip.compress(piece))
        put(gzip.flush())
        upload.commit(f"sha256:{packed.hexdigest()}")
    layer = Descriptor(media_type=model.OCI_LAYER_GZIP, digest=f"sha256:{packed.hexdigest()}", size=size)
    return layer, f"sha256:{plain.hexdigest()}"


def put_image(repository: Repository, layers: int, size: int, pattern: int) -> int:
    """Stores an image of such layers as ``latest``; returns its bytes."""
    made = [put_layer(repository, archive(number, size, pattern)) for number in range(layers)]
    diff_ids = [diff_id for _, diff_id in made]
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = model.Manifest(
        schema_version=2,
        media_type=model.OCI_MANIFEST,
        config=repository.put_blob(model.encode(config), model.OCI_CONFIG),
        layers=tuple(layer for layer, _ in made),
    )
    repository.put_manifest("latest", model.encode(manifest), model.OCI_MANIFEST)
    return sum(layer.size for layer, _ in made)


def peak_of(command: list[str]) -> float:
    """Runs a command; the most memory (MB, PSS) that it and its descendants held together."""
    peak = 0.0
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with contextlib.suppress(OSError):  # one of them has just ended
                peak = max(peak, memory(process.pid))
            time.sleep(_SAMPLE_SECONDS)
    if process.returncode:
        raise NydusError(f"{command[1]} failed with status {process.returncode}")
    return peak


@click.command()
@click.option("--layers", type=click.IntRange(1), default=8, show_default=True)
@click.option("--size", type=click.IntRange(1), default=1000, show_default=True, help="MB of each layer.")
@click.option("--random", is_flag=True, help="Content that cannot be compressed.")
@click.option("--limit", type=float, default=600, show_default=True, help="MB that are too much.")
@click.argument("options", nargs=-1)
def main(layers: int, size: int, random: bool, limit: float, options: tuple[str, ...]) -> None:
    """Convert an image of large layers from registry to registry and say how much memory that took.

    OPTIONS (after --) go to nydusify convert. The exit status is 1 if it was more than the limit.
    """
    with (
        tempfile.TemporaryDirectory(prefix="nydus-bench-") as folder,
        registry(Path(folder) / "r") as address,
    ):
        with Registry(address, plain_http=True) as client:
            pattern = _FILE if random else _PATTERN
            stored = put_image(client.repository("bench/source"), layers, size * 10**6, pattern)
        click.echo(f"{layers} layers of {size} MB, {stored / 1e6:.0f} MB compressed")
        reference = f"{address}/bench/source:latest"
        command = [str(NYDUSIFY), "convert", "--source", reference, "--target-suffix=-nydus"]
        started = time.monotonic()
        peak = peak_of([*command, "--plain-http", "--no-reuse", "--quiet", *options])
    click.echo(f"converted in {time.monotonic() - started:.1f} s with {peak:.0f} MB of memory at most")
    sys.exit(peak > limit)


if __name__ == "__main__":
    try:
        main(prog_name="python -m bench.memory")
    except NydusError as error:
        sys.exit(f"bench.memory: {error}")
