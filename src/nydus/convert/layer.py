"""The conversion of one layer: source blob in, Nydus blob out, while both are on their way."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial

from nydus.build.layer import BuildOptions, LayerResult, build_layer
from nydus.build.zran import build_reference
from nydus.convert.backend import BackendPlace
from nydus.convert.job import Converted, Job
from nydus.convert.options import ConvertOptions
from nydus.errors import BackendError, FormatError
from nydus.oci.foreign import open_layer, plain_http
from nydus.oci.place import Sink, SinkPlace, Source, SourcePlace, Stream, Writer
from nydus.oci.retry import wait_to_retry
from nydus.rafs.model import Compression, Digester, SuperFlag, Tree

_COMPRESSIONS = {"none": Compression.NONE, "lz4_block": Compression.LZ4_BLOCK, "zstd": Compression.ZSTD}
_REPORT_SECONDS = 0.1

#: (source bytes read, blob bytes built, blob bytes sent), called often.
Report = Callable[[int, int, int], None]


def build_options(options: ConvertOptions, dictionary: Tree | None = None) -> BuildOptions:
    """What the builder is told for a layer of an image."""
    from nydus.build.merge import Whiteout

    if options.oci_ref:
        return BuildOptions(
            compression=Compression.GZIP,
            digester=Digester.SHA256,
            chunk_size=options.chunk_size,
            inline_meta=True,
            toc=True,
            whiteout=Whiteout.NONE,
            prefetch_table=True,
        )
    six = options.fs_version == 6
    return BuildOptions(
        version=options.fs_version,
        compression=_COMPRESSIONS[options.compressor],
        chunk_size=options.chunk_size,
        batch_size=options.batch_size,
        # The bootstrap in a blob would tell everybody its key.
        inline_meta=not options.recipients,
        encrypt=bool(options.recipients),
        toc=six,
        aligned=options.aligned_chunk,
        whiteout=Whiteout.NONE,
        prefetch_table=True,
        # Chunks are found by digest: an index over ordinary layers (oci-ref) has sha256.
        digester=Digester.SHA256
        if dictionary is not None and dictionary.flags & SuperFlag.HASH_SHA256
        else Digester.BLAKE3,
        dictionary=dictionary,
    )


_opened: dict[SourcePlace, Source] = {}
_opened_sinks: dict[SinkPlace | BackendPlace, Sink] = {}


def convert_layer(job: Job, report: Report, built: Callable[[Converted], None]) -> None:
    """Converts one layer; a network failure makes it begin again.

    Args:
        built: called with the result as soon as it stands, while the last of the blob is still on its way (of
            an encrypted one, once it is stored).

    Raises:
        BackendError: the source cannot be read or the target not be written.
        FormatError: the layer is damaged; the message names it.
    """
    source = _opened.get(job.source) or _opened.setdefault(job.source, job.source.open())
    sink = _opened_sinks.get(job.target) or _opened_sinks.setdefault(job.target, job.target.open_sink())
    for attempt in range(1, job.options.attempts + 1):
        try:
            return _convert(job, source, sink, report, built)
        except BackendError as error:
            if not wait_to_retry(error, attempt, job.options.attempts, job.options.retry_delay):
                raise BackendError(
                    f"layer {job.number}: {error}", permanent=error.permanent, status=error.status
                ) from error
    raise AssertionError("unreachable")


def _convert(
    job: Job, source: Source, sink: Sink, report: Report, built: Callable[[Converted], None]
) -> None:
    started = time.monotonic()
    report(0, 0, 0)
    where = f"layer {job.number} ({job.layer.digest[:19]}…) of {job.source}"
    build: Callable[..., LayerResult] = build_layer
    if job.options.oci_ref:
        algorithm, _, layer_id = job.layer.digest.partition(":")
        build = partial(build_reference, layer_id=layer_id if algorithm == "sha256" else "")
    stream = open_layer(source, job.layer, plain_http=plain_http(job.source))
    try:
        with sink.upload() as upload:
            counted = _Counted(stream, upload, report)
            try:
                result = build(
                    counted,
                    counted.write,
                    build_options(job.options, job.dictionary),
                    job.options.prefetch,
                    where,
                )
                counted.drain()
            except FormatError:
                # Bytes that are not what the digest says explain why they cannot be understood.
                counted.drain()
                raise
            digest = f"sha256:{result.blob_digest}"
            # In an image a blob is named by the digest of its layer; the builder names files by their data.
            if job.options.oci_ref and result.blob:
                result.blob.rafs_digest = bytes.fromhex(result.blob_digest)
            elif job.options.recipients and result.blob:
                result.blob.id = result.blob_digest
            converted = Converted(
                digest,
                result.blob_size,
                result.tree,
                result.blob_meta if job.options.fs_version == 6 else b"",
                result.duplicates,
                time.monotonic() - started,
                hashlib.sha256(result.bootstrap).hexdigest(),
                result.toc_digest.hex() if result.toc_size else "",
                result.toc_size,
                reference=job.layer.digest if job.options.oci_ref else "",
            )
            early = not job.options.recipients  # each attempt has keys of its own, and so another blob
            if early:
                built(converted)
            upload.commit(digest)
            if not early:
                built(converted)
            counted.tell(final=True)
    finally:
        stream.close()


class _Counted:
    """Counts what passes in and out of the builder."""

    def __init__(self, stream: Stream, upload: Writer, report: Report) -> None:
        self._stream, self._upload, self._report = stream, upload, report
        self._read = self._built = 0
        self._told = 0.0

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self._read += len(data)
        self.tell()
        return data

    def write(self, data: bytes) -> None:
        self._upload.write(data)
        self._built += len(data)
        self.tell()

    def drain(self) -> None:
        """Reads what follows the archive, so that the digest of the whole blob is checked."""
        while self.read(1 << 20):
            pass

    def tell(self, final: bool = False) -> None:
        now = time.monotonic()
        if final or now - self._told > _REPORT_SECONDS:
            self._told = now
            self._report(self._read, self._built, self._built if final else self._upload.sent)
