"""``nydusify convert``."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nydus.cli.gostyle import (
    GoCommand,
    byte_size,
    decryption_key,
    encrypt_recipients,
    given,
    number,
    option,
    reporting,
    tell_environment,
    tell_unused,
)
from nydus.cli.logs import Log
from nydus.cli.nydusify_places import SOURCE, SOURCE_ARCHIVE, plain_http, speaks_http
from nydus.cli.nydusify_targets import TARGET, TARGET_ARCHIVE
from nydus.durations import duration
from nydus.errors import ConfigError, NydusError

if TYPE_CHECKING:
    from nydus.oci.place import SinkPlace, SourcePlace
    from nydus.oci.reference import Reference

#: What says how a Nydus image is made.
_OF_NYDUS = (
    "merge_platform", "oci_ref", "with_referrer", "oci", "fs_version", "fs_chunk_size", "batch_size",
    "compressor", "fs_align_chunk", "backend_aligned_chunk", "prefetch_dir", "prefetch_patterns",
    "chunk_dict", "chunk_dict_insecure", "chunk_dict_plain_http", "build_cache", "build_cache_tag",
    "build_cache_version", "build_cache_insecure", "build_cache_plain_http", "build_cache_max_records",
    "backend_force_push", "encrypt_recipients",
)  # fmt: skip
_MODELS = ("model-artifact", "modelfile")
#: What makes no difference to a model artifact, whose layers stay.
_NOT_OF_MODELS = (
    *(name for name in _OF_NYDUS if name not in ("fs_chunk_size", "prefetch_dir", "prefetch_patterns")),
    "backend_type", "platform", "all_platforms", "reverse", "no_reuse",
)  # fmt: skip
_OF_CACHE = (
    "build_cache_version",
    "build_cache_insecure",
    "build_cache_plain_http",
    "build_cache_max_records",
)
_OF_SOURCE = ("source_insecure", "source_plain_http")
_OF_TARGET = ("target_insecure", "target_plain_http", "push_chunk_size")


@click.command(cls=GoCommand, short_help="Convert an image to a Nydus image.")
@option("--source", env="SOURCE", help=SOURCE)
@option("--target", env="TARGET", help=TARGET)
@option("--target-suffix", env="TARGET_SUFFIX", help="Push to the source reference with this appended.")
@option("--source-archive", env="SOURCE_ARCHIVE", type=click.Path(), help=SOURCE_ARCHIVE)
@option("--target-archive", env="TARGET_ARCHIVE", type=click.Path(), help=TARGET_ARCHIVE)
@option("--source-insecure", env="SOURCE_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@option("--target-insecure", env="TARGET_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@plain_http
@option("--platform", help="os/architecture[/variant], separated by commas; default: this machine's.")
@option("--all-platforms", is_flag=True, help="Convert the images of all platforms.")
@option(
    "--merge-platform", "--multi-platform", env="MERGE_PLATFORM", is_flag=True, help="Keep the source too."
)
@option("--oci-ref", env="OCI_REF", is_flag=True, help="Keep the layers, add only an index to them.")
@option(
    "--with-referrer", env="WITH_REFERRER", is_flag=True, help="Make the source the subject of the target."
)
@option("--oci", env="OCI", is_flag=True, help="Write OCI media types whatever the source has.")
@option("--docker-v2-format", is_flag=True, hidden=True)
@option("--reverse", env="REVERSE", is_flag=True, help="Convert a Nydus image to an OCI image.")
@option("--fs-version", env="FS_VERSION", default="6", help="RAFS version, 5 or 6. [6]")
@option(
    "--fs-chunk-size",
    "--chunk-size",
    env="FS_CHUNK_SIZE",
    default="0x100000",
    help="A power of two. [0x100000]",
)
@option(
    "--batch-size", env="BATCH_SIZE", default="0", help="Compress small files together up to this size. [0]"
)
@option("--compressor", env="COMPRESSOR", default="zstd", help="none, lz4_block or zstd. [zstd]")
@option("--fs-align-chunk", env="FS_ALIGN_CHUNK", is_flag=True, help="Align chunks to 4 KiB.")
@option("--backend-aligned-chunk", env="BACKEND_ALIGNED_CHUNK", is_flag=True, hidden=True)
@option("--prefetch-dir", env="PREFETCH_DIR", help="Absolute path to fetch first.")
@option("--prefetch-patterns", env="PREFETCH_PATTERNS", is_flag=True, help="Read such paths from stdin.")
@option(
    "--chunk-dict",
    env="CHUNK_DICT",
    help="Share chunks with bootstrap:registry:<reference>, containerd://… or file://….",
)
@option("--chunk-dict-insecure", env="CHUNK_DICT_INSECURE", is_flag=True, help="Accept any TLS certificate.")
@option("--chunk-dict-plain-http", env="CHUNK_DICT_PLAIN_HTTP", is_flag=True, help="Speak http there.")
@option("--build-cache", env="BUILD_CACHE", help="Reference of an image with layers converted before.")
@option("--build-cache-tag", env="BUILD_CACHE_TAG", help="The same, as a tag in the target's repository.")
@option(
    "--build-cache-version", env="BUILD_CACHE_VERSION", default="v1", help="Use caches of this version only."
)
@option(
    "--build-cache-insecure", env="BUILD_CACHE_INSECURE", is_flag=True, help="Accept any TLS certificate."
)
@option("--build-cache-plain-http", env="BUILD_CACHE_PLAIN_HTTP", is_flag=True, help="Speak http there.")
@option("--build-cache-max-records", env="BUILD_CACHE_MAX_RECORDS", default=200, help="1 to 200. [200]")
@option(
    "--backend-type",
    env="BACKEND_TYPE",
    callback=lambda ctx, parameter, value: _of_its_kind(ctx, parameter, value, model=False),
    help="Store blobs in oss, s3 or localfs. [registry]",
)
@option("--backend-config", env="BACKEND_CONFIG", help="Its configuration as JSON.")
@option("--backend-config-file", env="BACKEND_CONFIG_FILE", help="A file with that.")
@option("--backend-force-push", env="BACKEND_FORCE_PUSH", is_flag=True, help="Upload blobs even if present.")
@option(
    "--source-backend-type",
    env="BACKEND_TYPE",
    callback=lambda ctx, parameter, value: _of_its_kind(ctx, parameter, value, model=True),
    help="model-artifact: the source is a model as modctl pushes it; modelfile: as it keeps it.",
)
@option("--source-backend-config", help='Of modelfile: {"work_dir": folder in which modctl keeps models}.')
@encrypt_recipients
@decryption_key
@option("--no-reuse", is_flag=True, help="Convert layers even if the target has them from an earlier run.")
@option(
    "--work-dir", env="WORK_DIR", default="./tmp", help="For temporary files, where any are needed. [./tmp]"
)
@option("--nydus-image", env="NYDUS_IMAGE", default="nydus-image", help="Not used: the builder is built in.")
@option(
    "--output-json", env="OUTPUT_JSON", type=click.Path(dir_okay=False), help="Write sizes and times there."
)
@option("--push-chunk-size", default="0MB", help="Upload in requests of this size, e.g. 5MB. [0MB: one each]")
@option("--push-retry-count", env="PUSH_RETRY_COUNT", default=3, help="How often a layer is tried. [3]")
@option("--push-retry-delay", env="PUSH_RETRY_DELAY", default="5s", help="Wait between attempts. [5s]")
@reporting
@click.pass_context
def convert(ctx: click.Context, /, **given_options: Any) -> None:
    """Convert an image to a Nydus image.

    Layers stream from the source to the target while they are converted; none is stored here on its way. What
    has to be put together first is in the work folder until then: an archive or image of containerd that is
    written, what a compressed archive holds, and blobs that --reverse verifies.
    """
    log: Log = ctx.obj if isinstance(ctx.obj, Log) else Log()
    tell_environment(ctx, log)
    values = dict(given_options)
    output = Path(values["output_json"]) if values["output_json"] else None
    if output:
        _write(output, "null")  # what it says of a conversion that failed
    _convert(ctx, log, values, output)


def _convert(ctx: click.Context, log: Log, values: dict[str, Any], output: Path | None) -> None:
    from nydus.cli.nydusify_places import image_name, place_of, platforms, work_dir
    from nydus.cli.nydusify_summary import figures, tell
    from nydus.cli.nydusify_targets import target_place
    from nydus.cli.progress import progress_for
    from nydus.convert.image import image
    from nydus.convert.options import ConvertOptions
    from nydus.convert.reuse import default_folder
    from nydus.oci.encryption import private_keys
    from nydus.oci.place import RegistryPlace

    kind = values["source_backend_type"]
    if kind not in (None, *_MODELS):
        raise ConfigError(
            f"--source-backend-type {kind!r} cannot be used; there is model-artifact, for what modctl "
            "pushed, and modelfile, for what it has built"
        )
    folder = Path(values["work_dir"])
    source = place_of(values, "source")
    if kind == "modelfile":
        source = _model_store(values["source_backend_config"], source)
    if not isinstance(source, RegistryPlace) and not source.name:
        source = replace(source, name=str(image_name(source)))
    target = _target(values, image_name(source))
    if given(ctx, "nydus_image"):
        log.warning("--nydus-image is not used: the builder is built in")
    for unused, names, why in (
        (values["reverse"], _OF_NYDUS, "with --reverse"),
        (kind, _NOT_OF_MODELS, "on a model artifact"),
        (kind != "modelfile", ("source_backend_config",), "without --source-backend-type modelfile"),
        (not values["reverse"], ("decryption_key",), "without --reverse"),
        (values["all_platforms"], ("platform",), "with --all-platforms"),
        (not (values["build_cache"] or values["build_cache_tag"]), _OF_CACHE, "without a build cache"),
        (not values["chunk_dict"], ("chunk_dict_insecure", "chunk_dict_plain_http"), "without --chunk-dict"),
        (not values["backend_type"], ("backend_force_push",), "without --backend-type"),
        (not isinstance(source, RegistryPlace), _OF_SOURCE, "on a source that is not in a registry"),
        (values["target_archive"] or "://" in target, _OF_TARGET, "on a target that is not in a registry"),
    ):
        if unused:
            tell_unused(ctx, log, names, why)
    if values["docker_v2_format"]:
        log.warning("--docker-v2-format is deprecated")
    options = ConvertOptions(
        fs_version=number(values["fs_version"]),
        compressor=values["compressor"],
        chunk_size=0x100000 if kind else number(values["fs_chunk_size"]),
        batch_size=number(values["batch_size"]),
        aligned_chunk=values["fs_align_chunk"] or values["backend_aligned_chunk"],
        prefetch=_prefetch(values),
        oci=values["oci"] and not values["docker_v2_format"],
        oci_ref=values["oci_ref"],
        merge_platform=values["merge_platform"],
        with_referrer=values["with_referrer"],
        recipients=values["encrypt_recipients"],
        record=None if values["no_reuse"] else default_folder(),
        attempts=values["push_retry_count"] if values["push_retry_count"] > 0 else 3,
        retry_delay=duration(values["push_retry_delay"]),
    )
    chosen = platforms(values["platform"], values["all_platforms"])

    keys = private_keys(values["decryption_key"])
    sink = target_place(
        target,
        values["target_archive"],
        source,
        folder=folder,
        plain_http=speaks_http(values, "target"),
        insecure=values["target_insecure"],
        push_chunk_size=byte_size(values["push_chunk_size"]),
    )
    with progress_for(log) as progress, sink as place:
        where = str(place)
        if kind:
            from nydus.convert.artifact import convert_artifact

            chunk_size = number(values["fs_chunk_size"]) if given(ctx, "fs_chunk_size") else 0
            result = convert_artifact(source, place, options, progress, chunk_size)
        elif values["reverse"]:
            from nydus.convert.reverse import reverse

            with _blobs(values) as blobs, work_dir(folder) as base:
                result = reverse(source, place, options, progress, chosen, blobs, keys, work_dir=base)
        else:
            cache, backend = _build_cache(values, target, source, place), _backend(values)
            chunks = _dictionary(values, source, place)
            result = image(source, place, options, progress, chosen, cache, backend, chunks, fork=True)
    tell(log, result, where)
    if output:
        _write(output, json.dumps(figures(result), separators=(",", ":")))


def _of_its_kind(
    ctx: click.Context, parameter: click.Parameter, value: str | None, *, model: bool
) -> str | None:
    """The value, unless it is that of the other option with the same environment variable."""
    return value if given(ctx, parameter.name or "", in_words=True) or (value in _MODELS) == model else None


def _model_store(text: str | None, source: SourcePlace) -> SourcePlace:
    """The model that modctl keeps under the name of an image in a registry; cli.md 2.2."""
    from nydus.oci.place import ModelStorePlace, RegistryPlace

    try:
        config = json.loads(text or "")
    except ValueError as error:
        raise ConfigError(f"--source-backend-config: not JSON: {error}") from None
    folder = config.get("work_dir") if isinstance(config, dict) else None
    if not isinstance(folder, str) or not folder or not isinstance(source, RegistryPlace):
        raise ConfigError(
            "--source-backend-type modelfile needs --source REFERENCE and --source-backend-config "
            '{"work_dir": FOLDER}, where FOLDER is that in which modctl keeps models'
        )
    return ModelStorePlace(Path(folder), str(source.reference))


def _backend(values: dict[str, Any]) -> Any:
    """The storage backend that the options name, or None."""
    from nydus.cli.nydusify_places import backend_config
    from nydus.convert.backend import backend_place

    found = backend_config(values["backend_type"], values["backend_config"], values["backend_config_file"])
    return backend_place(*found, force=values["backend_force_push"]) if found else None


def _blobs(values: dict[str, Any]) -> AbstractContextManager[Any]:
    """That backend for reading, or None."""
    from contextlib import closing

    place = _backend(values)
    return closing(place.open()) if place else nullcontext()


def _http(values: dict[str, Any], side: str, reference: Reference, *near: SourcePlace | SinkPlace) -> bool:
    """Whether to speak http for an image, which is reached like one nearby in the same registry."""
    from nydus.oci.place import RegistryPlace

    return speaks_http(values, side) or any(
        place.plain_http and place.reference.host == reference.host
        for place in near
        if isinstance(place, RegistryPlace)
    )


def _dictionary(values: dict[str, Any], *near: SourcePlace | SinkPlace) -> Any:
    """The image whose chunks ``--chunk-dict`` says to refer to, or None."""
    from nydus.cli.nydusify_places import image_reference, source_place, source_registry

    text, insecure = values["chunk_dict"], values["chunk_dict_insecure"]
    if not text:
        return None
    if text.startswith(("containerd://", "file://")):
        return source_place(
            text, None, plain_http=False, insecure=False, option="chunk-dict", work_dir=values["work_dir"]
        )
    if not text.startswith("bootstrap:registry:"):
        what = "is not bootstrap:registry:<reference>, containerd://NAMESPACE/REFERENCE or file://PATH"
        raise ConfigError(f"--chunk-dict {text!r} {what}")
    reference = image_reference(text.removeprefix("bootstrap:registry:"), "chunk-dict")
    http = _http(values, "chunk_dict", reference, *near)
    return source_registry(reference, plain_http=http, insecure=insecure)


def _build_cache(values: dict[str, Any], target: str, *near: SourcePlace | SinkPlace) -> Any:
    """The build cache that the options name, or None; a mere tag is one of the target's repository."""
    from nydus.cli.nydusify_places import image_reference
    from nydus.convert.cache import BuildCache
    from nydus.oci.place import registry_place

    if values["build_cache"] and values["build_cache_tag"]:
        raise ConfigError("--build-cache and --build-cache-tag cannot be used together")
    if not (values["build_cache"] or values["build_cache_tag"]):
        return None
    if not 1 <= values["build_cache_max_records"] <= 200:
        raise ConfigError("--build-cache-max-records must be from 1 to 200")
    tag = values["build_cache_tag"]
    if tag and (not target or "://" in target):
        raise ConfigError("--build-cache-tag needs a --target in a registry; use --build-cache")
    if tag:
        reference = image_reference(target, "target").with_tag(tag)
    else:
        reference = image_reference(values["build_cache"], "build-cache")
    if reference.digest:
        raise ConfigError("--build-cache must be a tag, not a digest")
    insecure = values["build_cache_insecure"] or (bool(tag) and values["target_insecure"])
    http = _http(values, "build_cache", reference, *near)
    place = registry_place(reference, plain_http=http, insecure=insecure)
    return BuildCache(place, values["build_cache_version"], values["build_cache_max_records"])


def _target(values: dict[str, Any], source: Reference) -> str:
    """What ``--target`` and ``--target-suffix`` say; "" where an archive keeps the name of the source."""
    target: str = values["target"] or ""
    if values["target_suffix"]:
        if target:
            raise ConfigError("exactly one of --target and --target-suffix is needed")
        if source.digest:
            raise ConfigError(f"--target-suffix cannot be used with a digest: {source}")
        return str(source.with_tag(source.tag + values["target_suffix"]))
    if not target and not values["target_archive"]:
        raise ConfigError("exactly one of --target and --target-suffix is needed (or --target-archive)")
    return target


def _prefetch(values: dict[str, Any]) -> tuple[bytes, ...]:
    if values["prefetch_patterns"]:
        if values["prefetch_dir"]:
            raise ConfigError("--prefetch-dir and --prefetch-patterns cannot be used together")
        from nydus.build.layer import prefetch_paths

        paths, relative = prefetch_paths(sys.stdin.buffer.read(1 << 24).splitlines())
        if relative:
            raise ConfigError(
                f"--prefetch-patterns: {relative[0].decode(errors='replace')!r} is not absolute"
            )
        return tuple(paths) or (b"/",)
    path = values["prefetch_dir"] or "/"
    if not path.startswith("/"):
        raise ConfigError(f"--prefetch-dir {path!r} is not absolute")
    return (path.encode(),)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise NydusError(f"--output-json {path}: {error.strerror}") from error
