"""RAFS v6: EROFS metadata with a table of blobs."""

from nydus.rafs.v6.superblock import read_chunk_table, read_superblock

__all__ = ["read_chunk_table", "read_superblock"]
