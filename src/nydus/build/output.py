"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from types import TracebackType
from typing import Self

from nydus.errors import NydusError


class Output:
    """A file under construction: written aside, and renamed when it is complete.

    What exists already and is not a regular file (a FIFO, ``/dev/null``) is written to directly. Leaving the
    context without :meth:`commit` removes what was written aside.

    Args:
        path: the file, or with ``directory`` the folder in which :meth:`commit` will name it.

    Raises (all methods):
        NydusError: the file cannot be written.
    """

    def __init__(self, path: str, *, directory: bool = False, mode: int = 0o644) -> None:
        self.path = path
        self._mode = mode
        self._aside = ""
        self._directory = directory
        try:
            try:
                special = not directory and not stat.S_ISREG(os.stat(path).st_mode)
            except FileNotFoundError:
                special = False
            if special:
                self._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            else:
                folder = path if directory else os.path.dirname(path) or "."
                self._descriptor, self._aside = tempfile.mkstemp(".tmp", ".nydus-", folder)
        except OSError as error:
            raise self._fail(error) from None

    def _fail(self, error: OSError) -> NydusError:
        return NydusError(f"{self.path}: cannot be written: {error.strerror}")

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise self._fail(error) from None

    def commit(self, name: str = "") -> str:
        """Make the file durable and give it its name; returns its path."""
        path = os.path.join(self.path, name) if self._directory else self.path
        try:
            if self._aside:
                os.fchmod(self._descriptor, self._mode)
                os.fsync(self._descriptor)
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
            if self._aside:
                os.rename(self._aside, path)  # noqa: PTH104
                self._aside = ""
        except OSError as error:
            raise self._fail(error) from None
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._aside:
            os.unlink(self._aside)  # noqa: PTH108
            self._aside = ""


def write_file(path: str, data: bytes) -> None:
    """Write a whole file."""
    with Output(path) as out:
        out.write(data)
        out.commit()
