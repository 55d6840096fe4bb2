"""The configuration each image gives its daemon."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from nydus.errors import ConfigError
from nydus.oci import hosts as registry_hosts
from nydus.oci.reference import parse
from nydus.snapshotter import labels as label
from nydus.snapshotter.template import Template, without_secrets, write


@pytest.fixture(autouse=True)
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "docker"
    path.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(path))
    return path / "config.json"


def test_the_default_is_filled_from_the_reference(tmp_path: Path) -> None:
    document = Template(None, tmp_path / "cache").fill("/5", parse("example.com:5000/a/b:1"), {})
    device = document["device"]
    assert device["id"] == "/5"
    assert device["backend"]["config"] == {"host": "example.com:5000", "repo": "a/b"}
    assert device["cache"]["config"]["work_dir"] == str(tmp_path / "cache")


def test_a_template_keeps_its_own_keys(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(
        json.dumps(
            {
                "device": {
                    "backend": {
                        "type": "registry",
                        "config": {"timeout": 9, "scheme": "http", "auth": "b3du"},
                    },
                    "cache": {"type": "blobcache", "config": {"compressed": True}},
                },
                "mode": "direct",
                "of_tomorrow": [1],
            }
        )
    )
    template = Template(path, tmp_path)
    document = template.fill("/", parse("ubuntu"), {})
    assert document["of_tomorrow"] == [1]
    config = document["device"]["backend"]["config"]
    assert (config["timeout"], config["scheme"], config["auth"]) == (9, "http", "b3du")
    assert (config["host"], config["repo"]) == ("registry-1.docker.io", "library/ubuntu")
    assert document["device"]["cache"]["config"] == {"compressed": True, "work_dir": str(tmp_path)}
    assert "auth" not in without_secrets(document)["device"]["backend"]["config"]
    assert template.fill("/", parse("b/c"), {})["device"]["backend"]["config"]["repo"] == "b/c"


@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1:5000", "[::1]:5000", "[::1]"])
def test_loopback_is_plain_http(tmp_path: Path, host: str) -> None:
    document = Template(None, tmp_path).fill("/", parse(f"{host}/a"), {})
    assert document["device"]["backend"]["config"]["scheme"] == "http"


def test_other_backends_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"device": {"backend": {"type": "localfs", "config": {"dir": "/d"}}}}))
    document = Template(path, tmp_path).fill("/", None, {})
    assert document["device"]["backend"] == {"type": "localfs", "config": {"dir": "/d"}}


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"device": {"backend": 1}}'])
def test_a_wrong_template_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ConfigError, match=r"t\.json"):
        Template(tmp_path / "t.json", tmp_path)


def test_labels_go_before_docker_config(tmp_path: Path, docker_config: Path) -> None:
    auth = base64.b64encode(b"file:secret").decode()
    docker_config.write_text(json.dumps({"auths": {"https://index.docker.io/v1/": {"auth": auth}}}))
    template = Template(None, tmp_path)
    config = template.fill("/", parse("ubuntu"), {})["device"]["backend"]["config"]
    assert base64.b64decode(config["auth"]) == b"file:secret", "the key docker login writes for Docker Hub"
    labels = {label.USERNAME: "me", label.SECRET: "mine"}
    config = template.fill("/", parse("ubuntu"), labels)["device"]["backend"]["config"]
    assert base64.b64decode(config["auth"]) == b"me:mine"
    config = template.fill("/", parse("ubuntu"), {label.SECRET: "tok"})["device"]["backend"]["config"]
    assert config["registry_token"] == "tok"


def test_written_files_are_private(tmp_path: Path) -> None:
    write(tmp_path / "a" / "config.json", {"x": 1})
    assert (tmp_path / "a" / "config.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.json"]


def hosts(directory: Path, name: str, text: str) -> None:
    (directory / name).mkdir(parents=True)
    (directory / name / "hosts.toml").write_text(text)


def test_mirrors_become_the_backend_s(tmp_path: Path) -> None:
    hosts(
        tmp_path / "h",
        "example.com_5000_",
        """
server = "https://example.com:5000"
[host."http://127.0.0.1:65001"]
  capabilities = ["pull", "resolve"]
  ca = "ca.pem"
  ping_url = "http://127.0.0.1:40901/ping"
  failure_limit = 3
  [host."http://127.0.0.1:65001".header]
    X-Dragonfly-Registry = ["https://example.com:5000", "second"]
[host."backup.example.com"]
[host."https://push.example.com"]
  capabilities = ["push"]
""",
    )
    template = Template(None, tmp_path, tmp_path / "h")
    config = template.fill("/", parse("example.com:5000/a"), {})["device"]["backend"]["config"]
    assert [mirror["host"] for mirror in config["mirrors"]] == [
        "http://127.0.0.1:65001",
        "https://backup.example.com",
    ]
    assert config["mirrors"][0]["headers"] == {"X-Dragonfly-Registry": "https://example.com:5000, second"}
    assert (config["mirrors"][0]["failure_limit"], config["scheme"]) == (3, "https")
    assert config["ca_cert_files"] == [str(tmp_path / "h" / "example.com_5000_" / "ca.pem")]
    other = template.fill("/", parse("other.com/a"), {})["device"]["backend"]["config"]
    assert "mirrors" not in other


def test_a_host_entry_for_the_registry_itself_gives_the_scheme(tmp_path: Path) -> None:
    hosts(tmp_path / "h", "reg.lan:5000", '[host."http://reg.lan:5000"]\nskip_verify = true')
    config = Template(None, tmp_path, tmp_path / "h").fill("/", parse("reg.lan:5000/a"), {})["device"][
        "backend"
    ]
    assert config["config"]["scheme"] == "http"
    assert config["config"]["skip_verify"] is True
    assert "mirrors" not in config["config"]


def test_a_daemon_gets_no_mirror_that_it_cannot_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = """
skip_verify = true
proxy = "http://proxy:1"
[host."https://harbor.io/v2/hub"]
override_path = true
[host."https://closed.io"]
client = "me.pem"
ca = "closed.pem"
[host."https://example.com"]
colour = "red"
"""
    hosts(tmp_path / "h", "example.com", text)
    template = Template(None, tmp_path, tmp_path / "h")
    config = template.fill("/", parse("example.com/a:1"), {})["device"]["backend"]["config"]
    (mirror,) = config["mirrors"]
    assert (mirror["host"], mirror["namespace"]) == ("https://harbor.io/v2/hub", "example.com")
    assert config["skip_verify"] is True and "ca_cert_files" not in config
    assert config["proxy"] == {"url": "http://proxy:1", "fallback": False}
    assert config["host"] == "example.com" and config["scheme"] == "https"
    assert "closed.io: nydusd cannot use" in caplog.text and "colour has no effect" in caplog.text
    for number, key in enumerate(('server = "https://a.io/b"', 'client = "me.pem"', '[header]\nx = "1"')):
        hosts(tmp_path / "h", f"{number}.com", key)
        with pytest.raises(ConfigError, match=r"[0-2]\.com: nydusd cannot use"):
            template.fill("/", parse(f"{number}.com/a:1"), {})


def test_what_is_said_of_a_mirror_is_not_for_the_registry(tmp_path: Path) -> None:
    text = 'server = "https://cache.lan"\n[host."https://mirror.lan"]\nskip_verify = true\n'
    hosts(tmp_path / "h", "reg.lan:5000", f'{text}[host."http://reg.lan:5000"]\nskip_verify = true\n')
    template = Template(None, tmp_path, tmp_path / "h")
    config = template.fill("/", parse("reg.lan:5000/a"), {})["device"]["backend"]["config"]
    assert (config["scheme"], config["host"], config.get("skip_verify")) == ("https", "cache.lan", None)
    assert [(each["host"], each["namespace"], each["skip_verify"]) for each in config["mirrors"]] == [
        ("https://mirror.lan", "reg.lan:5000", True),
        ("http://reg.lan:5000", "", True),
    ]


def test_what_is_shown_has_no_sign_in_data_of_hosts(tmp_path: Path) -> None:
    text = 'proxy = "http://me:swordfish@proxy:1"\n[host."https://mirror.lan".header]\n'
    hosts(tmp_path / "h", "reg.lan", f'{text}AUTHORIZATION = "Basic swordfish"\nX-One = "1"\n')
    document = Template(None, tmp_path, tmp_path / "h").fill("/", parse("reg.lan/a"), {})
    shown = without_secrets(document)
    assert "swordfish" not in str(shown) and "swordfish" in str(document)
    config = shown["device"]["backend"]["config"]
    assert (config["proxy"]["url"], config["mirrors"][0]["headers"]) == ("http://proxy:1", {"X-One": "1"})


def test_docker_hub_and_default_directories(tmp_path: Path) -> None:
    hosts(tmp_path, "index.docker.io", '[host."http://hub"]')
    hosts(tmp_path, "_default", '[host."http://any"]')
    assert registry_hosts.load(tmp_path, "docker.io").mirrors[0].url == "http://hub"
    assert registry_hosts.load(tmp_path, "quay.io").mirrors[0].url == "http://any"


@pytest.mark.parametrize(
    "text", ["nonsense", "server = 1", '[host."ftp://x"]', '[host."http://x"]\nfailure_limit = "x"']
)
def test_a_wrong_hosts_file_is_named(tmp_path: Path, text: str) -> None:
    hosts(tmp_path, "_default", text)
    with pytest.raises(ConfigError, match=r"_default/hosts\.toml"):
        registry_hosts.load(tmp_path, "x.io")
