"""What goes to and comes from the processes that convert layers; light to import: no process waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nydus.convert.backend import BackendPlace
from nydus.convert.options import ConvertOptions
from nydus.oci.model import Descriptor
from nydus.oci.place import SinkPlace, SourcePlace

if TYPE_CHECKING:
    from nydus.rafs.model import Tree


@dataclass(frozen=True, slots=True)
class Job:
    """One layer to convert, with all that another process needs to know.

    Attributes:
        number: of the layer in its image, from 1; for messages.
        target: where the blob goes.
        dictionary: chunks to refer to instead of storing them again.
    """

    number: int
    layer: Descriptor
    source: SourcePlace
    target: SinkPlace | BackendPlace
    options: ConvertOptions
    dictionary: Tree | None = None


@dataclass(slots=True)
class Converted:
    """One layer that is in the target.

    Attributes:
        tree: its file system, for the merge.
        meta: its ``blob.meta`` file, b"" for a layer without file data.
        duplicates: chunks that were found more than once.
        bootstrap: sha256 (hex) of the bootstrap in the blob.
        toc, toc_size: sha256 (hex) and size of the blob's table of contents.
        reference: digest of the source layer that holds the data (oci-ref), else "".
        reused: it was converted before.
    """

    digest: str
    size: int
    tree: Tree
    meta: bytes
    duplicates: int
    seconds: float
    bootstrap: str = ""
    toc: str = ""
    toc_size: int = 0
    reused: bool = False
    reference: str = ""
