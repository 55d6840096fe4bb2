"""Blobs are the same whatever the threads do, and cost no more memory than what is in flight."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import tarfile
import threading
from typing import Any

import pytest

from nydus.build.directory import build_directory
from nydus.build.layer import BuildOptions, LayerResult, build_layer
from nydus.build.output import Output
from nydus.errors import FormatError, NydusError
from nydus.rafs import blobmeta, codec
from nydus.rafs.model import ChunkFlag, Compression, Digester


def archive(seed: int = 1, files: int = 400) -> bytes:
    """Many small files, some large ones, and duplicates of both near and far."""
    rnd = random.Random(seed)
    pool = [rnd.randbytes(rnd.choice([1, 15, 16, 500, 5000])).hex().encode() for _ in range(files // 2)]
    pool += [rnd.randbytes(1_500_000), bytes(3_000_000)]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(files):
            data = rnd.choice(pool)
            info = tarfile.TarInfo(f"d{i % 7}/f{i}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def build(data: bytes, **options: Any) -> tuple[LayerResult, bytes]:
    blob: list[bytes] = []
    result = build_layer(io.BytesIO(data), blob.append, BuildOptions(**options), where="layer")
    return result, b"".join(blob)


@pytest.mark.parametrize("options", [{}, {"batch_size": 0x10000}, {"toc": True, "inline_meta": True}])
def test_same_bytes_for_any_number_of_threads(options: dict[str, Any]) -> None:
    data = archive()
    results = [build(data, workers=workers, **options) for workers in (1, 2, 5)]
    assert len({blob for _, blob in results}) == 1
    assert len({result.bootstrap for result, _ in results}) == 1


@pytest.mark.parametrize("compression", [Compression.NONE, Compression.LZ4_BLOCK, Compression.ZSTD])
@pytest.mark.parametrize("digester", list(Digester))
@pytest.mark.parametrize(
    "extra", [{}, {"encrypt": True}, {"batch_size": 0x4000}, {"encrypt": True, "batch_size": 0x4000}]
)
def test_every_chunk_can_be_read(compression: Compression, digester: Digester, extra: dict[str, Any]) -> None:
    data = archive()
    result, blob = build(data, compression=compression, digester=digester, chunk_size=0x10000, **extra)
    info = result.blob
    assert info is not None
    chunks = blobmeta.load(info, lambda offset, size: blob[offset : offset + size], size=len(blob))
    contents = []
    for i in range(len(chunks)):
        start, size, flags = int(chunks.coffset[i]), int(chunks.csize[i]), int(chunks.flags[i])
        inside, whole = 0, int(chunks.usize[i])
        if flags & ChunkFlag.BATCH:
            row = chunks.batch[int(chunks.context[i])]
            size, whole, inside = int(row["csize"]), int(row["usize"]), int(chunks.context_offset[i])
        stored = blob[start : start + size]
        if info.cipher:
            stored = codec.xts_decrypt(info.key, info.iv, stored)
        plain = stored if len(stored) == whole else codec.decompress(compression, stored, whole)
        contents.append(plain[inside : inside + int(chunks.usize[i])])
    assert len(set(contents)) == len(contents)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            row = result.tree.find(b"/" + member.name.encode())
            assert row is not None
            found = b"".join(contents[int(j)] for j in result.tree.node_chunks(row)["index"])
            stream = tar.extractfile(member)
            assert stream is not None and found == stream.read()


def test_threads_end_with_the_build() -> None:
    before = threading.active_count()
    data = archive()
    build(data)
    for cut in (300, 100_000, 2_000_000):
        with pytest.raises(FormatError):
            build(data[:cut])

    def full(data: bytes) -> None:
        raise NydusError("disk full")

    with pytest.raises(NydusError, match="disk full"):
        build_layer(io.BytesIO(data), full)
    for thread in threading.enumerate():
        if thread.name == "layer-reader":
            thread.join(5)
    assert threading.active_count() == before


def test_file_that_shrinks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(10_000))
    from nydus.build import directory

    scan = directory.scan

    def shrink(*arguments: Any) -> Any:
        found = scan(*arguments)
        (tmp_path / "file").write_bytes(b"short")
        return found

    monkeypatch.setattr(directory, "scan", shrink)
    with pytest.raises(NydusError, match="file: got shorter"):
        build_directory(str(tmp_path), lambda data: None)


def test_output_appears_whole_or_not_at_all(tmp_path: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), Output(str(path)) as out:
        out.write(b"half")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
    with Output(str(path)) as out:
        out.write(b"new")
        out.commit()
    assert path.read_bytes() == b"new"
    with Output("/dev/null") as out:
        out.write(b"gone")
        out.commit()


_PEAK = """
import resource, sys, tarfile
from nydus.build.layer import build_layer

def pieces(files):
    info = tarfile.TarInfo("x")
    info.size = 16 << 20
    for i in range(files):
        info.name = f"f{i}"
        yield info.tobuf()
        for j in range(16):
            yield bytes([i, j]) * 0x80000

class Layer:
    source = pieces(int(sys.argv[1]))
    def read(self, size):
        return next(self.source, b"")

build_layer(Layer(), lambda data: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_layer() -> None:
    small, large = (
        int(subprocess.run([sys.executable, "-c", _PEAK, str(n)], capture_output=True, check=True).stdout)
        for n in (2, 40)
    )
    assert large - small < 16 << 10  # KiB; the layers have 32 and 640 MiB


@pytest.mark.parametrize("options", [{"encrypt": True}, {"batch_size": 0x100_0000}])
def test_a_chunk_that_records_cannot_hold(options: dict[str, Any]) -> None:
    """16 MiB that do not shrink have a size of 25 bits; what shrinks fits."""
    big = BuildOptions(chunk_size=0x100_0000, workers=1, **options)
    with pytest.raises(FormatError, match="use a chunk size of 0x800000 or less"):
        build_layer(io.BytesIO(_tar(os.urandom(0x100_0000))), len, big)
    build_layer(io.BytesIO(_tar(bytes(0x100_0000))), len, big)
    build_layer(io.BytesIO(_tar(os.urandom(0x100_0000))), len, BuildOptions(chunk_size=0x100_0000))


def _tar(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("x")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()
