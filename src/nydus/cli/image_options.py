"""What the sub-commands of ``nydus-image`` share: number types, prefetch lists, the result document."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from nydus import version

if TYPE_CHECKING:
    from nydus.rafs.model import Tree

log = logging.getLogger("nydus.image")

PREFETCH_POLICIES = click.Choice(["fs", "blob", "none"])


class Number(click.ParamType[int]):
    """A decimal or ``0x`` hexadecimal number; with ``base=16`` always hexadecimal."""

    name = "number"

    def __init__(self, base: int = 0) -> None:
        self.base = base

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return int(value, self.base)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)


def read_prefetch_list() -> list[bytes]:
    """The absolute paths on standard input, one a line, as ``--prefetch-policy`` takes them."""
    from nydus.build.layer import prefetch_paths

    paths, relative = prefetch_paths(sys.stdin.buffer)
    for path in relative:
        log.warning("prefetch path %s is not absolute: skipped", os.fsdecode(path))
    return paths


@dataclass(slots=True)
class Trace:
    """Seconds and events of a run, for ``--output-json``."""

    consumed_time: dict[str, float] = field(default_factory=dict)
    registered_events: dict[str, str | int] = field(default_factory=dict)

    @contextmanager
    def time(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.consumed_time[what] = time.perf_counter() - start


def result(tree: Tree, bootstrap: str, blobs: list[str], trace: Trace) -> dict[str, Any]:
    """The result document (cli.md 1.4)."""
    from nydus.rafs.model import SuperFlag

    names = {
        SuperFlag.COMPRESSION_NONE: "none",
        SuperFlag.COMPRESSION_LZ4: "lz4_block",
        SuperFlag.COMPRESSION_GZIP: "gzip",
        SuperFlag.COMPRESSION_ZSTD: "zstd",
    }
    compressor = next((name for flag, name in names.items() if tree.flags & flag), "lz4_block")
    return {
        "version": version.full(),
        "bootstrap": bootstrap,
        "blobs": blobs,
        "external_bootstrap": "",
        "external_blobs": [],
        "trace": {
            "consumed_time": dict(sorted(trace.consumed_time.items())),
            "registered_events": dict(sorted(trace.registered_events.items())),
        },
        "fs_version": str(tree.version),
        "compressor": compressor,
    }


def write_result(path: str, document: dict[str, Any], *, indent: int | None = 2) -> None:
    """Write the result document, pretty-printed unless ``indent`` is None."""
    from nydus.build.output import write_file

    write_file(path, json.dumps(document, indent=indent).encode())
