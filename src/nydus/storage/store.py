"""The files of one blob in the cache directory, and what of them can be believed after any kind of stop.

``<id>.blob.data``
    the uncompressed blob, sparse, each chunk at its uncompressed offset;
``<id>.blob.data.chunk_map``
    4096 bytes of header and one bit for each chunk, set only when the chunk's bytes are on the disk;
``<id>.blob.data.verified``
    written on an orderly close: which chunks were checked, and a stamp (inode, size, modification time) of
    the data file they were checked in. Where it does not match, because of a crash, another program, a
    copied or edited file, chunks of the chunk map are only *suspect*. Where there is nothing to check
    chunks with, it says which were placed, and is believed only as long as there still is nothing;
``<id>.blob.data.places``
    where each chunk lies, and its digest where some image knows it. An id does not prove what a blob holds:
    only images that agree on this share files. To the others they are :class:`OtherBlob`, or a lying image
    could put its bytes under everybody's.

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
_PLACES = struct.Struct("<8sQI")  # magic, chunks, crc of the rows that follow
_PLACES_MAGIC = b"NYDPLAC1"
#: One row for each chunk: offset and size on the device (a size of 0 is unknown), digest (or zeros).
PLACE = np.dtype([("start", "<u8"), ("size", "<u4"), ("digest", "V32")])


class CacheError(NydusError):
    """The cache directory cannot be used."""


class OtherBlob(CacheError):
    """The files belong to a blob of the same name with other chunks."""


class Store:
    """The open files of one blob.

    Args:
        work_dir: cache directory, made when missing.
        name: file name stem, ``<id>.blob``.
        places: :data:`PLACE` rows, in ascending order.
        size: size of the data file in bytes.
        verifiable: whether there are digests.

    Attributes:
        initial: state of each chunk as found, one byte each: MISSING, SUSPECT or READY.

    Files of another size, or a chunk map that is none, are replaced by empty ones; a process that still has
    the old ones open keeps them to itself.

    Raises:
        OtherBlob: take another name.
        CacheError: the directory cannot be used.
    """

    def __init__(
        self, work_dir: Path, name: str, places: npt.NDArray[np.void], size: int, verifiable: bool
    ) -> None:
        self.path = work_dir / f"{name}.data"
        self._map_path = work_dir / f"{name}.data.chunk_map"
        self._verified_path = work_dir / f"{name}.data.verified"
        self._places_path = work_dir / f"{name}.data.places"
        self._chunks = chunks = len(places)
        self._bytes = (chunks + 7) // 8
        self.size = size
        self._verifiable = verifiable
        try:
            os.makedirs(work_dir, exist_ok=True)
            self._open(places)
        except OSError as error:
            raise CacheError(f"cache file {error.filename or self.path}: {error.strerror}") from None

    def _open(self, places: npt.NDArray[np.void]) -> None:
        # Whoever else may write to the directory must not make us write elsewhere, or read what is private.
        flags, mode = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600
        while True:
            self._map = OpenFile(self._map_path, flags, mode)
            with self._locked(_LOCK_SECONDS):
                if not self._current():
                    continue  # replaced while we waited for the lock
                self._data = OpenFile(self.path, flags, mode)
                map_size, data_size = self._map.size(), self._data.size()
                if map_size == 0 and data_size in (0, self.size):
                    os.ftruncate(self._data.fd, self.size)
                    self._map.write(0, self._header() + bytes(self._bytes))
                elif problem := self._problem(map_size, data_size):
                    log.warning("cache file %s: %s; starting over", self.path, problem)
                    for path in (self._verified_path, self._places_path, self.path, self._map_path):
                        path.unlink(missing_ok=True)
                    continue
                self.initial = self._states(self._join_places(places))
                return

    def agree(self, places: npt.NDArray[np.void]) -> None:
        """Note what another image knows of the chunks. Raises OtherBlob where it contradicts, CacheError."""
        try:
            with self._locked(_LOCK_SECONDS):
                if self._current():  # else nobody finds these files any more
                    self._join_places(places)
        except OSError as error:
            raise CacheError(f"{self._places_path}: {error.strerror}") from None

    def _join_places(self, places: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """Add what is new to the file of places.

        Returns:
            the chunks of which it said all that ``places`` says. Others may have been checked by somebody who
            did not know their digest, or knew another one.
        """
        found = self._read_places()
        if found is None:
            self._write_places(places)
            return np.zeros(len(places), np.bool_)
        lies, lay = places["size"] > 0, found["size"] > 0
        named, had = _known(places["digest"]), _known(found["digest"])
        moved = (places["start"] != found["start"]) | (places["size"] != found["size"])
        wrong = (lies & lay & moved) | (named & had & (places["digest"] != found["digest"]))
        joined = np.where(lies & ~lay, places, found)
        joined["digest"] = np.where(named, places["digest"], found["digest"])
        order = joined[joined["size"] > 0]
        ends = order["start"] + order["size"]
        if wrong.any() or (order["start"][1:] < ends[:-1]).any():
            raise OtherBlob(f"{self.path}: another image has other chunks in a blob of this name")
        if (joined != found).any():
            self._write_places(joined)
        return ~((lies & ~lay) | (named & ~had))

    def _read_places(self) -> npt.NDArray[np.void] | None:
        try:
            raw = OpenFile(self._places_path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        size = _PLACES.size + self._chunks * PLACE.itemsize
        data = memoryview(raw.read(0, size + 1))
        if len(data) != size:
            return None
        rows = data[_PLACES.size :]
        if _PLACES.unpack_from(data) != (_PLACES_MAGIC, self._chunks, zlib.crc32(rows)):
            return None
        return np.frombuffer(rows, PLACE)

    def _write_places(self, places: npt.NDArray[np.void]) -> None:
        rows = places.tobytes()
        # Not synced: when a power cut takes it away, what it covers is checked again.
        write_aside(
            self._places_path, _PLACES.pack(_PLACES_MAGIC, len(places), zlib.crc32(rows)) + rows, sync=False
        )

    @property
    def file(self) -> OpenFile:
        """The data file. Its path may lead to that of somebody who started over by now."""
        return self._data

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

    def _states(self, agreed: npt.NDArray[np.bool_]) -> bytearray:
        ready = self._unpack(self._map.read(_HEADER, self._bytes))
        states = ready.astype(np.uint8) * SUSPECT
        states[ready & agreed & self._verified()] = READY
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
        return data.ljust(size, b"\0")

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


def _known(digests: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    raw = np.ascontiguousarray(digests).view(np.uint8).reshape(-1, 32)
    return np.asarray(raw.any(axis=1))


def write_aside(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Make or replace a file so that it is whole or not there, whatever happens. Raises OSError.

    Args:
        sync: not even a power cut counts; the content must tell otherwise whether it is whole.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns():x}")
    try:
        file = OpenFile(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        file.write(0, data)
        if sync:
            os.fsync(file.fd)
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    if sync:
        directory = OpenFile(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory.fd)
