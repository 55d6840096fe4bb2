"""``nydus-image compact``: blobs without the chunks that nobody uses any more."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from nydus.cli import image_options, image_source

log = logging.getLogger("nydus.image")


@click.command("compact", context_settings=image_source.SETTINGS)
@click.option("-B", "--bootstrap", metavar="FILE", required=True, help="The bootstrap.")
@image_source.backend_options
@click.option(
    "--min-used-ratio",
    type=click.IntRange(0, 99),
    default=0,
    show_default=True,
    help="Rewrite blobs of which files use less than this percentage; 0 for none.",
)
@click.option(
    "--compact-blob-size",
    type=image_options.Number(),
    default=10 << 20,
    show_default=True,
    help="Join blobs smaller than this many bytes ...",
)
@click.option(
    "--max-compact-size",
    type=image_options.Number(),
    default=100 << 20,
    show_default=True,
    help="... to blobs of up to this many bytes.",
)
@click.option(
    "--layers-to-compact",
    type=image_options.Number(),
    default=0,
    show_default=True,
    help="Do nothing for fewer blobs.",
)
@click.option("-D", "--blob-dir", metavar="DIR", required=True, help="Directory of old and new blobs.")
@click.option("--chunk-dict", metavar="[bootstrap=]FILE", help="Chunk dictionary whose blobs stay.")
@click.option(
    "-O", "--output-bootstrap", metavar="FILE", help="The new bootstrap [default: STEM.bootstrap.compact]."
)
@click.option("-J", "--output-json", metavar="FILE", help="Write the result as JSON.")
def command(
    bootstrap: str,
    min_used_ratio: int,
    compact_blob_size: int,
    max_compact_size: int,
    layers_to_compact: int,
    blob_dir: str,
    chunk_dict: str | None,
    output_bootstrap: str | None,
    output_json: str | None,
    **backend: str | None,
) -> None:
    """Rewrite the blobs of an image so that little of them is unused, and few are small.

    Old blobs stay in the directory. Where there is nothing to gain, nothing is written.
    """
    from nydus.build.bootstrap import dictionary_path, load
    from nydus.build.compact import CompactOptions, compact
    from nydus.build.layer import write_bootstrap
    from nydus.build.output import write_file

    shared = frozenset(blob.id for blob in load(dictionary_path(chunk_dict)).blobs) if chunk_dict else None
    options = CompactOptions(
        min_used_ratio, compact_blob_size, max_compact_size, layers_to_compact, shared or frozenset()
    )
    trace = image_options.Trace()
    blobs = image_source.open_blobs(blob_dir=blob_dir, **backend)
    with image_source.open_image(bootstrap, blobs) as image:
        with trace.time("compact"):
            tree = compact(image, blob_dir, options)
        if tree is None:
            log.info("nothing to compact in %d blobs", len(image.blobs))
            return
        before = sum(blob.compressed_size for blob in image.blobs)
    path = output_bootstrap or str(Path(bootstrap).with_suffix(".bootstrap.compact"))
    with trace.time("dump_bootstrap"):
        write_file(path, write_bootstrap(tree))
    after = sum(blob.compressed_size for blob in tree.blobs)
    ids = [blob.id for blob in tree.blobs]
    log.info("compacted %d blobs of %d bytes to %d of %d", len(image.blobs), before, len(ids), after)
    if output_json:
        image_options.write_result(output_json, image_options.result(tree, path, ids, trace))
