"""The images to measure on: Debian packages where the tool for that is beside the checkout, or the demo's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nydus.demo.image import build

ROOT = Path(__file__).resolve().parents[1]
MAKE_IMAGE = ROOT.parent / "shared" / "tools" / "make-image"
CACHE = Path("/var/tmp/nydus-bench-images")
#: The images made there, and the packages of each of their layers but the first, which is Debian.
MADE = {
    "python": ("python3 python3-pip python3-numpy",),
    "wordpress": ("apache2 libapache2-mod-php php-mysql", "wordpress"),
}
PROGRAMS = {
    "echo": ("/bin/sh", "-c", "echo started"),
    "python3 json": ("python3", "-c", "import json; print('started', flush=True)"),
    "python3 numpy": ("python3", "-c", "import json, numpy; print('started', flush=True)"),
}


@dataclass(frozen=True)
class BenchImage:
    """An OCI layout with a shell, python3 and numpy in it."""

    title: str
    layout: Path

    @property
    def environment(self) -> list[str]:
        config: list[str] = self._blob(self._manifest["config"]["digest"])["config"]["Env"]
        return config

    @property
    def size(self) -> int:
        """Compressed bytes of all layers."""
        return sum(layer["size"] for layer in self._manifest["layers"])

    @property
    def largest_layer(self) -> Path:
        layer: dict[str, Any] = max(self._manifest["layers"], key=lambda one: one["size"])
        return self.layout / "blobs" / "sha256" / str(layer["digest"])[7:]

    @property
    def _manifest(self) -> dict[str, Any]:
        index = json.loads((self.layout / "index.json").read_bytes())
        return self._blob(index["manifests"][0]["digest"])

    def _blob(self, digest: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.layout / "blobs" / "sha256" / digest[7:]).read_bytes())
        return document


def find(layouts: Sequence[Path], folder: Path) -> list[BenchImage]:
    """The images to use; the first has python3 and numpy.

    Args:
        layouts: OCI layouts of the user's; none for ours.
        folder: where the demo's image is made if it is used.
    """
    if layouts:
        return [BenchImage(layout.name, layout) for layout in layouts]
    if not MAKE_IMAGE.exists():
        return [BenchImage("demo", build(folder / "image").layout)]
    for name, packages in MADE.items():
        if not (CACHE / name / "index.json").exists():
            # In a mount namespace of its own: what it mounts cannot stay behind.
            unshare = ["unshare", "--mount", "--propagation", "private"]
            make = [*unshare, str(MAKE_IMAGE), str(CACHE), name, *packages]
            subprocess.run(make, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return [BenchImage(name, CACHE / name) for name in MADE]
