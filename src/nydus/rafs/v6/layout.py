"""Byte layouts of a RAFS v6 bootstrap, which is an EROFS image with extensions; rafs.md section 2."""

from __future__ import annotations

import numpy as np

SUPER_OFFSET = 1024
EXT_OFFSET = 1152
DEVICE_OFFSET = 1408
MAGIC = 0xE0F5E1E2
COMPAT_RAFS = 0x4000_0000
INCOMPAT = 0xC  # chunked files and a device table
PAGE = 4096
#: Bytes at the start of the metadata area that hold no inode.
META_RESERVED = 4096
NID_SIZE = 32
MAX_DEVICES = 254
#: The mapped addresses of devices in a flat image are multiples of this.
FLAT_ALIGN = 0x80000

SUPER = np.dtype(
    [
        ("magic", "<u4"),
        ("checksum", "<u4"),
        ("compat", "<u4"),
        ("block_bits", "u1"),
        ("ext_slots", "u1"),
        ("root_nid", "<u2"),
        ("inodes", "<u8"),
        ("build_time", "V12"),
        ("blocks", "<u4"),
        ("meta_block", "<u4"),
        ("xattr_block", "<u4"),
        ("uuid_volume", "V32"),
        ("incompat", "<u4"),
        ("reserved", "<u2"),
        ("devices", "<u2"),
        ("device_slot", "<u2"),
        ("padding", "V38"),
    ]
)

EXT = np.dtype(
    [
        ("flags", "<u8"),
        ("blob_table_offset", "<u8"),
        ("blob_table_size", "<u4"),
        ("chunk_size", "<u4"),
        ("chunk_table_offset", "<u8"),
        ("chunk_table_size", "<u8"),
        ("prefetch_offset", "<u8"),
        ("prefetch_size", "<u4"),
        ("padding", "V204"),
    ]
)

DEVICE = np.dtype([("id", "V64"), ("blocks", "<u4"), ("mapped", "<u4"), ("padding", "V56")])

BLOB = np.dtype(
    [
        ("id", "V64"),
        ("index", "<u4"),
        ("chunk_size", "<u4"),
        ("chunk_count", "<u4"),
        ("compression", "<u4"),
        ("digester", "<u4"),
        ("features", "<u4"),
        ("compressed_size", "<u8"),
        ("uncompressed_size", "<u8"),
        ("toc_size", "<u4"),
        ("meta_compression", "<u4"),
        ("meta_offset", "<u8"),
        ("meta_compressed_size", "<u8"),
        ("meta_uncompressed_size", "<u8"),
        ("toc_digest", "V32"),
        ("secret", "V32"),  # sha256 of the RAFS blob (SEPARATE) or the AES key
        ("vector", "V16"),  # size of the RAFS blob (SEPARATE) or the AES initialization vector
        ("cipher", "<u4"),
        ("padding", "V36"),
    ]
)

#: Inode format: bit 0 extended, then the data layout.
EXTENDED = 1
FLAT_PLAIN = 0
FLAT_INLINE = 2
CHUNK_BASED = 4

INODE = np.dtype(
    [
        ("format", "<u2"),
        ("xattr_count", "<u2"),
        ("mode", "<u2"),
        ("reserved", "<u2"),
        ("size", "<u8"),
        ("u", "<u4"),
        ("ino", "<u4"),
        ("uid", "<u4"),
        ("gid", "<u4"),
        ("mtime", "<u8"),
        ("mtime_ns", "<u4"),
        ("nlink", "<u4"),
        ("padding", "V16"),
    ]
)

COMPACT = np.dtype(
    [
        ("format", "<u2"),
        ("xattr_count", "<u2"),
        ("mode", "<u2"),
        ("nlink", "<u2"),
        ("size", "<u4"),
        ("reserved", "<u4"),
        ("u", "<u4"),
        ("ino", "<u4"),
        ("uid", "<u2"),
        ("gid", "<u2"),
        ("padding", "<u4"),
    ]
)

DIRENT = np.dtype([("nid", "<u8"), ("name_offset", "<u2"), ("type", "u1"), ("reserved", "u1")])

#: Index of one chunk of a file; rafs.md 2.9.
CHUNK_INDEX = np.dtype([("index_low", "<u2"), ("device", "u1"), ("index_high", "u1"), ("block", "<u4")])
CHUNK_FORMAT_INDEXES = 0x20

XATTR_HEADER = 12
#: Name prefixes by their index in EROFS.
XATTR_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}

#: Directory entry type by ``mode >> 12``.
FILE_TYPES = np.zeros(16, np.uint8)
FILE_TYPES[[0o10, 0o4, 0o2, 0o6, 0o1, 0o14, 0o12]] = [1, 2, 3, 4, 5, 6, 7]

assert (SUPER.itemsize, EXT.itemsize, DEVICE.itemsize, BLOB.itemsize) == (128, 256, 128, 256)
assert (INODE.itemsize, COMPACT.itemsize, DIRENT.itemsize, CHUNK_INDEX.itemsize) == (64, 32, 12, 8)
