"""Blobs that are read to be checked, with the progress of that."""

from __future__ import annotations

from collections.abc import Iterable

from nydus.convert.progress import CHECK, LayerProgress, Progress
from nydus.oci.place import Stream


class Reading:
    """Tells how far each blob has been read.

    Args:
        blobs: (whose it is, digest, size in bytes) of all that will be read.
    """

    def __init__(self, blobs: Iterable[tuple[str, str, int]], progress: Progress) -> None:
        self._progress = progress
        self._states: dict[tuple[str, str], LayerProgress] = {}
        for owner, digest, size in blobs:
            number = 1 + sum(known == owner for known, _ in self._states)
            self._states.setdefault((owner, digest), LayerProgress(number, digest, size))
        progress.layers(list(self._states.values()), CHECK)

    def of(self, owner: str, digest: str, stream: Stream) -> Stream:
        """A blob that tells what is read of it, the first time that it is read."""
        state = self._states[owner, digest]
        if state.state == "done":
            return stream
        state.state = "working"
        self._progress.changed(state)
        return _Counted(stream, state, self._progress)


class _Counted:
    def __init__(self, stream: Stream, state: LayerProgress, progress: Progress) -> None:
        self._stream, self._state, self._progress = stream, state, progress

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._stream.read(size)
        self._state.downloaded += len(data)
        self._progress.changed(self._state)
        return data

    def close(self) -> None:
        """To be called after all was read."""
        self._stream.close()
        state = self._state
        if state.downloaded >= state.size:
            state.state, state.downloaded, state.built = "done", state.size, state.size
            self._progress.changed(state)
