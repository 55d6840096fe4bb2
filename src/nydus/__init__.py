"""Nydus for Python: container images that start before they are pulled.

    import nydus

    with nydus.open("bootstrap", "blobs/") as image:
        print(image.read("/etc/os-release").decode())

See :mod:`nydus.image`. Names are imported on first use, so that ``import nydus`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nydus.errors import BackendError, ConfigError, FormatError, NydusError
    from nydus.image import Entry, Image, create, merge, open

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "ConfigError",
    "Entry",
    "FormatError",
    "Image",
    "NydusError",
    "create",
    "merge",
    "open",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'nydus' has no attribute {name!r}")
    from importlib import import_module

    module = "errors" if name.endswith("Error") else "image"
    return getattr(import_module(f"nydus.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
