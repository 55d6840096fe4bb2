"""What ``nydusify convert`` says at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nydus.cli.logs import Log, count, human

if TYPE_CHECKING:
    from nydus.convert.image import Result

#: Mbit/s, for an estimate of what a lazy start saves.
_RATE = 100
#: Bytes that take long enough at that rate.
_WORTH_TELLING = 1 << 20


def tell(log: Log, result: Result, where: str) -> None:
    """Says what came of a conversion: one line, and JSON where that is wanted."""
    seconds = result.pull_seconds + result.convert_seconds + result.push_seconds
    reused = sum(layer.reused for layer in result.layers)
    text = f"converted {count(len(result.layers), 'layer')}"
    if reused:
        text += f" ({reused} of them before)"
    sizes = result.sizes
    text += f", {human(sizes.source)} to {human(sizes.target)}"
    parts = (("layers of the source", sizes.kept), ("in the storage backend", sizes.backend))
    if named := ", ".join(f"{human(size)} {what}" for what, size in parts if size):
        text += f" ({named})"
    text += f", in {seconds:.1f} s"
    if result.duplicates:
        text += f"; {count(result.duplicates, 'chunk')} did not have to be stored again"
    if start := sizes.start:
        share = f"{100 * start.size / start.image:.3g} %"
        text += f"; containers start after {human(start.size)}, {share} of the Nydus image"
        if start.source > _WORTH_TELLING:
            times = f"{_seconds(start.size)}, {_seconds(start.source)} for the whole source"
            text += f" (at {_RATE} Mbit/s {times})"
    document = {
        "target": where,
        "digest": result.descriptor.digest,
        "source_size": sizes.source,
        "target_size": sizes.target,
        **_parts(result),
        "duplicate_chunks": result.duplicates,
        "layers": [
            {"source": layer.digest, "source_size": layer.size, "size": layer.built, "reused": layer.reused}
            for layer in result.layers
        ],
        "pull_seconds": round(result.pull_seconds, 3),
        "convert_seconds": round(result.convert_seconds, 3),
        "push_seconds": round(result.push_seconds, 3),
    }
    log.result(text, document, target=where, digest=result.descriptor.digest)


def figures(result: Result) -> dict[str, int]:
    """What ``--output-json`` says: the reference's keys (bytes, nanoseconds), and some of our own."""
    return {
        "SourceImageSize": result.sizes.source_listed,
        "TargetImageSize": result.sizes.target_listed,
        "SourcePullElapsed": int(result.pull_seconds * 1e9),
        "ConversionElapsed": int(result.convert_seconds * 1e9),
        "TargetPushElapsed": int(result.push_seconds * 1e9),
        "TargetTotalSize": result.sizes.target,
        **{key.title().replace("_", ""): size for key, size in _parts(result).items()},
    }


def _parts(result: Result) -> dict[str, int]:
    sizes, start = result.sizes, result.sizes.start
    return {
        "kept_size": sizes.kept,
        "backend_size": sizes.backend,
        "start_size": start.size if start else 0,
        "start_image_size": start.image if start else 0,
        "start_source_size": start.source if start else 0,
    }


def _seconds(size: int) -> str:
    """How long a download takes at :data:`_RATE`."""
    return f"{size * 8 / (_RATE * 1e6):.1f} s"
