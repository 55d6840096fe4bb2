"""A blob as a stream that outlives broken connections and registries that fail."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from nydus.errors import BackendError
from nydus.oci.retry import wait_to_retry

if TYPE_CHECKING:
    import urllib3

    from nydus.oci.registry import Repository

#: A stream that broke off is resumed; this much progress forgives the earlier failures.
_PROGRESS = 1 << 20
#: A MiB of a stream may take this many times as long as a single answer.
_SLOWEST = 8

#: Told that a repository failed with an error after a stream's position; says who else has the blob.
Another = Callable[["Repository", int, BackendError], "Repository | None"]


class BlobStream(io.RawIOBase):
    """A blob read from its start to its end, checked at the end.

    ``read(n)`` gives exactly n bytes until the end is near. A connection that breaks is made again there,
    and a repository that fails for good is followed by another one, if there is any.

    Args:
        another: None if there is no other repository.

    Raises:
        BackendError: permanent if digest or size are wrong, unless another repository may have the right
            bytes. These are then asked for by whoever begins again; ``read(-1)`` does so by itself.
    """

    def __init__(
        self, repository: Repository, digest: str, size: int | None, another: Another | None = None
    ) -> None:
        super().__init__()
        self._repository, self._digest, self._size = repository, digest, size
        self._another = another
        self._lock = threading.Lock()
        self._response: urllib3.BaseHTTPResponse | None = None
        self._begin()

    def _begin(self) -> None:
        self._hash = hashlib.new("sha512" if self._digest.startswith("sha512:") else "sha256")
        self._position = 0
        self._ended = False
        self._failures, self._forgiven = 0, 0
        self._read_from = [self._repository]

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read(-1)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return self._all()
        pieces: list[bytes] = []
        with self._lock:
            while size and not self._ended:
                piece = self._next(size)
                pieces.append(piece)
                size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _all(self) -> bytes:
        began = self._position
        while True:
            try:
                return b"".join(iter(lambda: self.read(1 << 20), b""))
            except BackendError as error:
                if began or not self._ended or error.permanent:
                    raise
            self._begin()  # nobody has seen the wrong bytes yet

    def _next(self, size: int) -> bytes:
        while True:
            transport = self._repository.transport
            try:
                if self._response is None:
                    self._response = self._repository.open_range(self._digest, self._position, None)
                patience = _SLOWEST * transport.policy.read_timeout
                piece = transport.read(self._response, min(size, _PROGRESS), time.monotonic() + patience)
                if not piece and self._size is not None and self._position < self._size:
                    where = f"{self._repository}: {self._digest}"
                    what = f"truncated: {self._position} of {self._size} bytes"
                    # Without a length the end may as well have been a broken connection.
                    told = "Content-Length" in self._response.headers
                    raise BackendError(f"{where}: {what}", permanent=told)
                break
            except BackendError as error:
                self._drop()
                if self._position - self._forgiven >= _PROGRESS:
                    self._failures, self._forgiven = 0, self._position
                self._failures += 1
                policy, tried = transport.policy, self._failures
                if not wait_to_retry(
                    error, tried, policy.attempts, policy.delay(tried), patience=policy.total
                ) and not self._go_on_elsewhere(error):
                    raise
        self._hash.update(piece)
        self._position += len(piece)
        if self._size is not None and self._position > self._size:
            raise self._wrong(f"{self._repository}: {self._digest} is larger than {self._size} bytes")
        if not piece:
            self._finish()
        return piece

    def _go_on_elsewhere(self, error: BackendError) -> bool:
        other = self._another(self._repository, self._position, error) if self._another else None
        if other is None:
            return False
        self._repository, self._failures, self._forgiven = other, 0, self._position
        self._read_from.append(other)
        return True

    def _finish(self) -> None:
        self._ended = True
        if self._response is not None:
            self._response.release_conn()
            self._response = None
        found = f"{self._digest.partition(':')[0]}:{self._hash.hexdigest()}"
        if found != self._digest:
            where = " and ".join(str(each) for each in self._read_from)
            raise self._wrong(f"{where}: corrupted blob: expected {self._digest}, found {found}")

    def _wrong(self, text: str) -> BackendError:
        """The error for wrong bytes; whoever sent some of them is blamed."""
        self._drop()
        self._ended = True
        error = BackendError(text, permanent=True)
        if self._another:
            others = [self._another(each, self._position, error) for each in self._read_from]
            for other in others:
                if other is not None:
                    self._repository, error.permanent = other, False
        return error

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def close(self) -> None:
        self._drop()
        super().close()
