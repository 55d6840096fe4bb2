"""Byte layouts of a RAFS v5 bootstrap; rafs.md section 1."""

from __future__ import annotations

import numpy as np

MAGIC = 0x52414653
VERSION = 0x500
SUPER_SIZE = 8192

SUPER = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u4"),
        ("size", "<u4"),
        ("chunk_size", "<u4"),
        ("flags", "<u8"),
        ("inodes", "<u8"),
        ("inode_table_offset", "<u8"),
        ("prefetch_offset", "<u8"),
        ("blob_table_offset", "<u8"),
        ("inode_table_entries", "<u4"),
        ("prefetch_entries", "<u4"),
        ("blob_table_size", "<u4"),
        ("extended_entries", "<u4"),
        ("extended_offset", "<u8"),
    ]
)

EXTENDED_BLOB = np.dtype(
    [
        ("chunk_count", "<u4"),
        ("features", "<u4"),
        ("uncompressed_size", "<u8"),
        ("compressed_size", "<u8"),
        ("padding", "V40"),
    ]
)

INODE = np.dtype(
    [
        ("digest", "V32"),
        ("parent", "<u8"),
        ("ino", "<u8"),
        ("uid", "<u4"),
        ("gid", "<u4"),
        ("projid", "<u4"),
        ("mode", "<u4"),
        ("size", "<u8"),
        ("blocks", "<u8"),
        ("flags", "<u8"),
        ("nlink", "<u4"),
        ("child_index", "<u4"),
        ("child_count", "<u4"),
        ("name_length", "<u2"),
        ("target_length", "<u2"),
        ("rdev", "<u4"),
        ("mtime_ns", "<u4"),
        ("mtime", "<u8"),
        ("padding", "V8"),
    ]
)

#: Flags of an inode.
SYMLINK = 1
HARDLINK = 2
XATTR = 4
HOLES = 8

assert (SUPER.itemsize, EXTENDED_BLOB.itemsize, INODE.itemsize) == (80, 64, 128)
