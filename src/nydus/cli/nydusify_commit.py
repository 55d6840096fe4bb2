"""``nydusify commit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nydus.cli.gostyle import (
    GoCommand,
    decryption_key,
    encrypt_recipients,
    option,
    reporting,
    tell_environment,
)
from nydus.cli.logs import Log, human
from nydus.cli.nydusify_places import plain_http, speaks_http
from nydus.cli.nydusify_targets import TARGET, TARGET_ARCHIVE
from nydus.errors import ConfigError, NydusError

if TYPE_CHECKING:
    from nydus.containerd.containers import Container
    from nydus.oci.reference import Reference


@click.command(cls=GoCommand, short_help="Make an image of a running container.")
@option("--container", env="CONTAINER", required=True, help="Id of the container, or the beginning of it.")
@option("--target", env="TARGET", help=TARGET)
@option("--target-archive", env="TARGET_ARCHIVE", type=click.Path(), help=TARGET_ARCHIVE)
@option(
    "--containerd-address",
    env=("CONTAINERD_ADDRESS", "CONTAINERD_ADDR"),
    default="/run/containerd/containerd.sock",
    type=click.Path(path_type=Path),
    help="containerd's socket. [/run/containerd/containerd.sock]",
)
@option("--namespace", "-n", env="NAMESPACE", default="default", help="Namespace of the container. [default]")
@option("--source-insecure", env="SOURCE_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@option("--target-insecure", env="TARGET_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@plain_http
@option("--maximum-times", env="MAXIMUM_TIMES", default=400, help="Most layers that commits may add. [400]")
@option(
    "--with-path",
    "--with-mount-path",
    env="WITH_PATH",
    multiple=True,
    help="Also take this folder or file (something mounted into the container); !PATH leaves PATH out.",
)
@option(
    "--work-dir", env="WORK_DIR", default="./tmp", help="For the new blobs until they are pushed. [./tmp]"
)
@option("--nydus-image", env="NYDUS_IMAGE", default="nydus-image", hidden=True)
@decryption_key
@encrypt_recipients
@reporting
@click.pass_context
def commit(ctx: click.Context, /, **values: Any) -> None:
    """Make an image of a running container: its image, with what it changed on top.

    The container is held still while its changes are read, not while they are pushed. It must be one of this
    machine and run a Nydus image.
    """
    from nydus.cli.nydusify_places import source_registry, work_dir
    from nydus.cli.nydusify_targets import target_place
    from nydus.cli.progress import progress_for
    from nydus.containerd.containers import Containers
    from nydus.convert.changes import parse_selection
    from nydus.convert.commit import commit as run
    from nydus.oci.encryption import private_keys, recipients

    log: Log = ctx.obj if isinstance(ctx.obj, Log) else Log()
    tell_environment(ctx, log)
    if values["maximum_times"] < 1:
        raise ConfigError("--maximum-times must be at least 1")
    selection = parse_selection(values["with_path"])
    keys, readers = private_keys(values["decryption_key"]), recipients(values["encrypt_recipients"])
    with Containers(values["containerd_address"], values["namespace"]) as containers:
        container = containers.find(values["container"])
        base = source_registry(
            _image_of(container), plain_http=speaks_http(values, "source"), insecure=values["source_insecure"]
        )
        sink = target_place(
            values["target"],
            values["target_archive"],
            base,
            folder=Path(values["work_dir"]),
            plain_http=speaks_http(values, "target"),
            insecure=values["target_insecure"],
            containerd=values["containerd_address"],
        )
        with work_dir(Path(values["work_dir"])) as folder, progress_for(log) as progress, sink as target:
            where = str(target)
            made = run(
                containers,
                container,
                base,
                target,
                selection,
                folder,
                maximum=values["maximum_times"],
                progress=progress,
                keys=keys,
                readers=readers,
            )
    for what, digest, size, known in made.layers:
        log.info(f"layer with {what}: {human(size)}, {known} chunks are in the image already", layer=digest)
    log.result(
        f"committed container {container.id[:12]}, which was held still for {made.paused:.2f} s",
        {
            "container": container.id,
            "target": where,
            "digest": made.descriptor.digest,
            "layers": [
                {"holds": what, "digest": digest, "size": size, "known_chunks": known}
                for what, digest, size, known in made.layers
            ],
            "commits": made.commits,
            "paused_seconds": made.paused,
        },
        target=where,
        digest=made.descriptor.digest,
    )


def _image_of(container: Container) -> Reference:
    """Exactly the image that the container runs, whatever its tag names now in the registry."""
    from nydus.oci.reference import parse

    try:
        reference = parse(container.image)
    except ConfigError as error:
        raise NydusError(f"the image of container {container.id[:12]} has no reference: {error}") from error
    return reference.with_digest(container.digest) if container.digest else reference
