"""docker-registry, an independent registry, and what signs people in to it: a private CA, a token server."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

#: What htpasswd makes of "me" and "secret".
HTPASSWD = "me:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"
#: Seconds by which docker-registry forgives that a token has expired.
LEEWAY = 60
PEM = serialization.Encoding.PEM


class Authority:
    """A private CA."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of the tests")])
        self.certificate = self.issue(self.key, self.name, ca=True)

    def issue(
        self, key: ec.EllipticCurvePrivateKey, name: x509.Name, *, ca: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        local = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(local, critical=False)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def write(self, path: Path) -> Path:
        path.write_bytes(self.certificate.public_bytes(PEM))
        return path

    def pair(self, certificate: Path, key: Path) -> None:
        """Writes a certificate for 127.0.0.1 (or a client) and its key."""
        private = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, certificate.stem)])
        certificate.write_bytes(self.issue(private, name).public_bytes(PEM))
        form = serialization.PrivateFormat.PKCS8
        key.write_bytes(private.private_bytes(PEM, form, serialization.NoEncryption()))


class TokenServer:
    """Hands out the tokens that docker-registry checks: JSON, signed by a key whose certificate it knows.

    Args:
        lifetime: seconds.
        told: what the answers say of it.
    """

    def __init__(self, authority: Authority, lifetime: int, told: int = 0) -> None:
        self.scopes: list[str] = []
        wanted = "Basic " + base64.b64encode(b"me:secret").decode()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                allowed = self.headers.get("Authorization") == wanted
                query = parse_qs(urlsplit(self.path).query)
                scopes = " ".join(query.get("scope", [])).split()
                server.scopes += scopes
                token = server.sign(authority, scopes, lifetime)
                body = json.dumps(
                    {"token": token, "expires_in": told or lifetime} if allowed else {}
                ).encode()
                self.send_response(200 if allowed else 401)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(405)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def sign(self, authority: Authority, scopes: list[str], lifetime: int) -> str:
        def pack(data: bytes) -> str:
            return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

        der = authority.certificate.public_bytes(serialization.Encoding.DER)
        header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        now = int(time.time())
        access = [dict(zip(("type", "name", "actions"), scope.split(":"), strict=True)) for scope in scopes]
        claims = {
            "iss": "tests", "sub": "me", "aud": "registry", "jti": str(now),
            "iat": now, "nbf": now - LEEWAY, "exp": now + lifetime - LEEWAY,
            "access": [{**entry, "actions": entry["actions"].split(",")} for entry in access],
        }  # fmt: skip
        text = f"{pack(json.dumps(header).encode())}.{pack(json.dumps(claims).encode())}"
        r, s = decode_dss_signature(authority.key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{text}.{pack(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


@contextmanager
def registry(folder: Path, auth: str = "", tls: str = "") -> Iterator[str]:
    """A docker-registry with more lines of configuration; gives its host."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    host = f"127.0.0.1:{port}"
    config = folder / "config.yml"
    config.write_text(
        f'version: 0.1\nstorage: {{filesystem: {{rootdirectory: "{folder}/data"}}}}\n'
        f'http: {{addr: "{host}"{tls}}}\n{auth}log: {{level: error, accesslog: {{disabled: true}}}}\n'
    )
    with subprocess.Popen(["docker-registry", "serve", config], stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 10
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield host
        finally:
            process.terminate()


def log_in(folder: Path, host: str, password: str = "secret") -> dict[str, str]:
    """The environment of a user who did ``docker login``."""
    auth = base64.b64encode(f"me:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return {"DOCKER_CONFIG": str(folder)}
