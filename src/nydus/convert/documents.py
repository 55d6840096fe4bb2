"""The documents of a Nydus image: manifest, config, and the bootstrap layer."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec

from nydus import __version__
from nydus.errors import FormatError
from nydus.oci import model
from nydus.oci.encryption import ENCRYPTED, decrypt, encrypt
from nydus.oci.model import Descriptor, Manifest
from nydus.oci.place import Sink, Source

if TYPE_CHECKING:
    from nydus.oci.encryption import PrivateKey, Recipient

#: Where the bootstrap lies in its layer; the snapshotter finds it there.
BOOTSTRAP = "image/image.boot"
_BLOCK = 512
_FILE, _DIRECTORY = b"0", b"5"  # of tar
_GZIP_HEADER = bytes.fromhex("1f8b08 00 00000000 00 ff")  # no name, no time, unknown system
_LAST_BLOCK = b"\x03\0"  # of deflate: empty
_WINDOW = 32 << 10
_PIECE = 512 << 10
#: Of zlib-ng: a third of the time of zlib's usual level, 2 % more bytes.
_LEVEL = 5
_MAX_BOOTSTRAP_LAYER = 1 << 30
#: A layer inflates to at most this and so many times its size: tables shrink to a third, not a hundredth.
_INFLATED, _MAX_RATIO = 64 << 20, 100


def bootstrap_layer(
    bootstrap: bytes | Callable[[], bytes],
    metas: Mapping[str, bytes],
    others: Mapping[str, bytes] | None = None,
) -> tuple[bytes, str]:
    """Packs a bootstrap into the gzip tar that is the last layer of a Nydus image.

    The tar is that of Go's archive writer (USTAR, no names, no times), so that it is the same everywhere.

    Args:
        bootstrap: its bytes, or what makes them, which is called while the other files are packed.
        metas: blob id (hex) -> bytes of its ``blob.meta`` file, in layer order; spares a daemon the read of
            the end of each blob.
        others: more files by their path in the layer.

    Returns:
        The layer's bytes and its diff id.
    """
    files = {f"image/{blob}.blob.meta": data for blob, data in metas.items()} | dict(others or {})
    with ThreadPoolExecutor(os.cpu_count(), "gzip") as pool:
        behind = [_Packed(pool, _file(name, data)) for name, data in files.items()]
        data = bootstrap() if callable(bootstrap) else bootstrap
        first = _Packed(pool, _header("image", _DIRECTORY, 0o755, 0) + _file(BOOTSTRAP, data))
        parts = [first, *behind, _Packed(pool, bytes(2 * _BLOCK))]
        digest, checksum, size = hashlib.sha256(), 0, 0
        for part in parts:
            digest.update(part.data)
            checksum, size = zlib.crc32(part.data, checksum), size + len(part.data)
        pieces = [piece.result() for part in parts for piece in part.pieces]
    trailer = struct.pack("<II", checksum, size & 0xFFFFFFFF)
    return b"".join([_GZIP_HEADER, *pieces, _LAST_BLOCK, trailer]), f"sha256:{digest.hexdigest()}"


def _file(name: str, data: bytes) -> bytes:
    return b"".join((_header(name, _FILE, 0o444, len(data)), data, bytes(-len(data) % _BLOCK)))


class _Packed:
    """Part of a gzip member; its pieces are deflated side by side, each with the window before it."""

    def __init__(self, pool: ThreadPoolExecutor, data: bytes) -> None:
        self.data = data
        self.pieces = [pool.submit(self._deflate, start) for start in range(0, len(data), _PIECE)]

    def _deflate(self, start: int) -> bytes:
        from zlib_ng import zlib_ng

        data = memoryview(self.data)
        window = data[max(0, start - _WINDOW) : start]
        packer = zlib_ng.compressobj(_LEVEL, wbits=-zlib.MAX_WBITS, zdict=window)
        return packer.compress(data[start : start + _PIECE]) + packer.flush(zlib.Z_SYNC_FLUSH)


def _header(name: str, kind: bytes, mode: int, size: int) -> bytes:
    import tarfile

    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.size = kind, mode, size
    info: dict[str, Any] = dict(entry.get_info())
    info["name"] = name  # tarfile would add a slash to the directory's
    header = bytearray(entry.create_ustar_header(info, "ascii", "strict"))
    header[329:345] = b"0000000\0" * 2  # device numbers, which tarfile leaves out
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def put_bootstrap(writer: Sink, packed: bytes, readers: Sequence[Recipient] = ()) -> Descriptor:
    """Stores a bootstrap layer, encrypted if it is for some readers only."""
    if not readers:
        return writer.put_blob(packed, model.OCI_LAYER_GZIP)
    stored, annotations = encrypt(packed, readers)
    return writer.put_blob(stored, f"{model.OCI_LAYER_GZIP}{ENCRYPTED}", annotations=annotations)


def read_bootstrap_layer(
    source: Source, layer: Descriptor, where: str, keys: Sequence[PrivateKey] = ()
) -> tuple[dict[str, bytes], str]:
    """Fetches the last layer of a Nydus image; see :func:`unpack_bootstrap_layer`.

    Args:
        keys: private keys, for one that is encrypted.

    Raises:
        ConfigError: it is encrypted, and no key fits.
        BackendError: it cannot be read, or its bytes are not what its digest says.
        FormatError: it is not a bootstrap layer.
    """
    if layer.size > _MAX_BOOTSTRAP_LAYER:
        raise FormatError("the bootstrap layer is larger than 1 GiB", where=where)
    stream = source.blob(layer.digest, layer.size)
    try:
        data = stream.read(-1)
    finally:
        stream.close()
    if layer.media_type.endswith(ENCRYPTED):
        data = decrypt(data, layer.annotations, keys, where)
    return unpack_bootstrap_layer(data, where)


def unpack_bootstrap_layer(data: bytes, where: str) -> tuple[dict[str, bytes], str]:
    """The files of a bootstrap layer by their path in it, and its diff id.

    Paths are relative, and none of them leads out of the layer.

    Raises:
        FormatError: it is no tar (plain or gzip), has no bootstrap, or what does not belong there.
    """
    if data[:2] == b"\x1f\x8b":
        inflater = zlib.decompressobj(wbits=31)
        most = min(_MAX_BOOTSTRAP_LAYER, _INFLATED + _MAX_RATIO * len(data))
        try:
            data = inflater.decompress(data, most)
        except zlib.error as error:
            raise FormatError(f"damaged bootstrap layer: {error}", where=where) from error
        if not inflater.eof:
            what = f"is larger than {most} bytes" if inflater.unconsumed_tail else "is cut short"
            raise FormatError(f"the bootstrap layer {what}", where=where)
    from nydus.build.stream import Window
    from nydus.build.tar import TarReader

    contents: dict[str, bytes] = {}
    window = Window(iter((data,)), where)
    for entry in TarReader(window):
        if not stat.S_ISREG(entry.mode) or entry.hard_link:
            continue
        name = posixpath.normpath(entry.name.decode(errors="surrogateescape").lstrip("/"))
        if name.split("/")[0] == "..":
            raise FormatError("the bootstrap layer has a file outside of it", where=where, found=repr(name))
        if entry.sparse is not None:  # a few bytes could say that they are terabytes
            raise FormatError("the bootstrap layer has a sparse file", where=where, found=repr(name))
        contents[name] = bytes(window.take(entry.size))
    if BOOTSTRAP not in contents:
        raise FormatError(f"the bootstrap layer has no {BOOTSTRAP}", where=where)
    return contents, model.digest(data)


def rewrite_config(raw: bytes, diff_ids: Iterable[str], where: str, *, keep_history: bool = True) -> bytes:
    """The config of the source image with the layers of the Nydus image; every other key is kept.

    Without ``keep_history`` the bootstrap is all there is to tell of, as the image has no other layer.
    """
    model.decode(raw, model.ImageConfig, where)
    config: dict[str, Any] = json.loads(raw)
    config["rootfs"] = {"type": "layers", "diff_ids": list(diff_ids)}
    entry = {"created_by": "Nydus Converter", "comment": "Nydus Bootstrap Layer"}
    config["history"] = [*((keep_history and config.get("history")) or []), entry]
    return model.encode(config)


def provenance(source_digest: str, source_reference: str, fs_version: int) -> dict[str, str]:
    """The annotations that say what an image was made of, and by whom."""
    return {
        model.NYDUS_BUILDER_VERSION: f"v{__version__}-pynydus",
        model.NYDUS_FS_VERSION: str(fs_version),
        model.NYDUS_SOURCE_DIGEST: source_digest,
        model.NYDUS_SOURCE_REFERENCE: source_reference,
    }


def rewrite_manifest(
    source: Manifest,
    source_digest: str,
    source_reference: str,
    config: Descriptor,
    blobs: Iterable[Descriptor],
    bootstrap: Descriptor,
    *,
    fs_version: int,
    oci: bool,
    subject: Descriptor | None = None,
) -> Manifest:
    """The manifest of a Nydus image.

    Args:
        source_digest: of the manifest that was converted (not of an index that names it).
        oci: Docker's media types become those of OCI.
        subject: what the new manifest refers to.
    """
    docker = source.media_type == model.DOCKER_MANIFEST and not oci
    version = {model.NYDUS_FS_VERSION: str(fs_version)}
    return Manifest(
        schema_version=2,
        media_type=model.DOCKER_MANIFEST if docker else model.OCI_MANIFEST,
        artifact_type=source.artifact_type,
        config=config,
        layers=(
            *blobs,
            msgspec.structs.replace(
                bootstrap,
                media_type=model.DOCKER_LAYER_GZIP if docker else bootstrap.media_type,
                annotations={**bootstrap.annotations, model.NYDUS_BOOTSTRAP: "true", **version},
            ),
        ),
        subject=subject,
        annotations={**(source.annotations or {}), **provenance(source_digest, source_reference, fs_version)},
    )


def config_type(source: Manifest, *, oci: bool) -> str:
    """The media type of the config of a converted image."""
    kind = source.config.media_type or model.OCI_CONFIG
    return model.OCI_CONFIG if oci and kind == model.DOCKER_CONFIG else kind
