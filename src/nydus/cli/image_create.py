"""``nydus-image create``: a directory or an archive becomes a layer."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nydus.cli import image_options
from nydus.errors import ConfigError, NydusError

if TYPE_CHECKING:
    from nydus.build.external import Attributes
    from nydus.build.layer import BuildOptions, LayerResult
    from nydus.build.output import Output

log = logging.getLogger("nydus.image")

_TYPES = {
    "directory": "dir-rafs",
    "dir-rafs": "dir-rafs",
    "tar-rafs": "tar-rafs",
    "targz-rafs": "targz-rafs",
    "estargz-rafs": "estargz-rafs",
    "targz-ref": "targz-ref",
    "estargz-ref": "estargz-ref",
    "estargztoc-ref": "estargztoc-ref",
    "stargz_index": "estargztoc-ref",
    "tar-tarfs": "tar-tarfs",
}
_REFERENCES = ("targz-ref", "estargz-ref", "estargztoc-ref")


class _Type(click.ParamType[str]):
    """A source type. A plain choice would list all of them in every usage line."""

    name = "type"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return _TYPES[value]
        except KeyError:
            self.fail(f"{value!r} is not one of {', '.join(_TYPES)}", param, ctx)


@click.command("create", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("source", metavar="SOURCE")
@click.option(
    "-t", "--type", "--source-type", "kind", type=_Type(), default="dir-rafs", show_default=True,
    metavar="TYPE", help="What SOURCE is; see above.",
)  # fmt: skip
@click.option("-B", "--bootstrap", metavar="FILE", help="Where the bootstrap goes.")
@click.option("-D", "--blob-dir", metavar="DIR", help="Put blob (and bootstrap) here, named by their sha256.")
@click.option("-b", "--blob", metavar="FILE", help="Where the blob goes: a file or a FIFO.")
@click.option(
    "--external-blob",
    metavar="FILE",
    help="Where the bootstrap of external files goes with --blob-inline-meta.",
)
@click.option(
    "--blob-inline-meta",
    "--inline-bootstrap",
    "inline_meta",
    is_flag=True,
    help="Put the bootstrap into the blob.",
)
@click.option("--blob-id", metavar="ID", help="Id of the blob, instead of its sha256.")
@click.option(
    "--blob-data-size",
    type=image_options.Number(16),
    metavar="HEX",
    help="Size of the blob of estargztoc-ref.",
)
@click.option("--blob-offset", type=int, default=0, hidden=True)
@click.option(
    "--chunk-size", type=image_options.Number(), metavar="SIZE",
    help="Chunk size: a power of two from 0x1000 to 0x1000000 [default: 0x100000].",
)  # fmt: skip
@click.option(
    "--batch-size", type=image_options.Number(), default=0, metavar="SIZE",
    help="Store small files together up to this size; 0 for never.",
)  # fmt: skip
@click.option("--compressor", type=click.Choice(["none", "lz4_block", "zstd"]), help="[default: zstd]")
@click.option("--digester", type=click.Choice(["blake3", "sha256"]), help="[default: blake3]")
@click.option("-C", "--config", metavar="FILE", help="Not used: no existing blob is read.")
@click.option("-v", "--fs-version", type=click.Choice(["5", "6"]), default="6", show_default=True)
@click.option("--features", type=click.Choice(["blob-toc"]), help="End the blob with a table of contents.")
@click.option("--chunk-dict", metavar="[bootstrap=]FILE", help="Refer to the chunks of this image.")
@click.option("--parent-bootstrap", metavar="FILE", help="Build on top of this image.")
@click.option("--aligned-chunk", is_flag=True, help="Align chunks to 4 KiB (always so in version 6).")
@click.option("--repeatable", is_flag=True, help="Do not record owners.")
@click.option("--disable-check", is_flag=True, hidden=True)
@click.option(
    "--whiteout-spec", type=click.Choice(["oci", "overlayfs", "none"]), default="oci", show_default=True,
    help="How SOURCE says that files of the parent are gone.",
)  # fmt: skip
@click.option(
    "--prefetch-policy", type=image_options.PREFETCH_POLICIES, default="none", show_default=True,
    help="Unless none: read paths to prefetch from standard input.",
)  # fmt: skip
@click.option("-J", "--output-json", metavar="FILE", help="Write the result as JSON.")
@click.option("-E", "--encrypt", is_flag=True, help="Encrypt the blob with AES-128-XTS.")
@click.option("--blob-cache-dir", metavar="DIR", help="Write a ready-made cache instead of a blob.")
@click.option("--attributes", metavar="FILE", help="Says which files lie in other blobs, and where.")
@click.pass_context
def command(ctx: click.Context, /, **given: Any) -> None:
    """Build a layer: chunks of SOURCE go into a blob, its names into a bootstrap.

    \b
    TYPE is one of
      dir-rafs        a directory (also: directory)
      tar-rafs        a tar archive, plain or compressed with gzip or zstd
      targz-rafs      the same
      estargz-rafs    an eStargz layer
      targz-ref       a tar.gz archive that stays as it is: only tables are made
      estargz-ref     the same for an eStargz layer
      estargztoc-ref  the table of contents of an eStargz layer (also: stargz_index)
      tar-tarfs       a tar archive that stays as it is and serves as the blob
    """
    from nydus.build.layer import BuildOptions
    from nydus.build.merge import Whiteout
    from nydus.rafs.model import Compression, Digester

    kind: str = given["kind"]
    _check_usage(ctx, given)
    compressor = given["compressor"] or "zstd"
    digester = given["digester"] or "blake3"
    if kind in _REFERENCES:
        compressor, digester = "gzip", "sha256"
    elif kind == "tar-tarfs":
        compressor, digester = "none", "sha256"
    if given["blob_cache_dir"]:
        compressor = "none"
    for name, used in (("compressor", compressor), ("digester", digester)):
        if given[name] not in (None, used):
            log.info("%s is %s for this type, not %s", name, used, given[name])
    prefetch = image_options.read_prefetch_list() if given["prefetch_policy"] != "none" else []
    trace = image_options.Trace()
    default_size = 0x40_0000 if kind == "estargztoc-ref" else 0x10_0000
    with trace.time("load_images"):
        options = BuildOptions(
            version=int(given["fs_version"]),
            compression=Compression[compressor.upper()],
            digester=Digester[digester.upper()],
            chunk_size=default_size if given["chunk_size"] is None else given["chunk_size"],
            batch_size=given["batch_size"],
            inline_meta=given["inline_meta"],
            toc=given["features"] == "blob-toc",
            aligned=given["aligned_chunk"],
            encrypt=given["encrypt"],
            owners=not given["repeatable"],
            whiteout=Whiteout(given["whiteout_spec"]),
            prefetch_table=given["prefetch_policy"] == "fs",
            prefetch_blob=given["prefetch_policy"] == "blob",
            blob_id=given["blob_id"] or "",
            dictionary=_load(given["chunk_dict"], True),
            parent=_load(given["parent_bootstrap"], False),
        )
    _tell_unused(given)
    _create(given, options, prefetch, trace)


def _check_usage(ctx: click.Context, given: dict[str, Any]) -> None:
    """Combinations that make no sense: exit code 2, as for unknown options."""
    kind = given["kind"]

    def require(good: bool, text: str) -> None:
        if not good:
            raise click.UsageError(text, ctx)

    typed = ctx.get_parameter_source("kind") is click.core.ParameterSource.COMMANDLINE
    require(
        bool(given["bootstrap"] or given["blob_dir"] or given["inline_meta"] or given["blob_cache_dir"]),
        "give --bootstrap, --blob-dir or --blob-inline-meta",
    )
    require(not (given["inline_meta"] and given["bootstrap"]), "--blob-inline-meta and --bootstrap conflict")
    require(not (given["inline_meta"] and given["blob_id"]), "--blob-inline-meta and --blob-id conflict")
    require(
        bool(given["blob"] or given["blob_dir"] or typed or given["blob_cache_dir"]),
        "give --blob, --blob-dir or --type",
    )
    for other in ("blob", "blob_dir", "inline_meta", "compressor"):
        name = "blob-inline-meta" if other == "inline_meta" else other.replace("_", "-")
        require(not (given["blob_cache_dir"] and given[other]), f"--blob-cache-dir and --{name} conflict")
    if kind in (*_REFERENCES, "tar-tarfs"):
        require(given["fs_version"] == "6", f"{kind} needs --fs-version 6")
        require(not given["encrypt"], f"{kind} cannot be encrypted")
        require(given["prefetch_policy"] != "blob", f"{kind} has no --prefetch-policy blob")
        require(not given["batch_size"], f"{kind} has no --batch-size")
    if kind in ("targz-ref", "estargz-ref"):
        require(not given["blob_id"], f"{kind} names its blob itself")
    if kind == "estargztoc-ref":
        require(bool(given["blob_id"]), f"{kind} needs --blob-id")
    if given["blob_cache_dir"]:
        require(
            not kind.startswith("estargz") and kind not in ("targz-ref", "tar-tarfs"),
            f"{kind} has no --blob-cache-dir",
        )
    require(not given["attributes"] or kind == "dir-rafs", "--attributes needs type dir-rafs")
    require(len(given["blob_id"] or "") <= 255, "--blob-id is longer than 255 characters")


def _tell_unused(given: dict[str, Any]) -> None:
    """Options of callers of the reference that change nothing here."""
    if given["external_blob"] and not (given["inline_meta"] and given["kind"] == "dir-rafs"):
        log.warning("--external-blob has no effect without --blob-inline-meta and type dir-rafs")
    if given["config"]:
        log.warning("--config has no effect: no existing blob is read")
    if given["blob_offset"]:
        log.warning("--blob-offset has no effect")
    if given["blob_data_size"] is not None and given["kind"] != "estargztoc-ref":
        log.warning("--blob-data-size has no effect for type %s", given["kind"])


def _load(argument: str | None, dictionary: bool) -> Any:
    if not argument:
        return None
    from nydus.build.bootstrap import dictionary_path, load

    return load(dictionary_path(argument) if dictionary else argument)


def _create(
    given: dict[str, Any], options: BuildOptions, prefetch: list[bytes], trace: image_options.Trace
) -> None:
    from nydus.build.output import Output, write_file
    from nydus.build.stream import keep_memory

    keep_memory()
    with ExitStack() as stack:
        blob: Output | None = None
        if given["blob"]:
            blob = stack.enter_context(Output(given["blob"], mode=0o600))
        elif given["blob_dir"]:
            blob = stack.enter_context(Output(given["blob_dir"], directory=True, mode=0o600))
        # Opened in any case: somebody may wait at the other end of a FIFO.
        apart = stack.enter_context(Output(given["external_blob"])) if given["external_blob"] else None
        cache: Output | None = None
        if given["blob_cache_dir"]:
            cache = stack.enter_context(Output(given["blob_cache_dir"], directory=True, mode=0o600))
            options = replace(options, image=cache.write)
        with trace.time("total_build"):
            attributes = _attributes(given)
            names = attributes.names if attributes else ()
            result = _build(given, options, prefetch, blob.write if blob else lambda data: None, names)
            external = _build_external(given, attributes, options, apart)
        path = external_path = ""
        if not given["inline_meta"]:
            target = given["bootstrap"] or given["blob_dir"] or given["blob_cache_dir"]
            out = stack.enter_context(Output(target, directory=not given["bootstrap"]))
            out.write(result.bootstrap)
            if external is not None:
                beside = _external_path(target) if given["bootstrap"] else target
                apart = stack.enter_context(Output(beside, directory=not given["bootstrap"]))
                apart.write(external.bootstrap)
        # Both are complete: give them their names, the bootstrap last, so that it never names a missing blob.
        if blob is not None and (given["blob"] or result.blob_size):
            blob.commit(result.blob_id)
        if cache is not None and result.blob_size:
            cache.commit(f"{result.blob_id}.blob.data")
            meta = os.path.join(given["blob_cache_dir"], f"{result.blob_id}.blob.meta")
            write_file(meta, result.blob_meta)
        if not given["inline_meta"]:
            name = "" if given["bootstrap"] else hashlib.sha256(result.bootstrap).hexdigest()
            path = out.commit(name)
        if apart is not None and external is not None:
            by_digest = not given["bootstrap"] and not given["inline_meta"]
            name = f"{hashlib.sha256(external.bootstrap).hexdigest()}.external" if by_digest else ""
            external_path = apart.commit(name)
    blobs = [blob.id for blob in result.tree.blobs]
    if given["inline_meta"] and result.blob is not None:
        blobs = [result.blob_id if blob is result.blob else blob.id for blob in result.tree.blobs]
    log.info(
        "successfully built RAFS filesystem:\nmeta file path: %s\ndata blob size: %#x\ndata blobs: %s",
        path,
        result.blob_size,
        blobs,
    )
    if given["output_json"]:
        trace.registered_events.update(
            euid=str(os.geteuid()),
            egid=str(os.getegid()),
            blob_uncompressed_size=result.blob.uncompressed_size if result.blob else 0,
            dedup_chunks=result.duplicates,
        )
        document = image_options.result(result.tree, path, blobs, trace)
        if external is not None:
            document["external_bootstrap"] = "" if given["inline_meta"] else external_path
            document["external_blobs"] = [blob.id for blob in external.tree.blobs]
        image_options.write_result(given["output_json"], document)


def _attributes(given: dict[str, Any]) -> Attributes | None:
    if not given["attributes"]:
        return None
    from nydus.build.external import load

    return load(given["attributes"])


def _build_external(
    given: dict[str, Any], attributes: Attributes | None, options: BuildOptions, blob: Output | None
) -> LayerResult | None:
    """The image of the external files; None if nobody asks for one."""
    wanted = blob is not None and given["inline_meta"]
    if given["kind"] != "dir-rafs" or not (wanted or (attributes and attributes.names)):
        return None
    from nydus.build.external import Attributes, build_external

    sink = blob.write if blob is not None and wanted else lambda data: None
    return build_external(given["source"], attributes or Attributes(b""), sink, options)


def _external_path(bootstrap: str) -> str:
    """Where the bootstrap of external files goes (rafs.md 3.7)."""
    path = Path(bootstrap)
    if path.suffix == ".external":
        raise ConfigError(f"{bootstrap}: the bootstrap of external files would have this name, too")
    return str(path.with_suffix(".external"))


def _build(
    given: dict[str, Any],
    options: BuildOptions,
    prefetch: list[bytes],
    sink: Any,
    external: Collection[bytes] = (),
) -> LayerResult:
    source, kind = given["source"], given["kind"]
    try:
        mode = os.stat(source).st_mode
    except OSError as error:
        raise NydusError(f"{source}: cannot read the source: {error.strerror}") from None
    if kind == "dir-rafs":
        from nydus.build.directory import build_directory

        if not stat.S_ISDIR(mode):
            raise ConfigError(f"{source} is not a directory, as type dir-rafs wants; give --type")
        return build_directory(source, sink, options, prefetch, external)
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise ConfigError(f"{source} is not a file, FIFO or character device, as type {kind} wants")
    from nydus.build.stream import open_source

    with open_source(source) as stream:
        if kind in ("targz-ref", "estargz-ref"):
            from nydus.build.zran import build_reference

            return build_reference(stream, sink, options, prefetch, source)
        if kind == "estargztoc-ref":
            from nydus.build.stargz import build_stargz

            size = given["blob_data_size"] or 0
            return build_stargz(stream, sink, options, size, prefetch, source)
        if kind == "tar-tarfs":
            from nydus.build.tarfs import build_tarfs

            return build_tarfs(stream, options, prefetch, source)
        from nydus.build.layer import build_layer

        return build_layer(stream, sink, options, prefetch, source)
