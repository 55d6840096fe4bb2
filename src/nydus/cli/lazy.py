"""Command groups that import a sub-command only when it is used, and the one way in which commands fail."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from nydus.errors import NydusError


class LazyGroup(click.Group):
    """A click group whose sub-commands are named as ``"module:attribute"`` and imported on first use.

    Args:
        commands_in: sub-command name → (``"package.module:attribute"`` of a click command, one-line help).
            The help stands here so that ``--help`` of the group imports nothing.
    """

    def __init__(self, *args: Any, commands_in: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands_in = commands_in

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.commands_in, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands_in:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.commands_in[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, text) for name, (_, text) in sorted(self.commands_in.items())]
        rows += [
            (name, command.get_short_help_str())
            for name, command in sorted(self.commands.items())
            if name not in self.commands_in and not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class Ended(SystemExit):
    """A signal asked the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.text = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def end_in_order(first: Callable[[], None] | None = None) -> None:
    """Has SIGTERM and SIGHUP end the program as Ctrl-C does: with what it began undone.

    Temporary files are removed, uploads abandoned, mounts and processes ended. A signal that is ignored
    (``nohup``) stays so.

    Args:
        first: called when a signal comes; with it, Ctrl-C is such a signal, too.

    Raises (later, in the main thread):
        Ended: a signal came.
    """

    def end(number: int, _frame: object) -> None:
        for each in signals:  # ``timeout`` sends it twice, to us and to our group
            signal.signal(each, signal.SIG_IGN)
        if first:
            first()
        raise Ended(number)

    signals = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    if first and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signals.append(signal.SIGINT)
    for each in signals:
        signal.signal(each, end)


def run(command: click.Command, name: str) -> None:
    """Run a click command as a program: a `NydusError` is one line on stderr and exit code 1."""
    end_in_order()
    with as_program():
        try:
            command(prog_name=name)
        except Ended as ended:
            print(f"{name}: {ended.text}", file=sys.stderr)
            raise
        except NydusError as error:
            print(f"{name}: {error}", file=sys.stderr)
            sys.exit(1)


@contextmanager
def as_program() -> Iterator[None]:
    """What every program begins and ends with.

    A standard stream that was closed is /dev/null, lest its number becomes that of a socket. In the end the
    interpreter does not take itself apart, which with numpy takes it 20 ms; threads are waited for, and what
    is registered with :mod:`atexit` is called, as always.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115
    status = 1

    def leave() -> None:  # the last of what atexit calls, having been the first registered
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                os._exit(120)  # as the interpreter does
        os._exit(status)

    atexit.register(leave)
    try:
        yield
        status = 0
    except SystemExit as end:
        # With a text instead of a number it is 1; the interpreter prints it before it calls leave().
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except KeyboardInterrupt:
        atexit.unregister(leave)  # the interpreter ends itself by the signal
        raise
