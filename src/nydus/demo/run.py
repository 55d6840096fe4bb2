"""The main job end to end: an image is made, converted, and started lazily and the ordinary way."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from nydus.demo import lazy, report
from nydus.demo.image import DemoImage, build
from nydus.demo.push import push
from nydus.demo.report import Measurement, Speed
from nydus.demo.scene import NYDUS_TAG, OCI_TAG, REPOSITORY, ChrootScene, Scene
from nydus.errors import NydusError
from nydus.oci.place import RegistryPlace
from nydus.oci.reference import parse
from nydus.oci.registry import Registry
from nydus.oci.server import RegistryServer
from nydus.snapshotter.daemons import detach

SPEEDS = (Speed("full speed", None), Speed("3 MB/s", 3_000_000))


class Steps:
    """Says what is being done: progress bars on a terminal, a line for each step otherwise."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """One step; yields a function that is told the bytes done so far."""
        started = time.monotonic()
        task = self.progress.add_task(title, total=total)
        yield lambda done: self._update(task, done)
        size = self.progress.tasks[task].completed
        self.progress.update(task, total=max(size, 1), completed=max(size, 1))
        self.progress.stop_task(task)
        if not self.console.is_terminal:
            self.console.print(f"{title}: {report.seconds(time.monotonic() - started)}", highlight=False)

    def _update(self, task: TaskID, done: int) -> None:
        self.progress.update(task, completed=done)


@contextmanager
def watching(server: RegistryServer, tell: Callable[[int], None]) -> Iterator[None]:
    """While inside, ``tell`` hears ten times a second how many bytes the registry has sent."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            tell(server.counters.bytes_sent)

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        tell(server.counters.bytes_sent)


@contextmanager
def workspace() -> Iterator[Path]:
    """A folder on a disk that is empty of mounts and gone afterwards, also after a signal.

    It is not on tmpfs where that can be helped: the kernel mounts no EROFS from there.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    folder = Path(tempfile.mkdtemp(prefix="nydus-demo-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield folder
    finally:
        signal.signal(signal.SIGTERM, before)
        detach(folder)
        shutil.rmtree(folder, ignore_errors=True)


def run(picture: Path, console: Console, *, containerd: bool = False) -> list[Measurement]:
    """Do it all; prints what the program said and the table, writes the picture, returns the figures.

    Args:
        containerd: start containers with a private containerd and runc, not in a chroot.

    Raises:
        NydusError: not root, or one of the steps failed.
    """
    if os.geteuid() != 0:
        raise NydusError("the demo mounts file systems and enters them: run it as root")
    steps = Steps(console)
    with ExitStack() as stack:
        folder = stack.enter_context(workspace())
        server = stack.enter_context(RegistryServer(folder / "registry"))
        stack.enter_context(steps.progress)
        demo = prepare(folder, server, steps)
        scene: Scene
        if containerd:
            from nydus.demo.pods import PodScene

            scene = PodScene(server)
        else:
            scene = ChrootScene(server, stack.enter_context(lazy.Daemon(folder)))
        measurements: list[Measurement] = []
        for speed in SPEEDS:
            for way in ("lazy", "ordinary"):
                place = folder / str(len(measurements))
                place.mkdir()
                total = demo.size if way == "ordinary" else None
                with steps.step(f"starting it: {way}, {speed.title}", total) as tell, watching(server, tell):
                    measurements.append(scene.measure(way, speed, place))
    show(demo, measurements, picture, console)
    return measurements


def prepare(folder: Path, server: RegistryServer, steps: Steps) -> DemoImage:
    """Make the image, push it, convert it."""
    with steps.step("making an image of this machine's Python") as tell:
        sizes: dict[str, int] = {}

        def made(title: str, size: int) -> None:
            sizes[title] = size
            tell(sum(sizes.values()))

        demo = build(folder / "image", made)
    with steps.step("pushing it to the embedded registry", demo.size) as tell:
        with Registry(server.host, plain_http=True) as registry:
            push(demo.layout, registry.repository(REPOSITORY), OCI_TAG, tell)
    server.reset_counters()
    with steps.step("converting it to Nydus", demo.size) as tell, watching(server, tell):
        convert(f"{server.host}/{REPOSITORY}:{OCI_TAG}", f"{server.host}/{REPOSITORY}:{NYDUS_TAG}")
    return demo


def convert(source: str, target: str) -> None:
    """Convert an image of the embedded registry, as ``nydusify convert`` does."""
    from nydus.convert.image import image

    image(RegistryPlace(parse(source), plain_http=True), RegistryPlace(parse(target), plain_http=True))


def show(demo: DemoImage, measurements: list[Measurement], picture: Path, console: Console) -> None:
    """Print the figures and draw the picture."""
    title = (
        f"{len(demo.layers)} layers, {demo.files} files, {report.megabytes(demo.unpacked)}, "
        f"{report.megabytes(demo.size)} compressed"
    )
    report.picture(measurements, picture, f"Bytes fetched until the first output ({title})")
    console.print(f"\nImage: {title}\nThe program in it says: {measurements[0].output}\n", highlight=False)
    console.print(report.table(measurements, "From nothing to a running container"))
    for line in report.sooner(measurements):
        console.print(line, highlight=False)
    console.print(f"Picture: {picture}", highlight=False, soft_wrap=True)
