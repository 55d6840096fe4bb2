"""The course of a conversion: bars on a terminal, timed lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from nydus.cli.logs import Log, human
from nydus.convert.progress import CONVERT, LayerProgress, Progress, Verb

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_LINE_SECONDS = 5.0


@contextmanager
def progress_for(log: Log) -> Iterator[Progress]:
    """What shows the course of a conversion on the terminal of ``log``, or writes it to the log.

    Warnings of the library go to ``log`` meanwhile.
    """
    handler = _Warnings(log)
    library = logging.getLogger("nydus")
    library.addHandler(handler)
    try:
        with _bars(log) if log.terminal and log.enabled("info") else nullcontext(Lines(log)) as progress:
            yield progress
    finally:
        library.removeHandler(handler)


class _Warnings(logging.Handler):
    """Writes what the library warns of to the log of the command."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.warning(record.getMessage())


@contextmanager
def _bars(log: Log) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    bars = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=Console(file=log.stream, highlight=False),
        transient=True,
    )
    plain = log.write
    with bars:
        log.write = lambda line: bars.console.out(line, highlight=False)  # type: ignore[method-assign]
        try:
            yield Terminal(log, bars)
        finally:
            log.write = plain  # type: ignore[method-assign]


class Lines:
    """A line for each step, for each layer that is done, and every few seconds for all."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._layers: Sequence[LayerProgress] = ()
        self._verb = CONVERT
        self._told = time.monotonic()
        self._started = self._told

    def note(self, message: str, **fields: object) -> None:
        self._log.info(message, **fields)

    def layers(self, layers: Sequence[LayerProgress], verb: Verb = CONVERT) -> None:
        self._layers, self._verb = layers, verb
        self._started = time.monotonic()

    def changed(self, layer: LayerProgress) -> None:
        now = time.monotonic()
        if layer.state == "done":
            done = sum(other.state == "done" for other in self._layers)
            word = self._verb.kept if layer.reused else self._verb.done
            became = f" to {human(layer.built)}" if layer.built != layer.size else ""
            self._log.info(
                f"{word} layer {done}/{len(self._layers)}: {human(layer.size)}{became}"
                f" , elapse {now - self._started:.3f}s",
                layer=layer.digest,
            )
            self._told = now
        elif now - self._told > _LINE_SECONDS:
            self._told = now
            read, size = (
                sum(each.downloaded for each in self._layers),
                sum(each.size for each in self._layers),
            )
            sent = sum(each.uploaded for each in self._layers)
            rate = read / max(now - self._started, 1e-3)
            self._log.info(
                f"{self._verb.doing}: read {human(read)} of {human(size)} at {human(rate)}/s, "
                f"sent {human(sent)}"
            )


class Terminal:
    """A bar for each layer, and one for all."""

    def __init__(self, log: Log, bars: Bars) -> None:
        self._log, self._bars = log, bars
        self._tasks: dict[int, TaskID] = {}
        self._layers: Sequence[LayerProgress] = ()
        self._verb = CONVERT
        self._all: TaskID | None = None

    def note(self, message: str, **fields: object) -> None:
        self._log.info(message, **fields)

    def layers(self, layers: Sequence[LayerProgress], verb: Verb = CONVERT) -> None:
        self._layers, self._verb = layers, verb
        for position, layer in enumerate(layers):
            name = f"layer {position + 1:>2} {layer.digest[7:15]}"
            self._tasks[id(layer)] = self._bars.add_task(name, total=layer.size, note="waiting")
        self._all = self._bars.add_task(
            "all layers".ljust(17), total=sum(each.size for each in layers), note=""
        )

    def changed(self, layer: LayerProgress) -> None:
        done = self._verb.kept if layer.reused else self._verb.done
        # All of it must fit into 80 columns.
        note = done if layer.state == "done" else f"sent {human(layer.uploaded)}"
        self._bars.update(self._tasks[id(layer)], completed=layer.downloaded, note=note)
        if self._all is not None:
            sent = sum(each.uploaded for each in self._layers)
            read = sum(each.downloaded for each in self._layers)
            self._bars.update(self._all, completed=read, note=f"sent {human(sent)}")
