"""Counters in the shapes of nydusd.md §3.6.

``stat``, ``open`` and ``readdir`` never reach the daemon, so their counters stay zero; what is counted are
the reads of ranges that the kernel does not have.
"""

from __future__ import annotations

from typing import Any

from nydus.daemon.instance import Instance
from nydus.daemon.server import Daemon
from nydus.mount.blobfs import Counters

_READ = 4  # in the reference's list of operations


def file_system(daemon: Daemon, mountpoint: str) -> dict[str, Any]:
    """Reads are counted for the whole connection, which all mounts of a daemon share."""
    config = daemon.instance(mountpoint).image.config
    counters = daemon.devices.blobfs.counters if daemon.devices.blobfs is not None else Counters()

    def operations(reads: int) -> list[int]:
        return [reads if operation == _READ else 0 for operation in range(15)]

    return {
        "files_account_enabled": config.iostats_files,
        "access_pattern_enabled": config.access_pattern,
        "record_latest_read_files_enabled": config.latest_read_files,
        "measure_latency": True,
        "id": mountpoint,
        "nr_opens": 0,
        "data_read": counters.bytes,
        "block_count_read": counters.sizes,
        "fop_hits": operations(counters.reads),
        "fop_errors": operations(counters.errors),
        "fop_cumulative_latency_total": operations(counters.latency_us),
        "read_latency_dist": counters.latencies,
    }


def backend(daemon: Daemon, mountpoint: str) -> dict[str, Any]:
    return daemon.instance(mountpoint).image.backend.metrics.json()


def blobcache(daemon: Daemon, mountpoint: str) -> dict[str, Any]:
    """The sums over the blobs of an image."""
    instance = daemon.instance(mountpoint)
    image = instance.image
    total: dict[str, Any] = {}
    for blob in range(len(image.blobs)):
        cache = image.open_cache(blob)
        try:
            one = cache.metrics()
        finally:
            image.release_cache(blob)
        for key, value in one.items():
            if key not in total:
                total[key] = value
            elif isinstance(value, bool):
                total[key] = total[key] and value
            elif isinstance(value, (int, list)):
                total[key] += value
    return total | (instance.prefetch.metrics() if instance.prefetch is not None else {})


def inflight(daemon: Daemon) -> list[dict[str, int]] | None:
    """The reads that are being answered; None where there are none."""
    blobfs = daemon.devices.blobfs
    running = blobfs.inflight() if blobfs is not None else []
    return [
        {"inode": node, "opcode": 15, "unique": unique, "timestamp_secs": int(began)}
        for unique, node, began in running
    ] or None


def superblock(instance: Instance) -> dict[str, Any]:
    """What ``/api/v1/daemon/backend`` tells of an image."""
    head = instance.image.metadata.source
    forever = {"secs": 1 << 32, "nanos": 0}
    v6 = head.version == 6
    return {
        "magic": 0xE0F5E1E2 if v6 else 0x52414653,
        "version": 0x600 if v6 else 0x500,
        "sb_size": 0 if v6 else 8192,
        "root_inode": 0 if v6 else head.root,
        "chunk_size": head.chunk_size,
        "batch_size": 0,
        "inodes_count": head.inode_count,
        "flags": {"bits": int(head.flags)},
        "inode_table_entries": 0,
        "inode_table_offset": 0,
        "blob_table_size": 256 * len(head.blobs),
        "blob_table_offset": 0,
        "extended_blob_table_offset": 0,
        "extended_blob_table_entries": 0,
        "blob_device_table_count": len(head.blobs) if v6 else 0,
        "blob_device_table_offset": 1408 if v6 else 0,
        "prefetch_table_offset": 0,
        "prefetch_table_entries": len(head.prefetch),
        "attr_timeout": forever,
        "entry_timeout": forever,
        "is_chunk_dict": False,
        "meta_blkaddr": head.meta_offset // head.block_size if v6 else 0,
        "root_nid": head.root if v6 else 0,
        "chunk_table_offset": head.chunk_table[0],
        "chunk_table_size": head.chunk_table[1],
    }
