"""The target of a conversion, asked before there is anything to store."""

from __future__ import annotations

from nydus.convert.backend import BackendPlace
from nydus.errors import BackendError
from nydus.oci.place import Sink, SinkPlace


def require_target(sink: Sink, place: SinkPlace | BackendPlace) -> None:
    """Has a target that cannot be reached, or does not let us write, fail before any work is done for it.

    Raises:
        BackendError: names the target.
    """
    try:
        sink.probe()
    except BackendError as error:
        raise BackendError(
            f"target {place}: {error}", permanent=error.permanent, status=error.status
        ) from error
