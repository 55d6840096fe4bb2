"""The state that a successor gets survives its way, or is refused."""

from __future__ import annotations

import pytest

from nydus.daemon import state as states
from nydus.daemon.state import FileState, InstanceState, State
from nydus.errors import FormatError


def example() -> State:
    instance = InstanceState(1, "/a", "/mnt/a", "/boot", "{}", ["/etc"], "now", "blobfs", "works", [2], True)
    return State(
        "RUNNING", True, True, 2, [instance], [FileState(2, 4096, "blob", 1, 0, [7])], {"/a": {"k": "v"}}
    )


def test_round_trip() -> None:
    assert states.decode(states.encode(example())) == example()


@pytest.mark.parametrize("change", ["magic", "cut", "flip", "empty", "other"])
def test_damage_is_noticed(change: str) -> None:
    data = bytearray(states.encode(example()))
    if change == "magic":
        data[0] ^= 1
    elif change == "cut":
        del data[-3:]
    elif change == "flip":
        data[40] ^= 1
    elif change == "empty":
        data.clear()
    else:
        data = bytearray((0x0710198486640001).to_bytes(8, "little") + bytes(544))
    with pytest.raises(FormatError):
        states.decode(bytes(data))
