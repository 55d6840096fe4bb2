"""``nydusify completion``."""

from __future__ import annotations

import click

from nydus.cli.gostyle import GoCommand

_SHELLS = ("bash", "zsh", "fish")


@click.command(cls=GoCommand, short_help="Print a script that completes command lines.")
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, /, shell: str) -> None:
    """Print a script with which SHELL completes the command lines of nydusify.

    For bash: eval "$(nydusify completion bash)", in ~/.bashrc to have it always.
    """
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    kind = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}[shell]
    root = ctx.find_root()
    name = root.info_name or "nydusify"
    script = kind(root.command, {}, name, f"_{name.upper().replace('-', '_')}_COMPLETE")
    # The template of click, without its check of the shell's version, which would start a shell here.
    click.echo(script.source_template % script.source_vars())
