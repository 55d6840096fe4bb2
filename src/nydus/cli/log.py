"""Log lines of ``nydus-image`` in the form that its callers know."""

from __future__ import annotations

import datetime
import logging
import os
import sys

from nydus.errors import NydusError

LEVELS = {
    "trace": 5,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}
_NAMES = {5: "TRACE", 10: "DEBUG", 20: "INFO", 30: "WARN", 40: "ERROR", 50: "ERROR"}
_COLOURS = {5: "35", 10: "36", 20: "32", 30: "33", 40: "31", 50: "31"}


class _Formatter(logging.Formatter):
    """``[2026-11-21 14:30:00.123456 +00:00] INFO text``; other levels say where they come from."""

    def __init__(self, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        level = _NAMES.get(record.levelno, record.levelname)
        if self._colour:
            level = f"\x1b[{_COLOURS.get(record.levelno, '0')}m{level}\x1b[0m"
        if record.levelno != logging.INFO:
            level += f" [{record.module}:{record.lineno}]"
        return f"[{when:%Y-%m-%d %H:%M:%S.%f} +00:00] {level} {record.getMessage()}"


def configure(level: str = "info", file: str | None = None) -> None:
    """Send the log to stderr, in colour on a terminal, or append it to a file.

    Raises:
        NydusError: the file cannot be opened.
    """
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter(sys.stderr.isatty()))
    else:
        path = file if os.path.splitext(file)[1] else file + ".log"  # noqa: PTH122
        try:
            handler = logging.FileHandler(path)
        except OSError as error:
            raise NydusError(f"{path}: cannot write the log: {error.strerror}") from None
        handler.setFormatter(_Formatter(False))
    root = logging.getLogger("nydus")
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    root.propagate = False
