"""``nydusctl``: asks and controls a running nydusd (cli.md §3)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from nydus.cli.lazy import run
from nydus.daemon.client import DaemonClient, DaemonError

_RAW = click.option("-r", "--raw", is_flag=True, help="Print the JSON as it came.")


class _Context:
    def __init__(self, socket: Path, raw: bool) -> None:
        self.client, self.raw = DaemonClient(socket), raw


@click.group()
@click.option("-S", "--sock", type=click.Path(path_type=Path), required=True, help="The daemon's API socket.")
@_RAW
@click.pass_context
def nydusctl(context: click.Context, sock: Path, raw: bool) -> None:
    """Ask or control a running nydusd."""
    context.obj = _Context(sock, raw)


@nydusctl.command()
@_RAW
@click.pass_obj
def info(context: _Context, raw: bool) -> None:
    """What the daemon is and what it has mounted."""
    answer = context.client.info()
    if raw or context.raw:
        click.echo(json.dumps(answer))
        return
    version = answer["version"]
    rows: list[tuple[str, object]] = [
        ("Version", json.dumps(version["package_ver"])),
        ("Status", json.dumps(answer["state"])),
        ("Profile", json.dumps(version["profile"])),
        ("Commit", json.dumps(version["git_commit"])),
    ]
    _print(rows)
    for mountpoint, instance in sorted((answer["backend_collection"] or {}).items()):
        rafs = (instance.get("config") or {}).get("rafs") or {}
        ahead = rafs.get("prefetch") or {}
        click.echo(f"\nInstance: {mountpoint}")
        _print(
            [
                ("Mountpoint", json.dumps(mountpoint)),
                ("Type", json.dumps(instance.get("backend_type"))),
                ("Mounted Time", json.dumps(instance.get("mounted_time"))),
                ("Mode", json.dumps(rafs.get("mode"))),
                ("Provider", f"{instance.get('provider')} ({instance.get('provider_reason')})"),
                ("Prefetch", json.dumps(ahead.get("enable"))),
                ("Prefetch Merging Size", json.dumps(ahead.get("batch_size"))),
            ],
            indent="  ",
        )


@nydusctl.command("set")
@click.argument("kind", type=click.Choice(["log-level"]))
@click.argument("value")
@_RAW
@click.pass_obj
def set_(context: _Context, kind: str, value: str, raw: bool) -> None:
    """Change a setting of the daemon."""
    context.client.request("PUT", "/api/v1/daemon", {"log_level": value})


@nydusctl.command()
@click.argument("category", type=click.Choice(["backend", "cache", "fsstats"]))
@click.option(
    "-I", "--interval", type=click.FloatRange(0.1), help="Print what changes every so many seconds."
)
@click.option("-i", "--id", "mountpoint", help="Of which mount; needed where there are several.")
@_RAW
@click.pass_obj
def metrics(
    context: _Context, category: str, interval: float | None, mountpoint: str | None, raw: bool
) -> None:
    """Counters of the backend, the cache or the file system."""
    kind = {"backend": "backend", "cache": "blobcache", "fsstats": ""}[category]
    last = context.client.metrics(kind, mountpoint)
    if interval is None:
        if raw or context.raw:
            click.echo(json.dumps(last))
        else:
            _print(_rows(last))
        return
    while True:
        time.sleep(interval)
        now = context.client.metrics(kind, mountpoint)
        _print(_rows(_difference(now, last)))
        click.echo()
        last = now


@nydusctl.command()
@click.option("-s", "--source", required=True, help="Bootstrap of the image.")
@click.option("-c", "--config", required=True, type=click.Path(path_type=Path), help="Configuration file.")
@click.option("-m", "--mountpoint", required=True, help="Path inside the daemon's mountpoint.")
@click.option("-t", "--type", "kind", required=True, type=click.Choice(["rafs", "passthrough_fs"]))
@_RAW
@click.pass_obj
def mount(context: _Context, source: str, config: Path, mountpoint: str, kind: str, raw: bool) -> None:
    """Mount an image."""
    try:
        text = config.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DaemonError(f"{config}: cannot read the configuration: {error}") from None
    body = {"source": source, "fs_type": kind, "config": text}
    context.client.request("POST", "/api/v1/mount", body, mountpoint=mountpoint)


@nydusctl.command()
@click.option("-m", "--mountpoint", required=True, help="Path inside the daemon's mountpoint.")
@_RAW
@click.pass_obj
def umount(context: _Context, mountpoint: str, raw: bool) -> None:
    """Unmount an image."""
    context.client.umount(mountpoint)


def _print(rows: list[tuple[str, object]], indent: str = "") -> None:
    width = max((len(name) for name, _ in rows), default=0) + 1
    for name, value in rows:
        click.echo(f"{indent}{name + ':':<{width}}  {value}")


def _rows(counters: dict[str, Any]) -> list[tuple[str, object]]:
    return [(key.replace("_", " ").capitalize(), json.dumps(value)) for key, value in counters.items()]


def _difference(now: Any, before: Any) -> Any:
    if isinstance(now, dict):
        return {key: _difference(value, before.get(key, 0)) for key, value in now.items()}
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return [_difference(a, b) for a, b in zip(now, before, strict=True)]
    if isinstance(now, (int, float)) and not isinstance(now, bool) and isinstance(before, (int, float)):
        return now - before
    return now


def main() -> None:
    run(nydusctl, "nydusctl")


if __name__ == "__main__":
    main()
