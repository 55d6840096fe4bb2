"""``nydus-image``: build, merge, check and take apart RAFS images."""

from __future__ import annotations

import gc
import platform
import sys

import click

from nydus import __version__
from nydus.cli.lazy import Ended, LazyGroup, as_program, end_in_order
from nydus.errors import NydusError

_LEVELS = ("trace", "debug", "info", "warn", "error")


def _log_options() -> list[click.Parameter]:
    """``-L`` and ``-l``, which callers give before or after the sub-command."""
    return [
        click.Option(
            ["-L", "--log-file"],
            metavar="FILE",
            expose_value=False,
            callback=_remember,
            help="Append the log to a file.",
        ),
        click.Option(
            ["-l", "--log-level"],
            type=click.Choice(_LEVELS),
            expose_value=False,
            callback=_remember,
            help="Least important messages to log [default: info].",
        ),
    ]


def _remember(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.find_root().meta[f"nydus.{parameter.name}"] = value


class _ImageGroup(LazyGroup):
    """Gives every sub-command the log options, and starts the log before it runs."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _add_log_options(command)
        return command


def _add_log_options(command: click.Command) -> None:
    if any(parameter.name == "log_level" for parameter in command.params):
        return
    command.params += _log_options()
    if isinstance(command, click.Group):
        for below in command.commands.values():
            _add_log_options(below)
        return
    run = command.invoke

    def invoke(ctx: click.Context) -> object:
        from nydus.cli import log

        meta = ctx.find_root().meta
        log.configure(meta.get("nydus.log_level", "info"), meta.get("nydus.log_file"))
        return run(ctx)

    command.invoke = invoke  # type: ignore[method-assign]


def _version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from nydus.version import commit

    # The reference has more lines; what does not apply, or is not known, is left out.
    digits = commit()
    lines = [f"Version: \tv{__version__}", *([f"Git Commit: \t{digits}"] if digits else [])]
    click.echo("\n".join([" \r", *lines, f"Python: \t{platform.python_version()}"]))
    ctx.exit()


@click.group(
    cls=_ImageGroup,
    commands_in={
        "create": ("nydus.cli.image_create:command", "Build a layer from a directory or an archive."),
        "merge": ("nydus.cli.image_merge:command", "Merge the bootstraps of layers into that of an image."),
        "check": ("nydus.cli.image_check:command", "Verify a bootstrap and its blobs."),
        "inspect": ("nydus.cli.image_inspect:command", "Look around in a bootstrap."),
        "stat": ("nydus.cli.image_stat:command", "Statistics of bootstraps, and of their shared chunks."),
        "compact": ("nydus.cli.image_compact:command", "Rewrite blobs without the chunks nobody uses."),
        "unpack": ("nydus.cli.image_unpack:command", "Turn an image back into a tar archive."),
        "export": ("nydus.cli.image_export:command", "Export an image as a block device image."),
        "optimize": ("nydus.cli.image_optimize:command", "Put chunks to prefetch into a blob of their own."),
        "chunkdict": ("nydus.cli.image_chunkdict:command", "Make chunk dictionaries."),
    },
    invoke_without_command=True,
    params=_log_options(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Print version.",
)
@click.pass_context
def nydus_image(ctx: click.Context) -> None:
    """Build, merge, check and take apart RAFS images."""
    if ctx.invoked_subcommand is None:
        click.echo("Usage: [OPTIONS] [COMMAND]")


def main() -> None:
    """Run the command: 2 for wrong usage, 1 and one line on stderr for everything else."""
    end_in_order(lambda: None)  # Ctrl-C, too: click would make "Aborted!" and 1 of it
    # A command that runs for seconds and makes no cycles has nothing to collect, and much to look through:
    # a tenth of a short run would be spent on that.
    gc.disable()
    with as_program():
        try:
            nydus_image(prog_name="nydus-image")
        except Ended as ended:
            print(f"Error: {ended.text}", file=sys.stderr)
            raise
        except NydusError as error:
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(getattr(error, "exit_code", 1))
