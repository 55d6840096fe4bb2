"""``nydus-image check``: is this image sound?"""

from __future__ import annotations

import hashlib
import logging
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from nydus.cli import image_options, image_source, image_view
from nydus.errors import BackendError, FormatError, NydusError

if TYPE_CHECKING:
    from nydus.image import Image
    from nydus.rafs.blobmeta import ChunkMap
    from nydus.rafs.model import Array, BlobInfo, Tree
    from nydus.storage.backend import Backend

log = logging.getLogger("nydus.image")

#: Bad chunks of a blob that are named one by one.
_EACH = 20


@click.command("check", context_settings=image_source.SETTINGS)
@click.argument("positional", metavar="[BOOTSTRAP]", required=False)
@click.option("-B", "--bootstrap", metavar="FILE", help="The bootstrap, or a blob that holds one.")
@click.option("-D", "--blob-dir", metavar="DIR", help="Verify the data blobs in this directory, too.")
@click.option("-C", "--config", metavar="FILE", help="Verify the data blobs of this configuration, too.")
@click.option("-v", "--verbose", is_flag=True, help="Print every inode and chunk.")
@click.option("-J", "--output-json", metavar="FILE", help="Write the result as JSON.")
def command(
    positional: str | None,
    bootstrap: str | None,
    blob_dir: str | None,
    config: str | None,
    verbose: bool,
    output_json: str | None,
) -> None:
    """Verify every structure of a bootstrap, and with blobs at hand every chunk.

    Each problem is printed with its place, and what was found and expected there. The exit code is 1 if there
    are any.
    """
    from nydus.build import bootstrap as files
    from nydus.image import Image
    from nydus.rafs.verify import verify

    path = image_source.one_bootstrap(positional, bootstrap)
    trace = image_options.Trace()
    data = files.read_bytes(path)
    with trace.time("load_tree_from_bootstrap"):
        tree, problems = verify(data, path)
    count = 0
    for problem in problems:
        count += 1
        click.echo(str(problem), err=True)
    if tree is None:
        raise NydusError(f"{path}: not a sound bootstrap")
    files.name_blobs(tree, path)
    log.info("RAFS features: %s", image_view.flag_names(tree.flags))
    if blob_dir or config:
        backend = image_source.open_blobs(blob_dir=blob_dir, config=config)
        with Image(tree, backend, stem=files.stem(path)) as image, trace.time("verify_blobs"):
            for index in range(len(tree.blobs)):
                for error in verify_blob(image, backend, index):
                    count += 1
                    click.echo(str(error), err=True)
    if verbose:
        _print_inodes(image_view.view_of(path, data))
    if count:
        raise NydusError(f"{path}: {count} {'problem' if count == 1 else 'problems'}")
    click.echo("RAFS filesystem metadata is valid, referenced data blobs: ")
    for index, blob in enumerate(tree.blobs):
        click.echo(
            f"\t {index}: {blob.id}, compressed size {blob.compressed_size}, "
            f"uncompressed size {blob.uncompressed_size}, chunk size: {blob.chunk_size}, "
            f"chunk count: {blob.chunk_count}, features: {image_view.feature_words(blob.features)}"
        )
    if output_json:
        document = image_options.result(tree, path, [blob.id for blob in tree.blobs], trace)
        image_options.write_result(output_json, document, indent=None)


def verify_blob(image: Image, backend: Backend, index: int) -> Iterator[NydusError]:
    """What is wrong with one data blob: its size, its tables, each chunk."""
    import numpy as np

    from nydus.rafs.model import BlobFeature, ChunkFlag

    blob = image.blobs[index]
    if blob.features & BlobFeature.EXTERNAL and not _is_there(backend, blob):
        return
    try:
        yield from _verify_object(backend, blob)
        chunks = image.reader.chunk_map(index)
    except NydusError as error:
        yield _named(error, blob)
        return
    rows = np.flatnonzero(chunks.usize)
    proven = (chunks.flags[rows] & int(ChunkFlag.HAS_CRC)) != 0
    if chunks.digests is not None:
        proven |= chunks.digests[rows].any(axis=1)
    # In a merged image nothing is known of chunks that no file uses any more.
    mine = image.tree.chunks[image.tree.chunks["blob_index"] == index]
    blind = int((~proven & np.isin(rows, mine["index"])).sum())
    if blind and not blob.features & BlobFeature.TARFS:
        log.warning("blob %s: the image has neither digest nor checksum of %d chunks", blob.id, blind)
    yield from _wrong_records(image, index, chunks)
    for found, problem in enumerate(_bad_chunks(image, index, rows)):
        if found >= _EACH or isinstance(problem, BackendError):
            yield _named(problem, blob)
            return
        yield problem


def _is_there(backend: Backend, blob: BlobInfo) -> bool:
    try:
        backend.size(blob.id)
    except BackendError as error:
        log.warning("external blob %s is not verified: %s", blob.id, error)
        return False
    return True


def _verify_object(backend: Backend, blob: BlobInfo) -> Iterator[NydusError]:
    from nydus.rafs.model import BlobFeature

    if blob.features & BlobFeature.EXTERNAL or not blob.features & BlobFeature.INLINED_FS_META:
        size = backend.size(blob.id)
        # Blobs of old builders are longer than their data, whose size this was then; others may go on with a
        # bootstrap, which counted as inlined before the merge (rafs.md 3.7).
        exact = blob.features & BlobFeature.EXTERNAL or (
            blob.features & BlobFeature.CAP_TAR_TOC and not blob.features & BlobFeature.HAS_TAR_HEADER
        )
        if size < blob.compressed_size or (exact and size != blob.compressed_size):
            yield FormatError(
                "wrong size of the blob", where=blob.id, found=size, expected=blob.compressed_size
            )
    if blob.features & BlobFeature.SEPARATE and any(blob.rafs_digest):
        name = blob.rafs_digest.hex()
        size = backend.size(name)
        if size != blob.rafs_size:
            yield FormatError("wrong size of the RAFS blob", where=name, found=size, expected=blob.rafs_size)
        digest = hashlib.sha256()
        for start in range(0, size, 1 << 20):
            digest.update(backend.read(name, start, min(1 << 20, size - start)))
        # The name of a blob with a table of contents leaves out its digest array (rafs.md 3.7).
        if digest.hexdigest() != name and not blob.features & BlobFeature.HAS_TOC:
            yield FormatError("wrong digest of the RAFS blob", where=name, found=digest.hexdigest())


def _wrong_records(image: Image, index: int, chunks: ChunkMap) -> Iterator[NydusError]:
    """What the bootstrap says of stored chunks must be what the blob's own table says."""
    import numpy as np

    from nydus.rafs.model import ChunkFlag

    mine = image.tree.chunks[image.tree.chunks["blob_index"] == index]
    mine = mine[np.unique(mine["index"], return_index=True)[1]]
    rows = mine["index"].astype(np.int64)
    # Chunks in contexts have no place of their own, and images may have no table of chunks.
    alone = (chunks.flags[rows] & int(ChunkFlag.BATCH | ChunkFlag.ZRAN)) == 0
    alone &= mine["csize"] > 0
    for name, column in (("offset", "coffset"), ("size", "csize")):
        found, expected = mine[column], getattr(chunks, column)[rows]
        for at in np.flatnonzero(alone & (found != expected))[:_EACH].tolist():
            what = f"stored {name} of chunk {int(rows[at])} differs between bootstrap and blob"
            yield FormatError(what, where=chunks.blob.id, found=int(found[at]), expected=int(expected[at]))


def _bad_chunks(image: Image, index: int, rows: Array) -> Iterator[NydusError]:
    """Read and verify chunks; where that fails, halve the run until the chunk is found."""
    import numpy as np

    from nydus.rafs import codec
    from nydus.rafs.model import ChunkFlag

    if not len(rows):
        return
    blob = image.blobs[index]
    chunks = image.reader.chunk_map(index)
    try:
        for row, data in zip(
            rows.tolist(), image.reader.stream(np.full(len(rows), index), rows), strict=True
        ):
            # Readers that have a digest need no checksum; the reference's take the checksum first.
            if int(chunks.flags[row]) & ChunkFlag.HAS_CRC and codec.crc32c(data) != int(chunks.crc[row]):
                raise FormatError(
                    "has the wrong checksum",
                    expected=hex(codec.crc32c(data)),
                    found=hex(int(chunks.crc[row])),
                )
    except BackendError as error:
        yield error
    except FormatError as error:
        if len(rows) == 1:
            row = int(rows[0])
            offset = int(chunks.coffset[row])
            what = f"chunk {row}: {error.what}"
            yield FormatError(what, where=blob.id, offset=offset, found=error.found, expected=error.expected)
            return
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            yield from _bad_chunks(image, index, half)


def _named(error: NydusError, blob: BlobInfo) -> NydusError:
    return error if blob.id in str(error) else NydusError(f"{blob.id}: {error}")


def _print_inodes(view: image_view.View) -> None:
    tree = view.tree
    for row, path in tree.walk():
        node = tree.nodes[row]
        kind = stat.S_IFMT(int(node["mode"]))
        directory = kind == stat.S_IFDIR
        old = tree.version == 5
        number = int(view.numbers[row])
        target = f"Some({image_view.quoted(tree.target(row))})" if kind == stat.S_IFLNK else "None"
        click.echo(
            f"inode: {image_view.KINDS[kind]} {image_view.quoted(path)}: index {row + 1 if old else 0} "
            f"ino {number} real_ino {number} "
            f"child_index {int(node['first_child']) + 1 if old and directory else 0} "
            f"child_count {int(node['child_count']) if directory else int(node['chunk_count'])} "
            f"i_nlink {node['nlink']} i_size {node['size']} i_blocks {image_view.blocks_of(view, row)} "
            f"i_name_size {len(tree.name(row))} i_symlink_size {node['target_length']} "
            f"has_xattr {str(int(node['xattr']) >= 0).lower()} link {target} "
            f"i_mtime {node['mtime']} i_mtime_nsec {node['mtime_ns']}"
        )
        if kind == stat.S_IFREG:
            _print_chunks(tree, row)


def _print_chunks(tree: Tree, row: int) -> None:
    for chunk in tree.node_chunks(row):
        click.echo(
            f"\t chunk: id {chunk['digest'].tobytes().hex()}, index {chunk['index']}, "
            f"blob_index {chunk['blob_index']}, file_offset {chunk['file_offset']}, "
            f"compressed {chunk['coffset']}/{chunk['csize']}, "
            f"uncompressed {chunk['uoffset']}/{chunk['usize']}, crc32 {int(chunk['crc']):#x}"
        )
