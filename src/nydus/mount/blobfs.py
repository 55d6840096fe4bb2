"""blobfs: one large read-only file for each blob, served from a raw ``/dev/fuse`` descriptor.

EROFS is mounted on these files and keeps all metadata and every page it has read in the kernel, so Python
sees only large reads of missing ranges. Three properties carry the design (measured in docs/design.md):

* The FUSE mount is *detached*: it has no place in the mount tree, only a descriptor. EROFS opens its devices
  as ``/proc/self/fd/<descriptor>/<name>``. When the last EROFS and the descriptor are gone so is the mount.
* The connection lives as long as any process holds ``/dev/fuse``. A successor that holds it asks the kernel
  to send again what was not answered (FUSE_NOTIFY_RESEND) and goes on serving; no reader notices.
* Nobody holds it: readers get EIO, never zeros.

The requests are those of ``include/uapi/linux/fuse.h``, protocol 7.x.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from nydus.errors import MountError
from nydus.mount import syscalls

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")

MAX_READ = 1 << 20
BLOCK = 4096
ROOT = 1
_FOREVER = 1 << 32  # seconds; names and sizes never change
_REQUEST = 16 << 10  # the kernel wants room for 8 KiB; requests are small, as nothing is written
_FETCHERS = 32  # threads of one file that may wait for its backend at one time
# Readaheads that may wait for an answer, and from how many on the kernel makes fewer. All files share them: a
# registry that does not answer must not use them up.
_MAX_BACKGROUND, _CONGESTED = 1024, 768

# enum fuse_opcode
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 14, 15, 17, 18
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, INTERRUPT = 25, 26, 27, 28, 29, 36
DESTROY, BATCH_FORGET, NOTIFY_REPLY = 38, 42, 41
_SILENT = {FORGET, BATCH_FORGET, INTERRUPT, NOTIFY_REPLY}
_NOTIFY_INVAL_ENTRY, _NOTIFY_RESEND = 3, 7

# INIT flags (the upper word is in ``flags2``)
_ASYNC_READ, _BIG_WRITES, _PARALLEL_DIROPS, _MAX_PAGES = 1 << 0, 1 << 5, 1 << 18, 1 << 22
_EXPLICIT_INVAL_DATA, _INIT_EXT, _HAS_RESEND = 1 << 25, 1 << 30, 1 << 39
_WANTED = (
    _ASYNC_READ | _BIG_WRITES | _PARALLEL_DIROPS | _MAX_PAGES | _EXPLICIT_INVAL_DATA | _INIT_EXT | _HAS_RESEND
)
_FOPEN_KEEP_CACHE = 2

_IN = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, extensions, padding
_OUT = struct.Struct("<IiQ")  # length, error, unique
_INIT_IN = struct.Struct("<IIIII")  # major, minor, readahead, flags, flags2
_INIT_OUT = struct.Struct("<IIIIHHIIHHII24x")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_READ_IN = struct.Struct("<QQI")  # handle, offset, size
_HANDLE = struct.Struct("<Q")  # first in the requests and answers about an open file
_RESENT = 1 << 63  # set in the unique number of a request that is sent again
_IOV_MAX = 1024


class Source(Protocol):
    """What a file of blobfs reads from; safe for several threads."""

    @property
    def length(self) -> int:
        """Size of the file in bytes, a multiple of the block size of the image."""
        ...

    def ready(self, offset: int, length: int) -> bool:
        """Whether :meth:`read` would return without waiting for a backend."""
        ...

    def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """Exactly the bytes of a range inside the file; raises where they cannot be had.

        In memory that has been written to: if this process is killed while the kernel waits for a page of
        an answer, the reader gets EIO.
        """
        ...


class _Queue:
    """The reads of one file that wait for its backend: no other file has to wait for a slow one's threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._threads = 0

    def run(self, job: Callable[[], None]) -> None:
        """Has a thread do it, now or when one is free."""
        with self._lock:
            self._jobs.append(job)
            if self._threads == _FETCHERS:
                return
            self._threads += 1
        try:
            threading.Thread(target=self._work, name="blobfs-fetch", daemon=True).start()
        except RuntimeError as error:
            log.error("serving reads one after the other: %s", error)
            self._work()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._threads -= 1
                    return
                job = self._jobs.popleft()
            try:
                job()
            except Exception:
                log.exception("defect in serving a FUSE read")


@dataclass(slots=True)
class File:
    """One file of the file system. ``handles`` are the kernel's open files: EROFS mounts that use it."""

    node: int
    name: str
    size: int
    label: str
    source: Source
    handles: set[int] = field(default_factory=set)
    waiting: _Queue = field(default_factory=_Queue)


@dataclass(slots=True)
class Counters:
    """What readers asked for; sizes and latencies in the classes of nydusd.md §3.6."""

    reads: int = 0
    errors: int = 0
    bytes: int = 0
    latency_us: int = 0
    sizes: list[int] = field(default_factory=lambda: [0] * 8)
    latencies: list[int] = field(default_factory=lambda: [0] * 8)


_SIZE_CLASSES = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20]
_LATENCY_CLASSES = [200, 1000, 20_000, 50_000, 500_000, 1_000_000, 2_000_000]


_collection = threading.Lock()
_uncollected = 0  # threads during which nothing is collected


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector from running: in a thread with descriptors of its own, objects of other
    threads would close those instead of theirs."""
    global _uncollected
    with _collection:
        _uncollected += 1
        gc.disable()
    try:
        yield
    finally:
        with _collection:
            _uncollected -= 1
            if not _uncollected:
                gc.enable()


class BlobFs:
    """One FUSE connection and the threads that serve it.

    Args:
        device: the open ``/dev/fuse`` of the connection.
        mount: the detached mount, which new EROFS mounts open their devices through.
        threads: how many threads read requests; reads that must wait for a backend get others.
        on_change: called after the kernel opened or closed a file, from a serving thread.
    """

    def __init__(
        self,
        device: int,
        mount: int,
        *,
        threads: int = 4,
        on_change: Callable[[File], None] | None = None,
    ) -> None:
        self.device, self.mount = device, mount
        self.counters = Counters()
        self._count = threads
        self._on_change = on_change
        self._files: dict[int, File] = {}
        self._names: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self._inflight: dict[int, tuple[int, float]] = {}
        self._leaving = False
        self._threads: list[threading.Thread] = []
        self._reported: dict[tuple[str, int], float] = {}

    @classmethod
    def create(
        cls, *, threads: int = 4, on_change: Callable[[File], None] | None = None, source: str = "nydus"
    ) -> BlobFs:
        """Opens a new connection, not yet served: call :meth:`serve`.

        Raises:
            MountError: there is no ``/dev/fuse``, or no right to mount it.
        """
        device = -1
        try:
            device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            with syscalls.FsContext("fuse") as context:
                context.set("source", source)
                context.set("fd", str(device))
                context.set("rootmode", "40000")
                context.set("user_id", str(os.getuid()))
                context.set("group_id", str(os.getgid()))
                context.set("max_read", str(MAX_READ))
                context.set("allow_other")
                context.create()
                mount = context.mount(syscalls.ATTR_RDONLY | syscalls.ATTR_NODEV | syscalls.ATTR_NOSUID)
        except OSError as error:
            if device >= 0:
                os.close(device)
            raise MountError(f"cannot make a FUSE mount: {error.strerror}") from error
        return cls(device, mount, threads=threads, on_change=on_change)

    # Files

    def add(self, node: int, size: int, label: str, source: Source, handles: Sequence[int] = ()) -> File:
        """Adds a file. ``node`` is new for ever (a name is never used for two files), ``size`` in bytes,
        ``label`` what log lines call it, ``handles`` those that a predecessor has given out."""
        file = File(node, f"blob-{node}", size, label, source, set(handles))
        with self._lock:
            if node in self._files or node == ROOT:
                raise ValueError(f"node {node} is in use")
            self._files[node] = file
            self._names[file.name.encode()] = node
        return file

    def remove(self, node: int) -> None:
        """Removes a file that no EROFS uses any more, and its pages from the kernel."""
        with self._lock:
            file = self._files.pop(node, None)
            if file is None:
                return
            del self._names[file.name.encode()]
        name = file.name.encode()
        body = struct.pack("<QII", ROOT, len(name), 0) + name + b"\0"
        with suppress(OSError):  # ENOENT: the kernel has forgotten it already
            os.write(self.device, _OUT.pack(16 + len(body), _NOTIFY_INVAL_ENTRY, 0) + body)

    def files(self) -> list[File]:
        with self._lock:
            return list(self._files.values())

    def path(self, file: File) -> str:
        """The path by which this process opens a file, inside :meth:`waiting_for_it`."""
        return f"/proc/self/fd/{self.mount}/{file.name}"

    def waiting_for_it(self, function: Callable[[], T]) -> T:
        """Runs a function that makes the kernel open or read these files, such as an EROFS mount.

        The kernel's wait for an answer cannot be interrupted. If this process is killed in it, the waiting
        thread must not be what keeps the connection open, or it would wait for ever; nor may it keep clients
        waiting, or locks. So the function runs in a thread that has no descriptors but those it makes; paths
        below ``/proc/self/fd`` are those of the process all the same.
        """
        result: list[T] = []
        problem: list[BaseException] = []

        def run() -> None:
            try:
                with _no_collection():
                    syscalls.drop_descriptors()
                    result.append(function())
            except BaseException as error:
                problem.append(error)

        thread = threading.Thread(target=run, name="mounter", daemon=True)
        thread.start()
        thread.join()
        if problem:
            raise problem[0]
        return result[0]

    def inflight(self) -> list[tuple[int, int, float]]:
        """Running reads: (unique, node, seconds since the epoch when it came)."""
        return [(unique, node, when) for unique, (node, when) in list(self._inflight.items())]

    # Life

    def serve(self, *, resend: bool = False) -> None:
        """Starts the threads. ``resend``: first have the kernel send again what a dead predecessor took."""
        if resend:
            self.resend()
        for number in range(self._count):
            thread = threading.Thread(target=self._serve, name=f"blobfs-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def leave(self) -> None:
        """Takes no more requests and answers none with an error: a successor has them sent again."""
        self._leaving = True

    def resend(self) -> None:
        """Asks the kernel to send every unanswered request again."""
        try:
            os.write(self.device, _OUT.pack(16, _NOTIFY_RESEND, 0))
        except OSError as error:
            log.error("the kernel does not send requests again (%s): some readers may hang", error.strerror)

    def set_readahead(self, kib: int) -> None:
        """Sets the readahead of the FUSE mount; EROFS mounts made later use it."""
        major, minor = syscalls.device_of(self.mount)
        path = Path(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb")
        try:
            path.write_text(f"{kib}\n")
        except OSError as error:  # read-only /sys in a container: the kernel's 128 KiB stay
            log.warning("cannot set the readahead to %d KiB: %s", kib, error)

    def close(self, timeout: float = 5.0) -> None:
        """Gives up the mount and, when the connection has ended with its last user, the device.

        While a thread may still use the device's number the number must not become another file's: if the
        connection does not end in ``timeout`` seconds the device stays open.
        """
        if self.mount >= 0:
            os.close(self.mount)
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads) or self._inflight:
            log.warning("a FUSE connection is still in use")
            return
        os.close(self.device)

    # Serving

    def _serve(self) -> None:
        # A fault on this memory while the process is being killed makes the kernel fail the request that it
        # was just handing out: EIO for the reader, and no successor is asked for it.
        buffer = syscalls.resident_buffer(_REQUEST)
        view = memoryview(buffer)
        while not self._leaving:
            try:
                length = os.readv(self.device, [buffer])
            except OSError as error:
                if error.errno in (
                    errno.EINTR,
                    errno.EAGAIN,
                    errno.ENOENT,
                ):  # ENOENT: request was interrupted
                    continue
                if error.errno != errno.ENODEV:  # ENODEV: the last mount is gone
                    log.error("reading FUSE requests: %s", error.strerror)
                return
            try:
                self._handle(view[:length])
            except Exception:
                log.exception("defect in serving a FUSE request")
                with suppress(OSError, struct.error):
                    self._reply(_IN.unpack_from(view)[2], error=errno.EIO)

    def _handle(self, request: memoryview) -> None:
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        body = request[_IN.size :]
        if opcode == READ:
            _, offset, size = _READ_IN.unpack_from(body)
            self._read(unique, node, offset, size)
        elif opcode in _SILENT:
            # An INTERRUPT needs no answer. To fail the read would turn any signal of a living process into
            # EIO for it, and its bytes are wanted by others anyway; a killed reader does not wait for us.
            pass
        elif opcode == LOOKUP:
            found = self._names.get(bytes(body).rstrip(b"\0")) if node == ROOT else None
            if found is None:
                self._reply(unique, error=errno.ENOENT)
            else:
                entry = struct.pack("<QQQQII", found, 0, _FOREVER, _FOREVER, 0, 0)
                self._reply(unique, entry + self._attributes(found))
        elif opcode == GETATTR:
            if node == ROOT or node in self._files:
                self._reply(unique, struct.pack("<QII", _FOREVER, 0, 0) + self._attributes(node))
            else:
                self._reply(unique, error=errno.ESTALE)
        elif opcode == OPEN:
            self._opened(unique, node)
        elif opcode == RELEASE:
            self._released(unique, node, *_HANDLE.unpack_from(body))
        elif opcode == INIT:
            self._init(unique, body)
        elif opcode == STATFS:
            self._reply(
                unique, struct.pack("<QQQQQIIII24x", 0, 0, 0, len(self._files), 0, BLOCK, 255, BLOCK, 0)
            )
        elif opcode == OPENDIR:
            self._reply(unique, struct.pack("<QII", 0, 0, 0))
        elif opcode in (FLUSH, RELEASEDIR, READDIR, DESTROY):
            self._reply(unique)
        else:
            self._reply(unique, error=errno.ENOSYS)

    def _reply(self, unique: int, *buffers: Buffer, error: int = 0) -> None:
        length = _OUT.size + sum(map(len, buffers))
        try:
            os.writev(self.device, [_OUT.pack(length, -error, unique), *buffers])
        except OSError as failure:
            # ENOENT: the request is gone (its reader was killed); ENODEV: the connection is.
            if failure.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    def _init(self, unique: int, body: memoryview) -> None:
        if len(body) >= _INIT_IN.size:
            major, minor, _, low, high = _INIT_IN.unpack_from(body)
        else:  # before 7.36 there was no second flag word
            major, minor, _, low = struct.unpack_from("<IIII", body)
            high = 0
        flags = ((high << 32 if low & _INIT_EXT else 0) | low) & _WANTED
        log.debug("FUSE %d.%d, flags %#x", major, minor, flags)
        # Readahead here is only an upper limit: set_readahead() decides.
        reply = _INIT_OUT.pack(
            7, min(minor, 45), 16 << 20, flags & 0xFFFFFFFF, _MAX_BACKGROUND, _CONGESTED,
            BLOCK, 1, MAX_READ // BLOCK, 0, flags >> 32, 0,
        )  # fmt: skip
        self._reply(unique, reply)

    def _attributes(self, node: int) -> bytes:
        file = self._files.get(node)
        mode, size = (stat.S_IFREG | 0o400, file.size) if file else (stat.S_IFDIR | 0o500, 0)
        return _ATTR.pack(node, size, (size + 511) // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, BLOCK, 0)

    def _opened(self, unique: int, node: int) -> None:
        file = self._files.get(node)
        if file is None:
            self._reply(unique, error=errno.ESTALE)
            return
        # A predecessor may have been killed before it answered: named after the request, the handle is the
        # same when the request is sent again. It is noted before the answer, as a successor must not think
        # that nobody uses the file.
        handle = unique & ~_RESENT
        with self._lock:
            file.handles.add(handle)
        self._changed(file)
        self._reply(unique, struct.pack("<QII", handle, _FOPEN_KEEP_CACHE, 0))

    def _released(self, unique: int, node: int, handle: int) -> None:
        file = self._files.get(node)
        if file is not None:
            with self._lock:
                file.handles.discard(handle)
            self._changed(file)
        self._reply(unique)

    def _changed(self, file: File) -> None:
        if self._on_change is not None:
            self._on_change(file)

    def _read(self, unique: int, node: int, offset: int, size: int) -> None:
        file = self._files.get(node)
        if file is None:
            self._reply(unique, error=errno.ESTALE)
            return
        size = max(0, min(size, MAX_READ, file.size - offset))
        if size == 0:
            self._reply(unique)
            return
        began = time.time()
        self._inflight[unique] = (node, began)
        if file.source.ready(offset, size):
            self._serve_read(unique, file, offset, size, began)
            return
        # It will wait: leave this thread to reads that need not.
        file.waiting.run(lambda: self._serve_read(unique, file, offset, size, began))

    def _serve_read(self, unique: int, file: File, offset: int, size: int, began: float) -> None:
        problem: Exception | None = None
        buffers: Sequence[Buffer] = []
        try:
            buffers = file.source.read(offset, size)
            if len(buffers) >= _IOV_MAX:
                buffers = [b"".join(buffers)]
            found = sum(map(len, buffers))
            if found != size:  # a short answer would be zeros to EROFS
                raise OSError(errno.EIO, f"{found} bytes instead of {size}")
        except Exception as error:
            problem = error
        try:
            if problem is not None and self._leaving:
                log.debug("left to the successor: %s", problem)
            elif problem is not None:
                self._report(file, offset, size, problem)
                self._reply(unique, error=errno.EIO)
            else:
                self._answer(unique, file, offset, size, buffers)
        finally:
            self._inflight.pop(unique, None)
            self._account(size, int((time.time() - began) * 1e6), problem is not None)

    def _answer(self, unique: int, file: File, offset: int, size: int, buffers: Sequence[Buffer]) -> None:
        try:
            self._reply(unique, *buffers)
        except OSError as error:  # no memory, say; a read without any answer would wait for ever
            self._report(file, offset, size, error)
            self._reply(unique, error=errno.EIO)

    def _report(self, file: File, offset: int, size: int, problem: Exception) -> None:
        """One log line for a failing range, not one for each of the kernel's attempts."""
        key, now = (file.label, offset // MAX_READ), time.monotonic()
        with self._lock:
            if len(self._reported) > 1000:
                self._reported = {k: when for k, when in self._reported.items() if now - when < 10}
            again = now - self._reported.get(key, -10.0) < 10
            if not again:
                self._reported[key] = now
        level = logging.DEBUG if again else logging.ERROR
        log.log(level, "blob %s at offset %d, %d bytes: %s", file.label, offset, size, problem)

    def _account(self, size: int, microseconds: int, failed: bool) -> None:
        counters = self.counters
        with self._lock:
            counters.reads += 1
            counters.errors += failed
            counters.latency_us += microseconds
            counters.latencies[sum(microseconds > limit for limit in _LATENCY_CLASSES)] += 1
            if not failed:
                counters.bytes += size
                counters.sizes[sum(size >= limit for limit in _SIZE_CLASSES)] += 1
