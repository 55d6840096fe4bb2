"""What lies in a Nydus blob besides its data: everything that a tool may read there must be right."""

from __future__ import annotations

import hashlib

from nydus.errors import FormatError
from nydus.rafs import toc

_PIECE = 4 << 20


def check_contents(read: toc.Read, size: int, where: str, *, listed: bool, encrypted: bool = False) -> int:
    """Verifies the sections of a blob: their digests, that they lie without gaps, the bootstrap in it.

    Args:
        read, size: the blob.
        listed: the image says that it has a table of contents.
        encrypted: its chunk table can be read with the key of the blob only, and is left out.

    Returns:
        The number of sections; 0 for a blob that has data only.

    Raises:
        FormatError: something is wrong; the text names the section.
    """
    contents = toc.read_toc(read, size, where)
    if contents is None:
        if listed:
            raise FormatError("there is no table of contents at its end", where=where)
        return _check_appended(read, size, where)
    for entry in contents.entries:
        if encrypted and entry.name.startswith(toc.BLOB_META):
            continue  # whoever has the key checks it
        if entry.name == toc.IMAGE_BLOB:
            _check_data(read, entry, contents, where)
        else:
            data = contents.read(read, entry.name, where)
            if entry.name == toc.IMAGE_BOOT and data is not None:
                _check_bootstrap(data, where)
    end = contents.offset
    while end:
        name, length = toc.parse_tar_header(read(end - toc.HEADER_SIZE, toc.HEADER_SIZE), where, end)
        start = end - toc.HEADER_SIZE - length
        found = contents.find(name)
        if start < 0 or found is None or (found.offset != start and name != toc.IMAGE_BLOB):
            raise FormatError(
                f"section {name!r} is not where the table of contents has it",
                where=where,
                offset=start,
                expected="none" if found is None else found.offset,
                found=start,
            )
        if name == toc.IMAGE_BLOB and start:
            raise FormatError("there are bytes before the data", where=where, found=start)
        end = start
    return len(contents.entries)


def _check_appended(read: toc.Read, size: int, where: str) -> int:
    """A blob without table: the tar header at its end says whether it ends with a bootstrap."""
    if size < toc.HEADER_SIZE:
        return 0
    try:
        name, _ = toc.parse_tar_header(read(size - toc.HEADER_SIZE, toc.HEADER_SIZE))
    except FormatError:
        return 0
    if name != toc.IMAGE_BOOT:
        return 0
    _check_bootstrap(toc.extract_bootstrap(read, size, where), where)
    return 1


def _check_data(read: toc.Read, entry: toc.TocEntry, contents: toc.Toc, where: str) -> None:
    size = entry.compressed_size + toc.HEADER_SIZE
    if size > contents.offset:
        raise FormatError("the data reach beyond the table of contents", where=where, found=size)
    digest = hashlib.sha256()
    for offset in range(0, size, _PIECE):
        digest.update(read(offset, min(_PIECE, size - offset)))
    if digest.digest() != entry.digest:
        raise FormatError(
            "the data do not have the digest that the table of contents names",
            where=where,
            expected=entry.digest.hex(),
            found=digest.hexdigest(),
        )


def _check_bootstrap(data: bytes, where: str) -> None:
    from nydus.rafs.verify import verify

    _, problems = verify(data, f"{where}: its bootstrap")
    if problems:
        raise problems[0]
