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
@click.option("--image", type=click.Path(exists=True, file_okay=False, path_type=Path), help="An OCI layout.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Runs; medians count.")
@click.option(
    "--only",
    type=click.Choice(["building", "conversion", "reading"]),
    help="One part of it; the default is all parts.",
)
def main(image: Path | None, repeats: int, only: str | None) -> None:
    """Measure builds, conversion, mounts, starts and reads against the ordinary tools; needs root.

    Writes bench/results/result.json and result.png.
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
        chosen = find(image, folder)
        about["image"] = {"title": chosen.title, "compressed": chosen.size}

        def say(text: str) -> None:
            console.print(text, style="dim", highlight=False)

        figures = []
        for part in (building, conversion, reading):
            name = part.__name__.rpartition(".")[2]
            if only in (None, name):
                figures += part.run(chosen, folder / name, repeats, say)
    console.print(table(figures, f"{chosen.title}: {chosen.size / 1e6:.0f} MB compressed"))
    for path in save(figures, about, ROOT / "bench" / "results"):
        console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main(prog_name="scripts/bench")
    except NydusError as error:
        sys.exit(f"scripts/bench: {error}")
