"""RAFS v6: EROFS metadata with a table of blobs."""

from nydus.rafs.v6.reader import read
from nydus.rafs.v6.superblock import read_chunk_table, read_superblock
from nydus.rafs.v6.writer import chunk_formats, chunk_lists, chunk_table, write

__all__ = [
    "chunk_formats",
    "chunk_lists",
    "chunk_table",
    "read",
    "read_chunk_table",
    "read_superblock",
    "write",
]
