"""A container's start from nothing, measured: an image in a registry in both forms, a daemon, a program."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

from nydus.demo import lazy, ordinary
from nydus.demo.container import Container
from nydus.demo.image import COMMAND, ENV
from nydus.demo.report import Measurement, Speed
from nydus.oci.registry import Registry
from nydus.oci.server import RegistryServer

REPOSITORY = "demo/app"
OCI_TAG, NYDUS_TAG = "latest", "nydus"


class Scene(Protocol):
    """A place where containers can be started and their starts measured."""

    def measure(self, way: str, speed: Speed, place: Path) -> Measurement:
        """Start the image's program from nothing in the empty folder ``place``.

        Args:
            way: ``lazy`` or ``ordinary``.
        """


class ChrootScene:
    """Containers in a chroot; lazily they are mounted by a daemon that runs already."""

    def __init__(
        self,
        server: RegistryServer,
        daemon: lazy.Daemon,
        command: Sequence[str] = COMMAND,
        environment: Sequence[str] = ENV,
    ) -> None:
        self.server, self.daemon = server, daemon
        self.command, self.environment = command, environment

    def lazily(self, place: Path) -> tuple[list[Path], float]:
        """Mount the image; returns the lower folders of the container and when they were ready."""
        with Registry(self.server.host, plain_http=True) as registry:
            bootstrap = lazy.fetch_bootstrap(registry.repository(REPOSITORY), NYDUS_TAG, place)
        config = lazy.registry_config(self.server.host, REPOSITORY, place / "cache")
        return [self.daemon.mount(place.name, bootstrap, config)], time.monotonic()

    def ordinarily(self, place: Path, puller: ordinary.Puller) -> tuple[list[Path], float]:
        """Pull and unpack the image; as :meth:`lazily`."""
        layers = puller.pull(ordinary.Job(self.server.host, REPOSITORY, OCI_TAG, str(place)))
        return layers[::-1], time.monotonic()

    def measure(self, way: str, speed: Speed, place: Path) -> Measurement:
        """See :class:`Scene`."""
        self.server.throttle_bytes_per_second = speed.limit
        (place / "run").mkdir()
        with ExitStack() as stack:
            prepare = self.lazily
            if way == "ordinary":
                prepare = partial(self.ordinarily, puller=stack.enter_context(ordinary.Puller()))
            self.server.reset_counters()
            start = time.monotonic()
            lower, ready = prepare(place)
            container = Container(lower, place / "run", self.command, self.environment)
            outcome = stack.enter_context(container).wait()
            counters = self.server.counters
        self.server.throttle_bytes_per_second = None
        return Measurement(
            way,
            speed,
            ready - start,
            outcome.first_output - start,
            counters.bytes_sent,
            counters.requests,
            disk_use(place),
            [(moment - start, sent) for moment, sent in counters.samples],
            outcome.output,
        )


def disk_use(folder: Path) -> int:
    """Bytes of the blocks of the files in ``folder``, not of what is mounted below it; holes do not count."""
    total, device = 0, folder.stat().st_dev
    for where, folders, files in os.walk(folder):
        here = Path(where)
        folders[:] = [name for name in folders if (here / name).lstat().st_dev == device]
        total += sum((here / name).lstat().st_blocks for name in (".", *files))
    return total * 512
