"""Where ``ctr-remote images rpull`` reads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nydus.cli.ctr_remote import ctr_remote
from nydus.errors import BackendError
from nydus.oci import model
from nydus.oci.place import Source
from nydus.oci.registry import Registry
from nydus.snapshotter.pull import Pulled

sys.path.insert(0, str(Path(__file__).parents[1] / "oci"))

from faulty import BasicAuth, FaultyRegistry

EMPTY = b'{"schemaVersion": 2, "manifests": []}'


@pytest.fixture
def pulled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests of what containerd would have been given."""
    found: list[str] = []

    class Client:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None: ...
        def pull(self, reference: object, source: Source, **_: object) -> Pulled:
            found.append(source.manifest("1")[0].digest)
            return Pulled(found[-1], 1, 1)

    monkeypatch.setattr("nydus.snapshotter.pull.Client", Client)
    return found


def rpull(*arguments: str) -> Result:
    return CliRunner().invoke(ctr_remote, ["images", "rpull", *arguments])


def test_mirrors_come_first_and_get_nothing_that_is_for_the_registry(
    tmp_path: Path, pulled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with FaultyRegistry(tmp_path / "mirror") as mirror, FaultyRegistry(tmp_path / "registry") as server:
        with Registry(server.host, plain_http=True) as registry:
            registry.repository("app").put_manifest("1", EMPTY, model.OCI_INDEX)
        folder = tmp_path / "hosts" / server.host
        folder.mkdir(parents=True)
        (folder / "hosts.toml").write_text(f'[host."http://{mirror.host}"]\ncolour = "red"\n')
        mirror.intercepts.append(BasicAuth("nobody", "knows"))
        server.intercepts.append(BasicAuth("me", "secret"))
        arguments = (f"{server.host}/app:1", "--hosts-dir", str(tmp_path / "hosts"))
        done = rpull(*arguments, "--user", "me:secret")
        assert done.exit_code == 0, done.output
        assert "colour has no effect" in done.stderr
        assert len(pulled) == 1 and mirror.paths("GET")
        assert not [headers for _, _, headers in mirror.seen if "Authorization" in headers]
        done = rpull(*arguments, "--user", "me:wrong")
        assert isinstance(done.exception, BackendError) and "401" in str(done.exception)
        mirror.intercepts.clear()
        with Registry(mirror.host, plain_http=True) as registry:
            registry.repository("app").put_manifest("1", EMPTY + b" ", model.OCI_INDEX)
        assert rpull(*arguments).exit_code == 0
        assert len(set(pulled)) == 2, "the mirror's own"
