"""``nydus-image unpack``: an image becomes a tar archive."""

from __future__ import annotations

import logging

import click

from nydus.cli import image_source

log = logging.getLogger("nydus.image")


@click.command("unpack", context_settings=image_source.SETTINGS)
@click.argument("bootstrap", metavar="BOOTSTRAP", required=False)
@click.option("-B", "--bootstrap", "bootstrap_option", metavar="FILE", help="The bootstrap.")
@click.option("-b", "--blob", metavar="FILE", help="The blob of an image with only one.")
@click.option("-D", "--blob-dir", metavar="DIR", help="Directory of the blobs.")
@image_source.backend_options
@click.option("--output", metavar="FILE", required=True, help="The archive: a file or a FIFO.")
def command(bootstrap: str | None, bootstrap_option: str | None, output: str, **blobs: str | None) -> None:
    """Write all files of an image into a tar archive.

    Extended attributes, long names and fractions of seconds are PAX headers; whiteouts stay as stored.
    """
    from nydus.build.archive import write_tar
    from nydus.build.output import Output

    path = image_source.one_bootstrap(bootstrap, bootstrap_option)
    with image_source.open_image(path, image_source.open_blobs(**blobs)) as image, Output(output) as out:
        count = write_tar(image, out.write)
        out.commit()
    log.info("unpacked %d names of %s into %s", count, path, output)
