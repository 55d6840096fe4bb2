"""Images read from the mirrors that ``hosts.toml`` names."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from faulty import FaultyHandler, FaultyRegistry, blob_of, cut, is_blob, status
from nydusify_command import Nydusify

from nydus.convert.copy import copy
from nydus.convert.mounting import registry_backend
from nydus.errors import ConfigError
from nydus.oci.hosts import Host
from nydus.oci.mirrored import MirroredPlace
from nydus.oci.place import ArchivePlace, RegistryPlace, registry_place
from nydus.oci.reference import parse

pytestmark = pytest.mark.vectors
PASSWORDS = {"private.io": b"1", "same.io": b"1", "other.io": b"2"}


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[FaultyRegistry]:
    with FaultyRegistry(tmp_path / "mirror") as server:
        yield server


def hosts(tmp_path: Path, host: str, *urls: str) -> str:
    folder = tmp_path / "hosts" / host
    folder.mkdir(parents=True, exist_ok=True)
    tables = "".join(f'[host."{url}"]\ncapabilities = ["pull", "resolve"]\n' for url in urls)
    (folder / "hosts.toml").write_text(tables)
    return str(tmp_path / "hosts")


def test_the_mirror_is_read_and_the_registry_written(
    server: FaultyRegistry,
    mirror: FaultyRegistry,
    source: str,
    vectors: Path,
    nydusify: Nydusify,
    tmp_path: Path,
) -> None:
    copied = parse(source.replace(server.host, mirror.host))
    copy(ArchivePlace(vectors / "oci/source.tar"), RegistryPlace(copied, plain_http=True))
    folder = hosts(tmp_path, server.host)
    (tmp_path / "hosts" / server.host / "hosts.toml").write_text(
        '[host."http://127.0.0.1:1"]\n'
        f'[host."http://{mirror.host}"]\n[host."http://{mirror.host}".header]\nX-Wanted = "yes"\n'
    )
    target = f"{server.host}/small:nydus"
    mirror.seen.clear()
    done = nydusify(
        *("--hosts-dir", folder, "convert", "--source", source, "--target", target, "--plain-http"),
        *("--platform", "linux/amd64"),
    )
    assert done.returncode == 0, done.stderr
    assert not [path for path in server.paths("GET") if "manifests/latest" in path], (
        "the registry is not asked"
    )
    assert len([path for path in mirror.paths("GET") if "/blobs/" in path]) >= 4
    assert not mirror.paths("POST") and not mirror.paths("PUT")
    assert all(headers.get("X-Wanted") == "yes" for _, _, headers in mirror.seen)
    done = nydusify(
        *("check", "--source", source, "--target", target, "--plain-http", "--no-mount"),
        *("--platform", "linux/amd64"),
        env={"NYDUSIFY_HOSTS_DIR": folder},
    )
    assert done.returncode == 0, done.stderr


def test_what_a_mirror_lacks_comes_from_the_registry(
    server: FaultyRegistry, mirror: FaultyRegistry, source: str, nydusify: Nydusify, tmp_path: Path
) -> None:
    folder = hosts(tmp_path, server.host, f"http://{mirror.host}")
    done = nydusify("--hosts-dir", folder, "info", source, "--plain-http")
    assert done.returncode == 0 and "an ordinary OCI image" in done.stdout, done.stderr
    assert mirror.paths("GET")
    mirror.intercepts.append(lambda handler: not handler.send_error(503))
    done = nydusify("--hosts-dir", folder, "info", source, "--plain-http")
    assert done.returncode == 0, done.stderr


def spoil(handler: FaultyHandler) -> None:
    data = bytearray(blob_of(handler))
    data[len(data) // 2] ^= 1
    handler.reply(200, bytes(data))


@pytest.mark.parametrize("fault", [cut(100), status(500), spoil], ids=["broken", "refused", "spoiled"])
@pytest.mark.parametrize("command", ["convert", "copy"])
def test_blobs_that_a_mirror_cannot_give_come_from_the_registry(
    server: FaultyRegistry,
    mirror: FaultyRegistry,
    source: str,
    vectors: Path,
    nydusify: Nydusify,
    tmp_path: Path,
    command: str,
    fault: Callable[[FaultyHandler], None],
) -> None:
    copied = parse(source.replace(server.host, mirror.host))
    copy(ArchivePlace(vectors / "oci/source.tar"), RegistryPlace(copied, plain_http=True))
    mirror.intercepts.append(lambda handler: is_blob(handler) and not fault(handler))
    folder = hosts(tmp_path, server.host, f"http://{mirror.host}")
    options = ("--push-retry-delay", "0.1s", "--no-reuse") if command == "convert" else ()
    digests = []
    for more in (("--hosts-dir", folder), ()):
        mirror.seen.clear()
        name = f"new:{len(digests)}"
        target = f"{server.host}/{name}" if command == "convert" else f"file://{tmp_path}/{name}.tar"
        done = nydusify(
            *(*more, command, "--source", source, "--target", target),
            *("--plain-http", "--json", "--platform", "linux/amd64", *options),
        )
        assert done.returncode == 0, done.stderr
        digests.append(json.loads(done.stdout)["digest"])
        asked = [urlsplit(path).path for path in mirror.paths("GET") if "/blobs/" in path]
        assert len(asked) >= (2 if more else 0) and len(set(asked)) == len(asked)
    assert digests[0] == digests[1]


def test_a_server_takes_the_place_of_the_registry(
    server: FaultyRegistry, source: str, nydusify: Nydusify, tmp_path: Path
) -> None:
    folder = hosts(tmp_path, "example.com")
    (tmp_path / "hosts/example.com/hosts.toml").write_text(f'server = "http://{server.host}"\n')
    done = nydusify("--hosts-dir", folder, "info", "example.com/small:latest")
    assert done.returncode == 0 and "an ordinary OCI image" in done.stdout, done.stderr


@pytest.mark.root
def test_a_mount_reads_the_mirror(
    server: FaultyRegistry, mirror: FaultyRegistry, source: str, nydusify: Nydusify, tmp_path: Path
) -> None:
    nydus = source.replace("latest", "nydus")
    assert nydusify("convert", "--source", source, "--target", nydus, "--plain-http").returncode == 0
    there = nydus.replace(server.host, mirror.host)
    assert nydusify("copy", "--source", nydus, "--target", there, "--plain-http").returncode == 0
    folder = hosts(tmp_path, server.host, f"http://{mirror.host}")
    server.seen.clear()
    mirror.seen.clear()
    done = nydusify("--hosts-dir", folder, "check", "--source", source, "--target", nydus, "--plain-http")
    assert done.returncode == 0, done.stderr
    ranges = [headers["Range"] for _, _, headers in mirror.seen if "Range" in headers]
    assert ranges and not [headers for _, _, headers in server.seen if "Range" in headers]


def test_a_daemon_shows_mirrors_nothing_that_is_not_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in = {host: {"auth": b64encode(b"u:" + word).decode()} for host, word in PASSWORDS.items()}
    (tmp_path / "config.json").write_text(json.dumps({"auths": sign_in}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    mirrors = tuple(Host(f"https://{name}") for name in ("same.io", "other.io", "none.io"))

    def told(name: str, server: Host | None = None) -> tuple[str, str, list[str], bool]:
        place = registry_place(parse(f"{name}/small:1"))
        config = registry_backend(
            MirroredPlace(place.reference, credentials=place.credentials, mirrors=mirrors, server=server)
        )["config"]
        word = b64decode(config.get("auth", "")).decode()
        return config["host"], word, [each["host"] for each in config["mirrors"]], config["skip_verify"]

    every = [mirror.url for mirror in mirrors]
    assert told("private.io") == ("private.io", "u:1", ["https://same.io"], False)
    assert told("public.io") == ("public.io", "", every, False)
    assert told("private.io", Host("https://other.io")) == ("other.io", "u:2", ["https://other.io"], False)
    assert told("private.io", Host("https://none.io")) == ("none.io", "", every, False)
    unusable = (Host("https://none.io", client=(("a", "b"),)), Host("https://none.io", proxy="http://p:1"))
    careless = Host("https://h", "/v2/a", skip_verify=True)
    config = registry_backend(MirroredPlace(parse("public.io/a:1"), mirrors=(*unusable, careless)))["config"]
    expected = {"host": "https://h/v2/a", "namespace": "public.io", "skip_verify": True, "headers": {}}
    assert config["mirrors"] == [expected] and config["skip_verify"] is False
    server = Host("https://s.io", ca=("ca.pem",), skip_verify=True, proxy="http://p:1")
    config = registry_backend(MirroredPlace(parse("public.io/a:1"), server=server))["config"]
    assert (config["host"], config["skip_verify"], config["ca_cert_files"]) == ("s.io", True, ["ca.pem"])
    assert config["proxy"]["url"] == "http://p:1"
    with pytest.raises(ConfigError, match="nydusd cannot use path"):
        registry_backend(MirroredPlace(parse("public.io/a:1"), server=Host("https://s.io", "/a/v2")))


def test_wrong_files(source: str, nydusify: Nydusify, tmp_path: Path, server: FaultyRegistry) -> None:
    folder = hosts(tmp_path, server.host, "ftp://example.com")
    done = nydusify("--hosts-dir", folder, "info", source, "--plain-http")
    assert done.returncode == 1 and "is not the URL of a registry" in done.stderr
    done = nydusify("--hosts-dir", str(tmp_path / "no"), "info", source, "--plain-http")
    assert done.returncode == 1 and "not a directory" in done.stderr
