"""TLS: a private CA, and what is said of certificates that are not trusted."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from faulty import QUICK, FaultyRegistry
from urllib3.connection import HTTPSConnection
from urllib3.util.ssltransport import SSLTransport

from nydus.errors import BackendError
from nydus.oci import connections, model
from nydus.oci.registry import Registry
from nydus.storage import backends


def certificate(folder: Path, address: str) -> Path:
    """A self-signed certificate with its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "registry of the tests")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{address}.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + built.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture(params=["127.0.0.1", "127.0.0.2"])
def secure(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[FaultyRegistry, Path]]:
    """A registry at 127.0.0.1 that speaks TLS, with a certificate for the address of the parameter."""
    pem = certificate(tmp_path, request.param)
    server = FaultyRegistry(tmp_path / "registry")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    with server:
        yield server, pem


def test_certificates(secure: tuple[FaultyRegistry, Path]) -> None:
    server, pem = secure
    data = bytes(range(256)) * 40_000
    right_host = "127.0.0.1.pem" in pem.name
    with Registry(server.host, skip_verify=True, policy=QUICK) as registry:
        digest = registry.repository("a").put_blob(data, model.OCI_LAYER).digest
    with Registry(server.host, policy=QUICK) as registry:
        with pytest.raises(BackendError, match=r"certificate is not trusted: .*self.signed") as caught:
            registry.repository("a").blob_size(digest)
        assert caught.value.permanent
    with Registry(server.host, ca_certs=[str(pem)], policy=QUICK) as registry:
        repository = registry.repository("a")
        if right_host:
            assert repository.blob(digest).read() == data
            assert repository.read_range(digest, 1000, 5000) == data[1000:6000]
        else:
            with pytest.raises(BackendError, match=r"certificate is not trusted: .*127"):
                repository.blob_size(digest)


def test_a_ca_file_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pem", Path(__file__)):
        with pytest.raises(BackendError, match="not a usable CA certificate"):
            Registry("r.io", ca_certs=[str(path)])


def test_an_interruption_cuts_tls_inside_of_the_tls_to_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    inner = SSLTransport.__new__(SSLTransport)  # whose handshake would need two servers
    inner.socket = ours
    monkeypatch.setattr(HTTPSConnection, "connect", lambda self: setattr(self, "sock", inner))
    monkeypatch.setattr(connections, "interrupted", threading.Event())
    pools = connections.watch(urllib3.PoolManager()).pool_classes_by_scheme
    with ours, theirs:
        pools["https"].ConnectionCls("localhost").connect()
        connections.interrupt()
        assert theirs.recv(1) == b""


def test_care_that_is_not_taken_with_a_mirror_is_taken_with_the_registry(
    secure: tuple[FaultyRegistry, Path],
) -> None:
    server, _ = secure
    with Registry(server.host, skip_verify=True, policy=QUICK) as registry:
        digest = registry.repository("a").put_blob(b"some bytes", model.OCI_LAYER).digest

    def read(host: str, mirror: str) -> bytes:
        mirrors = [{"host": f"https://{mirror}", "skip_verify": True}]
        config = {"host": host, "repo": "a", "mirrors": mirrors}
        with contextlib.closing(backends.create("registry", config)) as backend:
            return backend.read(digest.removeprefix("sha256:"), 5, 5)

    assert read("127.0.0.1:1", server.host) == b"bytes"
    with pytest.raises(BackendError, match="certificate is not trusted"):
        read(server.host, "127.0.0.1:1")
