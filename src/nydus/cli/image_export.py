"""``nydus-image export``: an image as one file that the kernel can mount."""

from __future__ import annotations

import os

import click

from nydus.cli import image_source


@click.command("export", context_settings=image_source.SETTINGS)
@click.argument("bootstrap", metavar="BOOTSTRAP", required=False)
@click.option("--block", is_flag=True, required=True, help="Export as an image of a block device.")
@click.option("-B", "--bootstrap", "bootstrap_option", metavar="FILE", help="The bootstrap.")
@click.option("-C", "--config", metavar="FILE", help="Configuration that says where bootstrap and blobs are.")
@click.option("-D", "--localfs-dir", metavar="DIR", help="Directory of the blobs.")
@click.option(
    "--threads", type=click.IntRange(1, 32), default=4, show_default=True, help="Threads that decode chunks."
)
@click.option("-O", "--output", metavar="FILE", help="The exported file [default: DIR/BOOTSTRAP.disk].")
@click.option("--verity", is_flag=True, help="Append a dm-verity hash tree, and print its options.")
def command(
    bootstrap: str | None,
    block: bool,
    bootstrap_option: str | None,
    config: str | None,
    localfs_dir: str | None,
    threads: int,
    output: str | None,
    verity: bool,
) -> None:
    """Export a RAFS image as an EROFS file system with its data, for a loop or other block device."""
    from nydus.build.bootstrap import read_bytes
    from nydus.build.disk import write_disk
    from nydus.build.output import Output

    if config is not None and bootstrap is None and bootstrap_option is None:
        bootstrap = image_source.configured_bootstrap(config)
    path = image_source.one_bootstrap(bootstrap, bootstrap_option)
    if output is None:
        if localfs_dir is None:
            raise click.UsageError("give --output or --localfs-dir")
        output = os.path.join(localfs_dir, os.path.basename(path) + ".disk")
    blobs = image_source.open_blobs(blob_dir=localfs_dir, config=config)
    with image_source.open_image(path, blobs, threads=threads) as image, Output(output) as out:
        data = b"" if image.tree.version == 5 else read_bytes(path)
        disk = write_disk(image, out.write, bootstrap=data, verity=verity)
        out.commit()
    if verity:
        click.echo(disk.verity_options())
