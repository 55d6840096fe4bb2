"""How the commands reach registries, each in its own way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from docker_registry import Authority, registry
from faulty import FaultyRegistry
from nydusify_command import Nydusify, one_fatal_line

from nydus.cli.nydusify_commit import commit
from nydus.errors import ConfigError
from nydus.oci import model
from nydus.oci.mirrored import MirroredPlace
from nydus.oci.place import RegistryPlace
from nydus.oci.registry import Registry

needs_docker_registry = pytest.mark.skipif(
    not shutil.which("docker-registry"), reason="docker-registry is not installed"
)


@pytest.fixture
def secure(tmp_path: Path, vectors: Path, nydusify: Nydusify) -> Iterator[str]:
    """A registry with TLS that asks who we are, with an image ``team/app:v1``; ``hosts/client.*`` is us."""
    authority = Authority()
    folder = tmp_path / "hosts"
    folder.mkdir()
    ca = authority.write(folder / "ca.pem")
    authority.pair(folder / "client.cert", folder / "client.key")
    authority.pair(tmp_path / "server.cert", tmp_path / "server.key")
    tls = (
        f', tls: {{certificate: "{tmp_path}/server.cert", key: "{tmp_path}/server.key", clientcas: ["{ca}"]}}'
    )
    with registry(tmp_path, tls=tls) as host:
        certificates = tmp_path / ".config/containers/certs.d" / host  # HOME of the command is tmp_path
        certificates.mkdir(parents=True)
        for name, other in (("ca.pem", "ca.crt"), ("client.cert", "me.cert"), ("client.key", "me.key")):
            shutil.copy(folder / name, certificates / other)
        done = nydusify(
            "copy", "--source", f"file://{vectors}/oci/source.tar", "--target", f"{host}/team/app:v1"
        )
        assert done.returncode == 0, done.stderr
        yield host


@needs_docker_registry
@pytest.mark.vectors
def test_a_source_with_tls_and_a_target_without(
    nydusify: Nydusify, secure: str, server: FaultyRegistry, tmp_path: Path
) -> None:
    source, nydus = f"{secure}/team/app:v1", f"{server.host}/app:nydus"
    both = ("--source", source, "--target", nydus)
    files = tmp_path / "first"
    files.write_text("/\n")
    cached = ("--build-cache", f"{server.host}/cache:1", "--chunk-dict", f"bootstrap:registry:{nydus}")
    for arguments in (
        ("copy", "--source", source, "--target", f"{server.host}/app:v1"),
        ("convert", *both),
        ("convert", "--source", source, "--target", f"{server.host}/other:nydus", *cached),
        ("check", *both, "--no-mount"),
        ("copy", "--source", nydus, "--target", f"{secure}/back/app:nydus"),
        (
            "optimize",
            "--source",
            nydus,
            "--target",
            f"{secure}/back/app:first",
            "--prefetch-files",
            str(files),
        ),
        ("chunkdict", "generate", "--sources", f"{nydus},{nydus}", "--target", f"{secure}/back/app:chunks"),
    ):
        side = "target" if secure in arguments[arguments[0] == "chunkdict" :][2] else "source"
        done = nydusify(*arguments, f"--{side}-plain-http")
        assert done.returncode == 0, (arguments, done.stderr)
    assert "does not speak TLS" in one_fatal_line(nydusify("convert", *both))
    assert "400" in one_fatal_line(nydusify("convert", *both, "--plain-http"))
    done = nydusify("check", *both, "--no-mount", env={"TARGET_PLAIN_HTTP": "true"})
    assert done.returncode == 0 and "TARGET_PLAIN_HTTP" in done.stderr


@pytest.mark.vectors
def test_a_dictionary_and_a_cache_elsewhere(
    nydusify: Nydusify, source: str, server: FaultyRegistry, tmp_path: Path
) -> None:
    with FaultyRegistry(tmp_path / "third") as third:
        nydus, there = f"{server.host}/app:nydus", f"{third.host}/app:nydus"
        for target in (nydus, there):
            assert nydusify("convert", "--source", source, "--target", target, "--plain-http").returncode == 0
        sides = (
            "convert",
            "--source",
            source,
            "--target",
            nydus,
            "--source-plain-http",
            "--target-plain-http",
        )
        for name, reference in (
            ("chunk-dict", f"bootstrap:registry:{there}"),
            ("build-cache", f"{third.host}/cache:1"),
        ):
            assert "does not speak TLS" in one_fatal_line(nydusify(*sides, f"--{name}", reference))
            done = nydusify(*sides, f"--{name}", reference, f"--{name}-plain-http")
            assert done.returncode == 0, done.stderr


@needs_docker_registry
@pytest.mark.vectors
@pytest.mark.parametrize("as_server", [False, True])
def test_a_mirror_that_is_a_project_and_asks_who_we_are(
    nydusify: Nydusify, secure: str, server: FaultyRegistry, tmp_path: Path, as_server: bool
) -> None:
    """As Harbor has it for the images of other registries."""
    shutil.rmtree(tmp_path / ".config")
    folder = tmp_path / "hosts/example.com"
    folder.mkdir()
    how = 'ca = "../ca.pem"\nclient = [["../client.cert", "../client.key"]]\noverride_path = true\n'
    address = f"https://{secure}/v2/team"
    (folder / "hosts.toml").write_text(
        f'server = "{address}"\n{how}' if as_server else f'[host."{address}"]\n{how}colour = "red"\n'
    )
    done = nydusify(
        *("--hosts-dir", str(tmp_path / "hosts"), "convert", "--source", "example.com/app:v1"),
        *("--target", f"{server.host}/app:nydus", "--target-plain-http"),
    )
    assert done.returncode == 0, done.stderr
    assert as_server or "colour has no effect" in done.stderr


@pytest.mark.vectors
def test_a_dictionary_is_read_from_a_mirror(
    nydusify: Nydusify, source: str, server: FaultyRegistry, tmp_path: Path
) -> None:
    with FaultyRegistry(tmp_path / "mirror") as mirror:
        there = f"{mirror.host}/app:nydus"
        assert nydusify("convert", "--source", source, "--target", there, "--plain-http").returncode == 0
        (tmp_path / "hosts/example.com").mkdir(parents=True)
        (tmp_path / "hosts/example.com/hosts.toml").write_text(f'[host."http://{mirror.host}"]\n')
        done = nydusify(
            *("--hosts-dir", str(tmp_path / "hosts"), "convert", "--source", source, "--plain-http"),
            *(
                "--target",
                f"{server.host}/app:nydus",
                "--chunk-dict",
                "bootstrap:registry:example.com/app:nydus",
            ),
            *("--build-cache", f"{server.host}/cache:1"),
        )
        assert done.returncode == 0, done.stderr
        with Registry(server.host, plain_http=True) as here, Registry(mirror.host, plain_http=True) as other:
            document = other.repository("app").manifest("nydus")[1]
            blobs = [layer.digest for layer in model.decode(document, model.Manifest, there).layers[:-1]]
            assert blobs and all(here.repository("app").has_blob(digest) for digest in blobs)
        assert [path for path in server.paths("PUT") if path.startswith("/v2/cache/")]
        assert not [path for path in mirror.paths("GET") if path.startswith("/v2/cache/")]


@pytest.mark.parametrize(
    ("given", "read", "written"),
    [
        ("oci:out", "file://out/ (or, for an image that is called so, docker.io/library/oci:out)", "file://out/"),
        ("oci:/a/out:v1", "file:///a/out/:v1", "file:///a/out/:v1"),
        ("oci-archive:a.tar", "file://a.tar", "file://a.tar"),
        ("docker-archive:/a.tar:app:v1", "file:///a.tar:app:v1", "file:///a.tar"),
        ("docker://ghcr.io/a/b:1", "write ghcr.io/a/b:1", "write ghcr.io/a/b:1"),
        ("https://h/a", "write h/a", "write h/a"),
        ("http://h/a", "write h/a with --plain-http", "write h/a with --plain-http"),
        ("docker-daemon:app:v1", "containerd://NAMESPACE/REFERENCE", "containerd://NAMESPACE/REFERENCE"),
        ("dir:out", "file://PATH", "file://PATH"),
    ],
)  # fmt: skip
def test_what_skopeo_calls_images(
    nydusify: Nydusify, given: str, read: str, written: str, tmp_path: Path
) -> None:
    for command in ("copy", "convert"):
        found = one_fatal_line(nydusify(command, "--source", given, "--target", "localhost:1/a"))
        assert found.startswith(f"--source {given}: ") and read in found
        found = one_fatal_line(nydusify(command, "--source", "localhost:1/a", "--target", given))
        assert found.startswith(f"--target {given}: ") and written in found
    assert not list((tmp_path / "cwd").iterdir())


def test_the_image_of_a_container_is_read_from_a_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts/_default").mkdir(parents=True)
    (tmp_path / "hosts/_default/hosts.toml").write_text('[host."https://mirror.io"]\n')
    (tmp_path / "socket").touch()
    monkeypatch.setenv("NYDUSIFY_HOSTS_DIR", str(tmp_path / "hosts"))
    container = SimpleNamespace(id="abc", image="example.com/app:1", digest="sha256:" + "1" * 64)
    used: list[tuple[MirroredPlace, RegistryPlace]] = []

    def run(
        _: object, __: object, base: MirroredPlace, target: RegistryPlace, *___: object, **____: object
    ) -> None:
        used.append((base, target))
        raise ConfigError("far enough")

    class Fake:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None: ...
        def find(self, _: str) -> object:
            return container

    monkeypatch.setattr("nydus.containerd.containers.Containers", Fake)
    monkeypatch.setattr("nydus.convert.commit.commit", run)
    arguments = ["--container", "abc", "--target", "localhost:1/app:2", "--target-plain-http"]
    result = CliRunner().invoke(commit, [*arguments, "--work-dir", str(tmp_path / "work")])
    assert str(result.exception) == "far enough"
    ((base, target),) = used
    assert [host.url for host in base.mirrors] == ["https://mirror.io"]
    assert (base.plain_http, target.plain_http) == (False, True)
