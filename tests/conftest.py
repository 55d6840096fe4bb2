"""What all tests share: where the reference vectors are, and what this machine allows."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    unprivileged = os.geteuid() != 0 or not Path("/dev/fuse").exists()
    for item in items:
        if unprivileged and (item.get_closest_marker("root") or item.get_closest_marker("containerd")):
            item.add_marker(pytest.mark.skip(reason="needs root and /dev/fuse"))
        if item.get_closest_marker("vectors") and not SHARED.exists():
            item.add_marker(pytest.mark.skip(reason="the reference vectors are not beside this checkout"))


def pytest_configure() -> None:
    # A shell's background job ignores SIGINT, and so would every command that a test interrupts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A command run inside a test sends our log where it likes; the next test must not notice."""
    log = logging.getLogger("nydus")
    saved = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = saved[0], saved[2]
    log.setLevel(saved[1])


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of images written by the reference implementation."""
    path = SHARED / "vectors"
    if not path.exists():
        pytest.skip("the reference vectors are not beside this checkout")
    return path
