"""The ring of recent failures that ``/api/v1/daemon/events`` shows."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

_MAX_ERRORS, _MAX_SIZE = 500, 51200


class EventRing(logging.Handler):
    """Keeps error records, oldest out first, at most 500 of them and 51,200 bytes."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._guard = threading.Lock()
        self._errors: deque[str] = deque()
        self._size = self._total = 0

    def emit(self, record: logging.LogRecord) -> None:
        stamp = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(record.created))
        text = f"{stamp} - {record.getMessage()}"[:_MAX_SIZE]
        with self._guard:
            self._total += 1
            self._errors.append(text)
            self._size += len(text)
            while len(self._errors) > _MAX_ERRORS or self._size > _MAX_SIZE:
                self._size -= len(self._errors.popleft())

    def json(self) -> dict[str, Any]:
        with self._guard:
            return {
                "max_errors": _MAX_ERRORS,
                "total_errors": self._total,
                "max_size": _MAX_SIZE,
                "total_size": self._size,
                "errors": list(self._errors),
            }


events = EventRing()
