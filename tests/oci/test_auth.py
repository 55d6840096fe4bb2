from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from nydus.errors import ConfigError
from nydus.oci.auth import Credentials, docker_credentials, parse_challenges

AUTH = base64.b64encode(b"me:secret").decode()


def config(folder: Path, document: object) -> Path:
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("key", ["r.io", "https://r.io", "https://r.io/v2/", "https://r.io/"])
def test_credentials_of_a_docker_config(tmp_path: Path, key: str) -> None:
    folder = config(tmp_path, {"auths": {key: {"auth": AUTH}}})
    assert docker_credentials("r.io", folder) == Credentials("me", "secret")
    assert docker_credentials("other.io", folder) is None


def test_docker_hub_has_a_name_of_old(tmp_path: Path) -> None:
    folder = config(tmp_path, {"auths": {"https://index.docker.io/v1/": {"auth": AUTH}}})
    assert docker_credentials("docker.io", folder) == Credentials("me", "secret")


def test_identity_tokens_and_missing_files(tmp_path: Path) -> None:
    assert docker_credentials("r.io", tmp_path) is None
    folder = config(tmp_path, {"auths": {"r.io": {"identitytoken": "abc"}}})
    found = docker_credentials("r.io", folder)
    assert found is not None and found.identity_token == "abc"
    assert "abc" not in repr(found)


def test_credential_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text(
        "#!/bin/sh\nread server\n"
        'case "$server" in r.io) echo \'{"Username":"u","Secret":"s"}\';;'
        " *) echo credentials not found in native keychain; exit 1;; esac\n"
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    folder = config(tmp_path, {"credHelpers": {"r.io": "test"}})
    assert docker_credentials("r.io", folder) == Credentials("u", "s")
    folder = config(tmp_path, {"credsStore": "test", "auths": {"x.io": {"auth": AUTH}}})
    assert docker_credentials("r.io", folder) == Credentials("u", "s")
    assert docker_credentials("x.io", folder) == Credentials("me", "secret")
    folder = config(tmp_path, {"credHelpers": {"r.io": "not-there"}})
    with pytest.raises(ConfigError, match="docker-credential-not-there is not in PATH"):
        docker_credentials("r.io", folder)


@pytest.mark.parametrize(
    "text",
    ['{"auths": 1', "[1]", '{"auths":{"r.io":{"auth":"***"}}}', '{"auths":{"r.io":{"auth":"bm9jb2xvbg=="}}}'],
)
def test_a_broken_docker_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        docker_credentials("r.io", tmp_path)


def test_challenges() -> None:
    header = 'Bearer realm="https://a/t?x=1,2",service="s \\"q\\"", scope="repository:a:pull,push"'
    (found,) = parse_challenges([header])
    assert found.scheme == "bearer"
    assert found.parameters == {
        "realm": "https://a/t?x=1,2",
        "service": 's "q"',
        "scope": "repository:a:pull,push",
    }
    assert [c.scheme for c in parse_challenges(['Negotiate, Basic realm="x", Bearer realm=y'])] == [
        "negotiate",
        "basic",
        "bearer",
    ]
    assert parse_challenges(["", "=== ,,,"]) == []
