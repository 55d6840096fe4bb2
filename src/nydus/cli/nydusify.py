"""``nydusify``: images in, Nydus images out."""

from __future__ import annotations

import os

import click

from nydus import __version__
from nydus.cli.gostyle import GoGroup, option, run, use_log
from nydus.cli.logs import LEVELS, Log
from nydus.errors import ConfigError


@click.group(
    cls=GoGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    commands_in={
        "build": ("nydus.cli.nydusify_build:build", "Build an image from a directory."),
        "check": ("nydus.cli.nydusify_check:check", "Check a Nydus image, and compare it with its source."),
        "chunkdict": ("nydus.cli.nydusify_chunkdict:chunkdict", "Make chunk dictionaries."),
        "commit": ("nydus.cli.nydusify_commit:commit", "Make an image of a running container."),
        "completion": (
            "nydus.cli.nydusify_completion:completion",
            "Print a script that completes command lines.",
        ),
        "convert": ("nydus.cli.nydusify_convert:convert", "Convert an image to a Nydus image."),
        "copy": ("nydus.cli.nydusify_copy:copy", "Copy an image as it is."),
        "info": (
            "nydus.cli.nydusify_info:info",
            "Say what kind of image this is, how large, how much is shared.",
        ),
        "mount": ("nydus.cli.nydusify_mount:mount", "Mount a Nydus image until interrupted."),
        "optimize": (
            "nydus.cli.nydusify_optimize:optimize",
            "Put what a container reads first into a blob of its own.",
        ),
        "pack": ("nydus.cli.nydusify_build:build", "The same as build."),
        "view": ("nydus.cli.nydusify_mount:mount", "The same as mount."),
    },
)
@option("--debug", "-D", env="DEBUG_LOG_LEVEL", is_flag=True, help="Log at level debug.")
@option("--log-level", "-l", env="LOG_LEVEL", type=click.Choice(LEVELS), default="info", help="What to log.")
@option("--log-file", env="LOG_FILE", type=click.Path(dir_okay=False), help="Append log lines to this file.")
@click.option(
    "--hosts-dir",
    envvar="NYDUSIFY_HOSTS_DIR",
    show_envvar=True,
    type=click.Path(file_okay=False),
    help="Read images from mirrors, as the hosts.toml files below this directory say (containerd's form).",
)
@click.version_option(__version__, "--version", "-v", message="Version     : v%(version)s")
@click.pass_context
def nydusify(
    ctx: click.Context, debug: bool, log_level: str, log_file: str | None, hosts_dir: str | None
) -> None:
    """Make, check and copy Nydus images."""
    if hosts_dir:
        os.environ["NYDUSIFY_HOSTS_DIR"] = hosts_dir
    stream = None
    if log_file:
        try:
            stream = open(log_file, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"--log-file {log_file}: {error.strerror}") from error
        ctx.call_on_close(stream.close)
    from nydus.cli.warned import warnings_to

    ctx.obj = use_log(Log("debug" if debug else log_level, stream))
    ctx.with_resource(warnings_to(ctx.obj))


def main() -> None:
    run(nydusify, "nydusify")
