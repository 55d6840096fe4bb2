"""Nydus for Python: container images that start before they are pulled."""

__version__ = "0.1.0"
