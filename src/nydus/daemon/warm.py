"""The warm parent: it has every module imported and forks daemons (see :mod:`nydus.daemon.spawn`)."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from nydus.mount import syscalls


def serve(descriptor: int, run: Callable[[Sequence[str]], int]) -> int:
    """Forks a daemon for each request on a SEQPACKET socket, until its other end is closed.

    Args:
        descriptor: the socket.
        run: runs a daemon with given arguments and returns its exit status.
    """
    from nydus.daemon import logs, supervisor, worker

    del logs, supervisor
    worker.preload()
    gc.freeze()
    syscalls.name_process("nydusd-warm")
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    wake, waker = socket.socketpair()
    wake.setblocking(False)
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ended: dict[int, int | None] = {}
    while True:
        ready, _, _ = select.select([connection, wake], [], [])
        if wake in ready:
            with suppress(BlockingIOError):
                wake.recv(4096)
            _reap(ended)
        if connection not in ready:
            continue
        data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        if not data:
            return 0
        request = json.loads(data)
        if "status" in request:
            _reap(ended)
            pid = request["status"]
            answer = {"code": ended[pid]} if pid in ended else {"unknown": 1}
        else:
            pid = os.fork()
            if pid == 0:
                _become_daemon(request, descriptors, [connection, wake, waker], run)
            ended[pid] = None
            answer = {"pid": pid}
        for number in descriptors:
            os.close(number)
        connection.send(json.dumps(answer).encode())


def _become_daemon(
    request: dict[str, object],
    descriptors: list[int],
    sockets: list[socket.socket],
    run: Callable[[Sequence[str]], int],
) -> None:
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for opened in sockets:
            opened.close()
        os.setsid()
        for number, target in zip(descriptors, (1, 2), strict=True):
            os.dup2(number, target)
            os.close(number)
        os.chdir(str(request["cwd"]))
        environment = request["environment"]
        assert isinstance(environment, dict)
        os.environ.clear()
        os.environ.update(environment)
        argv = request["argv"]
        assert isinstance(argv, list)
        syscalls.name_process("nydusd")
        status = run(argv)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(f"nydusd: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reap(ended: dict[int, int | None]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        ended[pid] = os.waitstatus_to_exitcode(status)
