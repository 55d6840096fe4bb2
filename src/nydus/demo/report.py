"""The demo's figures as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table


@dataclass(frozen=True)
class Speed:
    """A speed of the registry's link in bytes a second; None has no limit."""

    title: str
    limit: int | None


@dataclass(frozen=True)
class Measurement:
    """One way to a running container, from nothing on this machine to its end.

    Attributes:
        way: ``lazy`` or ``ordinary``.
        ready: seconds until the root file system could be used (mounted; pulled and unpacked).
        first_output: seconds until the program's first byte of output.
        fetched, requests: bytes of bodies and number of requests that the registry answered.
        disk: bytes of file system blocks in use afterwards.
        samples: seconds since the start and bytes fetched by then, ascending.
        output: what the program printed.
    """

    way: str
    speed: Speed
    ready: float
    first_output: float
    fetched: int
    requests: int
    disk: int
    samples: Sequence[tuple[float, int]] = ()
    output: str = ""


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def seconds(time: float) -> str:
    return f"{time * 1000:.0f} ms" if time < 1 else f"{time:.1f} s"


def table(measurements: Sequence[Measurement], title: str) -> Table:
    """One row for each measurement."""
    result = Table(title=title, title_justify="left", title_style="bold")
    result.add_column("link", no_wrap=True)
    result.add_column("way", no_wrap=True)
    for name in ("root ready", "first output", "bytes moved", "requests", "disk used"):
        result.add_column(name, justify="right")
    previous = None
    for one in measurements:
        if previous is not None and previous != one.speed:
            result.add_section()
        result.add_row(
            "" if previous == one.speed else one.speed.title,
            one.way,
            seconds(one.ready),
            seconds(one.first_output),
            megabytes(one.fetched),
            str(one.requests),
            megabytes(one.disk),
            style="bold green" if one.way == "lazy" else "",
        )
        previous = one.speed
    return result


def sooner(measurements: Sequence[Measurement]) -> list[str]:
    """One sentence for each speed: how much sooner the first output came."""
    lines = []
    for speed in dict.fromkeys(one.speed for one in measurements):
        by_way = {one.way: one for one in measurements if one.speed == speed}
        if {"lazy", "ordinary"} <= set(by_way):
            lazy, ordinary = by_way["lazy"], by_way["ordinary"]
            lines.append(
                f"{speed.title}: first output {ordinary.first_output / lazy.first_output:.1f} times sooner, "
                f"with {ordinary.fetched / max(lazy.fetched, 1):.1f} times fewer bytes"
            )
    return lines


def picture(measurements: Sequence[Measurement], path: Path, title: str) -> None:
    """Draw bytes fetched over time, one panel for each speed; a dot marks the first output."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speeds = list(dict.fromkeys(one.speed for one in measurements))
    figure, axes = pyplot.subplots(
        1, len(speeds), figsize=(5.5 * len(speeds), 4), squeeze=False, layout="constrained"
    )
    colors = {"lazy": "#2a9d5c", "ordinary": "#b0533c"}
    for axis, speed in zip(axes[0], speeds, strict=True):
        for one in (one for one in measurements if one.speed == speed):
            times, fetched = _curve(one)
            color = colors.get(one.way)
            axis.step(times, fetched, where="post", color=color, label=f"{one.way}: {megabytes(one.fetched)}")
            axis.plot(one.first_output, fetched[-1], "o", color=color)
            axis.annotate(
                f"first output\n{seconds(one.first_output)}",
                (one.first_output, fetched[-1]),
                xytext=(-6, -40) if one.way == "ordinary" else (10, 0),
                textcoords="offset points",
                ha="right" if one.way == "ordinary" else "left",
                va="center",
                color=color,
            )
        axis.set(title=speed.title, xlabel="seconds", ylabel="MB fetched", xlim=(0, None), ylim=(0, None))
        axis.legend(loc="center right")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curve(one: Measurement) -> tuple[list[float], list[float]]:
    """Times and MB fetched from 0 to the first output."""
    inside = [(time, size) for time, size in one.samples if time <= one.first_output]
    last = inside[-1][1] if inside else 0
    points = [(0.0, 0), *inside, (one.first_output, last)]
    return [time for time, _ in points], [size / 1e6 for _, size in points]
