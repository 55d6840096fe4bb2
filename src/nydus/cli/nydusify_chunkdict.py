"""``nydusify chunkdict generate``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click

from nydus.cli.gostyle import GoCommand, GoGroup, option, reporting, tell_environment
from nydus.cli.logs import Log, human
from nydus.cli.nydusify_places import SOURCE, plain_http, speaks_http
from nydus.cli.nydusify_targets import TARGET, TARGET_ARCHIVE
from nydus.errors import NydusError


@click.group(cls=GoGroup, commands_in={}, short_help="Make chunk dictionaries.")
def chunkdict() -> None:
    """Make chunk dictionaries."""


@chunkdict.command(cls=GoCommand, short_help="Make a dictionary of the chunks that images share.")
@option(
    "--sources",
    env="SOURCES",
    multiple=True,
    required=True,
    help="Nydus images, separated by commas or given repeatedly. " + SOURCE,
)
@option("--target", env="TARGET", help="Without a target, only files are written. " + TARGET)
@option("--target-archive", env="TARGET_ARCHIVE", type=click.Path(), help=TARGET_ARCHIVE)
@option("--source-insecure", env="SOURCE_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@option("--target-insecure", env="TARGET_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@plain_http
@option("--backend-type", help="Where blobs are that sources do not list: oss, s3 or localfs.")
@option("--backend-config", help="Its configuration as JSON.")
@option("--backend-config-file", help="A file with that.")
@option(
    "--work-dir", env="WORK_DIR", default="./output", help="For documents and dictionary; kept. [./output]"
)
@option("--nydus-image", env="NYDUS_IMAGE", default="nydus-image", hidden=True)
@option("--all-platforms", is_flag=True, help="Take the images of all platforms.")
@option("--platform", help="os/architecture[/variant], separated by commas; default: this machine's.")
@reporting
@click.pass_context
def generate(ctx: click.Context, /, **values: Any) -> None:
    """Make a dictionary of the chunks that at least two images have.

    Conversions that are given it (convert --chunk-dict bootstrap:registry:TARGET) refer to these chunks, and
    do not store them again. The images must have been built with the same version and chunk size. Of images
    in a storage backend, the dictionary is for conversions into the same backend.
    """
    from nydus.cli.nydusify_places import backend_config, platforms, source_place
    from nydus.cli.nydusify_targets import target_place
    from nydus.cli.progress import progress_for
    from nydus.convert.backend import backend_place
    from nydus.convert.chunkdict import generate as run
    from nydus.oci.place import SinkPlace

    log: Log = ctx.obj if isinstance(ctx.obj, Log) else Log()
    tell_environment(ctx, log)
    found = backend_config(values["backend_type"], values["backend_config"], values["backend_config_file"])
    backend = backend_place(*found) if found else None
    names = [name.strip() for text in values["sources"] for name in text.split(",") if name.strip()]
    sources = [
        source_place(
            name,
            None,
            plain_http=speaks_http(values, "source"),
            insecure=values["source_insecure"],
            option="sources",
            work_dir=values["work_dir"],
        )
        for name in names
    ]
    work_dir = Path(values["work_dir"])
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NydusError(f"--work-dir {work_dir}: {error.strerror}") from error
    sink: AbstractContextManager[SinkPlace | None] = nullcontext()
    if values["target"] or values["target_archive"]:
        sink = target_place(
            values["target"],
            values["target_archive"],
            None,
            folder=work_dir,
            plain_http=speaks_http(values, "target"),
            insecure=values["target_insecure"],
        )
    with progress_for(log) as progress, sink as target:
        where = str(target or "")
        chosen = platforms(values["platform"], values["all_platforms"])
        made = run(sources, target, chosen, work_dir, progress, backend)
    for share in made.images:
        percent = 100 * share.shared_size / share.size if share.size else 0
        log.info(
            f"{human(share.shared_size)} of {human(share.size)} ({percent:.0f} %) are in the dictionary",
            image=share.image,
        )
    if not made.chunks:
        log.warning("no two of the images share a chunk: the dictionary is empty")
    log.result(
        f"{made.chunks} chunks, {human(made.size)} in {len(made.blobs)} blobs are shared; the images store "
        f"{human(made.stored)}, of which {human(made.stored - made.needed)} are repetitions",
        {
            "chunks": made.chunks,
            "size": made.size,
            "blobs": len(made.blobs),
            "stored": made.stored,
            "needed": made.needed,
            "target": where,
            "digest": made.descriptor.digest if made.descriptor else "",
        },
        **({"target": where, "digest": made.descriptor.digest} if made.descriptor else {}),
    )
