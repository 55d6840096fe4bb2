"""What is fuzzed: for each parser some good inputs, and a function that takes any bytes.

A target may raise :class:`NydusError` and nothing else.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nydus
from nydus import rafs
from nydus.build import archive, disk, external, optimize, stargz, stream, zran
from nydus.build.layer import BuildOptions, build_layer
from nydus.daemon import config as daemon_config
from nydus.errors import BackendError, NydusError
from nydus.image import Image
from nydus.oci import auth, hosts, model, reference
from nydus.oci.auth import Credentials
from nydus.oci.registry import Registry
from nydus.rafs import blobmeta, toc
from nydus.rafs.device import as_erofs
from nydus.rafs.model import BlobFeature, BlobInfo, Compression, Digester
from nydus.rafs.verify import verify
from nydus.snapshotter import config as snapshotter_config
from nydus.storage.backend import MeteredBackend
from nydus.storage.decode import Decoder

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
#: Files of an image that are read in one execution.
_FILES = 6


@dataclass(frozen=True, slots=True)
class Target:
    """``run`` gets mutations of ``seeds()``; ``text`` says that they are documents rather than tables."""

    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes], object]
    text: bool = False


class Memory(MeteredBackend):
    """Every blob has the same bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__("memory")
        self.data = data

    def _read(self, blob_id: str, offset: int, size: int) -> bytes:
        if offset + size > len(self.data):
            raise BackendError("beyond the end", permanent=True)
        return self.data[offset : offset + size]

    def size(self, blob_id: str) -> int:
        return len(self.data)

    def close(self) -> None:
        pass


# -- good inputs -------------------------------------------------------------------------------------------


@cache
def layer() -> bytes:
    """A tar archive with every type of entry."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: object) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.mode = kind, len(data), 0o755
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))

        add("dir", tarfile.DIRTYPE, mtime=1.5)
        add("dir/small", data=b"small", uid=1 << 22, pax_headers={"SCHILY.xattr.user.a": "1" * 50})
        add("dir/chunks", data=b"".join(bytes([n]) * 4096 for n in range(5)) + b"end")
        add("dir/" + "n" * 200, data=b"long name")
        add("hard", tarfile.LNKTYPE, linkname="dir/small")
        add("soft", tarfile.SYMTYPE, linkname="t" * 150)
        add("deep/er/file", data=os.urandom(0) + b"implied")
        add("char", tarfile.CHRTYPE, devmajor=5, devminor=1)
        add("fifo", tarfile.FIFOTYPE)
        add("dir/.wh.gone")
        for number in range(60):
            add(f"many/file-{number:03}", data=b"%d" % number * 30)
    return out.getvalue()


@cache
def images() -> list[tuple[bytes, bytes, nydus.Image]]:
    """Bootstrap, blob and image in several formats."""
    kinds: list[dict[str, object]] = [
        {"version": 6}, {"version": 5}, {"version": 5, "compression": Compression.LZ4_BLOCK},
        {"version": 6, "batch_size": 0x1000},
        {"version": 6, "encrypt": True, "compression": Compression.NONE},
        {"version": 6, "toc": True, "inline_meta": True}, {"version": 6, "inline_meta": True},
        {"version": 5, "inline_meta": True},
    ]  # fmt: skip
    found = []
    for options in kinds:
        with tempfile.TemporaryDirectory() as folder:
            image = nydus.create(io.BytesIO(layer()), folder, chunk_size=0x1000, workers=1, **options)
            (blob,) = Path(folder).iterdir()
            found.append((image.bootstrap(), blob.read_bytes(), image))
    blob = bytearray()
    options_ref = BuildOptions(
        compression=Compression.GZIP, digester=Digester.SHA256, chunk_size=0x1000, toc=True
    )
    result = zran.build_reference(io.BytesIO(gzip.compress(layer(), mtime=0)), blob.extend, options_ref)
    found.append((result.bootstrap, bytes(blob), Image(result.tree, Memory(bytes(blob)))))
    data = bytes(range(256)) * 400
    for version in (5, 6):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "file").write_bytes(data[512:50_000])
            text = (
                _ATTRIBUTES.replace(b"/dir/a", b"/file")
                .replace(b"64KiB", b"16KiB")
                .replace(b" crcs=0x12345678,0xabcdef", b"")
            )
            options = BuildOptions(version=version, chunk_size=0x1000)
            tree = external.build_external(folder, external.Attributes(text), len, options).tree
        found.append((rafs.write(tree), data, Image(tree, Memory(data))))
    return found


def _vector(*names: str) -> list[bytes]:
    return [(VECTORS / name).read_bytes() for name in names if (VECTORS / name).exists()]


def bootstraps(version: int) -> list[bytes]:
    vectors = {
        5: ("merge-v5/bootstrap", "v5-dir-sha256/bootstrap"),
        6: ("merge-v6/bootstrap", "v6-dir-batch/bootstrap", "v6-tarfs/bootstrap", "v6-targz-ref/bootstrap",
            "upstream/bootstrap/rafs-v6-2.2.boot"),
    }  # fmt: skip
    return [boot for boot, _, image in images() if image.tree.version == version] + _vector(*vectors[version])


@cache
def metas() -> list[tuple[BlobInfo, bytes]]:
    """Blob table entries with their ``blob.meta`` files."""
    found = []
    for _, blob, image in images():
        for info in image.tree.blobs:
            if info.meta_uncompressed_size:
                chunks = blobmeta.load(info, lambda at, n, blob=blob: blob[at : at + n], size=len(blob))  # type: ignore[misc]
                found.append((info, blobmeta.to_cache_file(chunks)))
    return found


# -- targets -----------------------------------------------------------------------------------------------


def _choice(data: bytes) -> int:
    return data[0] if data else 0


def read_bootstrap(data: bytes) -> None:
    verify(data)
    head = rafs.superblock(data)
    tree = rafs.read(data)
    assert len(head.blobs) == len(tree.blobs)
    paths = [path for _, path in tree.walk()]
    assert len(paths) == len(tree)
    assert tree.find(paths[-1]) == len(tree) - 1 or len(tree) > 1
    for row in range(0, len(tree), 97):
        assert tree.find(tree.path(row)) == row
        tree.node_xattrs(row)
    for number in range(len(tree.blobs)):
        try:
            Decoder(blobmeta.from_tree(tree, number))
        except NydusError:
            continue
    Image(tree, None).bootstrap()
    rafs.v6.write(as_erofs(tree))


def read_image(data: bytes) -> None:
    """First byte: which blob the bootstrap is over; files, archive and disk are read."""
    _, blob, _ = images()[_choice(data) % len(images())]
    bootstrap = data[1:]
    image = nydus.open(bootstrap, Memory(blob), threads=1)
    files = 0
    for directory, _, names in image.walk():
        for name in names[: _FILES - files]:
            files += 1
            try:
                list(image.stream(f"{directory}/{name}", 5, 9000))
            except (NydusError, OSError):  # symbolic links and devices
                continue
    for whole in (
        lambda: archive.write_tar(image, len),
        lambda: disk.write_disk(image, len, bootstrap=bootstrap, verity=True),
    ):
        try:
            whole()
        except NydusError:
            continue


def read_meta(data: bytes) -> None:
    """First byte: which blob table entry the file belongs to."""
    info, _ = metas()[_choice(data) % len(metas())]
    chunks = blobmeta.from_cache_file(info, data[1:])
    Decoder(chunks)
    chunks.find(5000, 5000)
    for context in range(min(len(chunks.zran), 3)):
        chunks.dictionary(context)


def read_blob(data: bytes) -> None:
    """First byte: which image; the rest is its blob: table of contents, tables, every chunk."""
    _, _, image = images()[_choice(data) % len(images())]
    blob = data[1:]
    backend = Memory(blob)

    def read(offset: int, size: int) -> bytes:
        return backend.read("", offset, size)

    for parse in (toc.read_toc, toc.extract_bootstrap):
        try:
            parse(read, len(blob))
        except NydusError:
            continue
    for info in image.tree.blobs:
        if image.tree.version == 6:
            chunks = blobmeta.load(info, read, size=len(blob))
        else:
            chunks = blobmeta.from_tree(image.tree, 0)
        decoder = Decoder(chunks)
        if info.features & BlobFeature.ZRAN:
            backend.data = gzip.compress(layer(), mtime=0)
        for unit in range(len(decoder.offset)):
            try:
                stored = read(int(decoder.offset[unit]), int(decoder.size[unit]))
                decoder.decode(unit, memoryview(stored))
            except NydusError:
                continue


def read_toc(data: bytes) -> None:
    def read(offset: int, size: int) -> bytes:
        if offset < 0 or size < 0 or offset + size > len(data):
            raise BackendError("beyond the end")
        return data[offset : offset + size]

    found = toc.read_toc(read, len(data))
    for entry in found.entries if found else ():
        try:
            found.read(read, entry.name, limit=1 << 20)  # type: ignore[union-attr]
        except NydusError:
            continue
    rafs.read(toc.extract_bootstrap(read, len(data)))


def build(data: bytes) -> None:
    result = build_layer(io.BytesIO(data), len, BuildOptions(chunk_size=0x1000, workers=1))
    rafs.read(result.bootstrap)


def index(data: bytes) -> None:
    options = BuildOptions(
        compression=Compression.GZIP, digester=Digester.SHA256, chunk_size=0x1000, workers=1
    )
    result = zran.build_reference(io.BytesIO(data), len, options)
    rafs.read(result.bootstrap)


def inflate(data: bytes) -> None:
    for _ in stream.blocks(io.BytesIO(data)):
        pass


def _compressed() -> list[bytes]:
    import zstandard

    return [
        layer(), gzip.compress(layer(), mtime=0),
        gzip.compress(layer()[:9000]) + gzip.compress(layer()[9000:]),
        zstandard.compress(layer()), *_vector("inputs/lower.tar.gz"),
    ]  # fmt: skip


def _tars() -> list[bytes]:
    folder = VECTORS / "upstream" / "tar"
    small = [path for path in folder.iterdir() if path.stat().st_size < 100_000] if folder.exists() else []
    return [layer(), *(path.read_bytes() for path in sorted(small))]


_DAEMON = {
    "device": {
        "backend": {"type": "registry", "config": {"scheme": "http", "host": "h", "repo": "r", "auth": "eDp5",
                                                   "mirrors": [{"host": "http://m", "headers": {"a": "b"}}]}},
        "cache": {"type": "blobcache", "config": {"work_dir": "cache"}},
    },
    "mode": "direct", "digest_validate": False, "amplify_io": 1048576,
    "fs_prefetch": {"enable": True, "threads_count": 8, "merging_size": 131072, "bandwidth_rate": 0},
}  # fmt: skip
_SNAPSHOTTER = b"""version = 1
root = "/var/lib/x"
address = "/run/x.sock"
daemon_mode = "dedicated"
[daemon]
nydusd_config = "/etc/c.json"
fs_driver = "fusedev"
threads_number = 4
[remote.mirrors_config]
dir = ""
[cache_manager]
gc_period = "24h30m"
"""
_HOSTS = b"""server = "https://registry.example"
[host."https://mirror:5000"]
capabilities = ["pull", "resolve"]
skip_verify = true
ca = ["a.pem", "b.pem"]
health_check_interval = 5
[host."https://mirror:5000".header]
x-a = ["1"]
"""
_CHALLENGE = (
    b'Bearer realm="https://auth.example/token",service="registry",scope="repository:a/b:pull", Basic realm=x'
)
_DIGEST, _OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
_STARGZ = {
    "version": 1,
    "entries": [
        {"name": "dir/", "type": "dir", "mode": 493, "modtime": "2020-01-01T00:00:00Z"},
        {"name": "dir/a", "type": "reg", "size": 5, "digest": _DIGEST, "offset": 100, "chunkDigest": _DIGEST,
         "xattrs": {"user.a": "MQ=="}, "uid": 1, "gid": 2},
        {"name": "big", "type": "reg", "size": 0x400005, "digest": _DIGEST, "offset": 400,
         "chunkSize": 0x400000, "chunkDigest": _DIGEST},
        {"name": "big", "type": "chunk", "offset": 9000, "chunkOffset": 0x400000, "chunkDigest": _DIGEST},
        {"name": "in", "type": "reg", "size": 7, "digest": _OTHER, "offset": 100, "innerOffset": 512},
        {"name": "s", "type": "symlink", "linkName": "dir/a"},
        {"name": "h", "type": "hardlink", "linkName": "dir/a"},
        {"name": "c", "type": "char", "devMajor": 5, "devMinor": 1},
    ],
}  # fmt: skip
_ATTRIBUTES = (
    b"""# comment
/dir/a type=external blob_index=0 blob_id=%s chunk_size=64KiB chunk_0_compressed_offset=512 \\
compressed_size=100000 file_size=70000 crcs=0x12345678,0xabcdef
"quoted\\303\\244 \\"x\\"" type=external blob_index=1
plain -type !crcs text
""".replace(b"\\\n", b"")
    % (b"a" * 64)
)
_MANIFEST = {
    "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
    "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": _DIGEST, "size": 7},
    "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": _DIGEST, "size": 1,
                "annotations": {"containerd.io/snapshot/nydus-blob": "true"}}],
}  # fmt: skip


def daemon_document(data: bytes) -> None:
    daemon_config.parse(data).public()


def blob_source(data: bytes) -> None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(document, dict):
        from nydus.image import open_backend

        open_backend(document)[0].close()


def snapshotter_document(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(data)
        file.flush()
        snapshotter_config.load(Path(file.name), {})


def oci_document(data: bytes) -> None:
    with contextlib.suppress(NydusError):
        model.decode_image(data, "application/vnd.oci.image.manifest.v1+json", "fuzz")
    model.decode(data, model.ImageConfig, "fuzz")


def registry_answer(data: bytes) -> None:
    assert len(auth.error_words(data)) <= 300
    for challenge in auth.parse_challenges([data.decode("latin-1")]):
        assert challenge.scheme


@cache
def _registry() -> Registry:
    return Registry("registry.example", credentials=Credentials("user", "secret"))


def redirect(data: bytes) -> None:
    registry = _registry()
    found = registry.transport.url("https://registry.example/v2/", data.decode("latin-1"))
    assert found.startswith(("http://", "https://"))
    registry.transport.at_home(found)


def stargz_contents(data: bytes) -> None:
    options = BuildOptions(
        compression=Compression.GZIP,
        digester=Digester.SHA256,
        chunk_size=0x400000,
        blob_id="a" * 64,
        workers=1,
    )
    result = stargz.build_stargz(io.BytesIO(data), len, options, 1 << 20)
    rafs.read(result.bootstrap)


def attributes_file(data: bytes) -> None:
    found = external.Attributes(data, "fuzz")
    for path in found.names:
        with contextlib.suppress(NydusError):
            found.size(path)
        with contextlib.suppress(NydusError):
            found.location(path, 70_000)


def hosts_document(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hosts.toml"
        path.write_bytes(data)
        hosts._read(path)


def name(data: bytes) -> None:
    parsed = reference.parse(data.decode("utf-8", "surrogateescape"))
    assert str(parsed)


def _documents(*documents: object) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(document, indent=1).encode() for document in documents]


def _numbered(kind: Callable[[], list[tuple[object, bytes]]]) -> Callable[[], list[bytes]]:
    return lambda: [bytes([number]) + data for number, (_, data) in enumerate(kind())]


TARGETS: dict[str, Target] = {
    "bootstrap-v5": Target(lambda: bootstraps(5), read_bootstrap),
    "bootstrap-v6": Target(lambda: bootstraps(6), read_bootstrap),
    "image": Target(_numbered(lambda: [(None, boot) for boot, _, _ in images()]), read_image),
    "blob-meta": Target(_numbered(lambda: list(metas())), read_meta),
    "blob": Target(_numbered(lambda: [(None, blob) for _, blob, _ in images()]), read_blob),
    "toc": Target(lambda: [blob[-60_000:] for _, blob, _ in images()], read_toc),
    "tar": Target(_tars, build),
    "stream": Target(_compressed, inflate),
    "zran": Target(lambda: _compressed()[:3], index),
    "daemon-config": Target(_documents(_DAEMON), daemon_document, text=True),
    "blob-source": Target(
        _documents(_DAEMON, {"type": "localfs", "localfs": {"dir": "/x", "alt_dirs": []}}),
        blob_source, text=True,
    ),
    "snapshotter-config": Target(lambda: [_SNAPSHOTTER], snapshotter_document, text=True),
    "prefetch-files": Target(
        _documents({"version": "v1", "files": [{"path": "/a", "ranges": [[0, 1]]}, {"path": "/b"}]}),
        optimize.parse_prefetch_files,
        text=True,
    ),
    "oci-documents": Target(
        _documents(_MANIFEST, {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers",
                   "diff_ids": [_DIGEST]}, "history": [{"created_by": "x"}], "config": {"Env": ["A=b"]}}),
        oci_document, text=True,
    ),
    "registry-answer": Target(
        lambda: [_CHALLENGE, b'{"errors": [{"code": "DENIED", "message": "no"}]}'], registry_answer, text=True
    ),
    "redirect": Target(
        lambda: [b"https://cdn.example:8443/a/b?c=d", b"/v2/x/blobs/uploads/1", b"http://registry.example:80/"],
        redirect, text=True,
    ),
    "mirror-hosts": Target(lambda: [_HOSTS], hosts_document, text=True),
    "stargz-toc": Target(_documents(_STARGZ), stargz_contents, text=True),
    "attributes": Target(lambda: [_ATTRIBUTES], attributes_file, text=True),
    "reference": Target(
        lambda: [b"docker.io/library/busybox:1@" + _DIGEST.encode(), b"localhost:5000/a/b"], name, text=True
    ),
}  # fmt: skip
