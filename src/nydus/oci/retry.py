"""What is tried again after a failure, and when."""

from __future__ import annotations

import logging
import threading

from nydus.errors import BackendError
from nydus.oci.connections import interrupted

log = logging.getLogger(__name__)

#: Seconds that a registry may ask to be left alone for; a command ends rather than waiting for longer.
PATIENCE = 60.0


def wait_to_retry(
    error: BackendError,
    tried: int,
    attempts: int,
    pause: float,
    *,
    patience: float = PATIENCE,
    stopped: threading.Event = interrupted,
) -> bool:
    """After a failure, waits until the time for another attempt, with a warning that says so.

    Args:
        tried: attempts made, of ``attempts``.
        pause: seconds to wait, unless the registry asks for more (Retry-After).
        patience: the most it may ask for.
        stopped: ends the wait.

    Returns:
        Whether to try again. If not, the caller raises ``error``.
    """
    ending = stopped.is_set() or interrupted.is_set()
    if error.permanent or tried >= attempts or error.retry_after > patience or ending:
        return False
    seconds = max(pause, error.retry_after)
    log.warning("%s; trying again in %.1f s (%d of %d)", error, seconds, tried + 1, attempts)
    return not stopped.wait(seconds)
