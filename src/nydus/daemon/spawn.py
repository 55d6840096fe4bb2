"""Starting daemons quickly: a warm parent has every module imported and forks a daemon in milliseconds.

The warm parent is ``nydusd --warm FD``: a process that waits on one end of a socket pair. Its daemons outlive
it; it ends when the other end is closed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from nydus.errors import NydusError


class WarmParent:
    """Starts and talks to one warm parent. Thread-safe.

    Args:
        python: the interpreter to run it with.
    """

    def __init__(self, python: str = sys.executable) -> None:
        self._lock = threading.Lock()
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Starts the parent if it is not running; does not wait until it is warm."""
        with self._lock:
            self._started()

    def spawn(self, argv: Sequence[str], *, log: Path | str | None = None) -> int:
        """Forks a daemon; returns its pid at once. The daemon says by its API socket when it is mounted.

        Args:
            argv: arguments of nydusd without the program's name, e.g. ``["fuse", "--mountpoint", …]``.
            log: file to append standard output and error to (default: this process's).

        Raises:
            NydusError: the warm parent cannot be started.
        """
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640) if log else None
        request: dict[str, object] = {"argv": list(argv), "cwd": os.getcwd(), "environment": dict(os.environ)}
        try:
            fds = [output or 1, output or 2]
            answer = self._call(request, fds)
        finally:
            if output is not None:
                os.close(output)
        return answer["pid"]

    def exit_status(self, pid: int) -> int | None:
        """How a daemon of this parent ended (as :attr:`subprocess.Popen.returncode`); None while it runs.

        Raises:
            NydusError: it is not a daemon of this parent.
        """
        answer = self._call({"status": pid}, [])
        if "unknown" in answer:
            raise NydusError(f"process {pid} was not started by this parent")
        return answer.get("code")

    def close(self) -> None:
        """Ends the parent; its daemons go on."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            if self._process is not None:
                self._process.wait()
                self._process = None

    def __enter__(self) -> WarmParent:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self._process, self._socket = None, None
        if self._socket is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [self._python, "-m", "nydus.cli.nydusd", "--warm", str(theirs.fileno())]
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )
            ours.settimeout(30)
            self._socket = ours
        return self._socket

    def _call(self, request: dict[str, object], fds: list[int]) -> dict[str, int]:
        data = json.dumps(request).encode()
        with self._lock:
            for attempt in (1, 2):
                connection = self._started()
                try:
                    socket.send_fds(connection, [data], fds)
                    answer: dict[str, int] = json.loads(connection.recv(4096) or b"null")
                    if answer is not None:
                        return answer
                    problem = "it died"
                except OSError as error:
                    problem = str(error)
                connection.close()
                self._socket = None
                if self._process is not None:
                    self._process.kill()
                    self._process.wait()
                if attempt == 2:
                    break
        raise NydusError(f"the warm parent of the daemons does not answer: {problem}")
