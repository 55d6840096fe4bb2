"""A small OCI registry: push, pull, range requests, cross-repository mounts, referrers.

For tests, demonstrations and air-gapped machines: no sign-in, no garbage collection. It can slow itself down
to the speed of a given link and keeps count of what it sends.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from nydus.errors import ConfigError, NydusError
from nydus.oci import model
from nydus.oci.reference import PATH, TAG
from nydus.oci.store import SHA256, Refusal, Session, Store

_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK = re.compile(rb"[0-9a-fA-F]{1,15}")
_PIECE = 1 << 20
#: Between two pieces of a throttled answer, so that the rate is smooth.
_THROTTLED_PIECE = 16 << 10
_SAMPLE_SECONDS = 0.02
_CATCH_UP_SECONDS = 0.05
#: How long an upload may stand still.
_UPLOAD_SECONDS = 3600.0


@dataclass(slots=True)
class Counters:
    """What a registry has done since it was made (or last reset). Times are of ``time.monotonic``."""

    requests: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    #: (time, bytes sent until then), at most one for each 20 ms.
    samples: list[tuple[float, int]] = field(default_factory=list)


class Throttle:
    """One link shared by all answers: ``take(n)`` returns when n more bytes may pass."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free = 0.0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        with self._lock:
            now = time.monotonic()
            # What a late wake-up lost may be made up for, or the link would be slower than it says.
            self._free = max(self._free, now - _CATCH_UP_SECONDS) + count / self._rate
            wait = self._free - now
        if wait > 0:
            time.sleep(wait)


class RegistryServer:
    """Serves a folder as a registry, in threads of this process::

        with RegistryServer(folder) as server:
            Registry(server.host, plain_http=True)

    Args:
        root: made if missing; what an earlier server stored there is served again.
        address: ``host:port`` to listen on; port 0 is any free one.
        throttle_bytes_per_second: speed of the whole link in sending; None is no limit. May be set later.

    Raises:
        ConfigError: the address is wrong or taken, or the folder is used by another server or holds
            something else.
    """

    #: What answers the requests of one connection.
    handler: type[Handler]

    def __init__(
        self,
        root: str | os.PathLike[str],
        address: str = "127.0.0.1:0",
        throttle_bytes_per_second: float | None = None,
    ) -> None:
        self.counters = Counters()
        self.throttle_bytes_per_second = throttle_bytes_per_second
        self._lock = threading.Lock()
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 0xFFFF:
            raise ConfigError(f"{address!r} is not host:port")
        self._server = _Server((host.strip("[]"), int(port)), self)
        try:
            self.store = Store(Path(root))
        except BaseException:
            self._server.server_close()
            raise
        self.host = f"{host}:{self._server.server_address[1]}"
        self._thread: threading.Thread | None = None

    @property
    def throttle_bytes_per_second(self) -> float | None:
        return self._rate

    @throttle_bytes_per_second.setter
    def throttle_bytes_per_second(self, rate: float | None) -> None:
        self._rate = rate
        self.throttle = Throttle(rate) if rate else None

    def reset_counters(self) -> Counters:
        """Begins to count anew; returns what was counted until now."""
        with self._lock:
            counted, self.counters = self.counters, Counters()
        return counted

    def count(self, *, requests: int = 0, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            counters = self.counters
            counters.requests += requests
            counters.bytes_sent += sent
            counters.bytes_received += received
            if sent:
                now, samples = time.monotonic(), counters.samples
                if len(samples) > 1 and now - samples[-2][0] < _SAMPLE_SECONDS:
                    samples[-1] = (now, counters.bytes_sent)
                else:
                    samples.append((now, counters.bytes_sent))

    def start(self) -> RegistryServer:
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="registry", daemon=True
        )
        self._thread.start()
        return self

    def serve_forever(self) -> None:
        """Serves in the calling thread until it is interrupted."""
        self._server.serve_forever()

    def stop(self) -> None:
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server.close_connections()
        self.store.close()

    def __enter__(self) -> RegistryServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], registry: RegistryServer) -> None:
        self.registry = registry
        self._open: set[socket.socket] = set()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(address, registry.handler)
        except OSError as error:
            raise ConfigError(f"cannot listen on {address[0]}:{address[1]}: {error.strerror}") from error

    def server_bind(self) -> None:  # without the reverse look-up of HTTPServer, which may take seconds
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:  # type: ignore[no-untyped-def]
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def service_actions(self) -> None:
        self.registry.store.expire(_UPLOAD_SECONDS)

    def handle_error(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    """One connection. Tests derive from it to be a registry with faults."""

    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 120
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = do_GET

    @property
    def registry(self) -> RegistryServer:
        return self.server.registry

    def answer(self) -> None:
        self.registry.count(requests=1)
        length = self.headers.get("Content-Length") or "0"
        self._unread = int(length) if _LENGTH.fullmatch(length) else 0
        self._chunked = "chunked" in self.headers.get("Transfer-Encoding", "").lower()
        self._begun = False
        try:
            if not _LENGTH.fullmatch(length):
                self.close_connection = True
                raise Refusal(400, "SIZE_INVALID", f"not a Content-Length: {length[:40]!r}")
            self.route()
        except Refusal as refusal:
            self.refuse(refusal)
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:  # of the disk
            if self._begun:
                raise
            self.close_connection = True
            status = 507 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 500
            self.refuse(Refusal(status, "UNKNOWN", f"the registry cannot store this: {error.strerror}"))
        self._drain()
        self.wfile.flush()

    def refuse(self, refusal: Refusal, headers: dict[str, str] | None = None) -> None:
        error = {"code": refusal.code, "message": refusal.message}
        self.reply(refusal.status, json.dumps({"errors": [error]}).encode(), headers)

    def route(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query, keep_blank_values=True)
        if path in ("/v2", "/v2/"):
            return self.reply(200, b"{}")
        if path == "/v2/_catalog":
            return self.reply(200, json.dumps({"repositories": self.registry.store.repositories()}).encode())
        match = re.fullmatch(r"/v2/(.+)/(manifests|blobs|tags|referrers)/([^/]*)(?:/([^/]*))?", path)
        if not match:
            raise Refusal(404, "UNSUPPORTED", f"no such page: {path}")
        name, kind, entry, more = match.groups()
        if kind == "blobs" and entry != "uploads" and more is None:
            entry = self._digest(entry)
        if not PATH.fullmatch(name) or len(name) > 255:
            raise Refusal(400, "NAME_INVALID", f"invalid repository name {name!r}")
        action = {
            "manifests": self.manifest,
            "blobs": self.upload if entry == "uploads" else self.blob,
            "tags": self.tags,
            "referrers": self.referrers,
        }[kind]
        action(name, more or "" if entry == "uploads" else entry)

    def _digest(self, text: str) -> str:
        if not SHA256.fullmatch(text):
            raise Refusal(400, "DIGEST_INVALID", f"not a sha256 digest: {text!r}")
        return text

    # Manifests

    def manifest(self, name: str, reference: str) -> None:
        if not SHA256.fullmatch(reference) and not TAG.fullmatch(reference):
            raise Refusal(400, "MANIFEST_INVALID", f"neither a tag nor a digest: {reference!r}")
        store = self.registry.store
        if self.command in ("GET", "HEAD"):
            digest, media_type, path = store.resolve(name, reference)
            data = path.read_bytes()
            more = {"Content-Type": media_type, "Docker-Content-Digest": digest, "ETag": f'"{digest}"'}
            self.reply(200, data, more)
        elif self.command == "PUT":
            self._put_manifest(name, reference)
        elif self.command == "DELETE":
            digest, _, _ = store.resolve(name, reference)
            folder = store.repository(name)
            if digest == reference:
                (folder / "_manifests" / digest.removeprefix("sha256:")).unlink(missing_ok=True)
            else:
                (folder / "_tags" / reference).unlink(missing_ok=True)
            self.reply(202)
        else:
            raise Refusal(405, "UNSUPPORTED", f"cannot {self.command} a manifest")

    def _put_manifest(self, name: str, reference: str) -> None:
        store = self.registry.store
        data = b"".join(self.body(limit=model.MAX_DOCUMENT))
        digest = model.digest(data)
        if reference.startswith("sha256:") and reference != digest:
            raise Refusal(400, "DIGEST_INVALID", f"the manifest is {digest}, not {reference}")
        content_type = self.headers.get("Content-Type", "")
        try:
            document = model.decode_image(data, content_type, "manifest")
        except NydusError as error:
            raise Refusal(400, "MANIFEST_INVALID", str(error)) from None
        if isinstance(document, model.Manifest):
            needed = [d for d in (document.config, *document.layers) if not d.urls]
            missing = [d.digest for d in needed if not store.has_blob(name, d.digest.partition(":")[2])]
            code = "MANIFEST_BLOB_UNKNOWN"
        else:
            known = store.repository(name) / "_manifests"
            missing = [
                d.digest for d in document.manifests if not (known / d.digest.partition(":")[2]).exists()
            ]
            code = "MANIFEST_UNKNOWN"
        if missing:
            raise Refusal(404, code, f"not in {name}: {', '.join(missing)}")
        hexdigest = digest.removeprefix("sha256:")
        aside = store.uploads / uuid.uuid4().hex
        aside.write_bytes(data)
        aside.replace(store.blobs / hexdigest)
        store.link(name, "_manifests", hexdigest, content_type or document.media_type)
        more: dict[str, str] = {}
        if document.subject:
            kind = document.artifact_type
            if not kind and isinstance(document, model.Manifest):
                kind = document.config.media_type
            found = model.Descriptor(
                media_type=content_type,
                digest=digest,
                size=len(data),
                artifact_type=kind,
                annotations=document.annotations or {},
            )
            folder = f"_referrers/{document.subject.digest.partition(':')[2]}"
            store.link(name, folder, hexdigest, msgspec.json.encode(found).decode())
            more["OCI-Subject"] = document.subject.digest
        if not reference.startswith("sha256:"):
            store.link(name, "_tags", reference, digest)
        more |= {"Location": f"/v2/{name}/manifests/{digest}", "Docker-Content-Digest": digest}
        self.reply(201, b"", more)

    def tags(self, name: str, entry: str) -> None:
        folder = self.registry.store.repository(name) / "_tags"
        if entry != "list" or not folder.parent.exists():
            raise Refusal(404, "NAME_UNKNOWN", f"repository unknown: {name}")
        tags = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        last = self.query.get("last", [""])[0]
        tags = [tag for tag in tags if tag > last]
        if (count := self.query.get("n", [""])[0]).isdigit():
            tags = tags[: int(count)]
        self.reply(200, json.dumps({"name": name, "tags": tags}).encode())

    def referrers(self, name: str, digest: str) -> None:
        folder = self.registry.store.repository(name) / "_referrers" / self._digest(digest).partition(":")[2]
        found = (
            [json.loads(path.read_bytes()) for path in sorted(folder.iterdir())] if folder.exists() else []
        )
        more: dict[str, str] = {}
        if wanted := self.query.get("artifactType", [""])[0]:
            found = [entry for entry in found if entry.get("artifactType") == wanted]
            more["OCI-Filters-Applied"] = "artifactType"
        index = {"schemaVersion": 2, "mediaType": model.OCI_INDEX, "manifests": found}
        self.reply(200, json.dumps(index).encode(), {"Content-Type": model.OCI_INDEX, **more})

    # Blobs

    def blob(self, name: str, digest: str) -> None:
        store = self.registry.store
        hexdigest = digest.partition(":")[2]
        if self.command not in ("GET", "HEAD"):
            raise Refusal(405, "UNSUPPORTED", f"cannot {self.command} a blob")
        if not store.has_blob(name, hexdigest):
            raise Refusal(404, "BLOB_UNKNOWN", f"blob unknown to repository {name}: {digest}")
        with open(store.blobs / hexdigest, "rb") as file:
            self.send_blob(file, digest)

    def send_blob(self, file: BinaryIO, digest: str) -> None:
        size = os.fstat(file.fileno()).st_size
        first, last, status = 0, size - 1, 200
        more = {
            "Content-Type": "application/octet-stream",
            "Docker-Content-Digest": digest,
            "Accept-Ranges": "bytes",
            "ETag": f'"{digest}"',
        }
        if match := _RANGE.fullmatch(self.headers.get("Range", "")):
            first = int(match[1])
            last = min(int(match[2]), size - 1) if match[2] else size - 1
            if first > last:
                return self.reply(416, b"", {"Content-Range": f"bytes */{size}"})
            status, more["Content-Range"] = 206, f"bytes {first}-{last}/{size}"
        count = last - first + 1
        self._start(status, count, more)
        if self.command == "HEAD":
            return None
        self.wfile.flush()
        throttle = self.registry.throttle
        while count:
            piece = min(count, _THROTTLED_PIECE if throttle else _PIECE)
            if throttle:
                throttle.take(piece)
            sent = self.connection.sendfile(file, first, piece)
            if not sent:
                self.close_connection = True
                return None
            first, count = first + sent, count - sent
            self.registry.count(sent=sent)
        return None

    # Uploads

    def upload(self, name: str, session_id: str) -> None:
        sessions = self.registry.store.sessions
        if not session_id:
            if self.command != "POST":
                raise Refusal(405, "UNSUPPORTED", "an upload begins with POST")
            return self._begin_upload(name)
        session = sessions.get(session_id)
        if session is None:
            raise Refusal(404, "BLOB_UPLOAD_UNKNOWN", f"upload unknown: {session_id}")
        with session.lock:
            if sessions.get(session_id) is not session:  # ended while we waited for it
                raise Refusal(404, "BLOB_UPLOAD_UNKNOWN", f"upload unknown: {session_id}")
            if self.command == "GET":
                self._progress(204, name, session)
            elif self.command == "DELETE":
                sessions.pop(session_id, None)
                session.drop()
                self.reply(204)
            elif self.command in ("PATCH", "PUT"):
                self._continue_upload(name, session)
            else:
                raise Refusal(405, "UNSUPPORTED", f"cannot {self.command} an upload")
        return None

    def _begin_upload(self, name: str) -> None:
        store = self.registry.store
        mount, source = self.query.get("mount", [""])[0], self.query.get("from", [""])[0]
        hexdigest = mount.partition(":")[2]
        if SHA256.fullmatch(mount) and PATH.fullmatch(source) and store.has_blob(source, hexdigest):
            store.link(name, "_blobs", hexdigest)
            return self._stored(name, mount)
        session = Session(store.uploads)
        store.sessions[session.id] = session
        if "digest" in self.query:
            return self._continue_upload(name, session)
        return self._progress(202, name, session)

    def _continue_upload(self, name: str, session: Session) -> None:
        store = self.registry.store
        match = re.fullmatch(r"(?:bytes )?(\d+)-\d+(?:/.*)?", self.headers.get("Content-Range", ""))
        if match and int(match[1]) != session.size:
            message = f"out of order: the upload has {session.size} bytes"
            raise Refusal(416, "BLOB_UPLOAD_INVALID", message)
        for piece in self.body():
            session.add(piece)
        if self.command == "PATCH":
            return self._progress(202, name, session)
        digest = self._digest(self.query.get("digest", [""])[0])
        found = f"sha256:{session.hash.hexdigest()}"
        store.sessions.pop(session.id, None)
        if found != digest:
            session.drop()
            raise Refusal(400, "DIGEST_INVALID", f"the upload is {found}, not {digest}")
        session.file.close()
        session.path.replace(store.blobs / digest.partition(":")[2])
        store.link(name, "_blobs", digest.partition(":")[2])
        return self._stored(name, digest)

    def _stored(self, name: str, digest: str) -> None:
        location = f"/v2/{name}/blobs/{digest}"
        self.reply(201, b"", {"Location": location, "Docker-Content-Digest": digest})

    def _progress(self, status: int, name: str, session: Session) -> None:
        location = f"/v2/{name}/blobs/uploads/{session.id}"
        more = {
            "Location": location,
            "Docker-Upload-UUID": session.id,
            "Range": f"0-{max(session.size - 1, 0)}",
        }
        self.reply(status, b"", more)

    # HTTP

    def body(self, limit: int | None = None) -> Iterator[bytes]:
        """The pieces of the request's body.

        Raises:
            Refusal: it is larger than ``limit``.
        """
        total = 0
        for piece in self._pieces():
            total += len(piece)
            self.registry.count(received=len(piece))
            if limit is not None and total > limit:
                self.close_connection = True
                raise Refusal(413, "SIZE_INVALID", f"larger than {limit} bytes")
            yield piece

    def _pieces(self) -> Iterator[bytes]:
        if not self._chunked:
            while self._unread:
                piece = self.rfile.read1(min(self._unread, _PIECE))
                if not piece:
                    raise ConnectionResetError
                self._unread -= len(piece)
                yield piece
            return
        while size := self._chunk_size():
            while size:
                piece = self.rfile.read1(min(size, _PIECE))
                if not piece:
                    raise ConnectionResetError
                size -= len(piece)
                yield piece
            self.rfile.readline(100)
        while self.rfile.readline(1000).strip():
            pass
        self._chunked = False

    def _chunk_size(self) -> int:
        text = self.rfile.readline(100).partition(b";")[0].strip()
        if not _CHUNK.fullmatch(text):
            raise ConnectionResetError
        return int(text, 16)

    def _drain(self) -> None:
        """An answer given before the body was read: the next request begins only after it."""
        if self._chunked or self._unread > _PIECE:
            self.close_connection = True
        else:
            for _ in self._pieces():
                pass

    def _start(self, status: int, length: int, headers: dict[str, str]) -> None:
        self._begun = True
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(length))
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        for key, value in headers.items():
            self.send_header(key, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def reply(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Sends an answer with a small body (JSON if ``headers`` has no other content type)."""
        kind = {"Content-Type": "application/json"} if data else {}
        self._start(status, len(data), kind | (headers or {}))
        if self.command != "HEAD" and data:
            if self.registry.throttle:
                self.registry.throttle.take(len(data))
            self.wfile.write(data)
            self.registry.count(sent=len(data))


RegistryServer.handler = Handler
