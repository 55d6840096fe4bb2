"""What a ``hosts.toml`` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from nydus.errors import ConfigError
from nydus.oci.hosts import Host, Hosts, load


def written(folder: Path, text: str, name: str = "_default") -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "hosts.toml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("url", "override", "address", "path"),
    [
        ("https://h", False, "https://h", "/v2"),
        ("h:5000", False, "https://h:5000", "/v2"),
        ("https://h/", False, "https://h", "/v2"),
        ("https://h/v2", False, "https://h", "/v2"),
        ("https://h/v2/", True, "https://h", "/v2"),
        ("http://h/us", False, "http://h", "/us/v2"),
        ("https://h/v2/dockerhub", True, "https://h", "/v2/dockerhub"),
        ("https://h/v2/dockerhub", False, "https://h", "/v2/dockerhub/v2"),
        ("https://h/a/../b", False, "https://h", "/b/v2"),
        ("https://h", True, "https://h", ""),
    ],
)
def test_addresses(tmp_path: Path, url: str, override: bool, address: str, path: str) -> None:
    text = f'[host."{url}"]\noverride_path = {str(override).lower()}\n'
    (found,) = load(written(tmp_path, text), "x.io").mirrors
    assert (found.url, found.path) == (address, path)
    found_server = load(
        written(tmp_path, f'server = "{url}"\noverride_path = {str(override).lower()}\n'), "x.io"
    )
    assert found_server.server
    assert (found_server.server.url, found_server.server.path) == (address, path)


def test_everything_that_a_host_may_have(tmp_path: Path) -> None:
    text = """
[host."https://m"]
capabilities = ["Pull"]
ca = ["a.pem", "/etc/b.pem"]
client = [["c.cert", "c.key"], ["both.pem", ""]]
skip_verify = true
dial_timeout = "1m1.5s"
proxy = "http://proxy:8080"
[host."https://m".header]
X-One = "1"
X-Several = ["a", "b"]
[host."https://m2"]
ca = "a.pem"
client = "both.pem"
[host."https://m3"]
client = ["one.pem", "two.pem"]
[host."https://pushed-only"]
capabilities = ["push"]
"""
    folder = tmp_path / "_default"
    found = load(written(tmp_path, text), "x.io")
    assert found.server is None and found.unused == ()
    first, second, third = found.mirrors
    both = str(folder / "both.pem")
    assert first == Host(
        "https://m",
        resolve=False,
        headers=(("X-One", "1"), ("X-Several", "a, b")),
        ca=(str(folder / "a.pem"), "/etc/b.pem"),
        client=((str(folder / "c.cert"), str(folder / "c.key")), (both, both)),
        skip_verify=True,
        proxy="http://proxy:8080",
        connect_timeout=61.5,
    )
    assert (second.ca, second.client) == ((str(folder / "a.pem"),), ((both, both),))
    assert third.client == tuple((str(folder / name),) * 2 for name in ("one.pem", "two.pem"))
    assert second.resolve


def test_the_top_of_the_file_is_about_the_server_itself(tmp_path: Path) -> None:
    text = 'skip_verify = true\nca = "a.pem"\n[header]\nX-One = "1"\n[host."https://m"]\n'
    found = load(written(tmp_path, text), "x.io")
    assert found.server == Host(
        "", skip_verify=True, ca=(str(tmp_path / "_default/a.pem"),), headers=(("X-One", "1"),)
    )
    assert found.mirrors == (Host("https://m"),)


def test_folders(tmp_path: Path) -> None:
    for name, url in (("x.io_5000_", "a"), ("x.io:5000", "b"), ("x.io", "c"), ("_default", "d")):
        written(tmp_path, f'server = "https://{url}"', name)

    def of(host: str) -> str:
        server = load(tmp_path, host).server
        return server.url if server else ""

    assert (of("x.io:5000"), of("x.io"), of("y.io")) == ("https://a", "https://c", "https://d")
    (tmp_path / "x.io_5000_/hosts.toml").unlink()
    assert load(tmp_path, "x.io:5000") == Hosts()
    for name in ("ca.crt", "me.cert", "me.key"):
        (tmp_path / "x.io_5000_" / name).touch()
    server = load(tmp_path, "x.io:5000").server
    assert server and server.ca == (str(tmp_path / "x.io_5000_/ca.crt"),)
    assert server.client == ((str(tmp_path / "x.io_5000_/me.cert"), str(tmp_path / "x.io_5000_/me.key")),)
    (tmp_path / "x.io_5000_").rename(tmp_path / "elsewhere")
    assert of("x.io:5000") == "https://b"


def test_what_is_not_known_is_told(tmp_path: Path) -> None:
    text = 'servr = "https://a"\n[host."https://m"]\ncolour = "red"\n[host."https://m".host."https://n"]\n'
    unused = load(written(tmp_path, text), "x.io").unused
    assert [line.rpartition(": ")[2].partition(" ")[0] for line in unused] == ["colour", "host", "servr"]
    assert all("hosts.toml" in line for line in unused) and 'host."https://m"' in unused[0]


def test_numbers_have_a_measure(tmp_path: Path) -> None:
    (found,) = load(written(tmp_path, '[host."https://m"]\ndial_timeout = "99999999h"\n'), "x.io").mirrors
    assert found.connect_timeout == 86400, "more than a socket takes"
    for wrong in ("inf", "nan", "-1"):
        with pytest.raises(ConfigError, match="health_check_interval"):
            load(written(tmp_path, f'[host."https://m"]\nhealth_check_interval = {wrong}\n'), "x.io")


def test_a_password_is_not_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must not have a user") as caught:
        load(written(tmp_path, '[host."https://me:secret@m"]\n'), "x.io")
    assert "secret" not in str(caught.value) and "https://m" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('server = "ftp://a"', "not the URL of a registry"),
        ('server = "https://me:secret@a"', "must not have a user"),
        ('[host."https://a?x=1"]', "must not have a user"),
        ('[host."https://[a"]', "not the URL of a registry"),
        ('[host."https://a:99999"]', "not the URL of a registry"),
        ('[host.""]', "host without address"),
        ("host = 1", "host a table"),
        ("[host]\na = 1", "is not a table"),
        ('capabilities = ["push"]', "without the capability pull"),
        ('[host."https://a"]\ncapabilities = ["fly"]', "unknown capability 'fly'"),
        ('[host."https://a"]\ncapabilities = "pull"', "array"),
        ('[host."https://a"]\nclient = [["a", "b", "c"]]', "client"),
        ('[host."https://a"]\nclient = [[1]]', "str"),
        ('[host."https://a"]\nclient = 1', "array"),
        ('[host."https://a"]\nclient = [[]]', "not the name of a file"),
        ('[host."https://a"]\nca = "\\u0000"', "not the name of a file"),
        ('[host."https://a".header]\nx = "a\\nb"', "not one that can be sent"),
        ('[host."https://a b"]', "not the URL of a registry"),
        ('[host."https://a"]\nproxy = "http://a:0"', "not the URL of an http or https proxy"),
        ('[host."https://a"]\nca = 1', "array"),
        ('[host."https://a"]\nskip_verify = "yes"', "skip_verify"),
        ('[host."https://a"]\noverride_path = 1', "bool"),
        ('[host."https://a"]\ndial_timeout = "soon"', "not a duration"),
        ('[host."https://a"]\nproxy = "socks5://a"', "not the URL of an http or https proxy"),
        ('[host."https://a".header]\nx = 1', "str"),
    ],
)
def test_what_is_wrong_is_refused(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=f"hosts.toml.*{what}"):
        load(written(tmp_path, text), "x.io")
