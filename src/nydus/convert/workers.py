"""Processes that convert layers.

A *forker* imports what a conversion needs, once, and forks the workers. A command forks it off itself, as
an import takes as long as some MB of a layer; elsewhere it is a fresh interpreter, which is safe in a
process with threads. Each worker gets its jobs as pickles on a socket. Its end is the end of its input, or
SIGTERM, on which it abandons its upload.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import queue
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from io import BufferedRWPair
from typing import TYPE_CHECKING, Any

from nydus.errors import NydusError
from nydus.mount import syscalls

if TYPE_CHECKING:
    from nydus.convert.job import Converted, Job

log = logging.getLogger(__name__)

_FRAME = struct.Struct("<Q")
_PATIENCE = 5.0
#: Each holds some 60 MB; images rarely have more large layers than this.
_MOST = 8

#: (index of the job, source bytes read, blob bytes built, blob bytes sent)
OnProgress = Callable[[int, int, int, int], None]
OnBuilt = Callable[[int, "Converted"], None]
OnStored = Callable[[int], None]


class Workers:
    """A number of worker processes.

    Args:
        count: how many; 0 is one for each processor.
        fork: this process can be forked: none of its threads holds a lock. That is faster.
    """

    def __init__(self, count: int = 0, *, fork: bool = False) -> None:
        count = count or min(os.cpu_count() or 1, _MOST)
        pairs = [socket.socketpair() for _ in range(count)]
        links = [theirs for _, theirs in pairs]
        # Ctrl-C reaches the whole group; an interpreter that starts would print where it was.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._forker = _fork_forker(pairs) if fork else _spawn_forker(links)
        except OSError as error:
            for ours, _ in pairs:
                ours.close()
            raise NydusError(f"cannot start a conversion process: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for link in links:
                link.close()
        self._status: int | None = None
        self._links = [ours for ours, _ in pairs]
        self._pipes: list[BufferedRWPair] = []
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._jobs: Sequence[Job] = ()
        self._waiting: list[int] = []  # jobs, the next one last
        self._unbuilt: set[int] = set()
        self._busy = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes; those at work abandon it."""
        for link in self._links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_WR)
        if self._status is None:
            self._signal(signal.SIGTERM)
            if self._reap(_PATIENCE) is None:
                self._signal(signal.SIGKILL)
                self._reap()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        for link in self._links:
            link.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._forker, number)

    def _reap(self, patience: float | None = None) -> int | None:
        """The forker's exit code once it has ended, None while it runs for longer than ``patience`` (s)."""
        if self._status is None:
            pidfd = os.pidfd_open(self._forker)
            try:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                if poll.poll(None if patience is None else patience * 1000):
                    self._status = os.waitstatus_to_exitcode(os.waitpid(self._forker, 0)[1])
            finally:
                os.close(pidfd)
        return self._status

    def run(self, jobs: Sequence[Job], progress: OnProgress, built: OnBuilt, stored: OnStored) -> None:
        """Converts layers, the largest first, until all are built; :meth:`finish` waits for the rest.

        The callbacks are called in the thread that calls these two.

        Raises:
            NydusError: what the first layer that failed raised; the others are not waited for.
        """
        self.finish()
        self._jobs, self._callbacks = jobs, (progress, built, stored)
        self._waiting = sorted(range(len(jobs)), key=lambda index: jobs[index].layer.size)
        self._unbuilt = set(range(len(jobs)))
        for link in self._links[len(self._pipes) : len(jobs)]:
            pipe = link.makefile("rwb")
            self._pipes.append(pipe)
            threading.Thread(
                target=_listen, args=(pipe, self._events), name="convert-events", daemon=True
            ).start()
        for pipe in self._pipes:
            self._give(pipe)
        while self._unbuilt:
            self._next()

    def finish(self) -> None:
        """Waits until all layers are in the target.

        Raises:
            NydusError: see :meth:`run`.
        """
        while self._busy:
            self._next()

    def _give(self, pipe: BufferedRWPair) -> None:
        if self._waiting:
            index = self._waiting.pop()
            self._busy += 1
            try:
                _send(pipe, (index, self._jobs[index]))
            except OSError:
                self._events.put(("gone",))

    def _next(self) -> None:
        progress, built, stored = self._callbacks
        match self._events.get():
            case ("progress", index, *figures):
                progress(index, *figures)
            case ("built", index, converted):  # again, if the end of the upload failed
                built(index, converted)
                self._unbuilt.discard(index)
            case ("stored", index, pipe):
                stored(index)
                self._busy -= 1
                self._give(pipe)
            case ("failed", error):
                raise error
            case ("warned", text):
                log.warning("%s", text)
            case ("gone",):
                code = self._reap() or 0
                how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
                raise NydusError(f"a conversion process was ended {how}; was there too little memory?")


def _spawn_forker(links: Sequence[socket.socket]) -> int:
    numbers = [link.fileno() for link in links]
    return os.posix_spawn(
        sys.executable,
        # -P: what lies in the current directory is not imported.
        [
            sys.executable,
            "-P",
            "-c",
            f"from nydus.convert.workers import main; main({numbers}, {os.getpid()})",
        ],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, number, number) for number in numbers
        ],  # which makes it inherited
    )


def _fork_forker(pairs: Sequence[tuple[socket.socket, socket.socket]]) -> int:
    import nydus.convert.layer  # noqa: F401  for both: the layers are merged here

    parent = os.getpid()
    # Until the handlers of this process are replaced in the other.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        if pid := os.fork():
            return pid
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        for ours, _ in pairs:
            ours.close()
        main([theirs.detach() for _, theirs in pairs], parent)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(1)


def _listen(pipe: BufferedRWPair, events: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    try:
        while message := _receive(pipe):
            events.put((*message, pipe) if message[0] == "stored" else message)
    except (OSError, ValueError, EOFError):
        pass
    events.put(("gone",))


def _send(pipe: BufferedRWPair, message: object) -> None:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    pipe.write(_FRAME.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: BufferedRWPair) -> tuple[Any, ...] | None:
    head = pipe.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    (size,) = _FRAME.unpack(head)
    data = pipe.read(size)
    if len(data) < size:
        return None
    message: tuple[Any, ...] = pickle.loads(data)
    return message


def main(numbers: Sequence[int], parent: int) -> None:
    """The life of the forker.

    It ends when all workers have ended, as the first that failed did: a signal that killed one kills it, too.
    If the command is killed, the workers are told to end, too, and are killed if they do not.

    Args:
        numbers: descriptors of sockets, one for each worker.
        parent: process id of the command.
    """
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach the parent too, which ends us in order
        signal.signal(number, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # whatever prints must not disturb the output of the command
    # numpy's BLAS, which nothing here uses, would start threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import nydus.convert.layer
    import nydus.oci.registry  # noqa: F401  the most usual source and target
    from nydus.build.stream import keep_memory

    keep_memory()
    # A worker lives for some layers; what is garbage in cycles until then is not worth a search.
    gc.disable()
    gc.freeze()
    links = [socket.socket(fileno=number) for number in numbers]
    workers = [_fork(link, links) for link in links]
    for link in links:
        link.close()

    def end() -> None:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGTERM)

    def terminate(*_: object) -> None:
        end()
        signal.alarm(round(2 * _PATIENCE))  # which ends this process, and with it the workers

    signal.signal(signal.SIGTERM, terminate)
    syscalls.die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        terminate()
    failed = 0
    while workers:
        pid, status = os.wait()
        workers.remove(pid)
        if status and not failed:
            failed = status
            end()
    if os.WIFSIGNALED(failed):
        with contextlib.suppress(OSError):  # SIGKILL
            signal.signal(os.WTERMSIG(failed), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(failed))
    os._exit(os.waitstatus_to_exitcode(failed))  # an interpreter takes its time to end


def _fork(link: socket.socket, links: Sequence[socket.socket]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for other in links:
            if other is not link:
                other.close()
        signal.signal(signal.SIGTERM, _stop)
        syscalls.die_with_parent(signal.SIGKILL)
        if os.getppid() == parent:
            _work(link.makefile("rwb"))
        status = 0
    except SystemExit:
        pass
    finally:
        os._exit(status)


class _Forward(logging.Handler):
    """Hands warnings to the parent, which knows where they are to be shown."""

    def __init__(self, answer: Callable[[object], None]) -> None:
        super().__init__(logging.WARNING)
        self._answer = answer
        self.layer = 0

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._answer(("warned", f"layer {self.layer}: {record.getMessage()}"))


def _work(pipe: BufferedRWPair) -> None:
    from nydus.convert.layer import convert_layer

    lock = threading.Lock()

    def answer(message: object) -> None:
        with lock:
            _send(pipe, message)

    forward = _Forward(answer)
    logging.getLogger("nydus").handlers[:] = [forward]

    while (received := _receive(pipe)) is not None:
        index, job = received
        forward.layer = job.number

        def report(read: int, built: int, sent: int, index: int = index) -> None:
            answer(("progress", index, read, built, sent))

        def built(converted: Converted, index: int = index) -> None:
            answer(("built", index, converted))

        try:
            convert_layer(job, report, built)
            answer(("stored", index))
        except NydusError as error:
            answer(("failed", error))
        except BrokenPipeError:
            return
        except Exception as error:  # a defect of ours must still reach the user as one line
            import traceback

            traceback.print_exc()
            answer(("failed", NydusError(f"layer {job.number}: {type(error).__name__}: {error}")))


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from nydus.oci.connections import interrupt

    interrupt()
    # Where this interrupts a clean-up, Python prints it; the parent has said already what is wrong.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    raise SystemExit(1)
