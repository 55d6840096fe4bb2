"""A pseudo-terminal for the command, as users sit in front of one."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class OnTerminal:
    """A command on a terminal of 24 lines of 80 columns.

    Attributes:
        text: what it has written, without colours and movements of the cursor.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self._process = subprocess.Popen(
            [Path(sys.executable).with_name("nydusify"), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "TERM": "xterm"},
        )
        os.close(theirs)
        self._ours = ours
        self._changed = threading.Condition()
        self._ended = False
        self.text = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 1 << 16)
            except OSError:  # EIO: the command has ended
                data = b""
            with self._changed:
                self.text += _ESCAPES.sub("", data.decode(errors="replace"))
                self._ended = not data
                self._changed.notify_all()
            if not data:
                return

    def wait_for(self, *words: str) -> bool:
        """Waits until all words were written; False if they are not within 20 s."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or all(word in self.text for word in words), 20)
            return all(word in self.text for word in words)

    def end(self) -> int:
        """Waits for the end; the exit code."""
        try:
            code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        self._reader.join()
        os.close(self._ours)
        return code
