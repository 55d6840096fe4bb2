"""The commands with docker-registry, an independent registry: sign-in, TLS, client certificates."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from docker_registry import HTPASSWD, Authority, TokenServer, log_in, registry
from faulty_proxy import FaultyProxy, reset_at
from nydusify_command import Nydusify

from nydus.convert.copy import copy_blob
from nydus.convert.progress import LayerProgress
from nydus.oci.layout import Layout
from nydus.oci.registry import Registry

pytestmark = [
    pytest.mark.vectors,
    pytest.mark.skipif(not shutil.which("docker-registry"), reason="docker-registry is not installed"),
]


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
        envs = {"wrong": log_in(tmp_path, host, "wrong"), "none": {"DOCKER_CONFIG": str(tmp_path / "none")}}
        for kind, env in envs.items():
            done = nydusify(*info, env=env)
            assert done.returncode == 1 and "401" in done.stderr.splitlines()[-1]
            assert "docker login" in done.stderr and "wrong" not in done.stderr
            assert ("the sign-in data of 'me' were refused" in done.stderr) == (kind == "wrong")


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
        assert f"/etc/containers/certs.d/{host}/" in done.stderr
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


@pytest.mark.parametrize(("chunk_size", "after"), [(0, 10 << 20), (5_000_000, 2_000_000)])
def test_a_connection_that_breaks_in_an_upload(tmp_path: Path, chunk_size: int, after: int) -> None:
    """docker-registry cannot go on with what broke within a request: the blob is sent once more."""
    data = random.Random(0).randbytes(24 << 20)
    layout = Layout(tmp_path / "layout").create()
    blob = layout.put_blob(data, "")
    with registry(tmp_path) as host, FaultyProxy(host) as way:
        way.fail(reset_at(after), "PATCH")
        with Registry(way.host, plain_http=True, push_chunk_size=chunk_size) as client:
            repository = client.repository("team/app")
            copy_blob(layout, repository, LayerProgress(1, blob.digest, blob.size))
            assert way.hits == 1
            assert repository.blob(blob.digest, blob.size).read() == data
