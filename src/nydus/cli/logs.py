"""Log lines in the form that scripts around the reference's Go tools expect (logrus text)."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TextIO

_LEVELS = {"panic": 0, "fatal": 1, "error": 2, "warn": 3, "warning": 3, "info": 4, "debug": 5, "trace": 6}
_SHORT = {"fatal": "FATA", "error": "ERRO", "warning": "WARN", "info": "INFO", "debug": "DEBU"}
_COLOURS = {"fatal": 31, "error": 31, "warning": 33, "info": 36, "debug": 37}
_PLAIN = re.compile(r"[A-Za-z0-9\-._/@^+]*")

LEVELS = tuple(_LEVELS)


class Log:
    """Writes one line for each message: to a terminal in short form, elsewhere as ``key=value``.

    Args:
        level: the lowest level that is written, one of :data:`LEVELS`.
        stream: standard error if None.

    Attributes:
        as_json: the outcome is printed as JSON, see :meth:`result`.
    """

    def __init__(self, level: str = "info", stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self._level = _LEVELS[level]
        self._started = time.monotonic()
        self.as_json = self._told = False

    def hush(self) -> None:
        """Write warnings and errors only."""
        self._level = min(self._level, _LEVELS["warning"])

    def enabled(self, level: str) -> bool:
        return _LEVELS[level] <= self._level

    def format(self, level: str, message: str, fields: dict[str, object]) -> str:
        pairs = [f"{key}={_quote(str(value))}" for key, value in sorted(fields.items())]
        if self.terminal:
            passed = int(time.monotonic() - self._started)
            head = f"\x1b[{_COLOURS[level]}m{_SHORT[level]}\x1b[0m[{passed:04}] {message:<44}"
            return " ".join([head, *pairs]).rstrip()
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        now = "Z".join(now.rsplit("+0000", 1)) if now.endswith("+0000") else f"{now[:-2]}:{now[-2:]}"
        return " ".join([f'time="{now}" level={level} msg={_quote(message)}', *pairs])

    def write(self, line: str) -> None:
        """Puts out one finished line; what shows progress bars replaces this."""
        print(line, file=self.stream, flush=True)

    def _log(self, level: str, message: str, fields: dict[str, object]) -> None:
        if self.enabled(level):
            self.write(self.format(level, message, fields))

    def debug(self, message: str, **fields: object) -> None:
        self._log("debug", message, fields)

    def info(self, message: str, **fields: object) -> None:
        self._log("info", message, fields)

    def warning(self, message: str, **fields: object) -> None:
        self._log("warning", message, fields)

    def result(self, message: str, document: Mapping[str, object], **fields: object) -> None:
        """Says what came of a command: one line for people and, where asked for, JSON on standard output."""
        self.info(message, **fields)
        if self.as_json:
            print(json.dumps(document), flush=True)
            self._told = True

    def failed(self, message: str) -> None:
        """The same for a command that failed; standard output has one document, the first."""
        self.fatal(message)
        if self.as_json and not self._told:
            with suppress(OSError):  # nobody reads it
                print(json.dumps({"error": message}), flush=True)

    def fatal(self, message: str, **fields: object) -> None:
        self._log("fatal", message, fields)


def _quote(text: str) -> str:
    if text and _PLAIN.fullmatch(text):
        return text
    return json.dumps(text, ensure_ascii=False)


def human(size: float) -> str:
    """A number of bytes for people, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def count(number: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
