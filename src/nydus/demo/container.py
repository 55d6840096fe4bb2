"""The least container: a private mount namespace, an overlay with a throw-away upper layer, a chroot.

Enough to run an image's program the same way on a lazy mount and on an unpacked image. All its mounts end
with the process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nydus.errors import NydusError

# $1 the work folder, $2 overlay's lowerdir option; then the environment, chroot and the program.
ENTER = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
mount -t proc proc "$1/root/proc"
shift 2
exec env -i "$@"
"""


@dataclass(frozen=True)
class Outcome:
    """What a container did; times on the monotonic clock in seconds."""

    output: str
    first_output: float
    ended: float


def program(name: str) -> str:
    """The path of a system program, also where PATH leaves out the administrator's folders."""
    found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if found is None:
        raise NydusError(f"the program {name!r} is needed and is not installed")
    return found


class Container:
    """Runs a program on top of read-only ``lower`` folders (topmost first); a context manager that kills it.

    Args:
        work: an existing empty folder; a tmpfs is mounted on it inside the namespace.
        environment: ``NAME=value`` of the image.
    """

    def __init__(
        self, lower: Sequence[Path], work: Path, command: Sequence[str], environment: Sequence[str]
    ) -> None:
        overlay = ":".join(str(path) for path in lower)
        enter = [
            program("unshare"),
            "--mount",
            "--propagation",
            "private",
            "--",
            "/bin/sh",
            "-c",
            ENTER,
            "sh",
        ]
        chroot = [*environment, program("chroot"), str(work / "root")]
        self.process = subprocess.Popen(
            [*enter, str(work), overlay, *chroot, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def wait(self) -> Outcome:
        """Read all output.

        Raises:
            NydusError: the program failed or printed nothing; the text has its last words.
        """
        assert self.process.stdout is not None
        first = os.read(self.process.stdout.fileno(), 1)
        first_output = time.monotonic()
        rest, errors = self.process.communicate()
        ended = time.monotonic()
        if self.process.returncode != 0 or not first:
            last = (errors.decode(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
            raise NydusError(f"the program in the container ended with {self.process.returncode}: {last}")
        return Outcome((first + rest).decode(errors="replace").strip(), first_output, ended)

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
