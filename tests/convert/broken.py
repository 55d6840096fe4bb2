"""Images that are broken in ways no digest shows: what names a changed part is changed with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nydus.convert.copy import copy
from nydus.convert.documents import bootstrap_layer, unpack_bootstrap_layer
from nydus.oci import model
from nydus.oci.layout import Layout, blob_path
from nydus.oci.place import LayoutPlace, SourcePlace
from nydus.rafs import toc

BOOT = "image/image.boot"


class Rebuilt:
    """A copy of an image in a layout, whose parts can be changed with all digests following."""

    def __init__(self, source: SourcePlace, folder: Path) -> None:
        self.place = LayoutPlace(folder, "latest")
        copy(source, self.place)
        self.layout = Layout(folder)
        self.manifest: dict[str, Any] = json.loads(self.layout.manifest("latest")[1])
        self.config: dict[str, Any] = json.loads(self.blob(self.manifest["config"]["digest"]))

    def blob(self, digest: str) -> bytes:
        return (self.layout.root / blob_path(digest)).read_bytes()

    def layer(self, number: int) -> bytes:
        return self.blob(self.manifest["layers"][number]["digest"])

    def files(self) -> dict[str, bytes]:
        """Of the bootstrap layer."""
        return unpack_bootstrap_layer(self.layer(-1), "")[0]

    def save(self) -> None:
        config = self.layout.put_blob(model.encode(self.config), model.OCI_CONFIG)
        self.manifest["config"] = json.loads(model.encode(config))
        self.layout.put_manifest("latest", model.encode(self.manifest), model.OCI_MANIFEST)

    def set_layer(self, number: int, data: bytes, diff_id: str = "") -> str:
        stored = self.layout.put_blob(data, "")
        self.manifest["layers"][number] |= {"digest": stored.digest, "size": stored.size}
        self.config["rootfs"]["diff_ids"][number] = diff_id or stored.digest
        self.save()
        return stored.digest.removeprefix("sha256:")

    def set_files(self, files: dict[str, bytes]) -> None:
        metas = {name[6:-10]: data for name, data in files.items() if name.endswith(".blob.meta")}
        self.set_layer(-1, *bootstrap_layer(files[BOOT], metas))

    def set_blob(self, number: int, data: bytes) -> None:
        """Puts other bytes in place of a blob; bootstrap and table are renamed with it."""
        old = self.manifest["layers"][number]["digest"].removeprefix("sha256:")
        files = self.files()
        new = self.set_layer(number, data)
        self.set_files({name.replace(old, new): part for name, part in files.items()} | {
            BOOT: files[BOOT].replace(old.encode(), new.encode())
        })  # fmt: skip

    def flip(self, place: Callable[[toc.Toc, bytes], int], number: int = 0) -> None:
        """Changes one bit of a blob, at the offset that ``place`` gives."""
        data = bytearray(self.layer(number))
        contents = toc.read_toc(lambda offset, size: bytes(data[offset : offset + size]), len(data))
        assert contents is not None
        data[place(contents, bytes(data))] ^= 1
        self.set_blob(number, bytes(data))


def section(name: str, at: int = 0) -> Callable[[toc.Toc, bytes], int]:
    """The offset of a section of a blob."""

    def place(contents: toc.Toc, data: bytes) -> int:
        entry = contents.find(name)
        assert entry is not None
        return entry.offset + at % entry.compressed_size

    return place
