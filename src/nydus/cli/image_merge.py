"""``nydus-image merge``: the bootstraps of layers become that of an image."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

import click

from nydus.cli import image_options

if TYPE_CHECKING:
    from nydus.build.bootstrap import LayerBlob

log = logging.getLogger("nydus.image")


@click.command("merge", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--parent-bootstrap", metavar="FILE", help="Merged bootstrap below all sources.")
@click.option("-B", "--bootstrap", metavar="FILE", help="Where the bootstrap goes.")
@click.option("-D", "--blob-dir", metavar="DIR", help="Put the bootstrap here, named by its sha256.")
@click.option("--chunk-dict", metavar="[bootstrap=]FILE", help="Chunk dictionary the layers were built with.")
@click.option(
    "--prefetch-policy",
    type=image_options.PREFETCH_POLICIES,
    default="none",
    show_default=True,
    help="Unless none: read paths to prefetch from standard input.",
)
@click.option("-J", "--output-json", metavar="FILE", help="Write the result as JSON.")
@click.option("--blob-digests", metavar="LIST", help="RAFS blob digest of each source, separated by commas.")
@click.option("--original-blob-ids", metavar="LIST", help="Blob id of each source.")
@click.option("--blob-sizes", metavar="LIST", help="RAFS blob size of each source.")
@click.option("--blob-toc-digests", metavar="LIST", help="Table of contents digest of each source.")
@click.option("--blob-toc-sizes", metavar="LIST", help="Table of contents size of each source.")
@click.option(
    "-C", "--config", metavar="FILE", help="Take blob ids from the bootstraps, not from file names."
)
def command(
    sources: tuple[str, ...],
    parent_bootstrap: str | None,
    bootstrap: str | None,
    blob_dir: str | None,
    chunk_dict: str | None,
    prefetch_policy: str,
    output_json: str | None,
    blob_digests: str | None,
    original_blob_ids: str | None,
    blob_sizes: str | None,
    blob_toc_digests: str | None,
    blob_toc_sizes: str | None,
    config: str | None,
) -> None:
    """Merge layer bootstraps, lowest first, into one.

    The blob of a layer is known by the name of its bootstrap file up to the first dot, unless the lists say
    otherwise.
    """
    from nydus.build.bootstrap import LayerBlob, describe_blob, dictionary_path, load, stem
    from nydus.build.layer import prefetch_rows, write_bootstrap
    from nydus.build.merge import merge
    from nydus.build.output import Output

    if (bootstrap is None) == (blob_dir is None):
        raise click.UsageError("give one of --bootstrap and --blob-dir")
    prefetch = image_options.read_prefetch_list() if prefetch_policy != "none" else None
    count = len(sources)
    known = _known_blobs(
        count,
        LayerBlob,
        digest=_strings("--blob-digests", blob_digests, count),
        original_id=_strings("--original-blob-ids", original_blob_ids, count),
        size=_numbers("--blob-sizes", blob_sizes, count),
        toc_digest=_strings("--blob-toc-digests", blob_toc_digests, count),
        toc_size=_numbers("--blob-toc-sizes", blob_toc_sizes, count),
    )
    trace = image_options.Trace()
    with trace.time("load_sources"):
        dictionary = load(dictionary_path(chunk_dict)) if chunk_dict else None
        shared = frozenset(blob.id for blob in dictionary.blobs) if dictionary else frozenset()
        parent = load(parent_bootstrap) if parent_bootstrap else None
        layers = [
            describe_blob(load(source), blob, "" if config else stem(source), shared)
            for source, blob in zip(sources, known, strict=True)
        ]
    with trace.time("merge"):
        tree = merge(layers, dictionary, parent)
        if prefetch is not None:
            tree.prefetch = prefetch_rows(tree, prefetch) if prefetch_policy == "fs" else []
    with trace.time("dump_bootstrap"):
        data = write_bootstrap(tree)
        with Output(bootstrap or blob_dir or "", directory=bootstrap is None) as out:
            out.write(data)
            path = out.commit(hashlib.sha256(data).hexdigest() if bootstrap is None else "")
    blobs = [blob.id for blob in tree.blobs]
    log.info("merged %d bootstraps: %d names, blobs %s", count, len(tree), blobs)
    if output_json:
        image_options.write_result(output_json, image_options.result(tree, path, blobs, trace))


def _strings(option: str, text: str | None, count: int) -> list[str] | None:
    if text is None:
        return None
    values = [value.strip() for value in text.split(",")]
    if len(values) != count:
        raise click.ClickException(f"{option} has {len(values)} items for {count} sources")
    return values


def _numbers(option: str, text: str | None, count: int) -> list[int | None] | None:
    values = _strings(option, text, count)
    if values is None:
        return None
    try:
        return [int(value) if value else None for value in values]
    except ValueError:
        raise click.ClickException(f"{option} must list decimal numbers, not {text!r}") from None


def _known_blobs(
    count: int,
    kind: type[LayerBlob],
    **columns: list[str] | list[int | None] | None,
) -> list[LayerBlob]:
    given = {name: values for name, values in columns.items() if values is not None}
    return [kind(**{name: values[i] for name, values in given.items()}) for i in range(count)]  # type: ignore[arg-type]
