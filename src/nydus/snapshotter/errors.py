"""Failures of snapshot calls, each with the gRPC status containerd expects for it."""

from __future__ import annotations

from typing import ClassVar

from nydus.errors import NydusError


class SnapshotError(NydusError):
    """A snapshot call that failed; ``code`` is the name of its gRPC status."""

    code: ClassVar[str] = "UNKNOWN"


class NotFound(SnapshotError):
    """The key, name or parent is unknown."""

    code = "NOT_FOUND"


class AlreadyExists(SnapshotError):
    """The key or name is taken; for a layer, "you need not download it"."""

    code = "ALREADY_EXISTS"


class InvalidArgument(SnapshotError):
    """The request can never succeed as it is."""

    code = "INVALID_ARGUMENT"


class FailedPrecondition(SnapshotError):
    """The snapshot is not of the right kind, or others depend on it."""

    code = "FAILED_PRECONDITION"


class Unavailable(SnapshotError):
    """It may succeed when tried again."""

    code = "UNAVAILABLE"
