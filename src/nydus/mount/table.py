"""The kernel's mount table, as this process sees it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of ``/proc/self/mountinfo``."""

    id: int
    device: str  # "major:minor"
    path: str
    kind: str
    source: str


def read() -> list[Mount]:
    """All mounts, oldest first; a later one on the same path hides an earlier one."""
    mounts = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(" ")
            end = fields.index("-", 6)
            mounts.append(
                Mount(int(fields[0]), fields[2], _plain(fields[4]), fields[end + 1], _plain(fields[end + 2]))
            )
    return mounts


def at(path: str | os.PathLike[str]) -> Mount | None:
    """What is mounted exactly on a path (not above it), topmost."""
    wanted = os.path.realpath(path)
    found = None
    for mount in read():
        if mount.path == wanted:
            found = mount
    return found


def id_of(fd: int) -> int:
    """The mount id of an open file of this thread."""
    with open(f"/proc/thread-self/fdinfo/{fd}", encoding="ascii") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key == "mnt_id":
                return int(value)
    raise OSError(f"descriptor {fd} has no mount id")


def _plain(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text) if "\\" in text else text
