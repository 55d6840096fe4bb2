"""The cache of one blob: a device that seems complete, filled with verified chunks as they are read."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nydus.errors import BackendError, FormatError, NydusError
from nydus.rafs import blobmeta
from nydus.rafs.blobmeta import ChunkMap
from nydus.rafs.model import BlobFeature, BlobInfo
from nydus.storage.backend import Backend
from nydus.storage.fetch import Buffer, Fetcher, Patience
from nydus.storage.files import OpenFile
from nydus.storage.flusher import DIRTY_BYTES, flusher
from nydus.storage.openblob import OpenBlob
from nydus.storage.store import MISSING, READY, SUSPECT, CacheError, write_aside

log = logging.getLogger(__name__)

BLOCK = 4096
#: Configurations may ask for 256 MiB; memory for that, times the threads, is not to be had.
_MAX_AMPLIFY = 16 << 20
_ZEROS = bytes(BLOCK)


class _Opening:
    """An attempt to open that others wait for. ``done`` is set once, whatever happens."""

    def __init__(self, local: bool) -> None:
        self.local = local
        self.done = threading.Event()
        self.error: NydusError | None = None


class BlobCache:
    """Random access to the uncompressed bytes of a blob; thread-safe.

    A chunk is fetched once however many readers wait for it, is checked against its digest (or checksum)
    before anybody sees it, and is then placed in a sparse file. A fetch that fails wakes all its readers with
    the error and leaves nothing behind: the next read tries again.

    Args:
        work_dir: cache directory, see :class:`~nydus.storage.store.Store`.
        blob: the bootstrap's entry of the blob.
        chunks: its chunk table, or a function that gets it; None reads ``blob.meta`` from the cache directory
            or the backend when the first byte is wanted.
        backend: where stored bytes come from.
        digests: adds what the bootstrap knows of the chunks to their table, once and late:
            ``lambda chunks: chunks.set_digests(v6.read_chunk_table(data, head), blob_index)``. A plain blob
            has no digests of its own, and its chunks cannot be verified without.
        amplify: a request is extended with following missing chunks up to this many stored bytes.
        validate: check the digest of a chunk on every read from the cache, not only the first time.
        own_places: the table gives the chunks other places than the blob's author did. The files are named by
            the table, too: those of the author's places must not be taken for them.
        meta_id: name of the blob that holds ``blob.meta``, where that is not said by ``blob`` itself.
        attempts: how often a read of the backend is tried.
        deadline: seconds after which no further attempt is started, and no reader waits any more. With a
            backend that gives up after ``timeout`` seconds an error takes ``deadline + timeout`` at most.

    Errors of all methods are NydusError: BackendError when bytes cannot be had or are wrong, CacheError when
    the cache directory cannot be used, FormatError for a corrupt chunk table.
    """

    def __init__(
        self,
        work_dir: Path,
        blob: BlobInfo,
        chunks: ChunkMap | Callable[[], ChunkMap] | None,
        backend: Backend,
        *,
        digests: Callable[[ChunkMap], None] | None = None,
        amplify: int = 1 << 20,
        validate: bool = False,
        own_places: bool = False,
        meta_id: str = "",
        attempts: int = 3,
        deadline: float = 20.0,
    ) -> None:
        if "/" in blob.id or "\0" in blob.id or blob.id.startswith(".") or not 0 < len(blob.id) <= 200:
            raise FormatError("invalid blob id", found=blob.id)
        self.work_dir = Path(work_dir)
        self.blob = blob
        self._chunks, self._digests = chunks, digests
        self._more_digests: list[Callable[[ChunkMap], None]] = []
        self._backend = backend
        self._amplify = min(amplify, _MAX_AMPLIFY)
        self._validate = validate
        self._own_places = own_places
        self._meta_id = meta_id
        self._closing = threading.Event()
        self._patience = Patience(attempts, deadline, self._closing)
        #: Device length: whole blocks, at least the uncompressed blob.
        self.length = -(-blob.uncompressed_size // BLOCK) * BLOCK
        self._lock = threading.Lock()
        self._opened: OpenBlob | None = None
        self._opening: _Opening | None = None
        self._fetcher: Fetcher | None = None
        self._flush_lock = threading.Lock()
        self._dirty: list[int] = []
        self._dirty_bytes = 0
        self._wrong: list[int] = []
        self._unsealed = False
        self._unkept: list[tuple[str, bytes]] = []
        self._no_space_until = 0.0
        self._demand = 0
        self._last_demand = 0.0
        self._count_lock = threading.Lock()
        self._reads = self._whole = self._partial = self._prefetched = self._prefetches = 0

    def read(self, offset: int, length: int) -> list[Buffer]:
        """The bytes of a range as buffers to send one after the other; fewer only at the end.

        Bytes that no chunk covers are zeros.
        """
        opened = self._opened or self._open()
        end = min(offset + length, self.length)
        if offset < 0 or length < 0:
            raise ValueError(f"invalid range {offset}+{length}")
        if end <= offset:
            return []
        first, last = opened.rows(offset, end)
        if opened.states.count(READY, first, last) == last - first:
            with self._count_lock:
                self._reads += 1
                self._whole += 1
            return [opened.store.read(offset, end - offset)]
        missing = opened.states.count(MISSING, first, last)
        with self._count_lock:
            self._reads += 1
            self._partial += 0 < missing < last - first
            self._whole += not missing
            self._demand += 1
        try:
            got = self._gather(opened, first, last)
        finally:
            with self._count_lock:
                self._demand -= 1
                self._last_demand = time.monotonic()
        return opened.assemble(got, offset, end, first, last)

    def fill(self, offset: int, length: int) -> int:
        """Make a range ready without giving its bytes, and without keeping readers from their turn.

        Returns:
            the number of stored bytes that had to be fetched.
        """
        opened = self._opened or self._open()
        first, last = opened.rows(max(offset, 0), min(offset + length, self.length))
        missing = [row for row in range(first, last) if opened.states[row] == MISSING and opened.wanted[row]]
        if opened.states.count(READY, first, last) == last - first:
            return 0
        self._gather(opened, first, last, prefetch=True)
        units = np.unique(opened.decoder.unit_of[missing])
        fetched = int(opened.decoder.size[units].sum())
        with self._count_lock:
            self._prefetched += fetched
            self._prefetches += 1
        return fetched

    def ready(self, offset: int, length: int) -> bool:
        """Whether a read of this range needs neither the backend nor a check. Never blocks on the backend."""
        opened = self._opened
        if opened is None:
            return False
        first, last = opened.rows(max(offset, 0), min(offset + length, self.length))
        return opened.states.count(READY, first, last) == last - first

    @property
    def complete(self) -> bool:
        """Whether every chunk that a file uses is in the cache, checked or not; asks no backend."""
        opened = self._opened or self._open_local()
        return opened is not None and not opened.missing()

    @property
    def busy(self) -> bool:
        """Whether readers wait for this blob, or did a moment ago."""
        return self._demand > 0 or time.monotonic() - self._last_demand < 0.05

    def bytes_in(self, seconds: float) -> int:
        """How many stored bytes the backend gives in this time, going by recent reads."""
        return self._backend.metrics.bytes_in(seconds)

    def verified_file(self) -> OpenFile | None:
        """The data file, if every chunk that a file uses has been checked: it can be given to EROFS as it is.

        It is this very file that was checked, whatever its path leads to by now. Never blocks on the backend,
        nor for a check: None while some chunks are not yet checked (see :meth:`verify`), or have nothing to
        be checked with.
        """
        opened = self._opened or self._open_local()
        return opened.store.file if opened is not None and opened.verified() else None

    def verify(self) -> int:
        """Check all chunks that an unclean stop left in doubt. Stands back while readers wait.

        Returns:
            the number of chunks found wrong; they will be fetched again when they are read.
        """
        opened = self._opened or self._open_local()
        if opened is None or self._validate:
            return 0
        wrong = 0
        row = opened.states.find(SUSPECT)
        while row >= 0 and not self._closing.is_set():
            wrong += self._check_suspect(opened, row) is None
            row = opened.states.find(SUSPECT, row + 1)
            while self.busy and not self._closing.wait(0.05):
                pass
        return wrong

    def add_digests(self, digests: Callable[[ChunkMap], None]) -> None:
        """Add what another image knows of this blob's chunks, before that image shares this cache.

        A merged image only knows the chunks that its own files use. Without this the cache would not know
        that others are wanted, and would call itself complete and verified without them.

        Raises:
            FormatError, CacheError: the image is corrupt, or disagrees with another about a chunk. While the
                chunk table has not been read yet nobody knows; then all reads fail later. What cannot be
                checked against what some image says of it is not given to any.
        """
        with self._lock:
            if self._opened is None or self._fetcher is None:
                self._more_digests.append(digests)
            else:
                self._opened.add_digests(digests, self._fetcher.flying)

    def flush(self) -> None:
        """Put placed chunks on the disk, and record them only then in the chunk map. Errors are logged."""
        opened = self._opened
        if opened is not None:
            self._flush(opened)

    def _flush(self, opened: OpenBlob) -> bool:
        with self._flush_lock:
            self._keep_chunks()
            with self._lock:
                rows, self._dirty, self._dirty_bytes = self._dirty, [], 0
                wrong, self._wrong = self._wrong, []
            if not rows and not wrong:
                return True
            try:
                opened.store.sync()
            except OSError as error:
                # The kernel forgets what it could not write: nothing of it may be believed any more.
                log.error("cache file %s cannot be synced: %s", opened.store.path, error.strerror)
                for row in rows:
                    opened.states[row] = MISSING
                return False
            try:
                present = opened.store.join(np.array(rows, np.int64), np.array(wrong, np.int64))
            except (OSError, CacheError) as error:
                log.warning("chunk map of %s cannot be written: %s", opened.store.path, error)
                with self._lock:
                    self._dirty = rows + self._dirty
                    self._wrong = wrong + self._wrong
                return False
            # Another process may have placed chunks. Its word is good for a second look.
            states = np.frombuffer(opened.states, np.uint8)
            present = present[opened.decoder.verifiable[present]]
            for row in present[states[present] == MISSING].tolist():
                opened.states[row] = SUSPECT
            return True

    def close(self) -> None:
        """Flush, record what is verified, and let go of the files. Waiting readers get an error soon."""
        self._closing.set()
        fetcher, self._fetcher = self._fetcher, None
        if fetcher is not None:
            fetcher.drain(1.0)
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is None or not self._flush(opened) or not self._unsealed:
            return
        try:
            opened.store.seal(opened.good())
        except OSError as error:
            log.warning("cache file %s cannot be sealed: %s", opened.store.path, error.strerror)

    def metrics(self) -> dict[str, Any]:
        """Counters in the JSON shape of ``/api/v1/metrics/blobcache`` (nydusd.md 3.6)."""
        opened = self._opened
        ready = len(opened.states) - opened.states.count(MISSING) if opened else 0
        return {
            "underlying_files": [opened.store.path.name if opened else f"{self.blob.id}.blob.data"],
            "store_path": str(self.work_dir),
            "partial_hits": self._partial,
            "whole_hits": self._whole,
            "total": self._reads,
            "entries_count": ready,
            "prefetch_data_amount": self._prefetched,
            "prefetch_requests_count": self._prefetches,
            "prefetch_workers": 0,
            "prefetch_unmerged_chunks": 0,
            "prefetch_cumulative_time_millis": 0,
            "prefetch_begin_time_secs": 0,
            "prefetch_begin_time_millis": 0,
            "prefetch_end_time_secs": 0,
            "prefetch_end_time_millis": 0,
            "buffered_backend_size": 0,
            "data_all_ready": opened is not None and not opened.missing(),
        }

    # Opening

    def _open_local(self) -> OpenBlob | None:
        """Open if that needs no backend."""
        if self._chunks is None and not (self.work_dir / f"{self.blob.id}.blob.meta").exists():
            return None
        try:
            return self._open(local=True)
        except NydusError as error:
            log.warning("cache of blob %s: %s", self.blob.id, error)
            return None

    def _open(self, local: bool = False) -> OpenBlob:
        """The chunk table and the files; the first caller gets them, the others wait for it."""
        with self._lock:
            if self._opened is not None:
                return self._opened
            opening = self._opening
            mine = opening is None
            if opening is None:
                opening = self._opening = _Opening(local)
        if mine:
            try:
                opened = self._open_files(local)
                with self._lock:
                    if self._closing.is_set():
                        raise BackendError(f"blob {self.blob.id}: the cache is closed")
                    for source in self._more_digests:
                        opened.add_digests(source, lambda _row: False)
                    self._more_digests.clear()
                    self._opened = opened
            except NydusError as error:
                opening.error = error
            except BaseException as error:
                opening.error = BackendError(f"blob {self.blob.id}: {error!r}")
                raise
            finally:
                with self._lock:
                    self._opening = None
                opening.done.set()
        elif not opening.done.wait(2 * self._patience.deadline):
            raise BackendError(f"blob {self.blob.id}: its chunk table did not arrive in time")
        if not mine and opening.local and not local:
            return self._open()  # that one did not try hard
        if opening.error is not None:
            raise BackendError(f"blob {self.blob.id} cannot be read: {opening.error}") from opening.error
        opened_now = self._opened
        if opened_now is None:
            raise BackendError(f"blob {self.blob.id}: the cache is closed")
        return opened_now

    def _open_files(self, local: bool) -> OpenBlob:
        chunks, from_files = self._load_chunks(local)
        if self._digests is not None:
            try:
                self._digests(chunks)
            except FormatError as error:
                if not from_files or local:
                    raise
                log.warning("%s; reading its chunk table again from the backend", error)
                self._file("meta").unlink(missing_ok=True)
                chunks, from_files = self._load_chunks(local)
                self._digests(chunks)
        opened = OpenBlob(
            self.work_dir,
            chunks,
            self.length,
            name=f"{self.blob.id}.{chunks.fingerprint()}" if self._own_places else self.blob.id,
            validate=self._validate,
            from_files=from_files,
        )
        self._fetcher = Fetcher(
            self.blob.id,
            self._backend,
            opened.decoder,
            self._patience,
            missing=lambda row: opened.states[row] == MISSING,
            spare=lambda row: opened.states[row] == MISSING and bool(opened.wanted[row]),
            place=lambda decoded: self._place(opened, decoded),
            amplify=self._amplify,
        )
        return opened

    def _load_chunks(self, local: bool) -> tuple[ChunkMap, bool]:
        if isinstance(self._chunks, ChunkMap):
            return self._chunks, False
        if self._chunks is not None:
            return self._chunks(), False
        chunks = self._load_cached_chunks()
        if chunks is not None:
            return chunks, True
        if local:
            raise CacheError(f"blob {self.blob.id}: no usable blob.meta in {self.work_dir}")
        chunks = self._repeat(self._fetch_chunks)
        # Encoded here, before the bootstrap's digests are added; written by the flusher, as syncs take time.
        self._unkept = [("meta", blobmeta.to_cache_file(chunks))]
        if chunks.digests is not None:
            self._unkept.insert(0, ("digest", chunks.digests.tobytes()))
        flusher.changed(self)
        return chunks, False

    def _keep_chunks(self) -> None:
        """Write the chunk table beside the data."""
        unkept, self._unkept = self._unkept, []
        try:
            for suffix, data in unkept:
                write_aside(self._file(suffix), data)
        except OSError as error:
            log.warning("blob.meta of %s cannot be kept: %s", self.blob.id, error.strerror)

    def _file(self, suffix: str) -> Path:
        return self.work_dir / f"{self.blob.id}.blob.{suffix}"

    def _load_cached_chunks(self) -> ChunkMap | None:
        try:
            chunks = blobmeta.from_cache_file(self.blob, self._file("meta").read_bytes())
            if self.blob.features & BlobFeature.INLINED_CHUNK_DIGEST:
                raw = self._file("digest").read_bytes()
                if len(raw) != 32 * len(chunks):
                    return None
                chunks.digests = np.frombuffer(raw, np.uint8).reshape(-1, 32).copy()
            return chunks
        except OSError:
            return None
        except FormatError as error:
            log.warning("%s; reading it again from the backend", error)
            return None

    def _fetch_chunks(self) -> ChunkMap:
        blob = self.blob
        name = self._meta_id or (blob.rafs_digest.hex() if blob.features & BlobFeature.SEPARATE else blob.id)
        inlined = BlobFeature.HAS_TOC | BlobFeature.INLINED_FS_META
        size = self._backend.size(name) if blob.features & inlined == inlined else None
        try:
            return blobmeta.load(blob, lambda at, length: self._backend.read(name, at, length), size=size)
        except FormatError:
            self._backend.doubt(name)
            raise

    def _repeat(self, get: Callable[[], ChunkMap]) -> ChunkMap:
        started = time.monotonic()
        attempt = 1
        while True:
            try:
                return get()
            except BackendError as error:
                if error.permanent or not self._patience.again(attempt, started):
                    raise
            except FormatError:
                if not self._patience.again(attempt, started):
                    raise
            attempt += 1

    # Filling

    def _gather(
        self, opened: OpenBlob, first: int, last: int, *, prefetch: bool = False
    ) -> dict[int, Buffer]:
        """Make a run of chunks ready; gives the bytes of those that had to be decoded or checked."""
        got: dict[int, Buffer] = {}
        states = opened.states
        limit = time.monotonic() + self._patience.deadline
        while True:
            row = states.find(SUSPECT, first, last)
            while row >= 0:
                if row not in got and (data := self._check_suspect(opened, row)) is not None and not prefetch:
                    got[row] = data
                row = states.find(SUSPECT, row + 1, last)
            missing = [row for row in range(first, last) if states[row] == MISSING and row not in got]
            if prefetch:
                missing = [row for row in missing if opened.wanted[row]]
            if not missing:
                return got
            fetcher = self._fetcher
            if fetcher is None:
                raise BackendError(f"blob {self.blob.id}: the cache is closed")
            if time.monotonic() > limit:
                raise BackendError(f"blob {self.blob.id}: no answer within {self._patience.deadline:g} s")
            extend = not prefetch and time.monotonic() > self._no_space_until
            try:
                got |= fetcher.fetch(missing, limit, extend=extend)
            except BackendError as error:
                if opened.from_files and isinstance(error.__cause__, FormatError):
                    # Perhaps it is the table that is wrong. The next one to open this blob gets a new one.
                    self._file("meta").unlink(missing_ok=True)
                raise

    def _check_suspect(self, opened: OpenBlob, row: int) -> bytes | None:
        """The bytes of a chunk found in the cache if they are right; else it is missing from now on."""
        start, size = opened.starts[row], int(opened.chunks.usize[row])
        try:
            data = opened.store.read(start, size)
            opened.decoder.check(row, data)
        except (FormatError, CacheError) as error:
            log.warning("cache file %s: %s, fetching it again", opened.store.path, error)
            with self._lock:
                if opened.states[row] == SUSPECT:
                    opened.states[row] = MISSING
                    self._wrong.append(row)
                    self._unsealed = True
            flusher.changed(self)
            return None
        if not self._validate:
            opened.states[row] = READY
            self._unsealed = True
        return data

    def _place(self, opened: OpenBlob, decoded: Sequence[tuple[int, Buffer]]) -> None:
        """Write verified chunks, adjacent ones together, and mark them ready."""
        run: list[Buffer] = []
        rows: list[int] = []
        start = end = 0
        for row, data in decoded:
            offset = opened.starts[row]
            gap = offset - end
            if rows and row == rows[-1] + 1 and 0 <= gap < BLOCK:
                if gap:
                    run.append(_ZEROS[:gap])
            else:
                self._write(opened, start, run, rows)
                run, rows, start = [], [], offset
            run.append(data)
            rows.append(row)
            end = offset + len(data)
        self._write(opened, start, run, rows)

    def _write(self, opened: OpenBlob, offset: int, buffers: list[Buffer], rows: list[int]) -> None:
        if not rows:
            return
        try:
            opened.store.write(offset, buffers)
        except OSError as error:
            # Readers still get the bytes they wait for; only the next ones have to fetch them again.
            now = time.monotonic()
            if now > self._no_space_until:
                log.warning("cache file %s cannot be written: %s", opened.store.path, error.strerror)
            self._no_space_until = now + 10
            return
        with self._lock:
            for row in rows:
                opened.states[row] = opened.placed[row]
            self._unsealed = True
            self._dirty += rows
            self._dirty_bytes += sum(len(buffer) for buffer in buffers)
            urgent = self._dirty_bytes > DIRTY_BYTES
        flusher.changed(self, urgent=urgent)
