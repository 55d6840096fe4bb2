"""Client of the OCI distribution API (and of Docker's registry API V2, its ancestor).

    registry = Registry("127.0.0.1:5000", plain_http=True)
    repository = registry.repository("demo/app")
    descriptor, data = repository.manifest("latest")

Everything received is checked: documents and blobs against their digest, ranges against their exact length.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Iterable, Mapping
from urllib.parse import quote, urlencode, urlsplit

import msgspec
import urllib3

from nydus.errors import BackendError
from nydus.oci import model
from nydus.oci.auth import Credentials
from nydus.oci.blobstream import BlobStream
from nydus.oci.model import Descriptor
from nydus.oci.reference import DIGEST
from nydus.oci.transport import REDIRECTS, Policy, Transport, content_length
from nydus.oci.upload import Upload

_ACCEPT = ", ".join([model.OCI_INDEX, model.OCI_MANIFEST, model.DOCKER_INDEX, model.DOCKER_MANIFEST, "*/*"])
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_MAX_HOPS = 5
_MAX_LOCATIONS = 4096
_MANIFEST_TIMEOUT = 60.0


class _Referring(msgspec.Struct, rename="camel"):
    """What a manifest says of its subject."""

    subject: Descriptor | None = None
    artifact_type: str = ""
    config: Descriptor | None = None
    annotations: dict[str, str] | None = None


class Registry:
    """One registry: its connections and its sign-in, shared by all repositories. Thread-safe.

    Args:
        host: ``host[:port]``; see :attr:`nydus.oci.reference.Reference.endpoint`.
        plain_http: speak http instead of https; never chosen by itself.
        skip_verify: accept any TLS certificate.
        ca_certs: PEM files trusted besides those of the system.
        client_certs: PEM files (certificate, key) to show to a registry that asks who we are.
        credentials: user and password, or :class:`~nydus.oci.auth.Credentials`; None is anonymous.
        policy: time limits and retries.
        proxy: URL of an HTTP proxy, or "".
        headers: sent along with every request to the registry itself.
        redirect_scheme, redirect_host: put in place of these parts of the addresses blobs are redirected to.
        push_chunk_size: bytes of one request of an upload; 0 streams (see :class:`~nydus.oci.upload.Upload`).
        root: path of the API.
        namespace: the registry that this one stands for, told it with every question; "" for none.
    """

    def __init__(
        self,
        host: str,
        *,
        plain_http: bool = False,
        skip_verify: bool = False,
        ca_certs: Iterable[str] = (),
        client_certs: Iterable[tuple[str, str]] = (),
        credentials: Credentials | tuple[str, str] | None = None,
        policy: Policy | None = None,
        proxy: str = "",
        headers: Mapping[str, str] | None = None,
        redirect_scheme: str = "",
        redirect_host: str = "",
        push_chunk_size: int = 0,
        root: str = "/v2",
        namespace: str = "",
    ) -> None:
        if isinstance(credentials, tuple):
            credentials = Credentials(*credentials)
        self.host = host
        self.redirect_scheme, self.redirect_host = redirect_scheme, redirect_host
        self.push_chunk_size = push_chunk_size
        self.root, self.namespace = root, namespace
        self.transport = Transport(
            host,
            plain_http=plain_http,
            skip_verify=skip_verify,
            ca_certs=tuple(ca_certs),
            client_certs=tuple(client_certs),
            credentials=credentials,
            policy=policy,
            proxy=proxy,
            headers=headers,
        )

    def repository(self, name: str) -> Repository:
        return Repository(self, name)

    def close(self) -> None:
        self.transport.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Repository:
    """The images and blobs of one repository. Thread-safe.

    Every method raises :class:`~nydus.errors.BackendError` in the registry's own words.
    """

    def __init__(self, registry: Registry, name: str) -> None:
        self.registry, self.name = registry, name
        self.transport = registry.transport
        # Below /v2 there may be the name of a project, which a token server then knows the repository by.
        scope = f"{registry.root}/{name}".removeprefix("/v2/") if registry.root.startswith("/v2/") else name
        self.pull = f"repository:{scope}:pull"
        self.push = f"repository:{scope}:pull,push"
        self.path = f"{registry.root}/{name}"
        self._query = f"?{urlencode({'ns': registry.namespace})}" if registry.namespace else ""
        self._locations: dict[str, str] = {}

    def __str__(self) -> str:
        return f"{self.registry.host}/{self.name}"

    # Documents

    def manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        """Fetches a manifest or index by tag or digest, at most 8 MiB.

        Returns:
            Its descriptor (digest and size are those of the bytes) and the bytes.
        """
        descriptor, data = self.transport.attempt(lambda: self._manifest(reference))
        return descriptor, data

    def _manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        where = f"{self}{'@' if ':' in reference else ':'}{reference}"
        response = self.transport.request(
            "GET",
            f"{self.path}/manifests/{quote(reference, safe=':')}{self._query}",
            self.pull,
            {"Accept": _ACCEPT},
            ok=(200,),
        )
        data = self.transport.read_all(response, model.MAX_DOCUMENT)
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
        wanted = reference if ":" in reference else response.headers.get("Docker-Content-Digest", "")
        if DIGEST.fullmatch(wanted):
            found = _digest_of(data, wanted)
            if found != wanted:
                raise BackendError(
                    f"{where}: corrupted manifest: expected {wanted}, found {found}", permanent=True
                )
        return model.describe(data, media_type), data

    def has_manifest(self, reference: str) -> bool:
        """Whether a manifest exists."""

        def ask() -> bool:
            path = f"{self.path}/manifests/{quote(reference, safe=':')}{self._query}"
            response = self.transport.request("HEAD", path, self.pull, {"Accept": _ACCEPT}, ok=(200, 404))
            self.transport.discard(response)
            return response.status == 200

        return self.transport.attempt(ask)

    def put_manifest(self, reference: str, data: bytes, media_type: str) -> Descriptor:
        """Stores a manifest or index under a tag or its digest; all it names must be there before.

        If it has a subject and the registry does not know the referrers API, the index that stands in for
        it (tag ``sha256-<hex>``) is extended.
        """
        described = model.describe(data, media_type)

        def put() -> bool:
            path = f"{self.path}/manifests/{quote(reference, safe=':')}"
            headers = {"Content-Type": media_type}
            response = self.transport.request(
                "PUT", path, self.push, headers, data, ok=(200, 201, 202), read_timeout=_MANIFEST_TIMEOUT
            )
            self.transport.discard(response)
            stored = response.headers.get("Docker-Content-Digest", "")
            if stored.startswith("sha256:") and stored != described.digest:
                raise BackendError(
                    f"{self}: stored {reference} as {stored}, not {described.digest}", permanent=True
                )

            return "OCI-Subject" in response.headers

        known = self.transport.attempt(put)
        document = model.decode(data, _Referring, f"{self}:{reference}")
        if document.subject and not known:
            self._add_referrer(document, described)
        return described

    def _add_referrer(self, document: _Referring, described: Descriptor) -> None:
        assert document.subject
        tag = document.subject.digest.replace(":", "-")
        entries: tuple[Descriptor, ...] = ()
        try:
            entries = model.decode(self.manifest(tag)[1], model.Index, f"{self}:{tag}").manifests
        except BackendError as error:
            if error.status != 404:
                raise
        if any(entry.digest == described.digest for entry in entries):
            return
        kind = document.artifact_type or (document.config.media_type if document.config else "")
        entry = msgspec.structs.replace(described, artifact_type=kind, annotations=document.annotations or {})
        index = model.Index(schema_version=2, media_type=model.OCI_INDEX, manifests=(*entries, entry))
        self.put_manifest(tag, model.encode(index), model.OCI_INDEX)

    def document(self, descriptor: Descriptor) -> bytes:
        """Fetches a small blob whole (an image config), at most 8 MiB."""
        if descriptor.size > model.MAX_DOCUMENT:
            raise BackendError(
                f"{self}: {descriptor.digest} is larger than {model.MAX_DOCUMENT} bytes", permanent=True
            )
        with self.blob(descriptor.digest, descriptor.size) as stream:
            return stream.read(-1)

    def referrers(self, digest: str) -> list[Descriptor]:
        """What has a manifest as its subject: the referrers API, else the fallback tag, else nothing."""

        def ask() -> bytes | None:
            path = f"{self.path}/referrers/{digest}{self._query}"
            response = self.transport.request(
                "GET", path, self.pull, {"Accept": model.OCI_INDEX}, ok=(200, 404)
            )
            if response.status == 404:
                self.transport.discard(response)
                return None
            return self.transport.read_all(response, model.MAX_DOCUMENT)

        data = self.transport.attempt(ask)
        if data is None:
            try:
                data = self.manifest(digest.replace(":", "-"))[1]
            except BackendError as error:
                if error.status == 404:
                    return []
                raise
        return list(model.decode(data, model.Index, f"{self}: referrers of {digest}").manifests)

    # Blobs

    def blob_size(self, digest: str) -> int:
        """The size of a blob in bytes."""
        return self.transport.attempt(lambda: self._head(digest))

    def has_blob(self, digest: str) -> bool:
        """Whether a blob is in this repository."""
        try:
            self.blob_size(digest)
        except BackendError as error:
            if error.status == 404:
                return False
            raise
        return True

    def _head(self, digest: str) -> int:
        response = self._follow("HEAD", digest, {}, ok=(200,))
        length = content_length(response)
        self.transport.discard(response)
        if length is None:
            raise BackendError(f"{self}: no Content-Length for {digest}", permanent=True)
        return length

    def blob(self, digest: str, size: int | None = None) -> BlobStream:
        """Opens a whole blob as a stream that is checked against the digest (and the size) at its end."""
        return BlobStream(self, digest, size)

    def read_range(self, digest: str, offset: int, length: int) -> bytes:
        """Reads exactly ``length`` bytes at ``offset`` of a blob; not digest-checked, which ranges cannot be.

        Raises:
            BackendError: also when the blob is shorter.
        """
        return self.transport.attempt(lambda: self._read_range(digest, offset, length))

    def _read_range(self, digest: str, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        response = self.open_range(digest, offset, length)
        data = self.transport.read(response, length, time.monotonic() + self.transport.policy.total)
        if len(data) != length:
            response.close()
            raise BackendError(
                f"{self}: {digest}: expected {length} bytes at offset {offset}, got {len(data)}"
            )
        if response.status == 200:
            response.close()  # the rest of the blob is still on its way
        else:
            response.release_conn()
        return data

    def open_range(self, digest: str, offset: int, length: int | None) -> urllib3.BaseHTTPResponse:
        """Asks for a range once and returns an answer whose body starts at ``offset``.

        A registry that does not know ranges sends the whole blob (status 200); what lies before ``offset`` is
        then read and dropped.

        Args:
            length: None is up to the end of the blob.
        """
        last = "" if length is None else offset + length - 1
        headers = {} if offset == 0 and length is None else {"Range": f"bytes={offset}-{last}"}
        response = self._follow("GET", digest, headers, ok=(200, 206))
        if response.status == 200:
            try:
                left = offset
                while left:
                    piece = self.transport.read(response, min(left, 1 << 20))
                    if not piece:
                        raise BackendError(f"{self}: {digest} ends before offset {offset}", permanent=True)
                    left -= len(piece)
            except BackendError:
                response.close()
                raise
            return response
        text = response.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(text.strip())
        if (
            not match
            or int(match[1]) != offset
            or (length is not None and int(match[2]) != offset + length - 1)
        ):
            response.close()
            permanent = bool(
                match and match[3] != "*" and length is not None and int(match[3]) < offset + length
            )
            asked = f"bytes {offset}-{last}"
            raise BackendError(
                f"{self}: {digest}: asked for {asked}, answered {text[:80]!r}", permanent=permanent
            )
        return response

    def _follow(
        self, method: str, digest: str, headers: dict[str, str], ok: tuple[int, ...]
    ) -> urllib3.BaseHTTPResponse:
        """Sends a blob request, following redirects; where a blob was found is kept for the next one."""
        if not DIGEST.fullmatch(digest):  # blob ids and annotations say what they like
            raise BackendError(
                f"{self}: {digest[:80]!r} is not the digest of a blob", permanent=True, status=404
            )
        transport = self.transport
        key = f"{method} {digest}"
        if known := self._locations.get(key):
            response = transport.send(method, known, headers)
            if response.status in ok:
                return response
            if not 400 <= response.status < 500 or response.status in (408, 416, 429):
                raise transport.refusal(response, method, known)
            # A signed address has expired, most likely: ask the registry for a new one.
            transport.discard(response)
            self._locations.pop(key, None)
        url = f"{transport.base}{self.path}/blobs/{digest}{self._query}"
        response = transport.request(method, url, self.pull, headers, ok={*ok, *REDIRECTS})
        for _ in range(_MAX_HOPS):
            if response.status not in REDIRECTS:
                return response
            transport.discard(response)
            url = self._rewrite(transport.url(url, response.headers.get("Location", "")))
            if transport.at_home(url):
                response = transport.request(method, url, self.pull, headers, ok={*ok, *REDIRECTS})
                continue
            response = transport.send(method, url, headers)
            if response.status in ok:
                if len(self._locations) >= _MAX_LOCATIONS:
                    self._locations.clear()
                self._locations[key] = url
            elif response.status not in REDIRECTS:
                raise transport.refusal(response, method, url)
        transport.discard(response)
        raise BackendError(f"{self}: {digest}: more than {_MAX_HOPS} redirects", permanent=True)

    def _rewrite(self, url: str) -> str:
        parts = urlsplit(url)
        if self.registry.redirect_scheme:
            parts = parts._replace(scheme=self.registry.redirect_scheme)
        if self.registry.redirect_host:
            parts = parts._replace(netloc=self.registry.redirect_host)
        return parts.geturl()

    def mount_blob(self, digest: str, source: str) -> bool:
        """Links a blob of another repository of this registry into this one; False if it cannot be done."""
        scope = f"{self.push} repository:{source}:pull"

        def mount() -> bool:
            query = urlencode({"mount": digest, "from": source})
            try:
                response = self.transport.request(
                    "POST",
                    f"{self.path}/blobs/uploads/?{query}",
                    scope,
                    {"Content-Length": "0"},
                    ok=(201, 202),
                )
            except BackendError as error:
                if error.status in (400, 401, 403, 404, 405):
                    return False
                raise
            self.transport.discard(response)
            if response.status == 202:  # an ordinary upload was begun instead
                self.abandon(
                    self.transport.url(self.transport.base + self.path, response.headers.get("Location", ""))
                )
            return response.status == 201

        return self.transport.attempt(mount)

    def upload(self) -> Upload:
        """Begins an upload whose digest is known only at its end."""
        return Upload(self, self.registry.push_chunk_size)

    def put_blob(self, data: bytes, media_type: str, **more: object) -> Descriptor:
        """Stores a small blob unless it is there."""
        described = model.describe(data, media_type, **more)
        if not self.has_blob(described.digest):
            with self.upload() as upload:
                upload.write(data)
                upload.commit(described.digest)
        return described

    def probe(self) -> None:
        """Finds out whether blobs can be stored here: begins an upload, and drops it.

        Raises:
            BackendError: they cannot be.
        """
        self.abandon(self.upload().begin())

    def abandon(self, location: str) -> None:
        """Tells the registry that an upload will not be finished; does not matter if it fails."""
        scope = self.push.replace(":pull,push", ":delete")  # which docker-registry wants for that
        with contextlib.suppress(BackendError):
            self.transport.discard(self.transport.request("DELETE", location, scope, ok=range(200, 600)))


def _digest_of(data: bytes, like: str) -> str:
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
