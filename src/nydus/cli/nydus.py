"""``nydus``: the demo, the embedded registry and other things that have no counterpart in the reference."""

from __future__ import annotations

import click

from nydus import __version__
from nydus.cli.lazy import LazyGroup, run


@click.group(
    cls=LazyGroup,
    commands_in={
        "demo": (
            "nydus.cli.demo:demo",
            "Run the main job end to end and compare it with the ordinary way.",
        ),
        "registry": ("nydus.cli.registry:registry", "Serve a folder as an OCI registry."),
    },
)
@click.version_option(__version__, prog_name="nydus")
def nydus() -> None:
    """Container images that start before they are pulled."""


@nydus.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)


def main() -> None:
    run(nydus, "nydus")
