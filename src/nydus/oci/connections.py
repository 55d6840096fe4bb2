"""Connections that an interrupted command cuts: none of its threads is to wait for a registry that hangs."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

#: The command is ending: what has not begun does not begin any more.
interrupted = threading.Event()

_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
os.register_at_fork(after_in_child=_open.clear)  # they stay the parent's
_holds: list[None] = []
_lock = threading.RLock()  # a signal may come to the thread that has it


def interrupt() -> None:
    """Wakes up all threads that wait for a registry, with an error; for signal handlers."""
    interrupted.set()
    with _lock:
        for each in list(_open):
            with contextlib.suppress(OSError):
                # That of a TLS socket first forgets the TLS, and a thread about to send would do without.
                socket.socket.shutdown(each, socket.SHUT_RDWR)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """While something is to be undone that would outlive the command: an interrupted one waits for that."""
    _holds.append(None)
    try:
        yield
    finally:
        _holds.pop()


def is_held() -> bool:
    return bool(_holds)


def _note(connection: Any) -> None:
    found = connection.sock
    if found is not None:
        # TLS inside of the TLS to a proxy is no socket, but has one.
        found = found if isinstance(found, socket.socket) else found.socket
        with _lock:
            _open.add(found)


class _Plain(HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _note(self)


class _Tls(HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _note(self)


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Plain


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Tls


def watch(manager: urllib3.PoolManager) -> urllib3.PoolManager:
    """Has the connections of a pool manager cut by :func:`interrupt`."""
    manager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
    return manager
