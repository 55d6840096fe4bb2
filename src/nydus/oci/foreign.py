"""Foreign layers: blobs that a registry does not hold, but whose descriptor says from where they can be had.

Most registries refuse what may not be distributed, such as the base layers of Windows images.
"""

from __future__ import annotations

import hashlib
from urllib.parse import urlsplit

import urllib3

from nydus.errors import BackendError
from nydus.oci.auth import shown
from nydus.oci.certificates import certificates
from nydus.oci.model import Descriptor
from nydus.oci.place import RegistryPlace, Source, SourcePlace, Stream, proxy_for
from nydus.oci.transport import REDIRECTS, Transport

_MAX_HOPS = 5
_PIECE = 1 << 20


def open_layer(source: Source, layer: Descriptor, *, plain_http: bool = False) -> Stream:
    """Opens a layer for reading: from where the image is or, if it is not there, from its ``urls``.

    Args:
        plain_http: whether such an address may be without TLS; the digest is checked in any case.
    """
    if not layer.urls or source.has_blob(layer.digest):
        return source.blob(layer.digest, layer.size)
    return ForeignBlob(layer, plain_http=plain_http)


def plain_http(place: SourcePlace) -> bool:
    """Whether the user allows addresses without TLS for an image."""
    return isinstance(place, RegistryPlace) and place.plain_http


class ForeignBlob:
    """A blob read from one of its addresses, checked against its digest at the end.

    Nobody is signed in for that: the addresses are what a document says, and not of the user's choice.

    Raises:
        BackendError: no address answers, or the bytes are wrong.
    """

    def __init__(self, layer: Descriptor, *, plain_http: bool = False) -> None:
        self._layer = layer
        self._hash = hashlib.new(layer.digest.partition(":")[0])
        self._position = 0
        self._transport, self._response = self._open(plain_http)

    def _open(self, plain_http: bool) -> tuple[Transport, urllib3.BaseHTTPResponse]:
        failure = BackendError(f"{self._layer.digest}: has no usable address", permanent=True)
        for url in self._layer.urls:
            parts = urlsplit(url)
            if parts.scheme != "https" and not (plain_http and parts.scheme == "http"):
                what = "foreign layers are only read over https"
                failure = BackendError(f"{shown(url)}: {what}", permanent=True)
                continue
            plain = parts.scheme == "http"
            host = parts.netloc.rpartition("@")[2]
            tls = certificates(host)
            transport = Transport(
                host,
                plain_http=plain,
                ca_certs=tls.ca,
                client_certs=tls.client,
                proxy=proxy_for(parts.scheme, host),
            )
            try:
                return transport, transport.attempt(lambda t=transport, u=url: _get(t, u))  # type: ignore[misc]
            except BackendError as error:
                transport.close()
                failure = error
        raise failure

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(_PIECE), b""))
        data = self._transport.read(self._response, size)
        self._hash.update(data)
        self._position += len(data)
        layer = self._layer
        if self._position > layer.size:
            raise BackendError(f"{shown(layer.urls[0])}: larger than {layer.size} bytes", permanent=True)
        if len(data) < size:
            found = f"{layer.digest.partition(':')[0]}:{self._hash.hexdigest()}"
            if found != layer.digest:
                what = f"corrupted foreign layer: expected {layer.digest}, found {found}"
                raise BackendError(f"{shown(layer.urls[0])}: {what}", permanent=self._position == layer.size)
        return data

    def close(self) -> None:
        self._response.close()
        self._transport.close()


def _get(transport: Transport, url: str) -> urllib3.BaseHTTPResponse:
    for _ in range(_MAX_HOPS):
        response = transport.send("GET", url, {})
        if response.status == 200:
            return response
        if response.status not in REDIRECTS:
            raise transport.refusal(response, "GET", url)
        transport.discard(response)
        url = transport.url(url, response.headers.get("Location", ""))
    raise BackendError(f"{transport.host}: more than {_MAX_HOPS} redirects", permanent=True)
