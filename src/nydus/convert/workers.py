"""Processes that convert layers.

They are started with a fresh interpreter, so that it is safe to use them from a process with threads, and
get their jobs as pickles on standard input. Their end is the end of their input, or SIGTERM, on which they
abandon their upload.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

from nydus.errors import NydusError

if TYPE_CHECKING:
    from nydus.convert.job import Converted, Job

_FRAME = struct.Struct("<Q")
_PATIENCE = 5.0

#: (index of the job, source bytes read, blob bytes built, blob bytes sent)
OnProgress = Callable[[int, int, int, int], None]
OnDone = Callable[[int, "Converted"], None]


class Workers:
    """A number of worker processes.

    Args:
        count: how many; they are started at once, so that their imports overlap with what the caller does.
    """

    def __init__(self, count: int) -> None:
        self._processes = [_start() for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes; those at work abandon it."""
        for process in self._processes:
            with contextlib.suppress(OSError):
                if process.stdin:
                    process.stdin.close()
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()
        self._processes.clear()

    def run(self, jobs: Sequence[Job], progress: OnProgress, done: OnDone) -> None:
        """Converts layers, the largest first. The callbacks are called in this thread.

        Raises:
            NydusError: what the first layer that failed raised; the others are not waited for.
        """
        order = sorted(range(len(jobs)), key=lambda index: -jobs[index].layer.size)
        events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        waiting = list(reversed(order))
        busy = 0
        threads: list[threading.Thread] = []

        def give(process: subprocess.Popen[bytes]) -> bool:
            if not waiting:
                return False
            index = waiting.pop()
            assert process.stdin
            try:
                _send(process.stdin, (index, jobs[index]))
            except OSError:
                events.put(("gone", process))
            return True

        for process in self._processes[: len(jobs)]:
            thread = threading.Thread(
                target=_listen, args=(process, events), name="convert-events", daemon=True
            )
            thread.start()
            threads.append(thread)
            busy += give(process)
        while busy:
            match events.get():
                case ("progress", index, read, built, sent):
                    progress(index, read, built, sent)
                case ("done", index, converted, process):
                    done(index, converted)
                    busy += give(process) - 1
                case ("failed", error):
                    raise error
                case ("gone", process):
                    code = process.wait()
                    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
                    raise NydusError(f"a conversion process was ended {how}; was there too little memory?")


def _start() -> subprocess.Popen[bytes]:
    # -P: what lies in the current directory is not imported.
    command = [sys.executable, "-P", "-c", "from nydus.convert.workers import main; main()"]
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as error:
        raise NydusError(f"cannot start a conversion process: {error}") from error


def _listen(process: subprocess.Popen[bytes], events: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    assert process.stdout
    try:
        while message := _receive(process.stdout):
            events.put((*message, process) if message[0] == "done" else message)
    except (OSError, ValueError, EOFError):
        pass
    events.put(("gone", process))


def _send(pipe: IO[bytes], message: object) -> None:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    pipe.write(_FRAME.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[Any, ...] | None:
    head = pipe.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    (size,) = _FRAME.unpack(head)
    data = pipe.read(size)
    if len(data) < size:
        return None
    message: tuple[Any, ...] = pickle.loads(data)
    return message


def main() -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends us in order
    signal.signal(signal.SIGTERM, _stop)
    jobs = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not break the frames
    lock = threading.Lock()

    def answer(message: object) -> None:
        with lock:
            _send(answers, message)

    from nydus.convert.layer import convert_layer

    while (received := _receive(jobs)) is not None:
        index, job = received

        def report(read: int, built: int, sent: int, index: int = index) -> None:
            answer(("progress", index, read, built, sent))

        try:
            answer(("done", index, convert_layer(job, report)))
        except NydusError as error:
            answer(("failed", error))
        except BrokenPipeError:
            return
        except Exception as error:  # a defect of ours must still reach the user as one line
            import traceback

            traceback.print_exc()
            answer(("failed", NydusError(f"layer {job.number}: {type(error).__name__}: {error}")))
    os._exit(0)  # nothing is left to tidy up, and an interpreter takes its time to do so


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Where this interrupts a clean-up, Python prints it; the parent has said already what is wrong.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    raise SystemExit(1)
