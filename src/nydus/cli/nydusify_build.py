"""``nydusify build`` (alias ``pack``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nydus.cli.gostyle import GoCommand, given, number, option, reporting, tell_environment
from nydus.cli.logs import Log, human
from nydus.errors import ConfigError


@click.command(cls=GoCommand, short_help="Build an image from a directory.")
@option("--source-dir", "--target-dir", env="SOURCE_DIR", required=True, help="The directory.")
@option(
    "--output-dir",
    "-o",
    env="OUTPUT_DIR",
    default="./.nydus-build-output",
    help="For bootstrap and blob. [./.nydus-build-output]",
)
@option(
    "--name",
    "--meta",
    "--bootstrap",
    env=("BOOTSTRAP", "IMAGE_NAME"),
    required=True,
    help="Name of the bootstrap; without an extension it gets .meta.",
)
@option(
    "--backend-push", env="BACKEND_PUSH", is_flag=True, help="Send bootstrap and new blobs to the backend."
)
@option("--backend-type", env="BACKEND_TYPE", default="oss", help="oss or s3. [oss]")
@option("--backend-config", env="BACKEND_CONFIG", help="Its configuration as JSON.")
@option("--backend-config-file", env="BACKEND_CONFIG_FILE", help="A file with that.")
@option("--chunk-dict", env="CHUNK_DICT", help="Share chunks with bootstrap=<path>.")
@option("--parent-bootstrap", env="PARENT_BOOTSTRAP", help="Build on top of this image.")
@option("--compact", env="COMPACT", is_flag=True, help="First make the parent's blobs fewer.")
@option("--compact-config-file", env="COMPACT_CONFIG_FILE", help="What of them is worth rewriting, as JSON.")
@option("--fs-version", env="FS_VERSION", default="6", help="RAFS version, 5 or 6. [6]")
@option("--compressor", env="COMPRESSOR", default="zstd", help="none, lz4_block or zstd. [zstd]")
@option("--chunk-size", env="CHUNK_SIZE", default="0x100000", help="A power of two. [0x100000]")
@option("--nydus-image", env="NYDUS_IMAGE", default="nydus-image", help="Not used: the builder is built in.")
@reporting
@click.pass_context
def build(ctx: click.Context, /, **values: Any) -> None:
    """Build an image from a directory.

    Bootstrap and blob are then in the output folder, and with --backend-push in a bucket, where their names
    begin with what the backend's configuration says: meta_prefix and blob_prefix.
    """
    from nydus.cli.image_options import Trace, result, write_result
    from nydus.cli.nydusify_places import backend_config
    from nydus.convert.options import ConvertOptions
    from nydus.convert.pack import Bucket, PackOptions, compact_options, pack

    log: Log = ctx.obj if isinstance(ctx.obj, Log) else Log()
    tell_environment(ctx, log)
    if given(ctx, "nydus_image"):
        log.warning("--nydus-image is not used: the builder is built in")
    checked = ConvertOptions(
        fs_version=number(values["fs_version"]),
        compressor=values["compressor"],
        chunk_size=number(values["chunk_size"]),
    )
    bucket = None
    if values["backend_config"] or values["backend_config_file"]:
        chosen = backend_config(
            values["backend_type"], values["backend_config"], values["backend_config_file"]
        )
        bucket = Bucket(*chosen) if chosen else None
    elif values["backend_push"] or values["compact"]:
        raise ConfigError("--backend-push and --compact need --backend-config or --backend-config-file")
    compact = None
    if values["compact"]:
        compact = compact_options(*_compact_config(values["compact_config_file"]))
    trace = Trace()
    with trace.time("total_build"):
        made = pack(
            PackOptions(
                Path(values["source_dir"]),
                Path(values["output_dir"]),
                values["name"],
                _build_options(checked),
                values["chunk_dict"] or "",
                values["parent_bootstrap"] or "",
                compact,
                bucket,
                values["backend_push"],
            )
        )
    trace.registered_events.update(dedup_chunks=made.result.duplicates)
    blobs = [blob.id for blob in made.tree.blobs]
    document = result(made.tree, str(made.bootstrap), blobs, trace)
    write_result(str(made.bootstrap.with_name("output.json")), document)
    if made.compacted:
        log.info(f"compacted the parent's blobs to {len(made.compacted)} new ones")
    for name in made.pushed:
        log.info("pushed", object=name)
    log.result(
        f"successfully built Nydus image (bootstrap:'{made.bootstrap}', blob:'{made.blob or ''}')",
        {
            "bootstrap": str(made.bootstrap),
            "blob": str(made.blob or ""),
            "blob_id": made.result.blob_id,
            "blob_size": made.result.blob_size,
            "compacted": made.compacted,
            "pushed": made.pushed,
        },
        size=human(made.result.blob_size),
    )


def _build_options(checked: Any) -> Any:
    """Those of a layer that has its bootstrap beside it."""
    from nydus.build.layer import BuildOptions
    from nydus.rafs.model import Compression

    return BuildOptions(
        version=checked.fs_version,
        compression=Compression[checked.compressor.upper()],
        chunk_size=checked.chunk_size,
    )


def _compact_config(path: str | None) -> tuple[bytes, str]:
    if not path:
        return b"{}", ""
    try:
        return Path(path).read_bytes(), path
    except OSError as error:
        raise ConfigError(f"--compact-config-file {path}: {error.strerror}") from error
