"""``nydusify copy``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nydus.cli.gostyle import GoCommand, byte_size, option, reporting, tell_environment
from nydus.cli.logs import Log, count, human
from nydus.cli.nydusify_places import SOURCE, SOURCE_ARCHIVE, plain_http, speaks_http
from nydus.cli.nydusify_targets import TARGET, TARGET_ARCHIVE
from nydus.errors import ConfigError


@click.command(cls=GoCommand, short_help="Copy an image as it is.")
@option(
    "--source",
    env="SOURCE",
    help=SOURCE,
)
@option("--target", env="TARGET", help=TARGET)
@option("--source-archive", env="SOURCE_ARCHIVE", type=click.Path(), help=SOURCE_ARCHIVE)
@option("--target-archive", env="TARGET_ARCHIVE", type=click.Path(), help=TARGET_ARCHIVE)
@option("--source-insecure", env="SOURCE_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@option("--target-insecure", env="TARGET_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@plain_http
@option("--source-backend-type", env="BACKEND_TYPE", help="Where the source's blobs are: oss, s3 or localfs.")
@option("--source-backend-config", env="BACKEND_CONFIG", help="Its configuration as JSON.")
@option("--source-backend-config-file", env="BACKEND_CONFIG_FILE", help="A file with that.")
@option("--platform", help="os/architecture[/variant], separated by commas; default: this machine's.")
@option("--all-platforms", is_flag=True, help="Copy the images of all platforms.")
@option("--push-chunk-size", default="0MB", help="Upload in requests of this size, e.g. 5MB. [0MB: one each]")
@option(
    "--work-dir", env="WORK_DIR", default="./tmp", help="For temporary files, where any are needed. [./tmp]"
)
@option("--nydus-image", env="NYDUS_IMAGE", default="nydus-image", hidden=True)
@reporting
@click.pass_context
def copy(ctx: click.Context, /, **values: Any) -> None:
    """Copy an image as it is; every digest stays.

    What the target has already is not sent again, and within one registry nothing is. Blobs of a storage
    backend become layers of the image, for which it gets a new manifest.
    """
    from nydus.cli.nydusify_places import (
        backend_config,
        one_platform,
        place_of,
        platforms,
    )
    from nydus.cli.nydusify_targets import target_place
    from nydus.cli.progress import progress_for
    from nydus.convert.backend import backend_place
    from nydus.convert.copy import Copied
    from nydus.convert.copy import copy as copy_image
    from nydus.convert.gather import gather

    log: Log = ctx.obj if isinstance(ctx.obj, Log) else Log()
    tell_environment(ctx, log)
    backend = backend_config(
        values["source_backend_type"],
        values["source_backend_config"],
        values["source_backend_config_file"],
        "--source-backend",
    )
    chosen = platforms(values["platform"], values["all_platforms"])
    source = place_of(values, "source")
    blobs = backend_place(*backend) if backend else None
    if blobs and values["all_platforms"]:
        raise ConfigError("--all-platforms cannot be used with a storage backend")

    sink = target_place(
        values["target"],
        values["target_archive"],
        source,
        folder=Path(values["work_dir"]),
        plain_http=speaks_http(values, "target"),
        insecure=values["target_insecure"],
        push_chunk_size=byte_size(values["push_chunk_size"]),
    )
    with progress_for(log) as progress, sink as target:
        where = str(target)
        copied: Copied
        if blobs:
            copied = gather(source, blobs, target, one_platform(values["platform"]), progress)
        else:
            copied = copy_image(source, target, progress, chosen)
    log.result(
        f"copied {count(copied.blobs, 'blob')}, sent {human(copied.sent)}"
        + (f", {human(copied.present)} were there" if copied.present else ""),
        {
            "target": where,
            "digest": copied.descriptor.digest,
            "blobs": copied.blobs,
            "sent": copied.sent,
            "present": copied.present,
        },
        target=where,
        digest=copied.descriptor.digest,
    )
