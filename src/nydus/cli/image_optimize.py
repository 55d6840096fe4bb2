"""``nydus-image optimize``: chunks that are read first move into a blob of their own."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from nydus.cli import image_options, image_source
from nydus.errors import ConfigError

log = logging.getLogger("nydus.image")


@click.command("optimize", context_settings=image_source.SETTINGS)
@click.option("-B", "--bootstrap", metavar="FILE", required=True, help="The bootstrap.")
@click.option("-p", "--prefetch-files", metavar="FILE", required=True, help="JSON list of files and ranges.")
@click.option("-C", "--config", metavar="FILE", help="Configuration that says where the blobs are.")
@image_source.backend_options
@click.option("-D", "--blob-dir", metavar="DIR", help="Directory of the blobs.")
@click.option("-b", "--blob", metavar="FILE", help="Not used.")
@click.option(
    "-O",
    "--output-bootstrap",
    metavar="FILE",
    default="optimized_bootstrap",
    show_default=True,
    help="The new bootstrap.",
)
@click.option(
    "--output-blob-dir", metavar="DIR", required=True, help="Directory of the new blob, named by its sha256."
)
@click.option("-J", "--output-json", metavar="FILE", help="Write the result as JSON.")
def command(
    bootstrap: str,
    prefetch_files: str,
    config: str | None,
    blob_dir: str | None,
    blob: str | None,
    output_bootstrap: str,
    output_blob_dir: str,
    output_json: str | None,
    **backend: str | None,
) -> None:
    """Put the chunks of some files into one more blob, which a daemon can fetch first and in one go."""
    from nydus.build.layer import write_bootstrap
    from nydus.build.optimize import optimize, parse_prefetch_files
    from nydus.build.output import write_file

    try:
        text = Path(prefetch_files).read_bytes()
    except OSError as error:
        raise ConfigError(f"{prefetch_files}: cannot be read: {error.strerror}") from None
    files = parse_prefetch_files(text, prefetch_files)
    trace = image_options.Trace()
    blobs = image_source.open_blobs(blob_dir=blob_dir, config=config, **backend)
    with image_source.open_image(bootstrap, blobs) as image, trace.time("dump_blob"):
        result = optimize(image, files, output_blob_dir)
    with trace.time("dump_bootstrap"):
        write_file(output_bootstrap, write_bootstrap(result.tree))
    if result.blob is None:
        log.warning("none of the files to prefetch has data: the image stays as it is")
    else:
        log.info("%d chunks in the new blob %s", result.blob.chunk_count, result.blob.id)
    if output_json:
        ids = [known.id for known in result.tree.blobs]
        document = image_options.result(result.tree, output_bootstrap, ids, trace)
        image_options.write_result(output_json, document)
