"""Durations as Go writes them."""

from __future__ import annotations

import re

from nydus.errors import ConfigError

_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str) -> float:
    """Seconds of a duration such as ``1m30s``.

    Raises:
        ConfigError: it is none.
    """
    if text == "0":
        return 0.0
    parts = list(_PART.finditer(text))
    if not parts or "".join(part[0] for part in parts) != text:
        raise ConfigError(f"{text!r} is not a duration such as 24h, 1m30s or 500ms")
    return sum(float(part[1]) * _UNITS[part[2]] for part in parts)
