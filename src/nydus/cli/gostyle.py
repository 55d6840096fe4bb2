"""Command lines as Go's urfave/cli takes them, for scripts written for the reference's ``nydusify``.

Long options may have one dash, flags may have ``=true`` or ``=false``, a wrong option is exit code 1 and an
unknown command exit code 3. Options may come from environment variables; since the names of these are short
common words (``SOURCE``, ``TARGET``), it is said when one is used.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

from nydus.cli.lazy import Ended, LazyGroup, as_program, end_in_order
from nydus.cli.logs import Log
from nydus.errors import ConfigError, NydusError

_TRUE, _FALSE = {"1", "t", "T", "true", "TRUE", "True"}, {"0", "f", "F", "false", "FALSE", "False"}
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds that a program which was told to end has for ending in order.
_PATIENCE = 6.0


class GoCommand(click.Command):
    """A command whose options are read in Go's way."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, normalise(self, args))


class GoGroup(LazyGroup):
    """A group whose options are read in Go's way; without a command it prints its help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit(0)
        return super().parse_args(ctx, normalise(self, args))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            click.echo(f"No help topic for '{args[0]}'", err=True)
            ctx.exit(3)
        return super().resolve_command(ctx, args)


def normalise(command: click.Command, args: Sequence[str]) -> list[str]:
    """Rewrites options up to the first positional argument into click's form."""
    options = {name: p for p in command.params if isinstance(p, click.Option) for name in p.opts}
    found: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word in ("-", "--"):
            return [*found, word, *rest]
        name, equals, value = word.partition("=")
        if re.fullmatch(r"-[A-Za-z][A-Za-z0-9-]+", name) and f"-{name}" in options:
            name = f"-{name}"
        option = options.get(name)
        if option is None:
            found.append(name + equals + value)
        elif option.is_flag:
            if equals and value in _FALSE:
                continue
            if equals and value not in _TRUE:
                raise ConfigError(f"{name}: {value!r} is neither true nor false")
            found.append(name)
        else:
            found += [name, value] if equals else [name, *rest[:1]]
            del rest[: 0 if equals else 1]
    return found


def option(*names: str, env: str | Sequence[str] = "", help: str = "", **more: Any) -> Callable[[Any], Any]:
    """A click option with the environment variables that the reference has for it; the first counts."""
    return click.option(*names, envvar=env or None, show_envvar=bool(env), help=help, **more)


def reporting(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options about how its outcome is told; see :meth:`Log.result`."""

    def hush(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(Log).hush()

    def as_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(Log).as_json = True

    flag: dict[str, Any] = {"is_flag": True, "expose_value": False}
    quiet = click.option("--quiet", "-q", callback=hush, help="Say only what is wrong.", **flag)
    printed = click.option("--json", callback=as_json, help="Print what came of it as JSON.", **flag)
    found: Callable[..., Any] = quiet(printed(command))
    return found


def decryption_key(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the option with private keys for encrypted images."""
    text = (
        "Private key for an encrypted image: FILE, or pgp:NAME of gpg's keyring; with a password "
        "FILE:file=PASSWORD-FILE (FILE:pass=PASSWORD is seen by all in ps). May be given repeatedly."
    )
    found: Callable[..., Any] = click.option("--decryption-key", multiple=True, help=text)(command)
    return found


def encrypt_recipients(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the option with those who may read the image that it makes, as a tuple of them."""

    def apart(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(word for text in given for word in text.split(",") if word)

    text = (
        "Who may read the image: jwe:FILE of a public key, pkcs7:FILE of a certificate or pgp:NAME of gpg's "
        "keyring, separated by commas or given repeatedly."
    )
    found: Callable[..., Any] = click.option(
        "--encrypt-recipients", multiple=True, callback=apart, help=text
    )(command)
    return found


def tell_environment(ctx: click.Context, log: Log) -> None:
    """Says which options came from the environment."""
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if (
            source is click.core.ParameterSource.ENVIRONMENT
            and ctx.params.get(parameter.name or "") is not None
        ):
            names = [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or ()
            name = next((name for name in names if os.environ.get(name)), "")
            log.warning(f"{parameter.opts[0]} is taken from the environment variable {name}")


def given(ctx: click.Context, name: str, *, in_words: bool = False) -> bool:
    """Whether the user gave a parameter, in whatever way, or ``in_words`` of the command line."""
    source = ctx.get_parameter_source(name)
    if in_words:
        return source is click.core.ParameterSource.COMMANDLINE
    return source is not click.core.ParameterSource.DEFAULT


def tell_unused(ctx: click.Context, log: Log, names: Sequence[str], why: str) -> None:
    """Says which of some parameters were given for nothing."""
    for parameter in ctx.command.params:
        if parameter.name in names and given(ctx, parameter.name):
            sharing = [each for each in ctx.command.params if each.envvar == parameter.envvar]
            if len(sharing) > 1 and not given(ctx, parameter.name, in_words=True):
                continue  # it may be meant for another option
            log.warning(f"{parameter.opts[0]} has no effect {why}")


def number(text: str) -> int:
    """A decimal or ``0x`` number.

    Raises:
        ConfigError: it is none.
    """
    try:
        return int(text, 0)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number") from None


def byte_size(text: str) -> int:
    """Bytes of a size such as ``5MB`` (decimal) or ``4MiB`` (binary); a plain number is bytes.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kmgt]?)(i?)b?", text.strip().lower())
    if not match or (match[3] and not match[2]):
        raise ConfigError(f"{text!r} is not a size such as 5MB or 4MiB")
    power = " kmgt".index(match[2] or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def run(command: click.Command, name: str) -> NoReturn:
    """Runs a command as a program: an error is one fatal line on standard error and exit code 1."""
    with as_program():
        log = Log()
        end_in_order(_cut_connections)
        _end_soon(log)
        try:
            code = command.main(prog_name=name, standalone_mode=False)
            sys.exit(code if isinstance(code, int) else 0)
        except click.exceptions.Exit as done:
            sys.exit(done.exit_code)
        except click.UsageError as error:
            if error.ctx is not None:
                click.echo(error.ctx.get_usage(), err=True)
            (error.ctx.obj if error.ctx and isinstance(error.ctx.obj, Log) else log).failed(
                error.format_message()
            )
            sys.exit(1)
        except NydusError as error:
            _current(log).failed(str(error))
            sys.exit(1)
        except Ended as ended:
            _current(log).failed(ended.text)
            raise
        except (click.Abort, KeyboardInterrupt):
            _current(log).failed("interrupted")
            sys.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)


def _end_soon(log: Log) -> None:
    """Ends the program though it does not end in order: C code that waits for a server hears no signal."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while (number := os.read(reader, 1)[0]) not in _ENDING:
            pass
        left = _PATIENCE
        while left > 0:
            time.sleep(0.2)
            connections = sys.modules.get("nydus.oci.connections")
            left = _PATIENCE if connections and connections.is_held() else left - 0.2
        current = _current(log)
        if current.terminal:
            current.stream.write("\x1b[?25h")  # the cursor, which bars hide
        current.failed(Ended(number).text)
        os._exit(128 + number)

    threading.Thread(target=watch, name="ending", daemon=True).start()


def _cut_connections() -> None:
    if connections := sys.modules.get("nydus.oci.connections"):  # it takes its time to be imported
        connections.interrupt()


def warn(text: str) -> None:
    """Says what is no error, where no log is at hand."""
    _current(Log()).warning(text)


_log: list[Log] = []


def use_log(log: Log) -> Log:
    """Makes ``log`` the one that a fatal error is written to."""
    _log[:] = [log]
    return log


def _current(otherwise: Log) -> Log:
    return _log[0] if _log else otherwise
