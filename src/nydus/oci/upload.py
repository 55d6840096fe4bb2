"""The upload of a blob while it is being made."""

from __future__ import annotations

import contextlib
import queue
import re
import threading
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nydus.errors import BackendError
from nydus.oci.retry import wait_to_retry

if TYPE_CHECKING:
    import urllib3

    from nydus.oci.registry import Repository

#: A blob up to this size is sent in one request, which can be repeated if it fails.
_WHOLE = 4 << 20
_PIECE = 256 << 10
_PIECES_WAITING = 16
#: More than what the buffers of a connection and of a registry may hold.
_KEPT = 16 << 20
_STALL = 60.0
#: How long one that is cancelled waits for the registry.
_PATIENCE = 2.0
#: A registry may need long to check the digest of a large blob.
_COMMIT = 300.0
#: However large a registry says that chunks must be: they are held in memory.
_MAX_CHUNK = 64 << 20
_RANGE = re.compile(r"(?:bytes=)?0-([0-9]{1,15})")


class Upload:
    """A blob on its way to a registry. ``write`` blocks while the network is slower than the writer.

    Leave it by :meth:`commit`; leaving the context in another way tells the registry to forget it::

        with repository.upload() as upload:
            upload.write(data)
            upload.commit(digest)

    A large blob goes as one streamed request (what Docker does, so what every registry knows). If that
    breaks, another goes on where the registry says it got to. That must be within what was sent last, which
    is kept; else it is an error that the maker of the blob may retry.

    With a chunk size it goes as one request for each chunk, which is held until the registry has it: one
    that fails is repeated in the same way. Proxies that limit the size of a request need this.

    Args:
        chunk_size: bytes of one request; 0 streams. A registry that wants larger chunks gets them.

    Attributes:
        sent: bytes the connection has taken so far.
    """

    def __init__(self, repository: Repository, chunk_size: int = 0) -> None:
        self._repository, self._transport = repository, repository.transport
        self._chunk_size = chunk_size
        self._whole = min(_WHOLE, chunk_size or _WHOLE)
        self._position = 0
        self._kept: deque[bytes] = deque()
        self._kept_size = self._taken = 0
        self._ended = False
        self._held: list[bytes] = []
        self._size = 0
        self._location = ""
        self._queue: queue.Queue[bytes | None] = queue.Queue(_PIECES_WAITING)
        self._sender: threading.Thread | None = None
        self._failure: BackendError | None = None
        self._cancelled = False
        self._finished = False
        self.sent = 0

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            self.cancel()

    def write(self, data: bytes) -> None:
        """Adds bytes to the blob.

        Raises:
            BackendError: the upload has failed.
        """
        self._held.append(bytes(data))
        self._size += len(data)
        if self._sender is None and self._size > self._whole:
            self._location = self.begin()
            self._sender = threading.Thread(target=self._send, name="upload", daemon=True)
            self._sender.start()
        if self._sender is not None:
            self._hand_over(_PIECE)

    def commit(self, digest: str) -> None:
        """Ends the blob; when this returns the registry has it and has checked it.

        Raises:
            BackendError: it was refused, or the upload had failed.
        """
        if self._sender is None:
            body = b"".join(self._held)
            self._transport.attempt(lambda: self._put(self.begin(), digest, body))
        else:
            self._hand_over(0)
            self._offer(None)
            self._sender.join()
            if self._failure:
                raise self._failure
            self._transport.attempt(lambda: self._put(self._location, digest, b""))
        self._finished = True

    def cancel(self) -> None:
        """Stops sending and has the registry drop what it got."""
        self._finished = self._cancelled = True
        if self._sender is not None:
            with contextlib.suppress(queue.Full):  # a sender that has pieces left sees the flag
                self._queue.put_nowait(None)
            self._sender.join(_PATIENCE)
            if self._sender.is_alive():
                return  # the registry does not answer; the thread ends with its time limit
        if self._location:
            self._repository.abandon(self._location)

    def begin(self) -> str:
        """Asks the registry for an upload; returns its address. The other methods do so when they need it."""

        def post() -> str:
            path = f"{self._repository.path}/blobs/uploads/"
            headers = {"Content-Length": "0"}
            response = self._transport.request("POST", path, self._repository.push, headers, ok=(201, 202))
            self._transport.discard(response)
            least = response.headers.get("OCI-Chunk-Min-Length", "")
            if self._chunk_size and least.isascii() and least.isdigit():
                self._chunk_size = max(self._chunk_size, min(int(least), _MAX_CHUNK))
            return self._transport.url(self._transport.base + path, response.headers.get("Location", ""))

        return self._transport.attempt(post)

    def _hand_over(self, least: int) -> None:
        if sum(map(len, self._held)) > least:
            self._offer(b"".join(self._held))
            self._held.clear()

    def _offer(self, piece: bytes | None) -> None:
        """Gives a piece to the sender, or raises what it died of."""
        while True:
            if self._failure:
                raise self._failure
            try:
                self._queue.put(piece, timeout=0.2)
                return
            except queue.Full:
                if self._sender is not None and not self._sender.is_alive():
                    raise self._failure or BackendError(f"{self._repository}: the upload stopped") from None

    def _send(self) -> None:
        try:
            if self._chunk_size:
                self._send_chunks()
            else:
                self._stream()
        except BackendError as error:
            self._failure = error
        except _Cancelled:
            pass

    def _patch(self, body: bytes | Iterator[bytes], headers: dict[str, str], *, streaming: bool) -> None:
        response = self._transport.request(
            "PATCH",
            self._location,
            self._repository.push,
            {"Content-Type": "application/octet-stream", **headers},
            body,
            ok=(201, 202, 204),
            read_timeout=_STALL,
            streaming=streaming,
        )
        self._moved(response)

    def _moved(self, response: urllib3.BaseHTTPResponse) -> None:
        """Notes where the upload goes on, which may be another address after each request."""
        self._transport.discard(response)
        location = response.headers.get("Location", "")
        if location:
            self._location = self._transport.url(self._location, location)

    def _send_chunks(self) -> None:
        waiting = bytearray()
        for piece in self._pieces():
            waiting += piece
            while len(waiting) >= self._chunk_size:
                self._send_chunk(bytes(waiting[: self._chunk_size]), self._position)
                del waiting[: self._chunk_size]
        if waiting:
            self._send_chunk(bytes(waiting), self._position)

    def _stream(self) -> None:
        failures = before = 0
        while not self._ended:
            try:
                self._patch(self._counted(), {}, streaming=True)
            except BackendError as error:
                failures = 1 if self._taken - before > _WHOLE else failures + 1
                before = self._taken
                policy = self._transport.policy
                if self._cancelled or not wait_to_retry(
                    error, failures, policy.attempts, policy.delay(failures), patience=policy.total
                ):
                    raise
                try:
                    self._send_chunk(b"".join(self._kept), self._taken - self._kept_size, failed=True)
                except BackendError as second:
                    raise BackendError(f"{error}; {second}", status=error.status) from error

    def _send_chunk(self, data: bytes, begin: int, failed: bool = False) -> None:
        """Sends what begins at an offset; what failed may have got there in part."""
        end = begin + len(data)

        def send() -> None:
            nonlocal failed
            if self._cancelled:
                raise _Cancelled
            if failed:
                self._position = self._ask_position(begin, end)
            if self._position == end:
                return
            body = data[self._position - begin :]
            headers = {"Content-Length": str(len(body)), "Content-Range": f"{self._position}-{end - 1}"}
            try:
                self._patch(body, headers, streaming=False)
            except BackendError as error:
                failed = True
                if error.status == 416:  # the answer to the request before got lost
                    raise BackendError(str(error), status=416) from error
                raise
            self._position = end

        self._transport.attempt(send)
        self.sent = end

    def _ask_position(self, begin: int, end: int) -> int:
        """How much of the blob the registry has, after a request for ``begin`` to ``end`` has failed."""
        try:
            response = self._transport.request(
                "GET", self._location, self._repository.push, ok=(200, 202, 204)
            )
        except BackendError as error:  # whoever makes the blob may begin again
            raise BackendError(f"an interrupted upload cannot go on: {error}", status=error.status) from error
        self._moved(response)
        match = _RANGE.fullmatch(response.headers.get("Range", ""))
        # "0-0" is what registries say of an upload without any bytes.
        stored = -1 if not match else 0 if match[1] == "0" else int(match[1]) + 1
        if not begin <= stored <= end:
            raise BackendError(
                f"{self._repository}: an interrupted upload cannot go on: expected {begin} to {end} bytes"
                f" there, the registry has {stored if match else 'none that it tells of'}"
            )
        return stored

    def _counted(self) -> Iterator[bytes]:
        for piece in self._pieces():
            self._kept.append(piece)
            self._kept_size += len(piece)
            self._taken += len(piece)
            while self._kept_size - len(self._kept[0]) >= _KEPT:
                self._kept_size -= len(self._kept.popleft())
            yield piece
            self.sent = self._taken

    def _pieces(self) -> Iterator[bytes]:
        while (piece := self._queue.get()) is not None:
            if self._cancelled:
                break
            yield piece
        self._ended = True
        if self._cancelled:
            raise _Cancelled  # breaks the connection, so that the registry sees no complete request

    def _put(self, location: str, digest: str, body: bytes) -> None:
        self._location = location
        url = f"{location}{'&' if '?' in location else '?'}digest={digest}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(body))}
        try:
            response = self._transport.request(
                "PUT", url, self._repository.push, headers, body, ok=(200, 201, 204), read_timeout=_COMMIT
            )
        except BackendError as error:
            # The answer to an earlier attempt may have been lost after the registry took the blob.
            if error.status == 404 and self._repository.has_blob(digest):
                return
            raise
        self._transport.discard(response)
        self.sent = self._size


class _Cancelled(Exception):
    """Ends a streamed request from within its body."""
