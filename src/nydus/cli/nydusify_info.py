"""``nydusify info``: what kind of image is this?"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from nydus.cli.gostyle import GoCommand, option, reporting
from nydus.cli.gostyle import decryption_key as key_option
from nydus.cli.logs import Log, count, human
from nydus.cli.nydusify_places import SOURCE, SOURCE_ARCHIVE
from nydus.errors import ConfigError

if TYPE_CHECKING:
    from nydus.convert.info import Info

_KINDS = {
    "oci": "an ordinary OCI image",
    "nydus": "a Nydus image",
    "oci-ref": "a Nydus index over the layers of an OCI image",
    "model": "a model artifact",
    "nydus-model": "a model artifact with a Nydus bootstrap over its layers",
    "storage-backend": "a Nydus image whose blobs are in a storage backend",
}


@click.command(cls=GoCommand, short_help="Say what kind of image this is, how large, how much is shared.")
@click.argument("reference", required=False)
@option("--target", env="TARGET", help="The image (or as the argument). " + SOURCE)
@option("--target-archive", type=click.Path(), help=SOURCE_ARCHIVE)
@option("--target-insecure", env="TARGET_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@option(
    "--plain-http",
    "--target-plain-http",
    env=["PLAIN_HTTP", "TARGET_PLAIN_HTTP"],
    is_flag=True,
    help="Speak http to the registry.",
)
@option("--platform", help="os/architecture[/variant], separated by commas; default: all.")
@key_option
@reporting
@click.pass_context
def info(
    ctx: click.Context,
    /,
    reference: str | None,
    target: str | None,
    target_archive: str | None,
    target_insecure: bool,
    plain_http: bool,
    platform: str | None,
    decryption_key: tuple[str, ...],
) -> None:
    """Say what kind of image REFERENCE is, how large, how much is shared, what is prefetched.

    Of a Nydus image only the metadata is read.
    """
    from nydus.cli.nydusify_places import platforms, source_place
    from nydus.convert.info import describe
    from nydus.convert.select import select
    from nydus.oci.encryption import private_keys

    if not (reference or target or target_archive):
        raise ConfigError("the REFERENCE of an image is needed, or --target-archive")
    place = source_place(
        reference or target, target_archive, plain_http=plain_http, insecure=target_insecure, option="target"
    )
    log: Log = ctx.obj if isinstance(ctx.obj, Log) else Log()
    keys = private_keys(decryption_key)
    reader = place.open()
    _, images = select(reader, place.target, str(place), platforms(platform, not platform), nydus=True)
    found = [describe(image, reader, str(place), keys) for image in images]
    if log.as_json:
        document: Any = [dataclasses.asdict(each) for each in found]
        click.echo(json.dumps(document if len(document) > 1 else document[0], indent=2))
        return
    for each in found if log.enabled("info") else ():
        _show(each)


def _elsewhere(found: Info) -> str:
    if not found.elsewhere:
        return ""
    where = "the layers of the source" if found.kind == "oci-ref" else "a storage backend"
    return f", {human(found.elsewhere)} in {where}: {human(found.total_size)} in all"


def _show(found: Info) -> None:
    rows = [
        ("Image", found.reference),
        ("Digest", found.digest),
        ("Platform", found.platform),
        ("Kind", _KINDS[found.kind]),
        ("Size", f"{human(found.size)} in {count(len(found.layers), 'layer')}" + _elsewhere(found)),
    ]
    if found.encrypted and not found.fs_version:
        rows.append(("RAFS", "encrypted; --decryption-key shows what is in it"))
    if found.fs_version:
        share = f"{100 * found.start_size / found.total_size:.3g} % of the image"
        rows += [
            (
                "RAFS",
                f"version {found.fs_version}, {found.compressor}, chunks of {found.chunk_size >> 10} KiB",
            ),
            ("Files", f"{found.files} files in {found.entries} entries, {human(found.file_size)}"),
            ("Chunks", f"{found.chunks}; {human(found.shared_size)} of the files' bytes are shared"),
            ("To start", f"{human(found.start_size)} have to be read, {share}; the rest follows on demand"),
            ("Prefetched", ", ".join(found.prefetch) or "nothing"),
        ]
    for name, value in (
        ("Made from", found.source_reference),
        ("its digest", found.source_digest),
        ("Made by", found.builder),
    ):
        if value:
            rows.append((name, value))
    for name, value in rows:
        click.echo(f"{name + ':':<12} {value}")
    for layer in found.layers:
        click.echo(f"  {layer['digest'][7:19]}  {human(layer['size']):>10}  {layer['role']}")
