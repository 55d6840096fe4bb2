"""The commands with docker-registry, an independent registry: sign-in, TLS, client certificates."""

from __future__ import annotations

import base64
import contextlib
import datetime
import ipaddress
import json
import random
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID
from nydusify_command import Nydusify

from nydus.convert.copy import copy_blob
from nydus.convert.progress import LayerProgress
from nydus.oci.layout import Layout
from nydus.oci.registry import Registry

pytestmark = [
    pytest.mark.vectors,
    pytest.mark.skipif(not shutil.which("docker-registry"), reason="docker-registry is not installed"),
]

#: What htpasswd makes of "me" and "secret".
HTPASSWD = "me:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"
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
    """

    def __init__(self, authority: Authority, lifetime: int) -> None:
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
                body = json.dumps({"token": token, "expires_in": lifetime} if allowed else {}).encode()
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
            "iat": now, "nbf": now - 1, "exp": now + lifetime,
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


def use(nydusify: Nydusify, host: str, vectors: Path, env: dict[str, str], *more: str) -> None:
    """Copies an image there, converts and checks it."""
    source, target = f"{host}/team/app:v1", f"{host}/other/app:nydus"
    for arguments in (
        ("copy", "--source", f"file://{vectors}/oci/source.tar", "--target", source),
        ("convert", "--source", source, "--target", target),
        ("check", "--source", source, "--target", target, "--no-mount"),
    ):
        done = nydusify(*arguments, *more, env=env)
        assert done.returncode == 0, done.stderr


def test_basic_sign_in(nydusify: Nydusify, vectors: Path, tmp_path: Path) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    auth = f'auth: {{htpasswd: {{realm: tests, path: "{tmp_path}/htpasswd"}}}}\n'
    with registry(tmp_path, auth) as host:
        use(nydusify, host, vectors, log_in(tmp_path, host), "--plain-http")
        info = ("info", f"{host}/team/app:v1", "--plain-http")
        for env in (log_in(tmp_path, host, "wrong"), {"DOCKER_CONFIG": str(tmp_path / "none")}):
            done = nydusify(*info, env=env)
            assert done.returncode == 1 and "401" in done.stderr.splitlines()[-1]
            assert "docker login" in done.stderr and "wrong" not in done.stderr


@pytest.mark.parametrize("lifetime", [300, 2])
def test_tokens(nydusify: Nydusify, vectors: Path, tmp_path: Path, lifetime: int) -> None:
    authority = Authority()
    bundle, tokens = authority.write(tmp_path / "root.pem"), TokenServer(authority, lifetime)
    settings = f'realm: "{tokens.address}", service: registry, issuer: tests, rootcertbundle: "{bundle}"'
    try:
        with registry(tmp_path, f"auth: {{token: {{{settings}}}}}\n") as host:
            use(nydusify, host, vectors, log_in(tmp_path, host), "--plain-http")
            asked = set(tokens.scopes)
            assert {"repository:team/app:pull", "repository:other/app:pull,push"} <= asked
            done = nydusify(
                "info", f"{host}/team/app:v1", "--plain-http", env=log_in(tmp_path, host, "wrong")
            )
            assert done.returncode == 1 and "401" in done.stderr.splitlines()[-1]
    finally:
        tokens.close()


@pytest.mark.parametrize("with_client", [False, True], ids=["server", "client"])
def test_a_private_authority(nydusify: Nydusify, vectors: Path, tmp_path: Path, with_client: bool) -> None:
    authority = Authority()
    ca = authority.write(tmp_path / "ca.pem")
    authority.pair(tmp_path / "server.cert", tmp_path / "server.key")
    tls = f', tls: {{certificate: "{tmp_path}/server.cert", key: "{tmp_path}/server.key"'
    tls += f', clientcas: ["{ca}"]}}' if with_client else "}"
    with registry(tmp_path, tls=tls) as host:
        source = ("copy", "--source", f"file://{vectors}/oci/source.tar", "--target", f"{host}/team/app:v1")
        done = nydusify(*source)
        assert done.returncode == 1 and "certificate is not trusted" in done.stderr.splitlines()[-1]
        folder = tmp_path / ".config/containers/certs.d" / host  # HOME of the command is tmp_path
        folder.mkdir(parents=True)
        authority.write(folder / "ca.crt")
        if with_client:
            done = nydusify(*source)
            assert done.returncode == 1 and "certificate" in done.stderr.splitlines()[-1]
            authority.pair(folder / "client.cert", folder / "client.key")
        use(nydusify, host, vectors, {})
        if with_client:
            (folder / "client.key").unlink()
            done = nydusify(*source)
            assert done.returncode == 1 and "client.key is missing" in done.stderr


@pytest.mark.root
def test_a_daemon_trusts_the_authority_too(nydusify: Nydusify, vectors: Path, tmp_path: Path) -> None:
    authority = Authority()
    authority.pair(tmp_path / "server.cert", tmp_path / "server.key")
    tls = f', tls: {{certificate: "{tmp_path}/server.cert", key: "{tmp_path}/server.key"}}'
    with registry(tmp_path, tls=tls) as host:
        folder = tmp_path / ".config/containers/certs.d" / host
        folder.mkdir(parents=True)
        authority.write(folder / "ca.crt")
        use(nydusify, host, vectors, {})
        done = nydusify("check", "--source", f"{host}/team/app:v1", "--target", f"{host}/other/app:nydus")
        assert done.returncode == 0, done.stderr
        assert "mounting image" in done.stderr


class Cutting:
    """A way to a registry that breaks once, when one connection has carried so many bytes to it."""

    def __init__(self, host: str, after: int) -> None:
        self._to, self._after = urlsplit(f"//{host}"), after
        self.cuts = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection((self._to.hostname, self._to.port))
                for pair in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                passed += len(data)
                target.sendall(data)
                if counted and passed > self._after and not self.cuts:
                    self.cuts += 1
                    break
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.mark.parametrize("chunk_size", [0, 5_000_000])
def test_a_connection_that_breaks_in_an_upload(tmp_path: Path, chunk_size: int) -> None:
    """docker-registry cannot go on with what broke within a request: the blob is sent once more."""
    data = random.Random(0).randbytes(24 << 20)
    layout = Layout(tmp_path / "layout").create()
    blob = layout.put_blob(data, "")
    with registry(tmp_path) as host:
        way = Cutting(host, 10 << 20)
        try:
            with Registry(way.host, plain_http=True, push_chunk_size=chunk_size) as client:
                repository = client.repository("team/app")
                copy_blob(layout, repository, LayerProgress(1, blob.digest, blob.size))
                assert way.cuts == 1
                assert repository.blob(blob.digest, blob.size).read() == data
        finally:
            way.close()
