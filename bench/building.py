"""nydus-image on one layer, beside inflating, compressing and hashing the same file with ordinary tools."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from bench.figures import Figure
from bench.images import BenchImage
from bench.processes import timed

NYDUS_IMAGE = Path(sys.executable).parent / "nydus-image"
YARDSTICK = "gzip -dc | zstd -3 | sha256sum"


def run(image: BenchImage, folder: Path, repeats: int, say: Callable[[str], None]) -> list[Figure]:
    """Every kind of source in turn, the yardstick before each round; then what big layers cost in memory."""
    folder.mkdir(parents=True)
    layer = folder / "layer.tar.gz"
    shutil.copyfile(image.largest_layer, layer)
    plain = folder / "layer.tar"
    with gzip.open(layer) as packed, plain.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    tree = folder / "tree"
    tree.mkdir()
    subprocess.run(["tar", "-xpf", plain, "-C", tree], check=True)

    def command(*words: str | Path) -> list[str | Path]:
        return [NYDUS_IMAGE, words[0], "-l", "error", *words[1:]]

    boot, blob = folder / "boot", folder / "blobs"
    blob.mkdir()
    jobs: list[tuple[str, float | None, list[str | Path]]] = [
        ("create from tar.gz", 0.9, command("create", "-t", "targz-rafs", "-B", boot, "-D", blob, layer)),
        ("create from tar", 0.7, command("create", "-t", "tar-rafs", "-B", boot, "-D", blob, plain)),
        ("create from a directory", 0.7, command("create", "-B", boot, "-D", blob, tree)),
        (
            "create a zran index",
            0.5,
            command("create", "-t", "targz-ref", "--blob-inline-meta", "-b", folder / "index", layer),
        ),
        ("check", None, command("check", boot)),
        ("check with every chunk", None, command("check", boot, "-D", blob)),
        ("merge with itself", None, command("merge", "-B", folder / "merged", boot, boot)),
        ("unpack", None, command("unpack", boot, "-D", blob, "--output", folder / "unpacked.tar")),
    ]
    yardstick = ["sh", "-c", f"gzip -dc {layer} | zstd -3 -q | sha256sum"]
    walls = [Figure(name, "s", other_name=YARDSTICK, most_ratio=aim) for name, aim, _ in jobs]
    costs = [Figure(f"{name}, CPU time", "s", other_name=YARDSTICK) for name, *_ in jobs[:4]]
    for number in range(repeats):
        say(f"building {number + 1}/{repeats}")
        other = timed(yardstick)
        for position, (_, _, words) in enumerate(jobs):
            if "create" in words:
                shutil.rmtree(blob)
                blob.mkdir()
            if "targz-ref" in words:  # leaves no blob for the commands behind it
                ours = timed(words)
                timed(jobs[2][2])
            else:
                ours = timed(words)
            walls[position].ours.append(ours.wall)
            walls[position].other.append(other.wall)
            if position < len(costs):
                costs[position].ours.append(ours.cpu)
                costs[position].other.append(other.cpu)
    start = Figure("nydus-image --version", "s", most=0.15)
    for _ in range(3 * repeats):
        start.ours.append(timed([NYDUS_IMAGE, "--version"]).wall)
    return [*walls, *costs, start, *_memory(folder, say)]


def _memory(folder: Path, say: Callable[[str], None]) -> list[Figure]:
    """Peak memory for layers of 100 MB and 1 GB, 100 files each."""
    figures = []
    for megabytes in (100, 1000):
        say(f"a layer of {megabytes} MB")
        layer = folder / "big.tar"
        with tarfile.open(layer, "w") as archive:
            for number in range(100):
                content = folder / "content"
                # Half of it can be compressed, and no two chunks are the same.
                with content.open("wb") as file:
                    for _ in range(megabytes // 2):
                        block = os.urandom(10_000)
                        file.write(block + block.hex().encode()[:10_000])
                archive.add(content, f"file-{number}")
        words: list[str | Path] = [
            NYDUS_IMAGE,
            "create",
            "-l",
            "error",
            "-t",
            "tar-rafs",
            "-B",
            folder / "boot",
        ]
        cost = timed([*words, "-b", "/dev/null", layer])
        figures.append(Figure(f"create from {megabytes} MB of tar, peak memory", "MB", [cost.peak]))
        layer.unlink()
    return figures
