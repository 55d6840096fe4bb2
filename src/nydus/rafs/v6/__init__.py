"""RAFS v6: EROFS metadata with a table of blobs."""

from nydus.rafs.v6.reader import read
from nydus.rafs.v6.superblock import read_chunk_table, read_superblock
from nydus.rafs.v6.writer import write

__all__ = ["read", "read_chunk_table", "read_superblock", "write"]
