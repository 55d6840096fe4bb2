"""``nydusify copy``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from nydus.cli.gostyle import GoCommand, byte_size, option, reporting, tell_environment
from nydus.cli.logs import Log, human
from nydus.errors import ConfigError


@click.command(cls=GoCommand, short_help="Copy an image as it is.")
@option(
    "--source",
    env="SOURCE",
    required=True,
    help="Reference, file://<archive or layout folder>, or containerd://NAMESPACE/REFERENCE.",
)
@option(
    "--target",
    env="TARGET",
    required=True,
    help="Reference, file://<archive>, or containerd://NAMESPACE/REFERENCE.",
)
@option("--source-insecure", env="SOURCE_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@option("--target-insecure", env="TARGET_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@option("--plain-http", env="PLAIN_HTTP", is_flag=True, help="Speak http to the registries.")
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
        new_archive,
        one_platform,
        platforms,
        source_place,
        work_dir,
    )
    from nydus.cli.progress import progress_for
    from nydus.containerd.store import SCHEME, containerd_place, write_image
    from nydus.convert.backend import backend_place
    from nydus.convert.copy import Copied
    from nydus.convert.copy import copy as copy_image
    from nydus.convert.gather import gather
    from nydus.oci.layout import Layout
    from nydus.oci.place import LayoutPlace, SinkPlace, registry_place
    from nydus.oci.reference import Reference, parse

    log: Log = ctx.obj if isinstance(ctx.obj, Log) else Log()
    tell_environment(ctx, log)
    backend = backend_config(
        values["source_backend_type"],
        values["source_backend_config"],
        values["source_backend_config_file"],
        "--source-backend",
    )
    plain, chosen = values["plain_http"], platforms(values["platform"], values["all_platforms"])
    source = source_place(
        values["source"], None, plain_http=plain, insecure=values["source_insecure"], option="source"
    )
    blobs = backend_place(*backend) if backend else None
    if blobs and values["all_platforms"]:
        raise ConfigError("--all-platforms cannot be used with a storage backend")

    def run(target: SinkPlace) -> Copied:
        if blobs:
            return gather(source, blobs, target, one_platform(values["platform"]), progress)
        return copy_image(source, target, progress, chosen)

    with progress_for(log) as progress:
        if values["target"].startswith(SCHEME):
            with work_dir(Path(values["work_dir"])) as base:
                with tempfile.TemporaryDirectory(dir=base, prefix="nydusify-") as folder:
                    copied = run(LayoutPlace(Path(folder), name=values["target"]))
                    write_image(Layout(folder), containerd_place(values["target"]))
        elif values["target"].startswith("file://"):
            path = Path(values["target"].removeprefix("file://"))
            name = getattr(source, "reference", None) or Reference("localhost", "image", "latest")
            with new_archive(path, name, Path(values["work_dir"]), "--target") as layout:
                copied = run(layout)
        else:
            target = registry_place(
                parse(values["target"]),
                plain_http=plain,
                insecure=values["target_insecure"],
                push_chunk_size=byte_size(values["push_chunk_size"]),
            )
            copied = run(target)
    log.result(
        f"copied {copied.blobs} blobs, sent {human(copied.sent)}"
        + (f", {human(copied.present)} were there" if copied.present else ""),
        {
            "target": values["target"],
            "digest": copied.descriptor.digest,
            "blobs": copied.blobs,
            "sent": copied.sent,
            "present": copied.present,
        },
        target=values["target"],
        digest=copied.descriptor.digest,
    )
