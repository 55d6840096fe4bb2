"""``nydus demo``: the main job with nothing to configure."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("output/demo.png"),
    show_default=True,
    help="Where the picture of bytes over time goes.",
)
@click.option("--containerd", is_flag=True, help="Start containers with a private containerd and runc.")
def demo(picture: Path, containerd: bool) -> None:
    """Start an image lazily and the ordinary way, and compare.

    Makes an image of what is on this machine, serves it from an embedded registry, converts it, and starts
    its program both ways, at full speed and over a link of 3 MB/s. Needs root and no network; only the
    picture stays behind.
    """
    from rich.console import Console

    from nydus.demo.run import run

    console = Console()
    if not console.is_terminal:
        console.width = 110
    run(picture, console, containerd=containerd)
