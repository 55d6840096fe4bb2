"""One command for all benchmarks; see ``--help``."""

from __future__ import annotations

import compileall
import os
import sys
from pathlib import Path

import click
from rich.console import Console

from bench import building, conversion, reading
from bench.figures import machine, save, table
from bench.images import ROOT, find
from nydus.demo.run import workspace
from nydus.errors import NydusError


@click.command()
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="An OCI layout; give several to convert all of them. The first has python3 and numpy.",
)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Runs; medians count.")
@click.option(
    "--only",
    type=click.Choice(["building", "conversion", "reading"]),
    help="One part of it; the default is all parts.",
)
def main(images: tuple[Path, ...], repeats: int, only: str | None) -> None:
    """Measure builds, conversion, mounts, starts and reads against the ordinary tools; needs root.

    Writes a JSON file and a picture for each image into bench/results.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 130
    if os.geteuid() != 0:
        raise NydusError("the benchmarks mount file systems: run them as root")
    # Commands that may not write their bytecode would be measured compiling themselves.
    compileall.compile_dir(ROOT / "src", quiet=1)
    about = machine()
    with workspace() as folder:

        def say(text: str) -> None:
            console.print(text, style="dim", highlight=False)

        for number, image in enumerate(find(images, folder)):
            about["image"] = {"title": image.title, "compressed": image.size}
            figures = []
            for part in (building, conversion, reading):
                name = part.__name__.rpartition(".")[2]
                # All of it needs one image with the programs that are started.
                if only in (None, name) and (not number or part is conversion):
                    figures += part.run(image, folder / f"{name}-{number}", repeats, say)
            if figures:
                console.print(table(figures, f"{image.title}: {image.size / 1e6:.0f} MB compressed"))
                for path in save(figures, about, ROOT / "bench" / "results", image.title):
                    console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main(prog_name="scripts/bench")
    except NydusError as error:
        sys.exit(f"scripts/bench: {error}")
