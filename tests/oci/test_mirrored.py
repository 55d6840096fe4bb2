"""Reading from mirrors, with the registry behind them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from faulty import FaultyHandler, FaultyRegistry, TokenAuth, blob_of, cut, hang_up, is_blob, status

from nydus.errors import BackendError
from nydus.oci import model
from nydus.oci.hosts import Host
from nydus.oci.mirrored import MirroredPlace, mirrored
from nydus.oci.place import RegistryPlace
from nydus.oci.reference import parse
from nydus.oci.registry import Registry
from nydus.oci.transport import Policy

DATA = os.urandom(3 << 20)


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[FaultyRegistry]:
    with FaultyRegistry(tmp_path / "mirror") as server:
        yield server


@pytest.fixture
def digest(server: FaultyRegistry, mirror: FaultyRegistry) -> str:
    """A blob that both have."""
    digest = ""
    for each in (server, mirror):
        with Registry(each.host, plain_http=True) as registry:
            digest = registry.repository("app").put_blob(DATA, model.OCI_LAYER).digest
        each.seen.clear()
    return digest


def place(server: FaultyRegistry, *mirrors: FaultyRegistry, **more: object) -> MirroredPlace:
    hosts = tuple(Host(f"http://{each.host}", **more) for each in mirrors)  # type: ignore[arg-type]
    policy = Policy(attempts=3, pause=0.01)
    return MirroredPlace(parse(f"{server.host}/app:1"), plain_http=True, policy=policy, mirrors=hosts)


def wrong(handler: FaultyHandler) -> None:
    data = bytearray(blob_of(handler))
    data[len(data) // 2] ^= 1
    start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
    more = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
    handler.reply(206 if start else 200, bytes(data[start:]), more)


def blobs(server: FaultyRegistry) -> list[str]:
    return [
        headers.get("Range", "all")
        for method, path, headers in server.seen
        if method == "GET" and "/blobs/" in path
    ]


@pytest.mark.parametrize(
    ("fault", "asked"),
    [
        (cut(1 << 20), ["bytes=1000-"]),
        (cut(0), ["all"]),
        (status(500), ["all"]),
        (status(404), ["all"]),
        (status(403), ["all"]),
        (hang_up, ["all"]),
    ],
)  # fmt: skip
def test_a_blob_goes_on_where_a_mirror_fails(
    server: FaultyRegistry, mirror: FaultyRegistry, digest: str, fault: object, asked: list[str]
) -> None:
    mirror.intercepts.append(lambda handler: is_blob(handler) and not fault(handler))  # type: ignore[operator]
    source = place(server, mirror).open()
    for _ in range(2):
        stream = source.blob(digest, len(DATA))
        assert stream.read(1000) + stream.read() == DATA
        stream.close()
    assert blobs(server) == [*asked, "all"]
    assert blobs(mirror) == ["all"], "the mirror is not asked for that blob again"
    assert not mirror.paths("HEAD")


def test_a_truncated_blob_is_completed(server: FaultyRegistry, mirror: FaultyRegistry, digest: str) -> None:
    mirror.intercepts.append(lambda handler: is_blob(handler) and not handler.reply(200, DATA[:1000]))
    assert place(server, mirror).open().blob(digest, len(DATA)).read() == DATA
    assert blobs(server) == ["bytes=1000-"]


def test_wrong_bytes_are_asked_for_elsewhere(
    server: FaultyRegistry, mirror: FaultyRegistry, digest: str
) -> None:
    mirror.intercepts.append(lambda handler: is_blob(handler) and not wrong(handler))
    source = place(server, mirror).open()
    stream = source.blob(digest, len(DATA))
    with pytest.raises(BackendError, match=f"{mirror.host}/app: corrupted blob") as caught:
        while stream.read(100_000):
            pass
    assert not caught.value.permanent, "whoever begins again gets it from the registry"
    assert source.blob(digest, len(DATA)).read() == DATA
    assert (len(blobs(mirror)), len(blobs(server))) == (1, 1)
    # Nobody has seen anything of what is read in one go.
    assert place(server, mirror).open().blob(digest, len(DATA)).read() == DATA


def test_a_document_and_ranges_come_from_elsewhere_too(
    server: FaultyRegistry, mirror: FaultyRegistry, digest: str
) -> None:
    mirror.intercepts.append(lambda handler: is_blob(handler) and not wrong(handler))
    source = place(server, mirror).open()
    assert source.document(model.describe(DATA, model.OCI_LAYER)) == DATA
    mirror.intercepts[:] = [lambda handler: is_blob(handler) and not status(503)(handler)]
    source = place(server, mirror).open()
    assert source.read_range(digest, 5, 10) == DATA[5:15]
    assert source.read_range(digest, 7, 10) == DATA[7:17]
    assert len(blobs(mirror)) == 2
    assert source.blob_size(digest) == len(DATA) and source.has_blob(digest)


def test_wrong_bytes_of_the_registry_are_an_error(
    server: FaultyRegistry, mirror: FaultyRegistry, digest: str
) -> None:
    for each in (server, mirror):
        each.intercepts.append(lambda handler: is_blob(handler) and not wrong(handler))
    with pytest.raises(BackendError, match=f"{server.host}/app: corrupted blob") as caught:
        place(server, mirror).open().blob(digest, len(DATA)).read()
    assert caught.value.permanent
    server.intercepts[:] = [lambda handler: is_blob(handler) and not status(404)(handler)]
    with pytest.raises(BackendError, match=f"{server.host}.*404") as caught:
        place(server, mirror).open().blob(digest, len(DATA)).read()


def test_a_mirror_that_does_not_answer_is_given_up(
    server: FaultyRegistry, mirror: FaultyRegistry, digest: str
) -> None:
    mirror.intercepts.append(lambda handler: not hang_up(handler))
    source = place(server, mirror).open()
    assert source.blob(digest, len(DATA)).read() == DATA
    with pytest.raises(BackendError, match="404"):
        source.manifest("1")
    assert len(mirror.seen) == 1


def test_only_who_may_say_what_a_tag_means_is_asked(server: FaultyRegistry, mirror: FaultyRegistry) -> None:
    stored = {}
    for each, text in (
        (server, b'{"schemaVersion": 2, "manifests": []}'),
        (mirror, b'{"schemaVersion":2, "manifests": []}'),
    ):
        with Registry(each.host, plain_http=True) as registry:
            stored[each.host] = registry.repository("app").put_manifest("1", text, model.OCI_INDEX).digest
        each.seen.clear()
    assert place(server, mirror).open().manifest("1")[0].digest == stored[mirror.host]
    source = place(server, mirror, resolve=False).open()
    assert source.manifest("1")[0].digest == stored[server.host]
    assert source.manifest(stored[mirror.host])[0].digest == stored[mirror.host]


def test_a_path_takes_the_place_of_that_of_the_api(
    server: FaultyRegistry, mirror: FaultyRegistry, tmp_path: Path
) -> None:
    """As a registry has it that is a proxy for others, each in a project of its own."""
    right, other = b'{"schemaVersion": 2, "manifests": []}', b'{"schemaVersion":2, "manifests": []}'
    with Registry(mirror.host, plain_http=True) as registry:
        registry.repository("proxied/app").put_manifest("1", right, model.OCI_INDEX)
        registry.repository("app").put_manifest("1", other, model.OCI_INDEX)
        digest = registry.repository("proxied/app").put_blob(DATA, model.OCI_LAYER).digest
    mirror.seen.clear()
    auth = TokenAuth()
    mirror.intercepts.append(auth)
    (tmp_path / "hosts/example.com").mkdir(parents=True)
    (tmp_path / "hosts/example.com/hosts.toml").write_text(
        f'[host."http://{mirror.host}/v2/proxied"]\noverride_path = true\n'
    )
    found, unused = mirrored(RegistryPlace(parse("example.com/app:1")), tmp_path / "hosts")
    assert unused == ()
    source = found.open()
    assert source.manifest("1")[1] == right
    assert source.blob(digest).read() == DATA
    asked = {urlsplit(path).path for path in mirror.paths("GET")} - {"/token"}
    assert asked == {"/v2/proxied/app/manifests/1", f"/v2/proxied/app/blobs/{digest}"}
    assert [fields["scope"] for fields in auth.requests] == ["repository:proxied/app:pull"]
    assert {urlsplit(path).query for path in mirror.paths("GET") if "/app/" in path} == {"ns=example.com"}


def test_the_registry_itself_is_told_nothing_of_itself(
    server: FaultyRegistry, tmp_path: Path, digest: str
) -> None:
    (tmp_path / "hosts/_default").mkdir(parents=True)
    file = tmp_path / "hosts/_default/hosts.toml"
    file.write_text('[header]\nX-Wanted = ["a", "b"]\n')
    reference = RegistryPlace(parse(f"{server.host}/app:1"), plain_http=True)
    assert mirrored(reference, tmp_path / "hosts")[0].open().blob(digest).read() == DATA
    assert [(path, headers.get("X-Wanted")) for _, path, headers in server.seen] == [
        (f"/v2/app/blobs/{digest}", "a, b")
    ]
    # The user's own sign-in data are for the registry, not for what takes its place.
    file.write_text(f'server = "http://{server.host}"\n')
    server.seen.clear()
    elsewhere = RegistryPlace(parse("example.com/app:1"))
    assert mirrored(elsewhere, tmp_path / "hosts")[0].open().blob(digest).read() == DATA
    assert server.paths("GET") == [f"/v2/app/blobs/{digest}?ns=example.com"]


def test_tls_is_tried_first_where_the_file_says_how(
    server: FaultyRegistry, tmp_path: Path, digest: str
) -> None:
    (tmp_path / "hosts/_default").mkdir(parents=True)
    (tmp_path / "hosts/_default/hosts.toml").write_text(
        f'server = "http://{server.host}"\nskip_verify = true\n'
    )
    found, _ = mirrored(RegistryPlace(parse("example.com/app:1")), tmp_path / "hosts")
    assert isinstance(found, MirroredPlace) and found.server
    assert [host.url for host in found.mirrors] == [f"https://{server.host}"]
    assert found.server.url == f"http://{server.host}"
    assert found.open().blob(digest).read() == DATA
