"""Getting chunks from the backend: once each, in few requests, within a bounded time."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from nydus.errors import BackendError, FormatError, NydusError
from nydus.storage.backend import Backend
from nydus.storage.decode import Decoder

log = logging.getLogger(__name__)

Buffer = bytes | memoryview

#: Requests of one reader that run at the same time.
_PARALLEL = 4
#: Stored bytes of a request of several units that were all asked for, at least.
_MIN_REQUEST = 128 << 10


@dataclass(frozen=True, slots=True)
class Patience:
    """How often, and for how long, something is tried.

    Attributes:
        attempts: tries at most.
        deadline: seconds after which no further try is started.
        closing: set when nobody wants the result any more.
    """

    attempts: int
    deadline: float
    closing: threading.Event

    def again(self, attempt: int, started: float) -> bool:
        """Whether to go on after a failed attempt (counted from 1); waits a little before."""
        pause = 0.1 * 2**attempt
        if attempt >= self.attempts or time.monotonic() + pause - started > self.deadline:
            return False
        return not self.closing.wait(pause)


class _Flight:
    """Units that are being fetched in one request. ``done`` is set once, whatever happens."""

    __slots__ = ("data", "demanded", "done", "errors", "units")

    def __init__(self, units: list[int]) -> None:
        self.units = units
        self.demanded = set(units)  # the others are only there because they lie beside them
        self.data: dict[int, Buffer] = {}
        self.errors: dict[int, NydusError] = {}
        self.done = threading.Event()


class Fetcher:
    """Fetches the chunks of one blob. No lock is held while bytes are on their way.

    Args:
        blob_id: where the chunks are stored.
        missing: whether a chunk is not in the cache.
        spare: whether a chunk may be fetched though nobody asks for it now.
        place: puts verified chunks into the cache; they are no longer missing then. Must not raise.
        amplify: a request is extended with following spare chunks up to this many stored bytes. Readers that
            jump about get less: no more than what is worth a request of its own on this link. Those that go
            on where the last request ended get twice as much each time.
    """

    def __init__(
        self,
        blob_id: str,
        backend: Backend,
        decoder: Decoder,
        patience: Patience,
        *,
        missing: Callable[[int], bool],
        spare: Callable[[int], bool],
        place: Callable[[Sequence[tuple[int, Buffer]]], None],
        amplify: int,
    ) -> None:
        self._blob_id = blob_id
        self._backend = backend
        self._decoder = decoder
        self._patience = patience
        self._missing, self._spare, self._place = missing, spare, place
        self._amplify = amplify
        self._gap = amplify // 128
        self._window = 0
        self._next = -1
        self._lock = threading.Lock()
        self._flights: dict[int, _Flight] = {}

    def fetch(self, rows: Sequence[int], limit: float, *, extend: bool) -> dict[int, Buffer]:
        """Fetch chunks, or wait for those that are on their way already.

        Args:
            rows: missing chunks.
            limit: time (of ``time.monotonic``) until which to wait for the requests of others.
            extend: take neighbours along.

        Returns:
            the bytes of the chunks. Some may be left out, having arrived by other ways: ask again for those
            still missing.

        Raises:
            BackendError: a chunk could not be had. Its cause is a FormatError where what came was wrong.
        """
        mine, joined = self._plan(rows, extend)
        self._run(mine)
        wanted = set(self._decoder.unit_of[list(rows)].tolist())
        got: dict[int, Buffer] = {}
        for flight in (*mine, *joined):
            if not flight.done.wait(max(0.0, limit - time.monotonic())):
                raise BackendError(f"blob {self._blob_id}: no answer in time")
            for unit, error in flight.errors.items():
                if unit in wanted:
                    status = error.status if isinstance(error, BackendError) else None
                    raise BackendError(str(error), status=status) from error
            got.update((row, flight.data[row]) for row in rows if row in flight.data)
        return got

    def flying(self, row: int) -> bool:
        """Whether a chunk is being fetched."""
        return int(self._decoder.unit_of[row]) in self._flights

    def drain(self, seconds: float) -> None:
        """Wait for the requests that are under way, but not longer than this."""
        limit = time.monotonic() + seconds
        with self._lock:
            flights = set(self._flights.values())
        for flight in flights:
            flight.done.wait(max(0.0, limit - time.monotonic()))

    def _plan(self, rows: Sequence[int], extend: bool) -> tuple[list[_Flight], list[_Flight]]:
        """Requests to make, and requests of others to wait for."""
        units = dict.fromkeys(self._decoder.unit_of[list(rows)].tolist())
        mine: list[int] = []
        joined: dict[int, _Flight] = {}
        with self._lock:
            for unit in units:
                flight = self._flights.get(unit)
                if flight is not None:
                    joined[id(flight)] = flight
                elif any(map(self._missing, self._decoder.rows(unit))):
                    mine.append(unit)
            flights = [_Flight(group) for group in self._split(sorted(mine))]
            if flights and extend:
                self._extend(flights[-1])
            for flight in flights:
                self._flights.update(dict.fromkeys(flight.units, flight))
        return flights, list(joined.values())

    def _split(self, units: list[int]) -> list[list[int]]:
        """Neighbours in the blob together, but not so many that nothing could run in parallel."""
        decoder = self._decoder
        limit = max(self._amplify, _MIN_REQUEST)
        result: list[list[int]] = []
        start = end = memory = 0
        for unit in units:
            offset, size = int(decoder.offset[unit]), int(decoder.size[unit])
            memory += int(decoder.memory[unit])
            near = result and start <= offset <= end + self._gap
            if near and offset + size - start <= limit and memory <= 4 * limit:
                result[-1].append(unit)
                end = max(end, offset + size)
            else:
                result.append([unit])
                start, end, memory = offset, offset + size, int(decoder.memory[unit])
        return result

    def _extend(self, flight: _Flight) -> None:
        """Add the missing units that follow; their decoded size is bounded, too."""
        decoder = self._decoder
        first, last = flight.units[0], flight.units[-1]
        start = int(decoder.offset[first])
        end = int(decoder.offset[last]) + int(decoder.size[last])
        grown = 2 * self._window if first == self._next else 0
        limit = min(self._amplify, max(end - start + self._backend.metrics.spare_bytes(), grown))
        self._window = limit
        self._next = last + 1
        memory = int(decoder.memory[flight.units].sum())
        for unit in range(last + 1, len(decoder.offset)):
            offset, size = int(decoder.offset[unit]), int(decoder.size[unit])
            near = start <= offset <= end + self._gap and offset + size - start <= limit
            if not near or memory > 4 * limit:
                return
            self._next = unit + 1
            if unit in self._flights or not any(map(self._spare, decoder.rows(unit))):
                continue
            flight.units.append(unit)
            end = max(end, offset + size)
            memory += int(decoder.memory[unit])

    def _run(self, flights: list[_Flight]) -> None:
        """Fetch all, a few at a time, one of them in this thread."""
        waiting = deque(flights)

        def work() -> None:
            while True:
                try:
                    flight = waiting.popleft()
                except IndexError:
                    return
                self._fetch(flight)

        with suppress(RuntimeError):  # no more threads to be had: then this one does it all
            for _ in range(min(len(flights), _PARALLEL) - 1):
                threading.Thread(target=work, name="blob-fetch", daemon=True).start()
        work()

    def _fetch(self, flight: _Flight) -> None:
        started = time.monotonic()
        pending = flight.units
        errors: dict[int, NydusError] = {}
        attempt = 1
        try:
            while pending:
                errors = self._attempt(flight, pending)
                extended = len(pending) > len(flight.demanded)
                # What was only taken along is not worth another attempt, and may be what spoilt this one.
                pending = [unit for unit in pending if unit in errors and unit in flight.demanded]
                hopeless = all(isinstance(e, BackendError) and e.permanent for e in errors.values())
                if pending and ((hopeless and not extended) or not self._patience.again(attempt, started)):
                    break
                attempt += 1
            flight.errors = {unit: errors[unit] for unit in pending}
        except Exception as error:
            # Not raised: other flights of this thread have readers, too.
            log.exception("defect in fetching from blob %s", self._blob_id)
            failure = BackendError(f"blob {self._blob_id}: {error!r}")
            flight.errors = dict.fromkeys(flight.demanded, failure)
        finally:
            with self._lock:
                for unit in flight.units:
                    del self._flights[unit]
            flight.done.set()
        if flight.errors:
            unit, first = next(iter(flight.errors.items()))
            size, offset = int(self._decoder.size[unit]), int(self._decoder.offset[unit])
            log.error("blob %s: cannot read %d bytes at offset %#x: %s", self._blob_id, size, offset, first)

    def _attempt(self, flight: _Flight, units: list[int]) -> dict[int, NydusError]:
        """One request: place what is right, and tell what is wrong with the others."""
        decoder = self._decoder
        start = int(decoder.offset[units].min())
        end = int((decoder.offset[units] + decoder.size[units]).max())
        try:
            stored = memoryview(self._backend.read(self._blob_id, start, end - start))
        except BackendError as error:
            return dict.fromkeys(units, error)
        errors: dict[int, NydusError] = {}
        decoded: list[tuple[int, Buffer]] = []
        for unit in units:
            at = int(decoder.offset[unit]) - start
            try:
                decoded += decoder.decode(unit, stored[at : at + int(decoder.size[unit])])
            except FormatError as error:
                errors[unit] = error
        if errors:
            self._backend.doubt(self._blob_id)
        flight.data.update(decoded)
        self._place(decoded)
        return errors
