"""Source images in a registry of the tests."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tarfile
import time
from pathlib import Path

from faulty import FaultyRegistry

from nydus.convert.copy import copy
from nydus.oci import model
from nydus.oci.place import ArchivePlace, RegistryPlace, Sink
from nydus.oci.reference import parse
from nydus.oci.registry import Registry


def place(reference: str) -> RegistryPlace:
    return RegistryPlace(parse(reference), plain_http=True)


def source_of(server: FaultyRegistry, vectors: Path, vector: str) -> str:
    """What the reference made a vector of (``NAME`` or ``run/NAME``), in a repository of this name."""
    folder = Path(vector).parent
    reference = f"{server.host}/{folder.name or 'small'}:latest"
    copy(ArchivePlace(vectors / "oci" / folder / "source.tar"), place(reference))
    return reference


def docker_image(source: str) -> tuple[RegistryPlace, str]:
    """An image as Docker's schema 2, with the tag ``docker``, and the digest of its manifest."""
    reference = parse(source)
    with Registry(reference.host, plain_http=True) as registry:
        repository = registry.repository(reference.repository)
        text = repository.manifest(reference.target)[1].decode()
        text = text.replace(model.OCI_LAYER_GZIP, model.DOCKER_LAYER_GZIP).replace(
            model.OCI_CONFIG, model.DOCKER_CONFIG
        )
        document = {"schemaVersion": 2, "mediaType": model.DOCKER_MANIFEST, **json.loads(text)}
        stored = repository.put_manifest("docker", model.encode(document), model.DOCKER_MANIFEST)
    return place(f"{reference.host}/{reference.repository}:docker"), stored.digest


def two_platforms(host: str) -> RegistryPlace:
    """An index of the image ``small`` for two platforms, with an attestation as BuildKit adds them."""
    with Registry(host, plain_http=True) as registry:
        repository = registry.repository("small")
        manifest = json.loads(repository.manifest("latest")[1])
        entries = []
        for architecture in ("amd64", "arm64"):
            config = repository.document(
                model.Descriptor(**{k: manifest["config"][k] for k in ("digest", "size")})
            )
            changed = repository.put_blob(config.replace(b"amd64", architecture.encode()), model.OCI_CONFIG)
            manifest["config"] = json.loads(model.encode(changed))
            stored = repository.put_manifest(
                model.digest(model.encode(manifest)), model.encode(manifest), model.OCI_MANIFEST
            )
            entries.append(
                {
                    **json.loads(model.encode(stored)),
                    "platform": {"architecture": architecture, "os": "linux"},
                }
            )
        note = {
            **entries[0],
            "platform": {"architecture": "unknown", "os": "unknown"},
            "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
        }
        index = {"schemaVersion": 2, "mediaType": model.OCI_INDEX, "manifests": [*entries, note]}
        repository.put_manifest("two", model.encode(index), model.OCI_INDEX)
    return place(f"{host}/small:two")


def no_tag(server: FaultyRegistry) -> bool:
    with Registry(server.host, plain_http=True) as registry:
        if registry.repository("small").has_manifest("nydus"):
            return False

    def uploads() -> list[Path]:
        # One that a worker began when it was ended may be left: nobody was there to hear where it is.
        found = []
        for path in server.store.uploads.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found += [path] * bool(path.stat().st_size)
        return found

    deadline = time.monotonic() + 5  # the last request of a worker that was ended may still be answered
    while uploads() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not uploads()


def source_layer(server: FaultyRegistry, number: int = 1) -> Path:
    with Registry(server.host, plain_http=True) as registry:
        manifest = json.loads(registry.repository("small").manifest("latest")[1])
    return server.store.blobs / manifest["layers"][number]["digest"].partition(":")[2]


def layer_of(*names: str, mode: int = 0o755) -> bytes:
    """A gzip tar of empty files and (with a slash at the end) directories."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in names:
            entry = tarfile.TarInfo(name.rstrip("/"))
            entry.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            entry.mode, entry.uid, entry.mtime = mode, 7, 1234567
            archive.addfile(entry)
    return buffer.getvalue()


def layer_with(name: str, data: bytes) -> bytes:
    """A gzip tar of one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def put_image(server: FaultyRegistry, tag: str, *layers: bytes) -> RegistryPlace:
    with Registry(server.host, plain_http=True) as registry:
        store_image(registry.repository("small"), tag, *layers)
    return place(f"{server.host}/small:{tag}")


def store_image(sink: Sink, tag: str, *layers: bytes) -> None:
    diff_ids = [model.digest(gzip.decompress(layer)) for layer in layers]
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = model.Manifest(
        schema_version=2,
        media_type=model.OCI_MANIFEST,
        config=sink.put_blob(model.encode(config), model.OCI_CONFIG),
        layers=tuple(sink.put_blob(layer, model.OCI_LAYER_GZIP) for layer in layers),
    )
    sink.put_manifest(tag, model.encode(manifest), model.OCI_MANIFEST)
