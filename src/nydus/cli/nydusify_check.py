"""``nydusify check``."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nydus.cli.gostyle import (
    GoCommand,
    decryption_key,
    given,
    option,
    reporting,
    tell_environment,
    tell_unused,
)
from nydus.cli.logs import Log, count, human
from nydus.cli.nydusify_places import SOURCE, SOURCE_ARCHIVE, plain_http
from nydus.errors import ConfigError, NydusError

if TYPE_CHECKING:
    from nydus.convert.check import Side
    from nydus.convert.listing import Listing

#: What is about the comparison with a source.
_OF_SOURCE = (
    "nydusd", "source_insecure", "source_plain_http",
    "source_backend_type", "source_backend_config", "source_backend_config_file",
)  # fmt: skip


@click.command(cls=GoCommand, short_help="Check a Nydus image, and compare it with its source.")
@option("--source", env="SOURCE", help="Without a source, the target alone is checked. " + SOURCE)
@option("--target", env="TARGET", help=SOURCE)
@option("--source-archive", type=click.Path(), help=SOURCE_ARCHIVE)
@option("--target-archive", type=click.Path(), help=SOURCE_ARCHIVE)
@option("--source-insecure", env="SOURCE_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@option("--target-insecure", env="TARGET_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@plain_http
@option(
    "--source-backend-type", env="BACKEND_TYPE", help="Where a Nydus source's blobs are: oss, s3 or localfs."
)
@option("--source-backend-config", env="BACKEND_CONFIG", help="Its configuration as JSON.")
@option("--source-backend-config-file", env="BACKEND_CONFIG_FILE", help="A file with that.")
@option(
    "--target-backend-type",
    "--backend-type",
    env="BACKEND_TYPE",
    help="Where the target's blobs are: oss, s3 or localfs.",
)
@option(
    "--target-backend-config", "--backend-config", env="BACKEND_CONFIG", help="Its configuration as JSON."
)
@option(
    "--target-backend-config-file",
    "--backend-config-file",
    env="BACKEND_CONFIG_FILE",
    help="A file with that.",
)
@option(
    "--multi-platform", env="MULTI_PLATFORM", is_flag=True, help="Not needed: both halves are always checked."
)
@option("--platform", help="os/architecture; default: this machine's.")
@decryption_key
@option("--no-mount", is_flag=True, help="Read the files without mounting the image.")
@option(
    "--work-dir", env="WORK_DIR", default="./output", help="For documents and bootstrap; kept. [./output]"
)
@option("--output-json", env="OUTPUT_JSON", type=click.Path(dir_okay=False), help="Write a report there.")
@option("--nydus-image", env="NYDUS_IMAGE", default="nydus-image", help="Not used: the checks are built in.")
@option(
    "--nydusd", env="NYDUSD", default="nydusd", help="The daemon to mount with; default: the built-in one."
)
@reporting
@click.pass_context
def check(ctx: click.Context, /, **values: Any) -> None:
    """Check a Nydus image, and compare it with its source.

    All documents, blobs and chunks are read and verified. With a source, the two file systems are compared in
    everything; the image is mounted for that, which needs root.
    """
    from nydus.cli.nydusify_check_files import complete
    from nydus.cli.nydusify_places import backend_config, one_platform, place_of
    from nydus.cli.progress import progress_for
    from nydus.convert.backend import backend_place
    from nydus.convert.check import Report
    from nydus.convert.check import check as run
    from nydus.oci.encryption import private_keys

    log: Log = ctx.obj if isinstance(ctx.obj, Log) else Log()
    tell_environment(ctx, log)
    alone = not (values["source"] or values["source_archive"])
    for unused, names, why in (
        (alone, _OF_SOURCE, "without --source"),
        (not alone and values["no_mount"], ("nydusd",), "with --no-mount"),
        (values["source_archive"], ("source_insecure", "source_plain_http"), "with --source-archive"),
        (values["target_archive"], ("target_insecure", "target_plain_http"), "with --target-archive"),
    ):
        if unused:
            tell_unused(ctx, log, names, why)
    target = place_of(values, "target")
    source = None
    if not alone:
        source = place_of(values, "source")
    places = []
    for side in ("target", "source"):
        words = ("type", "config", "config_file")
        kind, text, file = (values[f"{side}_backend_{word}"] for word in words)
        if not kind:  # a configuration from the environment may be the other side's
            text = text if given(ctx, f"{side}_backend_config", in_words=True) else None
            file = file if given(ctx, f"{side}_backend_config_file", in_words=True) else None
        found = backend_config(kind, text, file, f"--{side}-backend")
        places.append(backend_place(*found) if found else None)
    keys = private_keys(values["decryption_key"])
    work_dir = Path(values["work_dir"])
    output = Path(values["output_json"]) if values["output_json"] else None
    report = Report(str(target), str(source or ""))
    document: dict[str, Any] = {"target": str(target), "verified": False}
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        mounted = None
        if source is not None and not values["no_mount"]:
            _require_root()
            daemon = values["nydusd"] if given(ctx, "nydusd") else ""

            def through_mount(side: Side, folder: Path) -> Listing:
                return _mounted(side, folder, work_dir, daemon)

            mounted = through_mount
        with progress_for(log) as progress:
            platform = one_platform(values["platform"])
            run(target, source, platform, work_dir, progress, mounted, places[0], places[1], keys, report)
        complete(work_dir)
        document = {**dataclasses.asdict(report), "verified": True}
        for warning in report.warnings:
            log.warning(warning)
        counts = report.checks
        size = human(counts.get("blob bytes", 0))
        same = f"; the same as {report.source}" if report.source else ""
        log.result(
            f"verified {count(counts.get('manifest', 0), 'layer')}, {count(counts.get('blobs', 0), 'blob')} "
            f"({size}), {count(counts.get('files', 0), 'file')}{same}",
            document,
        )
    except NydusError as error:
        document = {**dataclasses.asdict(report), "verified": False, "error": str(error)}
        with suppress(OSError):  # whoever looks for the reason wants these files, too
            complete(work_dir)
        raise
    except OSError as error:
        document["error"] = f"{error.filename}: {error.strerror}"
        raise NydusError(document["error"]) from error
    finally:
        if output:
            try:
                output.write_text(json.dumps(document, indent=2) + "\n")
            except OSError as error:
                log.warning(f"--output-json {output}: {error.strerror}")


def _require_root() -> None:
    import os

    if os.geteuid() != 0:
        raise ConfigError("mounting needs root; use --no-mount to compare without a mount")


def _mounted(side: Side, folder: Path, work_dir: Path, nydusd: str) -> Listing:
    """The files of the target through a lazy mount."""
    from concurrent.futures import ThreadPoolExecutor

    from nydus.convert.documents import BOOTSTRAP
    from nydus.convert.listing import of_directory
    from nydus.convert.mounting import backend_of, mounted
    from nydus.oci.place import ArchivePlace

    backend: dict[str, Any]
    if side.blobs is not None:
        backend = side.blobs.device
    elif isinstance(side.place, ArchivePlace):
        backend = {"type": "localfs", "config": {"dir": str((folder / side.name).absolute())}}
    else:
        backend = backend_of(side.place)
    mountpoint = folder / "mnt"
    mountpoint.mkdir()
    bootstrap = work_dir / side.name / "nydus_bootstrap" / BOOTSTRAP
    # Nothing interrupts a read that waits for a daemon, but the end of the daemon.
    with ThreadPoolExecutor(1, "walk") as pool:
        with mounted(backend, bootstrap, mountpoint, folder / "nydusd", prefetch=True, nydusd=nydusd):
            return pool.submit(of_directory, str(mountpoint)).result()
