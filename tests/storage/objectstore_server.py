"""A small S3 and OSS server: enough of both protocols for blobs, with signatures that are looked at."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

KEY, SECRET, REGION = "AKTEST", "hush-hush", "eu-test-1"
_SIGNED = re.compile(
    rf"(AWS4-HMAC-SHA256|OSS4-HMAC-SHA256) Credential={KEY}/\d+/[^/]+/(s3|oss)/a|OSS {KEY}:.+"
)


class ObjectStoreServer:
    """Keeps objects in memory. ``fault`` may answer a request instead (it then returns True).

    Attributes:
        objects: ``bucket/key`` -> bytes.
        seen: method and path of each request.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.seen: list[tuple[str, str]] = []
        self.fault: Callable[[Handler], bool] | None = None
        server = self

        class Bound(Handler):
            owner = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def config(self, **more: str) -> dict[str, str]:
        """A backend configuration of type ``s3`` for this server."""
        return {
            "endpoint": self.host,
            "scheme": "http",
            "bucket_name": "images",
            "region": REGION,
            "access_key_id": KEY,
            "access_key_secret": SECRET,
            "object_prefix": "nydus/",
            **more,
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: ObjectStoreServer

    def handle(self) -> None:
        with suppress(OSError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(OSError):  # a client that was killed
                self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, f"<Error><Code>{code}</Code><Message>made to fail</Message></Error>".encode())

    def handle_one(self) -> None:
        owner, parts = self.owner, urlsplit(self.path)
        key, query = unquote(parts.path).lstrip("/"), parse_qs(parts.query, keep_blank_values=True)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        owner.seen.append((self.command, self.path))
        if owner.fault and owner.fault(self):
            return None
        if not _SIGNED.match(self.headers.get("Authorization", "")):
            return self.refuse(403, "AccessDenied")
        if self.command in ("GET", "HEAD"):
            return self.send_object(key)
        if self.command == "DELETE":
            owner.objects.pop(key, None)
            owner.uploads.pop(query.get("uploadId", [""])[0], None)
            return self.reply(204)
        if "uploads" in query:
            name = f"up{len(owner.seen)}"
            owner.uploads[name] = {}
            fields = f"<Bucket>b</Bucket><Key>{key}</Key><UploadId>{name}</UploadId>"
            text = f"<InitiateMultipartUploadResult>{fields}</InitiateMultipartUploadResult>"
            return self.reply(200, text.encode())
        if "partNumber" in query:
            owner.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
            return self.reply(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        if "uploadId" in query:
            uploaded = owner.uploads.pop(query["uploadId"][0])
            owner.objects[key] = b"".join(uploaded[number] for number in sorted(uploaded))
            fields = f"<Key>{key}</Key><ETag>x</ETag>"
            text = f"<CompleteMultipartUploadResult>{fields}</CompleteMultipartUploadResult>"
            return self.reply(200, text.encode())
        if origin := self.headers.get("x-amz-copy-source") or self.headers.get("x-oss-copy-source"):
            owner.objects[key] = owner.objects[unquote(origin).lstrip("/")]
            return self.reply(200, b"<CopyObjectResult><ETag>x</ETag></CopyObjectResult>")
        owner.objects[key] = body
        return self.reply(200, ETag='"x"')

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

    def send_object(self, key: str) -> None:
        data = self.owner.objects.get(key)
        if data is None:
            return self.refuse(404, "NoSuchKey")
        about = {"ETag": '"x"', "Last_Modified": "Sat, 21 Nov 2026 10:00:00 GMT"}
        wanted = self.headers.get("Range")
        if not wanted:
            return self.reply(200, data, **about)
        first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        if first >= len(data):
            return self.refuse(416, "InvalidRange")
        piece = data[first : last + 1]
        span = f"bytes {first}-{first + len(piece) - 1}/{len(data)}"
        return self.reply(206, piece, Content_Range=span, **about)


@contextmanager
def rclone_server(folder: Path) -> Iterator[dict[str, str]]:
    """The configuration of a bucket ``images`` of rclone's S3 server, which keeps it in ``folder``/root."""
    rclone = os.environ.get("RCLONE") or shutil.which("rclone")
    if not rclone:
        pytest.skip("no rclone, nor RCLONE set; go install github.com/rclone/rclone@v1.76.0 makes it")
    (folder / "root/images").mkdir(parents=True)
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    keys = ("--auth-key", f"{KEY},{SECRET}")
    command = [rclone, "serve", "s3", "--addr", address, *keys, str(folder / "root")]
    environment = {"HOME": str(folder), "PATH": "/usr/bin:/bin"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))):
                break
            time.sleep(0.05)
        yield {
            "endpoint": address,
            "scheme": "http",
            "bucket_name": "images",
            "region": "us-east-1",
            "access_key_id": KEY,
            "access_key_secret": SECRET,
            "object_prefix": "nydus/",
        }
    finally:
        process.terminate()
        process.wait()
