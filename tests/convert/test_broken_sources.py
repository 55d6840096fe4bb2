"""Sources that cannot be converted: one clear error, and no tag."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faulty import FaultyRegistry
from images import no_tag, place, source_layer

from nydus.convert.copy import copy
from nydus.convert.image import image
from nydus.convert.options import ConvertOptions
from nydus.errors import FormatError, NydusError
from nydus.oci import model
from nydus.oci.place import ArchivePlace
from nydus.oci.registry import Registry

pytestmark = pytest.mark.vectors


@pytest.mark.parametrize("damage", ["bit", "cut", "other"])
def test_damaged_layers(server: FaultyRegistry, source: str, damage: str) -> None:
    path = source_layer(server)
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 4
    elif damage == "cut":
        del data[-100:]
    else:
        data[:] = bytes(len(data))
    path.write_bytes(data)
    with pytest.raises(
        NydusError, match=r"^layer 2.*(corrupted blob: expected sha256|truncated: \d+ of)"
    ) as caught:
        image(place(source), place(f"{server.host}/small:nydus"))
    assert "\n" not in str(caught.value)
    assert no_tag(server)


def test_a_layer_that_is_no_archive(server: FaultyRegistry, source: str) -> None:
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        manifest = json.loads(repository.manifest("latest")[1])
        layer = repository.put_blob(b"no tar at all" * 1000, model.OCI_LAYER_GZIP)
        manifest["layers"][1] = json.loads(model.encode(layer))
        repository.put_manifest("broken", model.encode(manifest), model.OCI_MANIFEST)
    with pytest.raises(FormatError, match=r"layer 2 .*small:broken"):
        image(place(f"{server.host}/small:broken"), place(f"{server.host}/small:nydus"))
    assert no_tag(server)


def test_what_cannot_be_converted_is_refused_before_anything_is_pushed(
    server: FaultyRegistry, source: str, vectors: Path
) -> None:
    copy(ArchivePlace(vectors / "oci/v6-zstd.tar"), place(f"{server.host}/small:done"))
    with Registry(server.host, plain_http=True) as registry:
        repository = registry.repository("small")
        text = repository.manifest("latest")[1]
        changed = text.replace(b"v1.tar+gzip", b"v1.tar+gzip+encrypted")
        repository.put_manifest("encrypted", changed, model.OCI_MANIFEST)
        manifest = json.loads(text)
        del manifest["layers"][0]
        repository.put_manifest("fewer", model.encode(manifest), model.OCI_MANIFEST)
    server.seen.clear()
    for tag, words in (
        ("done", "is a Nydus image already"),
        ("encrypted", "layer 1 is encrypted"),
        ("fewer", "wrong number of layers"),
        ("unknown", "404 manifest unknown"),
    ):
        with pytest.raises(NydusError, match=words):
            image(place(f"{server.host}/small:{tag}"), place(f"{server.host}/small:nydus"))
    assert not server.paths("POST")


def test_a_network_that_fails_for_a_while(server: FaultyRegistry, source: str) -> None:
    from faulty import Times, hang_up

    server.intercepts.append(Times(1, lambda h: h.command == "PUT" and "/blobs/" in h.path, hang_up))
    image(place(source), place(f"{server.host}/small:nydus"), ConvertOptions(retry_delay=0.1))
    assert not no_tag(server)
