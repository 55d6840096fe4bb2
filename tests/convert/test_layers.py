"""Layers of every kind: how they are compressed, what is in them, where they are."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import tarfile
from collections.abc import Sequence

import msgspec
import pytest
import zstandard
from documents import tree_of
from faulty import FaultyHandler, FaultyRegistry
from nydusify_command import Nydusify

from nydus.convert.image import image
from nydus.convert.options import ConvertOptions
from nydus.errors import BackendError, ConfigError, NydusError
from nydus.oci import model
from nydus.oci.place import RegistryPlace
from nydus.oci.reference import parse
from nydus.oci.registry import Registry

DATA = random.Random(5).randbytes(200_000)


def archive(**files: bytes | None) -> bytes:
    """A plain tar; None is a directory, ``__`` in names a slash."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as found:
        for name, data in files.items():
            entry = tarfile.TarInfo(name.replace("__", "/"))
            entry.type, entry.size = (tarfile.DIRTYPE, 0) if data is None else (tarfile.REGTYPE, len(data))
            entry.mode, entry.uid, entry.mtime = 0o755, 7, 1234567
            found.addfile(entry, io.BytesIO(data or b""))
    return buffer.getvalue()


Layer = tuple[bytes, bytes, str]  # the archive, how it is stored, its type


def zipped(data: bytes) -> Layer:
    return data, gzip.compress(data, mtime=0), model.OCI_LAYER_GZIP


def put_image(
    server: FaultyRegistry, layers: Sequence[Layer], urls: dict[int, tuple[str, ...]] | None = None
) -> RegistryPlace:
    """Stores an image as ``small:kinds``; layers that have addresses are not stored."""
    urls = urls or {}
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        diff_ids = [model.digest(plain) for plain, _, _ in layers]
        config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        listed = []
        for number, (_, stored, kind) in enumerate(layers):
            if number in urls:
                described = msgspec.structs.replace(model.describe(stored, kind), urls=urls[number])
            else:
                described = repository.put_blob(stored, kind)
            listed.append(described)
        manifest = model.Manifest(
            schema_version=2,
            media_type=model.OCI_MANIFEST,
            config=repository.put_blob(model.encode(config), model.OCI_CONFIG),
            layers=tuple(listed),
        )
        repository.put_manifest("kinds", model.encode(manifest), model.OCI_MANIFEST)
    return RegistryPlace(parse(f"{server.host}/small:kinds"), plain_http=True)


def target(server: FaultyRegistry) -> RegistryPlace:
    return RegistryPlace(parse(f"{server.host}/small:nydus"), plain_http=True)


def check(nydusify: Nydusify, server: FaultyRegistry, *more: str) -> None:
    name = f"{server.host}/small"
    done = nydusify(
        "check", "--source", f"{name}:kinds", "--target", f"{name}:nydus", "--plain-http", "-q", *more
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr


KINDS = [
    zipped(archive(a=None, a__b=DATA, c=b"below")),
    (empty := archive(), empty, "application/vnd.oci.image.layer.v1.tar"),
    (tar := archive(c=DATA[:5000], d=b""), tar, "application/vnd.oci.image.layer.v1.tar"),
    (tar := archive(e__f=None), zstandard.compress(tar), "application/vnd.oci.image.layer.v1.tar+zstd"),
    (tar := archive(g=DATA[::-1]), zstandard.compress(tar), "application/vnd.oci.image.layer.v1.tar+zstd"),
    zipped(archive(a__nothing=b"", h=None)),
    (tar := archive(i=b"one\n"), gzip.compress(tar), model.DOCKER_LAYER_GZIP),
    zipped(empty),
]


@pytest.mark.parametrize(
    "options", [ConvertOptions(), ConvertOptions(fs_version=5), ConvertOptions(batch_size=0x10000)]
)
def test_kinds_of_layers(server: FaultyRegistry, nydusify: Nydusify, options: ConvertOptions) -> None:
    result = image(put_image(server, KINDS), target(server), options)
    assert len(result.layers) == len(KINDS)
    check(nydusify, server, "--no-mount")


@pytest.mark.parametrize("oci_ref", [False, True])
def test_an_image_without_any_data(server: FaultyRegistry, nydusify: Nydusify, oci_ref: bool) -> None:
    layers = [zipped(archive(a=None)), zipped(archive()), zipped(archive(a__b=b""))]
    image(put_image(server, layers), target(server), ConvertOptions(oci_ref=oci_ref))
    check(nydusify, server, "--no-mount")


def test_an_index_over_layers_that_are_not_compressed(server: FaultyRegistry, nydusify: Nydusify) -> None:
    image(put_image(server, KINDS[:3]), target(server), ConvertOptions(oci_ref=True))
    check(nydusify, server, "--no-mount")


@pytest.mark.root
@pytest.mark.parametrize("fs_version", [6, 5])
def test_as_many_layers_as_runtimes_allow(
    server: FaultyRegistry, nydusify: Nydusify, fs_version: int
) -> None:
    """127, each with a blob of its own; compared through a mount."""
    layers = [
        zipped(archive(**{f"d{n}": None, f"d{n}__f": DATA[n:4000], "x": DATA[n:99]})) for n in range(127)
    ]
    image(put_image(server, layers), target(server), ConvertOptions(fs_version=fs_version))
    assert len(tree_of(target(server).open(), "nydus").blobs) == 127
    check(nydusify, server)


class Elsewhere:
    """Serves the layers that the registry does not have."""

    def __init__(self, server: FaultyRegistry, data: bytes) -> None:
        self._data, self.asked = data, 0
        self.url = f"http://{server.host}/foreign"
        server.intercepts.append(self)

    def __call__(self, handler: FaultyHandler) -> bool:
        if handler.path == "/moved":
            handler.reply(302, b"", {"Location": "/foreign"})
        elif handler.path == "/foreign":
            assert "Authorization" not in handler.headers
            self.asked += 1
            handler.reply(200, self._data)
        elif handler.path == "/gone":
            handler.reply(404)
        else:
            return False
        return True


FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"


def foreign(server: FaultyRegistry, *urls: str) -> RegistryPlace:
    tar, stored, _ = zipped(archive(base=DATA))
    return put_image(server, [(tar, stored, FOREIGN), zipped(archive(top=b"x"))], {0: urls})


def test_foreign_layers(server: FaultyRegistry, nydusify: Nydusify) -> None:
    _, stored, _ = zipped(archive(base=DATA))
    elsewhere = Elsewhere(server, stored)
    base = elsewhere.url.removesuffix("/foreign")
    source = foreign(server, f"{base}/gone", f"{base}/moved")
    image(source, target(server))
    assert elsewhere.asked == 1
    check(nydusify, server, "--no-mount")
    with pytest.raises(ConfigError, match=r"layer 1 is not in the registry.*convert it instead"):
        image(source, target(server), ConvertOptions(oci_ref=True))


@pytest.mark.parametrize("damage", ["bit", "cut", "longer"])
def test_a_foreign_layer_that_is_something_else(server: FaultyRegistry, damage: str) -> None:
    _, stored, _ = zipped(archive(base=DATA))
    changed = {"bit": bytes([*stored[:-1], stored[-1] ^ 1]), "cut": stored[:-9], "longer": stored + b"x"}
    elsewhere = Elsewhere(server, changed[damage])
    with pytest.raises(NydusError, match=r"layer 1.*(corrupted foreign layer|larger than|expected)"):
        image(foreign(server, elsewhere.url), target(server), ConvertOptions(retry_delay=0))
    assert not (server.store.repository("small") / "_tags/nydus").exists()


def test_foreign_layers_without_tls_have_to_be_allowed() -> None:
    from nydus.oci.foreign import ForeignBlob

    layer = model.Descriptor(
        digest=f"sha256:{hashlib.sha256().hexdigest()}", size=0, urls=("http://127.0.0.1:1/x", "file:///etc")
    )
    with pytest.raises(BackendError, match="only read over https"):
        ForeignBlob(layer)
