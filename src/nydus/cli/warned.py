"""What the library warns of, as lines of a command's log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nydus.cli.logs import Log


@contextmanager
def warnings_to(log: Log) -> Iterator[None]:
    """Writes what the library warns of to ``log`` meanwhile; without a handler these are bare lines."""
    handler = _Warnings(log)
    library = logging.getLogger("nydus")
    library.addHandler(handler)
    try:
        yield
    finally:
        library.removeHandler(handler)


class _Warnings(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.warning(record.getMessage())
