"""Conversions and checks through a proxy that spoils what it carries from and to docker-registry."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker_registry import HTPASSWD, Authority, TokenServer, log_in, registry
from faulty_proxy import (
    Fault,
    FaultyProxy,
    corrupt,
    cut,
    endless,
    lie,
    redirect,
    refuse,
    reset_at,
    stall,
    wait,
)
from images import layer_of, layer_with, place, store_image
from nydusify_command import Nydusify, one_fatal_line

from nydus.convert.check import check
from nydus.convert.image import image
from nydus.oci import model
from nydus.oci.layout import Layout
from nydus.oci.place import RegistryPlace
from nydus.oci.reference import parse
from nydus.oci.transport import Policy

pytestmark = pytest.mark.skipif(
    not shutil.which("docker-registry"), reason="docker-registry is not installed"
)

MIB = 1 << 20
UPLOAD, MANIFEST = "/blobs/uploads/", "/manifests/"
LARGEST = layer_with("a", random.Random(5).randbytes(6 * MIB))
LAYER = f"/blobs/{model.digest(LARGEST)}"
ANY_BLOB = "/blobs/sha256:"
AMD64 = model.Platform(os="linux", architecture="amd64")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with an image of three layers: 6 MiB, 1 MiB and next to nothing."""
    folder = tmp_path_factory.mktemp("large") / "layout"
    store_image(
        Layout(folder).create(),
        "v1",
        LARGEST,
        layer_with("b", random.Random(6).randbytes(MIB)),
        layer_of("d/", "d/f"),
    )
    return folder


@pytest.fixture
def proxy(docker_registry: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(docker_registry) as proxy:
        yield proxy


class Commands:
    """``nydusify`` on the image ``large`` in a registry."""

    def __init__(self, nydusify: Nydusify, host: str, env: dict[str, str] | None = None) -> None:
        self._nydusify, self._env = nydusify, env
        self.source, self.target = f"{host}/team/app:v1", f"{host}/team/app:nydus"

    def push(self, layout: Path, *more: str) -> None:
        self("copy", "--source", f"file://{layout}", "--target", self.source, *more)

    def convert(self, *more: str) -> None:
        self("convert", "--source", self.source, "--target", self.target, *more)

    def check(self) -> None:
        self("check", "--source", self.source, "--target", self.target, "--no-mount")

    def __call__(self, *arguments: str) -> None:
        done = self._nydusify(*arguments, "--plain-http", env=self._env)
        assert done.returncode == 0, done.stderr

    def fails(self, command: str) -> str:
        """The error of a command; nothing has been tagged by it."""
        arguments = (command, "--source", self.source, "--target", self.target, "--plain-http")
        more = ("--no-mount",) if command == "check" else ("--push-retry-delay", "0s")
        return one_fatal_line(self._nydusify(*arguments, *more, env=self._env))


@pytest.fixture
def commands(nydusify: Nydusify, proxy: FaultyProxy, large: Path) -> Commands:
    commands = Commands(nydusify, proxy.host)
    commands.push(large)
    proxy.seen.clear()
    return commands


# What passes by


def busy_was_obeyed(proxy: FaultyProxy) -> bool:
    """Whether what was refused with 429 came again, and not before the second that was asked for."""
    for refused in (seen for seen in proxy.seen if seen.status == 429):
        again = next(s for s in proxy.seen if s.path == refused.path and s.at > refused.at)
        if again.at - refused.at < 1:
            return False
    return True


def test_a_download_goes_on(commands: Commands, proxy: FaultyProxy) -> None:
    """One fault after the other in the same layer; what was there already is not read again."""
    for step in (commands.convert, commands.check):
        before = proxy.hits
        proxy.seen.clear()
        proxy.fail(refuse(429, Retry_After="1"), path=LAYER)
        proxy.fail(refuse(503), path=LAYER, times=2)
        proxy.fail(cut(2 * MIB), path=LAYER)
        proxy.fail(reset_at(2 * MIB), path=LAYER)
        proxy.fail(lie(1000), path=LAYER)
        step()
        assert proxy.hits == before + 6 and busy_was_obeyed(proxy)
        ranges = [seen.headers.get("Range", "") for seen in proxy.seen if LAYER in seen.path]
        starts = [int(found[6:-1]) for found in ranges if found]
        assert starts[0] == 2 * MIB and starts == sorted(starts) and starts[-1] > 3 * MIB


@pytest.mark.parametrize(
    ("more", "after"), [((), 2 * MIB), (("--push-chunk-size", "1MB"), MIB // 2)], ids=["stream", "chunks"]
)
def test_an_upload_goes_on(commands: Commands, proxy: FaultyProxy, more: tuple[str, ...], after: int) -> None:
    proxy.fail(refuse(429, Retry_After="1"), "POST", UPLOAD)
    proxy.fail(refuse(429, Retry_After="1"), "PATCH", UPLOAD)
    proxy.fail(reset_at(after), "PATCH", UPLOAD)
    proxy.fail(refuse(502), "PUT", UPLOAD, times=2)
    proxy.fail(refuse(503), "PUT", MANIFEST)
    commands.convert(*more, "--push-retry-delay", "0s")
    assert proxy.hits == 6
    commands.check()


def test_a_stall_is_given_up(commands: Commands, proxy: FaultyProxy, tmp_path: Path) -> None:
    """With a short limit: no option sets it."""

    def patient(reference: str) -> RegistryPlace:
        return RegistryPlace(parse(reference), plain_http=True, policy=Policy(read_timeout=1))

    source, target = patient(commands.source), patient(commands.target)
    for act in (lambda: image(source, target), lambda: check(target, source, AMD64, tmp_path / "work")):
        before = proxy.hits
        proxy.fail(stall(2 * MIB), path=LAYER)
        act()
        assert proxy.hits == before + 1


def test_a_token_that_ends_within_a_layer(nydusify: Nydusify, large: Path, tmp_path: Path) -> None:
    """The client was told that it would hold for longer, so only the registry can say."""
    authority = Authority()
    bundle, tokens = authority.write(tmp_path / "root.pem"), TokenServer(authority, 2, told=300)
    settings = f'realm: "{tokens.address}", service: registry, issuer: tests, rootcertbundle: "{bundle}"'
    try:
        with registry(tmp_path, f"auth: {{token: {{{settings}}}}}\n") as host, FaultyProxy(host) as proxy:
            commands = Commands(nydusify, proxy.host, log_in(tmp_path, proxy.host))
            small = ("--push-chunk-size", "200kB")
            commands.push(large)
            for method, fault, step in (
                ("GET", cut(MIB, pause=2.5), lambda: commands.convert("--no-reuse")),
                ("PATCH", wait(2.5), lambda: commands.convert("--no-reuse", *small)),
                ("GET", cut(MIB, pause=2.5), commands.check),
            ):
                proxy.seen.clear()
                if method == "PATCH":
                    # The blobs of the first conversion are there, and would not be sent again.
                    commands.target = commands.target.replace("app:", "other:")
                proxy.fail(fault, method, LAYER if method == "GET" else UPLOAD, signed=True)
                step()
                forgotten = {seen.status for seen in proxy.seen if seen.method == "DELETE"}
                assert not forgotten or 204 in forgotten  # uploads that were only tried
                assert any(seen.status == 401 and "Authorization" in seen.headers for seen in proxy.seen)
                if method == "GET":
                    assert any(seen.status == 206 and LAYER in seen.path for seen in proxy.seen)
    finally:
        tokens.close()


# What does not


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (corrupt(4 * MIB), "corrupted blob: expected sha256:[0-9a-f]{64}, found sha256:[0-9a-f]{64}"),
        (lie(-1000), r"truncated: \d+ of \d+ bytes"),
    ],
    ids=["corrupted", "shorter"],
)
def test_a_layer_that_is_not_what_it_was(
    commands: Commands, proxy: FaultyProxy, fault: Fault, words: str
) -> None:
    proxy.fail(fault, path=LAYER, times=99)
    message = commands.fails("convert")
    assert "layer 1" in message and re.search(words, message)
    assert not place(commands.target).open_sink().has_manifest("nydus")


def test_a_blob_that_is_corrupted_on_its_way(commands: Commands, proxy: FaultyProxy) -> None:
    commands.convert()
    manifest = json.loads(place(commands.target).open().manifest("nydus")[1])
    blob = manifest["layers"][0]["digest"]
    proxy.fail(corrupt(4 * MIB), path=blob, times=99)
    assert blob[7:19] in commands.fails("check")


@pytest.mark.parametrize("command", ["convert", "check"])
def test_a_manifest_without_end(commands: Commands, proxy: FaultyProxy, command: str) -> None:
    if command == "check":
        commands.convert()
    proxy.fail(endless, path=MANIFEST, times=99)
    assert "larger than" in commands.fails(command)


# Other hosts


def test_credentials_stay_with_their_registry(nydusify: Nydusify, large: Path, tmp_path: Path) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    (tmp_path / "open").mkdir()
    (tmp_path / "open/data").symlink_to(tmp_path / "data")
    auth = f'auth: {{htpasswd: {{realm: tests, path: "{tmp_path}/htpasswd"}}}}\n'
    with registry(tmp_path, auth) as signed, registry(tmp_path / "open") as storage:
        with FaultyProxy(signed) as proxy, FaultyProxy(storage) as elsewhere:
            commands = Commands(nydusify, proxy.host, log_in(tmp_path, proxy.host))
            commands.push(large)
            proxy.fail(redirect(elsewhere.host), "GET|HEAD", ANY_BLOB, times=999)
            commands.convert()
            commands.check()
            assert proxy.hits >= 6 and any("Authorization" in seen.headers for seen in proxy.seen)
            assert len(elsewhere.seen) >= 6
            assert not any("Authorization" in seen.headers for seen in elsewhere.seen)
