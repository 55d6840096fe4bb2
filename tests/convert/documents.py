"""Images as nested documents, for comparing two of them key by key."""

from __future__ import annotations

import json
from typing import Any

from nydus import rafs
from nydus.convert.documents import unpack_bootstrap_layer
from nydus.oci import model
from nydus.oci.place import Source
from nydus.rafs.model import Tree

#: What rightly differs between two builders of the same image.
DIFFERENT = {"digest", "size"}


def load(source: Source, reference: str) -> Any:
    """The manifest or index with everything it refers to put in place."""
    descriptor, data = source.manifest(reference)
    document = json.loads(data)
    document["content type"] = descriptor.media_type or document.get("mediaType", "")
    if "manifests" in document:
        for entry in document["manifests"]:
            entry["content"] = load(source, entry["digest"])
        return document
    config = model.Descriptor(digest=document["config"]["digest"], size=document["config"]["size"])
    document["config"]["content"] = json.loads(source.document(config))
    return document


def without(document: Any, keys: set[str]) -> Any:
    """A copy without some keys, at any depth."""
    if isinstance(document, dict):
        return {key: without(value, keys) for key, value in document.items() if key not in keys}
    if isinstance(document, list):
        return [without(value, keys) for value in document]
    return document


def bootstrap_files(source: Source, reference: str) -> tuple[dict[str, bytes], str]:
    """The files of the bootstrap layer of a single image, and its diff id."""
    descriptor, data = source.manifest(reference)
    manifest = model.decode_image(data, descriptor.media_type, reference)
    assert isinstance(manifest, model.Manifest)
    return unpack_bootstrap_layer(source.document(manifest.layers[-1]), reference)


def tree_of(source: Source, reference: str) -> Tree:
    return rafs.read(bootstrap_files(source, reference)[0]["image/image.boot"], reference)


def listing(tree: Tree) -> dict[str, tuple[Any, ...]]:
    """What is compared of each path: all attributes and the digests of the chunks."""
    found = {}
    for row, path in tree.walk():
        node = tree.nodes[row]
        attributes = tuple(int(node[key]) for key in ("mode", "uid", "gid", "nlink", "mtime"))
        size = int(node["size"]) if node["mode"] & 0o170000 != 0o040000 else 0
        chunks = [bytes(chunk["digest"]).hex() for chunk in tree.node_chunks(row)]
        xattrs = dict(tree.node_xattrs(row))
        found[path.decode("utf8", "surrogateescape")] = (*attributes, size, tree.target(row), chunks, xattrs)
    return found


def tree_listing(source: Source, reference: str) -> tuple[dict[str, tuple[Any, ...]], list[bytes]]:
    """The listing of an image's tree, and the paths of its prefetch table."""
    tree = tree_of(source, reference)
    return listing(tree), [tree.path(row) for row in tree.prefetch]
