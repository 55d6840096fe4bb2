"""RAFS v5: the format before EROFS."""

from nydus.rafs.v5.reader import read
from nydus.rafs.v5.superblock import read_superblock
from nydus.rafs.v5.writer import directory_sizes, write

__all__ = ["directory_sizes", "read", "read_superblock", "write"]
