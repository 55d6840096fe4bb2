"""Configuration documents: what is taken, what is refused, and how the refusal reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nydus.daemon import config as configs
from nydus.errors import ConfigError


def document(**more: Any) -> dict[str, Any]:
    backend = {"type": "registry", "config": {"host": "h", "repo": "r", "auth": "c2VjcmV0OnB3"}}
    device = {"backend": backend, "cache": {"type": "blobcache", "config": {"work_dir": "/c"}}}
    return {"device": device, "mode": "direct", **more}


def test_defaults_are_the_references() -> None:
    config = configs.parse(json.dumps(document()))
    assert config.amplify_io == 1 << 20
    assert config.fs_prefetch.prefetch_all and not config.fs_prefetch.enable
    assert config.device.cache.work_dir == Path("/c")


def test_null_means_absent_and_unknown_keys_are_named(caplog: pytest.LogCaptureFixture) -> None:
    data = document(warmup=1, colour="red", amplify_io=None, fs_prefetch={"enable": True, "speed": 9})
    with caplog.at_level(logging.WARNING):
        config = configs.parse(json.dumps(data))
    assert config.amplify_io == 1 << 20
    assert [r.getMessage() for r in caplog.records] == [
        "configuration: ignoring unknown keys: colour, fs_prefetch.speed"
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ("{}", "device"),
        (json.dumps({"device": {}}), "backend"),
        (json.dumps(document(mode="x")), "mode"),
        (json.dumps(document(amplify_io="1")), "amplify_io"),
        (json.dumps(document(amplify_io=1 << 40)), "amplify_io"),
        (json.dumps(document(fs_prefetch={"enable": True, "threads_count": 0})), "threads_count"),
        (json.dumps({"version": 2}), "version 2"),
        (" " * (2 << 20), "larger"),
        ("\ud800", "JSON"),
    ],
)
def test_a_refusal_names_the_key(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        configs.parse(text.encode("utf-8", "surrogatepass"))


def test_credentials_are_blanked() -> None:
    shown = json.dumps(configs.parse(json.dumps(document())).public())
    assert "c2VjcmV0OnB3" not in shown
    assert configs.redact({"proxy": {"url": "http://u:p@h:1/x"}}) == {"proxy": {"url": "http://h:1/x"}}


def test_the_environment_gives_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_PULL_AUTH", "b3RoZXI6cHc=")
    assert configs.parse(json.dumps(document())).device.backend.config["auth"] == "b3RoZXI6cHc="


def test_the_shortcut_for_local_files() -> None:
    config = configs.parse(configs.for_localfs(Path("/images")))
    assert config.device.backend.config == {"dir": "/images"}
    assert config.device.cache.work_dir == Path("/images")
