"""The files that scripts look for in the work folder of ``nydusify check``, besides the documents."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from nydus.build.bootstrap import load
from nydus.cli import image_options
from nydus.cli.image_options import Trace
from nydus.convert.documents import BOOTSTRAP
from nydus.errors import NydusError

#: Where version 2.2 of the reference had what newer ones have in a folder for each image.
_FLAT = {
    "nydus_manifest.json": "target/nydus_manifest.json",
    "nydus_config.json": "target/nydus_config.json",
    "nydus_bootstrap": f"target/nydus_bootstrap/{BOOTSTRAP}",
    "nydus_bootstrap_debug.json": "target/nydus_output.json",
    "oci_manifest.json": "source/oci_manifest.json",
    "oci_config.json": "source/oci_config.json",
}


def complete(work_dir: Path) -> None:
    """Adds what ``nydus-image check`` says of each bootstrap (of a damaged one, ``error``), and links in the
    place of older versions.

    Raises:
        OSError: a file cannot be written.
    """
    for folder in (work_dir / "source", work_dir / "target"):
        path = folder / "nydus_bootstrap" / BOOTSTRAP
        if not path.is_file():
            continue
        output = str(folder / "nydus_output.json")
        trace = Trace()
        try:
            with trace.time("load_tree_from_bootstrap"):
                tree = load(str(path))
        except NydusError as error:
            image_options.write_result(output, {"error": str(error)}, indent=None)
            continue
        document = image_options.result(tree, str(path), [blob.id for blob in tree.blobs], trace)
        image_options.write_result(output, document, indent=None)
    for name, place in _FLAT.items():
        link = work_dir / name
        if link.is_symlink():
            link.unlink()
        if (work_dir / place).exists():
            with suppress(FileExistsError):  # something of the user's
                link.symlink_to(place)
