"""The files of one blob in the cache directory, and what of them can be believed after any kind of stop.

``<id>.blob.data``
    the uncompressed blob, sparse, each chunk at its uncompressed offset;
``<id>.blob.data.chunk_map``
    4096 bytes of header and one bit for each chunk, set only when the chunk's bytes are on the disk;
``<id>.blob.data.verified``
    written on an orderly close: which chunks were checked, and a stamp (inode, size, modification time) of
    the data file they were checked in. Where it does not match, because of a crash, another program, a
    copied or edited file, chunks of the chunk map are only *suspect*. Where there is nothing to check
    chunks with, it says which were placed, and is believed only as long as there still is nothing.

Names and bytes of the first two are the reference's (nydusd.md 5.1, 5.2), which may work in the same
directory. Several processes may, too: they place the same verified bytes, and join their bits under a lock
on the chunk map. A bit is only ever taken away by somebody who found the chunk wrong.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nydus.errors import NydusError
from nydus.storage.files import OpenFile

log = logging.getLogger(__name__)

MISSING, SUSPECT, READY = 0, 1, 2

Rows = npt.NDArray[np.int64]

_HEADER = 4096
_MAGIC1, _MAGIC2, _ALL_READY = 0x424D4150, 0x434D4150, 0x4D4D4150
_VERIFIED = struct.Struct("<8sQQQQ")  # magic, chunks, inode, size, mtime in ns; then the bitmap and its crc
_VERIFIED_MAGIC, _PLACED_MAGIC = b"NYDVRFD1", b"NYDPLCD1"
_LOCK_SECONDS = 5.0


class CacheError(NydusError):
    """The cache directory cannot be used."""


class Store:
    """The open files of one blob.

    Args:
        work_dir: cache directory, made when missing.
        name: file name stem, ``<id>.blob``.
        chunks: number of chunks.
        size: size of the data file in bytes.
        verifiable: whether there are digests.

    Attributes:
        initial: state of each chunk as found, one byte each: MISSING, SUSPECT or READY.

    Files of another size, or a chunk map that is none, are replaced by empty ones; a process that still has
    the old ones open keeps them to itself.
    """

    def __init__(self, work_dir: Path, name: str, chunks: int, size: int, verifiable: bool) -> None:
        self.path = work_dir / f"{name}.data"
        self._map_path = work_dir / f"{name}.data.chunk_map"
        self._verified_path = work_dir / f"{name}.data.verified"
        self._chunks = chunks
        self._bytes = (chunks + 7) // 8
        self.size = size
        self._verifiable = verifiable
        try:
            os.makedirs(work_dir, exist_ok=True)
            self._open()
        except OSError as error:
            raise CacheError(f"cache file {error.filename or self.path}: {error.strerror}") from None

    def _open(self) -> None:
        while True:
            self._map = OpenFile(self._map_path, os.O_RDWR | os.O_CREAT)
            with self._locked(_LOCK_SECONDS):
                if not self._current():
                    continue  # replaced while we waited for the lock
                self._data = OpenFile(self.path, os.O_RDWR | os.O_CREAT)
                map_size, data_size = self._map.size(), self._data.size()
                if map_size == 0 and data_size in (0, self.size):
                    os.ftruncate(self._data.fd, self.size)
                    self._map.write(0, self._header() + bytes(self._bytes))
                elif problem := self._problem(map_size, data_size):
                    log.warning("cache file %s: %s; starting over", self.path, problem)
                    for path in (self._verified_path, self.path, self._map_path):
                        path.unlink(missing_ok=True)
                    continue
                self.initial = self._states()
                return

    def _current(self) -> bool:
        try:
            return os.path.samestat(self._map_path.stat(), os.fstat(self._map.fd))
        except FileNotFoundError:
            return False

    def _problem(self, map_size: int, data_size: int) -> str:
        if data_size != self.size:
            return f"data file has {data_size} bytes instead of {self.size}"
        if map_size != _HEADER + self._bytes:
            return f"chunk map has {map_size} bytes instead of {_HEADER + self._bytes}"
        if self._map.read(0, 12) != self._header()[:12]:
            return "chunk map has an unknown header"
        return ""

    @staticmethod
    def _header(all_ready: bool = False) -> bytes:
        return struct.pack("<4I", _MAGIC1, 1, _MAGIC2, _ALL_READY if all_ready else 0).ljust(_HEADER, b"\0")

    @contextmanager
    def _locked(self, seconds: float) -> Iterator[None]:
        """Hold the lock between processes; a stopped process may hold it for ever, so the wait is bounded."""
        fd = self._map.fd
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CacheError(
                        f"{self._map_path}: locked by another process for {seconds:g} s"
                    ) from None
                time.sleep(0.002)
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)

    def _states(self) -> bytearray:
        ready = self._unpack(self._map.read(_HEADER, self._bytes))
        states = ready.astype(np.uint8) * SUSPECT
        states[ready & self._verified()] = READY
        return bytearray(states.tobytes())

    def _unpack(self, bits: bytes) -> npt.NDArray[np.bool_]:
        return np.unpackbits(np.frombuffer(bits, np.uint8), count=self._chunks).astype(np.bool_)

    def _stamp(self) -> tuple[int, int, int]:
        info = os.fstat(self._data.fd)
        return info.st_ino, info.st_size, info.st_mtime_ns

    def _verified(self) -> npt.NDArray[np.bool_]:
        nothing = np.zeros(self._chunks, np.bool_)
        try:
            raw = self._verified_path.read_bytes()
        except OSError:
            return nothing
        if len(raw) != _VERIFIED.size + self._bytes + 4:
            return nothing
        magic, chunks, *stamp = _VERIFIED.unpack_from(raw)
        if magic == _PLACED_MAGIC and self._verifiable:
            return nothing
        if (
            magic not in (_VERIFIED_MAGIC, _PLACED_MAGIC)
            or chunks != self._chunks
            or tuple(stamp) != self._stamp()
        ):
            return nothing
        if zlib.crc32(raw[:-4]).to_bytes(4, "little") != raw[-4:]:
            return nothing
        return self._unpack(raw[_VERIFIED.size : -4])

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the data file; those beyond its proper end are zeros.

        Raises:
            CacheError: the file is shorter than it should be, or cannot be read.
        """
        try:
            data = self._data.read(offset, size)
        except OSError as error:
            raise CacheError(f"{self.path}: {error.strerror} at offset {offset:#x}") from None
        if len(data) == size:
            return data
        if offset + len(data) < self.size:
            raise CacheError(f"{self.path}: truncated by somebody to {offset + len(data)} bytes")
        return data + bytes(size - len(data))

    def write(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        """Place adjacent buffers. Raises OSError, after which any part of them may be there."""
        for start in range(0, len(buffers), 512):
            part = buffers[start : start + 512]
            total = sum(len(buffer) for buffer in part)
            done = os.pwritev(self._data.fd, part, offset)
            if done != total:
                self._data.write(offset + done, memoryview(b"".join(part))[done:])
            offset += total

    def sync(self) -> None:
        """Put everything written so far on the disk. Raises OSError."""
        os.fdatasync(self._data.fd)

    def join(self, ready: Rows, wrong: Rows) -> Rows:
        """Set the bits of chunks that are on the disk (after :meth:`sync`), clear those found wrong.

        Returns:
            all chunks that the chunk map has now, those of other processes too.
        """
        with self._locked(_LOCK_SECONDS):
            before = self._map.read(0, _HEADER + self._bytes)
            if len(before) != _HEADER + self._bytes:
                raise CacheError(f"{self._map_path}: truncated by somebody to {len(before)} bytes")
            bits = self._unpack(before[_HEADER:])
            bits[wrong] = False
            bits[ready] = True
            after = self._header(bool(bits.all())) + np.packbits(bits).tobytes()
            if after != before:
                self._map.write(0, after)
                os.fdatasync(self._map.fd)
        return np.flatnonzero(bits)

    def seal(self, good: Rows) -> None:
        """Record at an orderly close which chunks need no check next time. Raises OSError."""
        if not self._current():
            return  # somebody started over; these files are nobody's any more
        # Not fdatasync: the stamp holds the modification time.
        os.fsync(self._data.fd)
        bits = np.zeros(self._chunks, np.bool_)
        bits[good] = True
        magic = _VERIFIED_MAGIC if self._verifiable else _PLACED_MAGIC
        raw = _VERIFIED.pack(magic, self._chunks, *self._stamp()) + np.packbits(bits).tobytes()
        raw += zlib.crc32(raw).to_bytes(4, "little")
        write_aside(self._verified_path, raw)


def write_aside(path: Path, data: bytes) -> None:
    """Make or replace a file so that it is whole or not there, whatever happens. Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns():x}")
    try:
        file = OpenFile(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        file.write(0, data)
        os.fsync(file.fd)
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    directory = OpenFile(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory.fd)
