"""Labels of snapshots: those that containerd forwards, ``containerd.io/snapshot.ref`` and ``…/snapshot/*``.

For the boolean ones presence counts, whatever the value: deployed images rely on it.
"""

from __future__ import annotations

from collections.abc import Mapping

_PREFIX = "containerd.io/snapshot/"

TARGET = "containerd.io/snapshot.ref"
"""The chain ID this Prepare is meant to produce; absent for the writable layer of a container."""

IMAGE_REF = _PREFIX + "cri.image-ref"
LAYER_DIGEST = _PREFIX + "cri.layer-digest"
MANIFEST_DIGEST = _PREFIX + "cri.manifest-digest"
IMAGE_LAYERS = _PREFIX + "cri.image-layers"
STARGZ_REF = _PREFIX + "remote/stargz.reference"
STARGZ_DIGEST = _PREFIX + "remote/stargz.digest"

BLOB = _PREFIX + "nydus-blob"
BOOTSTRAP = _PREFIX + "nydus-bootstrap"

USERNAME = _PREFIX + "pullusername"
SECRET = _PREFIX + "pullsecret"
VOLATILE = _PREFIX + "overlay.volatile"
UID_MAPPING = _PREFIX + "uidmapping"
GID_MAPPING = _PREFIX + "gidmapping"

SECRETS = frozenset({USERNAME, SECRET})


def image_reference(labels: Mapping[str, str]) -> str:
    """The reference the image was pulled by, or ``""``: the CRI's label, else the older one of stargz."""
    return labels.get(IMAGE_REF) or labels.get(STARGZ_REF) or ""


def layer_digest(labels: Mapping[str, str]) -> str:
    """The digest of the compressed layer (``sha256:…``), or ``""``."""
    return labels.get(LAYER_DIGEST) or labels.get(STARGZ_DIGEST) or ""
