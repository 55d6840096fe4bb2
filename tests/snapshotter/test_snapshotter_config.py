"""The configuration file and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nydus.durations import duration
from nydus.errors import ConfigError
from nydus.snapshotter.config import load


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults(tmp_path: Path) -> None:
    config, warnings = load(None, {"root": str(tmp_path)})
    assert (config.daemon_mode, config.daemon.fs_driver, config.log.level) == ("dedicated", "fusedev", "info")
    assert config.cache_dir == tmp_path / "cache"
    assert config.log_dir == tmp_path / "logs"
    assert warnings == []


def test_the_file_the_reference_ships_is_understood(tmp_path: Path) -> None:
    config, warnings = load(
        write(
            tmp_path / "c.toml",
            f"""
version = 1
root = "{tmp_path}"
address = "/run/x.sock"
daemon_mode = "multiple"
cleanup_on_close = false
[system]
enable = true
[system.debug]
daemon_cpu_profile_duration_secs = 5
[daemon]
nydusd_config = ""
recover_policy = "restart"
fs_driver = "fusedev"
threads_number = 4
log_rotation_size = 0
[metrics]
address = ":9110"
[remote.auth]
enable_cri_keychain = true
[cache_manager]
gc_period = "24h"
cache_dir = ""
[experimental.tarfs]
enable_tarfs = false
export_mode = ""
""",
        ),
        {"log.level": "debug", "daemon.fs_driver": None},
    )
    assert config.daemon_mode == "dedicated"
    assert config.daemon.log_rotation_size == 0, "a zero that is written counts"
    assert config.log.level == "debug"
    assert config.cache_dir == tmp_path / "cache"
    assert [warning.split()[0] for warning in warnings] == [
        "system.enable",
        "metrics.address",
        "remote.auth.enable_cri_keychain",
    ]


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    _, warnings = load(
        write(tmp_path / "c.toml", "version = 1\n[daemon]\nthread_number = 1\n[extra]\na = 1"), {}
    )
    assert [warning.split("unknown key ")[1].split()[0] for warning in warnings] == [
        "daemon.thread_number",
        "extra",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("root = '/x'", "unsupported configuration version none"),
        ("version = 2", "unsupported configuration version 2"),
        ("version =", "not TOML"),
        ("version = 1\ndaemon_mode = 'single'", "invalid daemon mode"),
        ("version = 1\ndaemon_mode = 'none'", "not supported yet"),
        ("version = 1\n[daemon]\nfs_driver = 'blockdev'", "daemon.fs_driver"),
        ("version = 1\n[daemon]\nthreads_number = 'four'", "daemon.threads_number"),
        ("version = 1\n[daemon]\nthreads_number = 2000", "daemon.threads_number"),
        ("version = 1\n[image]\nvalidate_signature = true", "image.validate_signature"),
        ("version = 1\n[cache_manager]\ngc_period = 'soon'", "cache_manager.gc_period"),
        ("version = 1\n[remote.mirrors_config]\ndir = '/nowhere'", "remote.mirrors_config.dir"),
        (f"version = 1\nroot = '/{'x' * 70}'", "longer than 70 bytes"),
    ],
)
def test_refusals_name_the_key(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        load(write(tmp_path / "c.toml", text), {})


@pytest.mark.parametrize(
    ("text", "seconds"), [("24h", 86400), ("1m30s", 90), ("500ms", 0.5), ("0", 0), ("0s", 0), ("1.5h", 5400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "h", "1d", "1h x"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(ConfigError):
        duration(text)
