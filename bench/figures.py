"""Measured figures, their aims, and how they are shown."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass
class Figure:
    """One measured quantity, with the ordinary way's beside it where there is one.

    Attributes:
        unit: ``s``, ``MB`` or ``requests``.
        ours, other: one value for each run; the median counts.
        other_name: what ``other`` was done with.
        most: the aim: our median is at most this.
        most_ratio, least_ratio: the aim for ours / other, or for other / ours where more is better.
    """

    name: str
    unit: str
    ours: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    other_name: str = ""
    most: float | None = None
    most_ratio: float | None = None
    least_ratio: float | None = None

    @property
    def value(self) -> float:
        return statistics.median(self.ours)

    @property
    def other_value(self) -> float | None:
        return statistics.median(self.other) if self.other else None

    @property
    def ratio(self) -> float | None:
        """Ours / other."""
        return self.value / self.other_value if self.other_value else None

    @property
    def aim(self) -> str:
        if self.most is not None:
            return f"≤ {show(self.most, self.unit)}"
        if self.most_ratio is not None:
            return f"≤ {self.most_ratio:g}×"
        return f"≥ {self.least_ratio:g}× sooner" if self.least_ratio is not None else ""

    @property
    def met(self) -> bool | None:
        """Whether the aim is reached; None where there is none."""
        if self.most is not None:
            return self.value <= self.most
        if self.ratio is None:
            return None
        if self.most_ratio is not None:
            return self.ratio <= self.most_ratio
        return None if self.least_ratio is None else 1 / self.ratio >= self.least_ratio


def show(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
    return f"{value:.1f} MB" if unit == "MB" else f"{value:g}"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "load_at_start": os.getloadavg()[0],
    }


def table(figures: Sequence[Figure], title: str) -> Table:
    result = Table(title=title, title_justify="left")
    for name in ("figure", "ours", "ordinary", "with", "ratio", "aim", ""):
        result.add_column(name, justify="left" if name in ("figure", "with", "aim") else "right")
    for one in figures:
        other = one.other_value
        result.add_row(
            one.name,
            show(one.value, one.unit),
            "" if other is None else show(other, one.unit),
            one.other_name,
            "" if one.ratio is None else f"{one.ratio:.2f}×",
            one.aim,
            {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[one.met],
        )
    return result


def save(figures: Sequence[Figure], about: dict[str, Any], folder: Path, name: str) -> tuple[Path, Path]:
    """Write the JSON result and the plot of one image; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        **about,
        "figures": [
            {
                **asdict(one),
                "median": one.value,
                "other_median": one.other_value,
                "ratio": one.ratio,
                "met": one.met,
            }
            for one in figures
        ],
    }
    result, picture = folder / f"{name}.json", folder / f"{name}.png"
    result.write_text(json.dumps(document, indent=1) + "\n")
    plot([one for one in figures if one.other], picture)
    return result, picture


def plot(figures: Sequence[Figure], path: Path) -> None:
    """Draw times as our share of the ordinary way's, logarithmic; further left is better for us."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = [one for one in figures if one.unit == "s"]
    ratios = [one.ratio or 1.0 for one in times]
    picture, axis = pyplot.subplots(figsize=(10, 0.42 * len(times) + 1), layout="constrained")
    axis.set_xscale("log")
    least = min(ratios) / 2
    colors = {True: "#2a9d5c", False: "#b0533c", None: "#8fa3ad"}
    for row, (one, ratio) in enumerate(zip(times, ratios, strict=True)):
        axis.barh(row, ratio - least, left=least, color=colors[one.met], height=0.6)
        limit = one.most_ratio or (1 / one.least_ratio if one.least_ratio else None)
        if limit:
            axis.plot([limit, limit], [row - 0.4, row + 0.4], color="black", linewidth=2)
        text = f"{ratio:.2f}×   {show(one.value, one.unit)} / {show(one.other_value or 0, one.unit)}"
        axis.text(1.02, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    axis.axvline(1, color="gray", linestyle=":", linewidth=1)
    axis.set_yticks(range(len(times)), [f"{one.name}  ({one.other_name})" for one in times], fontsize=9)
    axis.set(xlabel="our time / the ordinary way's (black: the aim; dotted: equal)", xlim=(least, None))
    axis.invert_yaxis()
    picture.savefig(path, dpi=110)
    pyplot.close(picture)
