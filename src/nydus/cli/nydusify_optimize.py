"""``nydusify optimize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nydus.cli.gostyle import (
    GoCommand,
    byte_size,
    decryption_key,
    encrypt_recipients,
    option,
    reporting,
    tell_environment,
)
from nydus.cli.logs import Log, count, human
from nydus.cli.nydusify_places import SOURCE, SOURCE_ARCHIVE, plain_http, speaks_http
from nydus.cli.nydusify_targets import TARGET, TARGET_ARCHIVE
from nydus.errors import ConfigError

_TOLD = 5


@click.command(cls=GoCommand, short_help="Put what a container reads first into a blob of its own.")
@option("--source", env="SOURCE", help=SOURCE)
@option("--target", env="TARGET", help=TARGET)
@option("--source-archive", env="SOURCE_ARCHIVE", type=click.Path(), help=SOURCE_ARCHIVE)
@option("--target-archive", env="TARGET_ARCHIVE", type=click.Path(), help=TARGET_ARCHIVE)
@option("--source-insecure", env="SOURCE_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@option("--target-insecure", env="TARGET_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@plain_http
@option(
    "--prefetch-files",
    env="PREFETCH_FILES",
    required=True,
    type=click.Path(),
    help="The files: JSON list, trace of the optimizer, metrics/pattern of a daemon, or plain lines.",
)
@option("--policy", env="OPTIMIZE_POLICY", default="separated-blob-with-prefetch-files", hidden=True)
@option("--platform", help="os/architecture; default: this machine's.")
@option("--source-backend-type", env="BACKEND_TYPE", help="Where the source's blobs are: oss, s3 or localfs.")
@option("--source-backend-config", env="BACKEND_CONFIG", help="Its configuration as JSON.")
@option("--source-backend-config-file", env="BACKEND_CONFIG_FILE", help="A file with that.")
@option("--push-chunk-size", default="0MB", help="Upload in requests of this size, e.g. 5MB. [0MB: one each]")
@option("--work-dir", env="WORK_DIR", default="./tmp", help="For the new blob until it is pushed. [./tmp]")
@option("--nydus-image", env="NYDUS_IMAGE", default="nydus-image", hidden=True)
@decryption_key
@encrypt_recipients
@reporting
@click.pass_context
def optimize(ctx: click.Context, /, **values: Any) -> None:
    """Put what a container reads first into a blob of its own.

    A daemon fetches that blob in one go while the container starts. Files and everything else stay the same.
    The target may be any place: blobs that it lacks are linked or copied. Where the blobs of the image
    are in a storage backend, the new one goes there.
    """
    from nydus.cli.nydusify_places import backend_config, one_platform, place_of, work_dir
    from nydus.cli.nydusify_targets import target_place
    from nydus.cli.progress import progress_for
    from nydus.convert.backend import backend_place
    from nydus.convert.optimize import optimize as run
    from nydus.oci.encryption import private_keys, recipients

    log: Log = ctx.obj if isinstance(ctx.obj, Log) else Log()
    tell_environment(ctx, log)
    source = place_of(values, "source")
    sink = target_place(
        values["target"],
        values["target_archive"],
        source,
        folder=Path(values["work_dir"]),
        plain_http=speaks_http(values, "target"),
        insecure=values["target_insecure"],
        push_chunk_size=byte_size(values["push_chunk_size"]),
    )
    try:
        trace = Path(values["prefetch_files"]).read_bytes()
    except OSError as error:
        raise ConfigError(f"--prefetch-files {values['prefetch_files']}: {error.strerror}") from error
    found = backend_config(
        values["source_backend_type"],
        values["source_backend_config"],
        values["source_backend_config_file"],
        "--source-backend",
    )
    backend = backend_place(*found) if found else None
    with work_dir(Path(values["work_dir"])) as folder, progress_for(log) as progress, sink as target:
        where = str(target)
        made = run(
            source,
            target,
            trace,
            values["prefetch_files"],
            one_platform(values["platform"]),
            folder,
            progress,
            backend,
            keys=private_keys(values["decryption_key"]),
            readers=recipients(values["encrypt_recipients"]),
        )
    for path in made.missing[:_TOLD]:
        log.warning(f"{path} is not in the image")
    if len(made.missing) > _TOLD:
        log.warning(f"and {len(made.missing) - _TOLD} more are not")
    log.result(
        f"{count(made.files, 'file')}, {count(made.chunks, 'chunk')}, {human(made.size)} "
        f"in the new blob {made.blob[:12]}; copied {human(made.sent)} of the others",
        {
            "target": where,
            "digest": made.descriptor.digest,
            "blob": made.blob,
            "size": made.size,
            "files": made.files,
            "chunks": made.chunks,
            "missing": made.missing,
            "sent": made.sent,
        },
        target=where,
        digest=made.descriptor.digest,
    )
