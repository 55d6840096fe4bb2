"""The mounts that containerd is told to make for a snapshot."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nydus.snapshotter import labels as label
from nydus.snapshotter.errors import InvalidArgument


class Mount(NamedTuple):
    """One entry; ``options`` as in fstab."""

    type: str
    source: str
    options: list[str]


def bind(source: Path, *, writable: bool) -> list[Mount]:
    """A directory as it is."""
    return [Mount("bind", str(source), ["rw" if writable else "ro", "rbind"])]


def overlay(
    lower: Sequence[Path], writable: Path | None, options: Sequence[str] = (), kind: str = "overlay"
) -> list[Mount]:
    """An overlay of ``lower``, newest first, below ``writable/fs`` if given."""
    upper = [f"workdir={writable / 'work'}", f"upperdir={writable / 'fs'}"] if writable else []
    return [Mount(kind, "overlay", [*upper, *options, "lowerdir=" + ":".join(map(str, lower))])]


def extra_option(bootstrap: Path, document: Mapping[str, Any], directory: Path) -> str:
    """What a virtual machine's runtime needs to mount the image itself.

    ``document`` must hold no secrets: every list of mounts shows it.
    """
    with open(bootstrap, "rb") as file:
        head = file.read(1028)
    version = "v6" if head[1024:1028] == b"\xe2\xe1\xf5\xe0" else "v5"
    value = {
        "source": str(bootstrap),
        "config": json.dumps(document),
        "snapshotdir": str(directory),
        "fs_version": version,
    }
    return "extraoption=" + base64.b64encode(json.dumps(value).encode()).decode()


class IdMapping(NamedTuple):
    """``size`` user and group IDs from ``inside`` shown as those from ``host``."""

    inside: int
    host: int
    size: int

    def options(self) -> list[str]:
        """The overlay options; containerd 2 acts on them."""
        text = f"{self.inside}:{self.host}:{self.size}"
        return [f"uidmap={text}", f"gidmap={text}"]


def id_mapping(labels: Mapping[str, str]) -> IdMapping | None:
    """The mapping asked for by the labels, None if there is none.

    Raises:
        InvalidArgument: only one label, two that differ, or numbers that make no sense.
    """
    users, groups = labels.get(label.UID_MAPPING), labels.get(label.GID_MAPPING)
    if not users and not groups:
        return None
    numbers = (users or "").split(":")
    if (
        users != groups
        or len(numbers) != 3
        or not all(number.isascii() and number.isdigit() for number in numbers)
    ):
        raise InvalidArgument(
            f"ID mapping labels must both be the same inside:host:size, found {users!r} and {groups!r}:"
            " invalid argument"
        )
    mapping = IdMapping(*map(int, numbers))
    if mapping.size == 0 or max(mapping.inside, mapping.host) + mapping.size > 1 << 32:
        raise InvalidArgument(f"ID mapping {users} does not fit in 32 bits: invalid argument")
    return mapping
