"""Whether a registry lets us read an image, asked while nobody waits.

containerd pulls with credentials of its own, which are not given to the snapshotter. Without this question
the lack of ours would show only as input/output errors inside the container.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nydus.errors import BackendError, NydusError
from nydus.storage import backends

_REFUSED = (401, 403)
_MAX_ANSWERS = 1000


class Access:
    """Questions about images, by the ID of the snapshot that holds the bootstrap. Thread-safe."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(2, "access")
        self._lock = threading.Lock()
        self._answers: dict[int, Future[str]] = {}

    def ask(self, snapshot: int, backend: Mapping[str, Any], blob: str) -> None:
        """Ask, in the background, with the ``backend`` part of a daemon's configuration."""
        with self._lock:
            while len(self._answers) >= _MAX_ANSWERS:
                del self._answers[next(iter(self._answers))]
            self._answers[snapshot] = self._executor.submit(refusal, backend, blob)

    def check(self, snapshot: int, backend: Mapping[str, Any], blob: str) -> None:
        """Raise if the registry refused and still does; an unanswered or unasked question holds up nobody.

        Raises:
            NydusError: in the registry's words.
        """
        with self._lock:
            answer = self._answers.pop(snapshot, None)
        if answer is None or not answer.done() or not answer.result():
            return
        # The credentials may have come meanwhile.
        if words := refusal(backend, blob):
            with self._lock:
                self._answers[snapshot] = answer
            raise NydusError(
                f"the registry refuses us: {words}; give root credentials for it in Docker's configuration"
            )

    def close(self) -> None:
        """Forget all questions."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def refusal(backend: Mapping[str, Any], blob: str) -> str:
    """The words of a registry that does not let us read ``blob``; "" if it does, or does not say."""
    try:
        opened = backends.create(backend["type"], dict(backend["config"]))
        try:
            opened.size(blob)
        finally:
            opened.close()
    except BackendError as error:
        return str(error) if error.status in _REFUSED else ""
    except NydusError:
        return ""
    return ""
