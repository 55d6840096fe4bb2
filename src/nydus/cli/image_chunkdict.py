"""``nydus-image chunkdict generate``: a dictionary of the chunks that images share."""

from __future__ import annotations

import hashlib
import logging

import click

from nydus.cli import image_options, image_source
from nydus.errors import ConfigError

log = logging.getLogger("nydus.image")


@click.group("chunkdict", context_settings=image_source.SETTINGS)
def command() -> None:
    """Make chunk dictionaries."""


@command.command("generate", context_settings=image_source.SETTINGS)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--database", metavar="URL", help="Also write all chunks to sqlite:///PATH.")
@click.option("-B", "--bootstrap", metavar="FILE", help="Where the dictionary goes.")
@click.option("-D", "--blob-dir", metavar="DIR", help="Put the dictionary here, named by its sha256.")
@click.option(
    "--prefetch-policy",
    type=image_options.PREFETCH_POLICIES,
    default="none",
    show_default=True,
    help="Unless none: read paths from standard input; a dictionary has no use for them.",
)
@click.option("-J", "--output-json", metavar="FILE", help="Write the result as JSON.")
@click.option("-C", "--config", metavar="FILE", help="Not used: no blob is read.")
@click.option("-v", "--verbose", is_flag=True, help="Say what each image has.")
def generate_command(
    sources: tuple[str, ...],
    database: str | None,
    bootstrap: str | None,
    blob_dir: str | None,
    prefetch_policy: str,
    output_json: str | None,
    config: str | None,
    verbose: bool,
) -> None:
    """Make a dictionary of the chunks that at least two bootstraps have.

    Give it to later builds with --chunk-dict. Image and tag are taken from the name of the directory that a
    bootstrap lies in (REPOSITORY:TAG).
    """
    from nydus.build.bootstrap import load
    from nydus.build.chunkdict import Source, generate, write_database
    from nydus.build.layer import write_bootstrap
    from nydus.build.output import Output

    if (bootstrap is None) == (blob_dir is None):
        raise click.UsageError("give one of --bootstrap and --blob-dir")
    if database is not None and not database.removeprefix("sqlite://").startswith("/"):
        raise ConfigError(f"--database {database!r} is not sqlite:///PATH")
    if prefetch_policy != "none":
        image_options.read_prefetch_list()
    trace = image_options.Trace()
    with trace.time("load_sources"):
        images = [Source.of_path(path, load(path)) for path in sources]
    for image in images if verbose else ():
        log.info("%s:%s has %d chunks", image.name, image.tag, len(image.tree.chunks))
    with trace.time("generate"):
        tree = generate(images)
    if not len(tree.chunks):
        log.warning("no two of the %d images share a chunk: the dictionary is empty", len(images))
    if database is not None:
        with trace.time("write_database"):
            write_database(database.removeprefix("sqlite://"), images)
    data = write_bootstrap(tree)
    with Output(bootstrap or blob_dir or "", directory=bootstrap is None) as out:
        out.write(data)
        path = out.commit(hashlib.sha256(data).hexdigest() if bootstrap is None else "")
    ids = [blob.id for blob in tree.blobs]
    log.info("%d chunks of %d blobs are shared", len(tree.chunks), len(ids))
    if output_json:
        image_options.write_result(output_json, image_options.result(tree, path, ids, trace))
