"""``nydus-image stat``: what images consist of, and which chunks they share."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nydus.cli import image_source, image_view
from nydus.errors import NydusError

if TYPE_CHECKING:
    from nydus.rafs.model import Array, Tree

#: Rows of the table of what a shared dictionary would save.
_THRESHOLDS = 20


@dataclass(slots=True)
class Numbers:
    """Statistics of one image, or of several together.

    ``comp`` and ``uncomp`` are stored and plain bytes of distinct chunks; ``uncomp_size`` counts whole
    blocks, ``padding_size`` what they waste. ``chunk_sizes[i]`` is the number of chunks if they had 2**(12+i)
    bytes, ``file_sizes[i]`` the number of non-empty files whose size has i bits. ``dedup`` chunks are in
    several images of the base, ``ref`` chunks of the target are in the base, ``own`` ones are neither.
    """

    dirs: int = 0
    files: int = 0
    symlinks: int = 0
    chunks: int = 0
    file_size: int = 0
    comp_size: int = 0
    uncomp_size: int = 0
    padding_size: int = 0
    chunk_sizes: list[int] = field(default_factory=lambda: [0] * 9)
    file_sizes: list[int] = field(default_factory=lambda: [0] * 45)
    dedup_chunks: int = 0
    dedup_comp_size: int = 0
    dedup_uncomp_size: int = 0
    own_chunks: int = 0
    own_comp_size: int = 0
    own_uncomp_size: int = 0
    ref_chunks: int = 0
    ref_comp_size: int = 0
    ref_uncomp_size: int = 0

    def count(self, kind: str, chunks: Array) -> None:
        """Add chunks to one of ``dedup``, ``own`` and ``ref``."""
        sums = (len(chunks), int(chunks["csize"].sum()), int(chunks["usize"].sum()))
        for name, value in zip(("chunks", "comp_size", "uncomp_size"), sums, strict=True):
            setattr(self, f"{kind}_{name}", getattr(self, f"{kind}_{name}") + value)


@click.command("stat", context_settings=image_source.SETTINGS)
@click.option("-B", "--bootstrap", metavar="FILE", help="The image.")
@click.option("-D", "--blob-dir", metavar="DIR", help="All files without extension in it are images.")
@click.option("-T", "--target", metavar="FILE", help="Which of its chunks do the images above have?")
@click.option("-C", "--config", metavar="FILE", help="Take from these blobs what the bootstraps do not say.")
@click.option(
    "--digester",
    type=click.Choice(["blake3", "sha256"]),
    expose_value=False,
    help="Not needed: images say it themselves.",
)
@click.option("-J", "--output-json", metavar="FILE", help="Write the result as JSON instead of a table.")
def command(
    bootstrap: str | None,
    blob_dir: str | None,
    target: str | None,
    config: str | None,
    output_json: str | None,
) -> None:
    """Statistics of an image, or of a set of images and the chunks they have in common."""
    if (bootstrap is None) == (blob_dir is None):
        raise click.UsageError("give one of --bootstrap and --blob-dir")
    paths = [bootstrap] if bootstrap else _images_in(blob_dir or "")
    base, wanted = Numbers(), Numbers()
    images = [_load(path, base, config) for path in paths]
    shared = _share(images, base)
    if target:
        _compare(_load(target, wanted, config), shared, wanted)
    if output_json:
        from nydus.build.output import write_file

        document = {
            "dedup_enabled": blob_dir is not None,
            "target_enabled": target is not None,
            "base_image": asdict(base),
            "target_image": asdict(wanted),
        }
        write_file(output_json, json.dumps(document).encode())
        return
    _print("Base image" if blob_dir is None else f"{len(paths)} base images", base)
    if target:
        _print("Target image", wanted)
    if blob_dir is not None:
        _print_thresholds(images, base)


def _images_in(folder: str) -> list[str]:
    try:
        paths = sorted(
            entry.path for entry in os.scandir(folder) if entry.is_file() and not Path(entry).suffix
        )
    except OSError as error:
        raise NydusError(f"{folder}: cannot be listed: {error.strerror}") from None
    if not paths:
        raise NydusError(f"{folder}: holds no bootstraps (files without an extension)")
    return paths


def _load(path: str, numbers: Numbers, config: str | None) -> Array:
    """Add an image to the numbers; gives its distinct chunks."""
    import numpy as np

    view = image_view.open_view(path)
    tree, chunks = view.tree, view.tree.chunks
    if config:
        from nydus.build.bootstrap import stem
        from nydus.image import Image

        with Image(tree, image_source.open_blobs(config=config), stem=stem(path)) as image:
            chunks = image_view.complete_chunks(image)
    _add_names(tree, numbers)
    _, first = np.unique(chunks["blob_index"].astype(np.uint64) << 32 | chunks["index"], return_index=True)
    chunks = chunks[first]
    usize = chunks["usize"].astype(np.int64)
    whole = int((-(-usize // 4096) * 4096).sum())
    numbers.chunks += len(chunks)
    numbers.comp_size += int(chunks["csize"].sum())
    numbers.uncomp_size += whole
    numbers.padding_size += whole - int(usize.sum())
    return chunks


def _add_names(tree: Tree, numbers: Numbers) -> None:
    import numpy as np

    nodes = tree.nodes[tree.nodes["link"] == np.arange(len(tree))]
    kinds = nodes["mode"] >> 12
    sizes = nodes["size"][kinds == stat.S_IFREG >> 12].astype(np.int64)
    numbers.dirs += int((kinds == stat.S_IFDIR >> 12).sum())
    numbers.symlinks += int((kinds == stat.S_IFLNK >> 12).sum())
    numbers.files += len(sizes)
    numbers.file_size += int(sizes.sum())
    for index in range(len(numbers.chunk_sizes)):
        numbers.chunk_sizes[index] += int((-(-sizes // (1 << 12 + index))).sum())
    bits = np.minimum(np.frexp(sizes[sizes > 0].astype(np.float64))[1], len(numbers.file_sizes) - 1)
    for index, count in enumerate(np.bincount(bits, minlength=len(numbers.file_sizes)).tolist()):
        numbers.file_sizes[index] += count


def _keys(chunks: Array) -> Array:
    """What makes two chunks the same: digest and size."""
    import numpy as np

    keys = np.zeros(len(chunks), np.dtype([("digest", "V32"), ("usize", "<u4")]))
    keys["digest"], keys["usize"] = chunks["digest"], chunks["usize"]
    return keys.view("V36")


def _share(images: list[Array], base: Numbers) -> set[bytes]:
    """Sort the chunks of all base images into own and shared ones; gives the keys of all."""
    seen, chunks, counts = _occurrences(images)
    base.count("own", chunks[counts == 1])
    base.count("dedup", chunks[counts > 1])
    return seen


def _occurrences(images: list[Array]) -> tuple[set[bytes], Array, Array]:
    """All keys; one chunk for each; in how many images it is."""
    import numpy as np

    everything = np.concatenate(images)
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    counts: list[int] = []
    position = 0
    for chunks in images:
        mine: set[int] = set()
        for key in _keys(chunks).tolist():
            number = numbers.setdefault(key, len(first))
            if number == len(first):
                first.append(position)
                counts.append(0)
            if number not in mine:
                mine.add(number)
                counts[number] += 1
            position += 1
    return set(numbers), everything[np.array(first, np.int64)], np.array(counts, np.int64)


def _compare(chunks: Array, shared: set[bytes], wanted: Numbers) -> None:
    import numpy as np

    known = np.array([key in shared for key in _keys(chunks).tolist()], bool)
    wanted.count("ref", chunks[known])
    wanted.count("own", chunks[~known])


def _print(title: str, numbers: Numbers) -> None:
    click.echo(f"{title}:")
    for name, value in asdict(numbers).items():
        if name == "chunk_sizes":
            text = ", ".join(f"{4 << index}K: {count}" for index, count in enumerate(value))
        elif name == "file_sizes":
            text = ", ".join(f"<2^{index}: {count}" for index, count in enumerate(value) if count)
        else:
            text = str(value)
        click.echo(f"    {name + ':':<20} {text}")


def _print_thresholds(images: list[Array], base: Numbers) -> None:
    """What a dictionary would save that holds the chunks which at least so many images have."""
    _, chunks, counts = _occurrences(images)
    stored, plain = chunks["csize"].astype("i8"), chunks["usize"].astype("i8")
    click.echo(
        "Global Dedup Thresh: Raw Chunks: Dedup Chunks: Comp Content Size: Comp Base Size: Comp Image Size: "
        "Uncomp Content Size: Uncomp Base Size Uncomp Image Size"
    )
    raw = base.chunks
    for threshold in range(1, _THRESHOLDS + 1):
        common = counts >= threshold
        row = [threshold, raw, int(common.sum())]
        for sizes in (stored, plain):
            row += [
                int((sizes * counts).sum()),
                int(sizes[common].sum()),
                int((sizes * counts)[~common].sum()),
            ]
        click.echo(" ".join(f"{value:>#14x}" for value in row))
