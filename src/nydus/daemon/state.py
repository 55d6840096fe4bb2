"""What a successor must know to go on serving: kept by the supervisor, sent to the controller on upgrade.

The encoding is our own (nydusd.md §4.2 allows it): a magic line, a JSON document, and its CRC. It holds the
configuration documents *with* their credentials and must not be shown to anybody.
"""

from __future__ import annotations

import zlib

import msgspec

from nydus.errors import FormatError

_MAGIC = b"nydusd-state 1\n"
_LIMIT = 64 << 20


class InstanceState(msgspec.Struct):
    """One mount. ``number`` is its identity; ``nodes`` are the files of blobfs that it has as devices."""

    number: int
    mountpoint: str
    path: str
    bootstrap: str
    config: str
    prefetch_files: list[str] | None
    mounted_time: str
    provider: str
    reason: str
    nodes: list[int] = []
    mounted: bool = False


class FileState(msgspec.Struct):
    """One file of blobfs, blob number ``blob`` of an image. ``handles``: what the kernel has open."""

    node: int
    size: int
    label: str
    instance: int
    blob: int
    handles: list[int]


class State(msgspec.Struct):
    """All of it. ``held``: a controller has the descriptors, too. ``pid``: the process whose state it is."""

    state: str = "INIT"
    held: bool = False
    shared: bool = False
    next_number: int = 1
    instances: list[InstanceState] = []
    files: list[FileState] = []
    runtime: dict[str, dict[str, str]] = {}
    pid: int = 0


def encode(state: State) -> bytes:
    body = msgspec.json.encode(state)
    return _MAGIC + body + b"\n%08x\n" % zlib.crc32(body)


def decode(data: bytes, where: str = "daemon state") -> State:
    """Raises FormatError where the bytes are not a whole state of ours."""
    if not data.startswith(_MAGIC):
        raise FormatError("not a state of this daemon", where=where, found=data[:16], expected=_MAGIC)
    if len(data) > _LIMIT:
        raise FormatError("too large", where=where, found=len(data), expected=f"at most {_LIMIT}")
    body, tail = data[len(_MAGIC) : -10], data[-10:]
    if tail != b"\n%08x\n" % zlib.crc32(body):
        raise FormatError("damaged or cut off", where=where)
    try:
        return msgspec.json.decode(body, type=State)
    except msgspec.DecodeError as error:
        raise FormatError(str(error), where=where) from None
