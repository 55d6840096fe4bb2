"""What a conversion can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nydus.errors import ConfigError

COMPRESSORS = ("none", "lz4_block", "zstd")


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How layers are built and what the image is to look like.

    Attributes:
        fs_version: RAFS version, 5 or 6.
        compressor: one of :data:`COMPRESSORS`.
        chunk_size: bytes; a power of two from 4 KiB to 16 MiB.
        batch_size: chunks smaller than this share one compressed batch; 0 is off.
        aligned_chunk: chunks are aligned to 4 KiB in the blob.
        prefetch: paths that a daemon fetches first.
        oci: Docker's media types become those of OCI.
        oci_ref: layers stay as they are; a Nydus blob holds only the tables that say where their files lie.
        merge_platform: the target is an index of the source image and the Nydus image.
        with_referrer: the source manifest is the subject of the Nydus manifest.
        recipients: who may read the image, as :func:`nydus.oci.encryption.recipients` takes them; () is all.
        record: folder that remembers converted layers (see :mod:`nydus.convert.reuse`); None for none.
        workers: processes that convert layers; 0 is one for each processor.
        attempts: how often a layer is tried when the network fails.
        retry_delay: seconds before the second attempt.
    """

    fs_version: int = 6
    compressor: str = "zstd"
    chunk_size: int = 1 << 20
    batch_size: int = 0
    aligned_chunk: bool = False
    prefetch: tuple[bytes, ...] = (b"/",)
    oci: bool = False
    oci_ref: bool = False
    merge_platform: bool = False
    with_referrer: bool = False
    recipients: tuple[str, ...] = ()
    record: Path | None = None
    workers: int = 0
    attempts: int = 3
    retry_delay: float = 5.0

    def __post_init__(self) -> None:
        if self.fs_version not in (5, 6):
            raise ConfigError(f"fs-version must be 5 or 6, not {self.fs_version}")
        if self.compressor not in COMPRESSORS:
            raise ConfigError(f"compressor must be one of {', '.join(COMPRESSORS)}, not {self.compressor!r}")
        if self.oci_ref and (self.fs_version != 6 or self.batch_size or self.aligned_chunk):
            raise ConfigError("oci-ref needs fs-version 6, and cannot batch or align chunks")
        if self.recipients and (self.fs_version != 6 or self.oci_ref or self.merge_platform):
            raise ConfigError("encrypted images need fs-version 6, and cannot be oci-ref or merge-platform")
        size = self.chunk_size
        if size & (size - 1) or not 1 << 12 <= size <= 1 << 24:
            raise ConfigError(f"chunk-size must be a power of two from 0x1000 to 0x1000000, not {size:#x}")
        if not 0 <= self.batch_size <= size:
            raise ConfigError(
                f"batch-size must be from 0 to the chunk size {size:#x}, not {self.batch_size:#x}"
            )
