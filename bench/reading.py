"""Mounting, starting and reading an image lazily, beside the ordinary way and the same tree on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count, product
from pathlib import Path

from bench.figures import Figure
from bench.images import PROGRAMS, BenchImage
from bench.processes import memory, timed
from nydus.daemon.client import DaemonClient
from nydus.daemon.spawn import WarmParent
from nydus.demo import lazy
from nydus.demo.ordinary import Job, Puller
from nydus.demo.push import push
from nydus.demo.report import Measurement, Speed
from nydus.demo.run import SPEEDS, convert
from nydus.demo.scene import NYDUS_TAG, OCI_TAG, REPOSITORY, ChrootScene
from nydus.errors import NydusError
from nydus.mount import table
from nydus.oci.registry import Registry
from nydus.oci.server import RegistryServer

MOUNTS = 20
SPAWNS = 10


class Bench:
    """An image in an embedded registry in both forms, and a daemon."""

    def __init__(self, image: BenchImage, folder: Path, server: RegistryServer, daemon: lazy.Daemon) -> None:
        self.image, self.folder, self.server, self.daemon = image, folder, server, daemon
        self.scene = ChrootScene(server, daemon, environment=image.environment)
        self.numbers = count()
        self.ordinary: dict[int | None, list[float]] = {}
        with Registry(server.host, plain_http=True) as registry:
            repository = registry.repository(REPOSITORY)
            push(image.layout, repository, OCI_TAG)
            convert(f"{server.host}/{REPOSITORY}:{OCI_TAG}", f"{server.host}/{REPOSITORY}:{NYDUS_TAG}")
            self.bootstrap = lazy.fetch_bootstrap(repository, NYDUS_TAG, folder / "bootstrap")

    def config(self, cache: str) -> dict[str, object]:
        return lazy.registry_config(self.server.host, REPOSITORY, self.folder / cache)

    def mounts(self) -> list[Figure]:
        """Mount in the running daemon; a new daemon from the warm parent. Caches are empty each time."""
        running = Figure("mount in a running daemon", "s", most=0.030)
        for number in range(MOUNTS):
            start = time.monotonic()
            self.daemon.mount(f"m{number}", self.bootstrap, self.config(f"cache-m{number}"))
            running.ours.append(time.monotonic() - start)
        for number in range(MOUNTS):
            self.daemon.client.umount(f"/m{number}")
        new = Figure("a new daemon from the warm parent", "s", most=0.080)
        with WarmParent() as parent:
            for number in range(SPAWNS + 1):
                took = self._spawn(parent, self.folder / f"daemon-{number}")
                if number:  # before the first one the parent has to become warm
                    new.ours.append(took)
        return [running, new]

    def _spawn(self, parent: WarmParent, place: Path) -> float:
        (place / "mnt").mkdir(parents=True)
        config, socket = place / "config.json", place / "api.sock"
        config.write_text(json.dumps(self.config(f"{place.name}/cache")))
        arguments = ["--mountpoint", place / "mnt", "--bootstrap", self.bootstrap, "--config", config]
        start = time.monotonic()
        parent.spawn([str(word) for word in (*arguments, "--apisock", socket)], log=place / "log")
        while table.at(place / "mnt") is None:
            if time.monotonic() - start > 30:
                raise NydusError(f"nydusd did not mount: {(place / 'log').read_text()[-500:]}")
            time.sleep(0.001)
        took = time.monotonic() - start
        client = DaemonClient(socket)
        client.wait("RUNNING")
        client.exit()
        while table.at(place / "mnt") is not None:
            time.sleep(0.005)
        return took

    def starts(self, repeats: int, say: Callable[[str], None]) -> list[Figure]:
        """From nothing to the first output of several programs, and what moved until their end."""
        figures = []
        for speed, (program, command) in product(SPEEDS, PROGRAMS.items()):
            name = f"{program}, {speed.title}"
            # numpy's libraries alone are an eighth of the image: the aim is for what uses little of it.
            aim = 8.0 if speed.limit and program != "python3 numpy" else None
            first = Figure(f"first output of {name}", "s", other_name="pull, unpack, run", least_ratio=aim)
            moved = Figure(f"bytes for {name}", "MB", other_name="all layers")
            self.scene.command = command
            for number in range(repeats):
                say(f"{first.name} {number + 1}/{repeats}")
                one = self._start("lazy", speed)
                first.ours.append(one.first_output)
                moved.ours.append(one.fetched / 1e6)
                moved.other.append(self.image.size / 1e6)
            # The ordinary way does not depend on the program: it is waiting for the whole image.
            if speed.limit not in self.ordinary:
                say(f"pull, unpack, run, {speed.title}")
                self.ordinary[speed.limit] = [
                    self._start("ordinary", speed).first_output for _ in range(1 if speed.limit else repeats)
                ]
            first.other = self.ordinary[speed.limit]
            figures += [first, moved]
        return figures

    def _start(self, way: str, speed: Speed) -> Measurement:
        place = self.folder / f"start-{next(self.numbers)}"
        place.mkdir()
        measured = self.scene.measure(way, speed, place)
        if way == "lazy":
            self.daemon.client.umount(f"/{place.name}")
        # The daemon may still be writing its cache down; what stays goes with the workspace.
        shutil.rmtree(place, ignore_errors=True)
        return measured

    def reads(self, repeats: int, say: Callable[[str], None]) -> list[Figure]:
        """The whole tree: cold, warm, `find` twice; the bytes must be those of the same tree on disk.

        Raises:
            NydusError: they are not.
        """
        disk = self.folder / "disk"
        disk.mkdir()
        self._copy_to_disk(disk)
        name = "the same tree on disk"
        cold = Figure("whole read, cold", "s", other_name=name)
        warm = Figure("whole read, warm", "s", other_name=name, most_ratio=1.2)
        cached = Figure("whole read, mounted again", "s", other_name=name)
        find_first = Figure("find, first", "s", other_name=name)
        find_again = Figure("find, again", "s", other_name=name, most_ratio=1.2)
        moved = Figure("bytes of the cold read", "MB", other_name="all layers")
        requests = Figure("requests of the cold read", "requests")
        idle = Figure("memory of nydusd, one mount", "MB")
        full = Figure("memory of nydusd, after the cold read", "MB")
        expected = read(disk)[1]
        for number in range(repeats):
            say(f"whole read {number + 1}/{repeats}")
            root = self.daemon.mount(f"r{number}", self.bootstrap, self.config(f"cache-r{number}"))
            idle.ours.append(memory(self.daemon.process.pid))
            for figure in (find_first, find_again):
                figure.ours.append(find(root))
                figure.other.append(find(disk))
            self.server.reset_counters()
            for figure in (cold, warm):
                took, found = read(root)
                if found != expected:
                    raise NydusError(f"{root} does not read as {disk}: {found}, not {expected}")
                figure.ours.append(took)
                figure.other.append(read(disk)[0])
                if figure is cold:
                    moved.ours.append(self.server.counters.bytes_sent / 1e6)
                    requests.ours.append(self.server.counters.requests)
                    full.ours.append(memory(self.daemon.process.pid))
            moved.other.append(self.image.size / 1e6)
            self.daemon.client.umount(f"/r{number}")
            root = self.daemon.mount(f"a{number}", self.bootstrap, self.config(f"cache-r{number}"))
            cached.ours.append(read(root)[0])
            cached.other.append(read(disk)[0])
            self.daemon.client.umount(f"/a{number}")
        return [cold, warm, cached, find_first, find_again, moved, requests, idle, full]

    def _copy_to_disk(self, disk: Path) -> None:
        """Unpack the OCI image's layers over each other, whiteouts honoured."""
        place = self.folder / "pulled"
        place.mkdir()
        with Puller() as puller:
            layers = puller.pull(Job(self.server.host, REPOSITORY, OCI_TAG, str(place)))
        for layer in layers:
            for mark in sorted(layer.rglob(".wh.*")):
                hidden = disk / mark.relative_to(layer).parent
                targets = [hidden / mark.name.removeprefix(".wh.")]
                if mark.name == ".wh..wh..opq":
                    targets = list(hidden.iterdir()) if hidden.is_dir() else []
                subprocess.run(["rm", "-rf", "--", *map(str, targets)], check=True)
                mark.unlink()
            subprocess.run(["cp", "-a", f"{layer}/.", str(disk)], check=True)


def read(root: Path) -> tuple[float, str]:
    """Read every byte below ``root`` as a sorted tar stream; seconds and the stream's digest."""
    script = 'tar -C "$1" --sort=name --mtime=@0 -cf - . | md5sum'
    cost = timed(["sh", "-c", script, "sh", root])
    return cost.wall, cost.output.split()[0]


def find(root: Path) -> float:
    """Visit and stat every file below ``root``; seconds."""
    return timed(["find", root, "-size", "+1000000k"]).wall


def run(image: BenchImage, folder: Path, repeats: int, say: Callable[[str], None]) -> list[Figure]:
    with ExitStack() as stack:
        folder.mkdir()
        server = stack.enter_context(RegistryServer(folder / "registry"))
        bench = Bench(image, folder, server, stack.enter_context(lazy.Daemon(folder)))
        say("mounts")
        return bench.mounts() + bench.reads(repeats, say) + bench.starts(repeats, say)
