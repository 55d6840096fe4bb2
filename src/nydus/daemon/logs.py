"""Logging as the reference's daemon does it (nydusd.md §1.5)."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from nydus.daemon.events import events
from nydus.errors import NydusError

LEVELS = {"trace": 5, "debug": 10, "info": 20, "warn": 30, "error": 40}


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.created))
        name = "WARN" if record.levelno == logging.WARNING else record.levelname
        place = "" if record.levelno == logging.INFO else f" [{record.filename}:{record.lineno}]"
        text = f"[{seconds}.{int(record.created % 1 * 1e6):06d} +00:00] {name}{place} {record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def set_up(level: str, file: Path | None, rotation_mib: int) -> None:
    """Logs to a file or standard error. ``rotation_mib``: size at which the file is rotated, 0 never.

    Raises:
        NydusError: the file cannot be opened.
    """
    handler: logging.Handler
    try:
        if file is None:
            handler = logging.StreamHandler()
        elif rotation_mib:
            from logging.handlers import RotatingFileHandler

            handler = RotatingFileHandler(_with_suffix(file), maxBytes=rotation_mib << 20, backupCount=10)
        else:
            handler = logging.FileHandler(_with_suffix(file))
    except OSError as error:
        raise NydusError(f"{file}: cannot open the log file: {error.strerror}") from None
    handler.setFormatter(_Format())
    logging.basicConfig(level=LEVELS[level], handlers=[handler, events], force=True)
    logging.addLevelName(5, "TRACE")
    for noisy in ("urllib3", "mfusepy"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def set_level(level: str) -> bool:
    """Changes the level; False if there is no such level."""
    if level.lower() not in LEVELS:
        return False
    logging.getLogger().setLevel(LEVELS[level.lower()])
    return True


def _with_suffix(file: Path) -> Path:
    return file if file.suffix else file.with_suffix(".log")
