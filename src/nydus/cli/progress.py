"""The course of a conversion: bars on a terminal, timed lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

from nydus.cli.logs import Log, human
from nydus.convert.progress import CONVERT, LayerProgress, Progress, Verb

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_LINE_SECONDS = 5.0


def progress_for(log: Log) -> AbstractContextManager[Progress]:
    """What shows the course of a conversion on the terminal of ``log``, or writes it to the log."""
    return _bars(log) if log.terminal and log.enabled("info") else nullcontext(Lines(log))


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


class _Group(NamedTuple):
    """Layers with which the same is done."""

    layers: Sequence[LayerProgress]
    verb: Verb
    started: float


class Lines:
    """A line for each step, for each layer that is done, and every few seconds for all."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._groups: dict[int, _Group] = {}  # by id of the layer
        self._told = time.monotonic()

    def note(self, message: str, **fields: object) -> None:
        self._log.info(message, **fields)

    def layers(self, layers: Sequence[LayerProgress], verb: Verb = CONVERT) -> None:
        group = _Group(layers, verb, time.monotonic())
        self._groups.update((id(layer), group) for layer in layers)

    def changed(self, layer: LayerProgress) -> None:
        now = time.monotonic()
        group = self._groups.get(id(layer))
        if group is None:
            return
        layers, verb, started = group
        if layer.state == "done":
            done = sum(other.state == "done" for other in layers)
            word = verb.kept if layer.reused else verb.done
            sizes = [layer.size] if layer.digest else []  # none where it is made of a whole image
            if layer.built != layer.size:
                sizes.append(layer.built)
            size = " to ".join(map(human, sizes))
            fields = {"layer": layer.digest} if layer.digest else {}
            text = f"{word} layer {done}/{len(layers)}: {size} , elapse {now - started:.3f}s"
            self._log.info(text, **fields)
            self._told = now
        elif now - self._told > _LINE_SECONDS:
            self._told = now
            read, whole = sum(each.downloaded for each in layers), sum(each.size for each in layers)
            rate = read / max(now - started, 1e-3)
            sent = f", sent {_sent(layers)}" if verb.sends else ""
            self._log.info(f"{verb.doing}: read {human(read)} of {human(whole)} at {human(rate)}/s{sent}")


class Terminal:
    """A bar for all layers, and one for each that is being worked on.

    Bars of all layers would not fit on a screen, and what does not fit is cut off.
    """

    def __init__(self, log: Log, bars: Bars) -> None:
        self._log, self._bars = log, bars
        self._tasks: dict[int, TaskID] = {}  # by id of the layer
        self._layers: Sequence[LayerProgress] = ()
        self._shown: set[int] = set()
        self._verb = CONVERT
        self._all: TaskID | None = None

    def note(self, message: str, **fields: object) -> None:
        self._log.info(message, **fields)

    def layers(self, layers: Sequence[LayerProgress], verb: Verb = CONVERT) -> None:
        for task in [*self._tasks.values(), *([] if self._all is None else [self._all])]:
            self._bars.remove_task(task)
        self._tasks = {}
        self._layers, self._verb = layers, verb
        self._shown = {id(layer) for layer in layers}
        self._all = self._bars.add_task("", total=sum(each.size for each in layers), note="")
        self._show_all()

    def changed(self, layer: LayerProgress) -> None:
        if id(layer) not in self._shown:  # it was of what came before
            return
        task = self._tasks.get(id(layer))
        if layer.state == "done":
            if task is not None:
                del self._tasks[id(layer)]
                self._bars.remove_task(task)
        else:
            if task is None:
                name = f"layer {layer.number:>2} {layer.digest[7:15]}"
                task = self._tasks[id(layer)] = self._bars.add_task(name, total=layer.size, note="")
            # All of it must fit into 80 columns.
            note = f"sent {human(layer.uploaded)}" if self._verb.sends else ""
            self._bars.update(task, completed=layer.downloaded, note=note)
        self._show_all()

    def _show_all(self) -> None:
        if self._all is not None:
            done = sum(each.state == "done" for each in self._layers)
            self._bars.update(
                self._all,
                description=f"{done} of {len(self._layers)} layers".ljust(17),
                completed=sum(each.downloaded for each in self._layers),
                note=f"sent {_sent(self._layers)}" if self._verb.sends else "",
            )


def _sent(layers: Sequence[LayerProgress]) -> str:
    return human(sum(each.uploaded for each in layers))
