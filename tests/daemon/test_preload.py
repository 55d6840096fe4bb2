"""A daemon imports what its image needs before it forks, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nydus.daemon import config
from nydus.daemon.options import Options

REPORT = "; import sys; print(' '.join(sys.modules))"


def imported(backend: str) -> set[str]:
    program = f"from nydus.daemon import worker; worker.preload({backend!r}){REPORT}"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(result.stdout.split())


def test_local_files_need_no_http_client() -> None:
    modules = imported("localfs")
    assert "nydus.storage.cache" in modules
    assert not modules & {
        "urllib3",
        "nydus.storage.backends.registry",
        "ssl",
        "cryptography",
        "click",
        "asyncio",
    }
    assert "urllib3" in imported("registry") & imported("")


def test_the_backend_of_the_command_line(tmp_path: Path) -> None:
    place = tmp_path / "mnt"
    image = tmp_path / "bootstrap"
    file = tmp_path / "config.json"
    assert Options(place).backend_type() == ""
    assert Options(place, bootstrap=image, localfs_dir=tmp_path).backend_type() == "localfs"
    assert Options(place, bootstrap=image, config=file).backend_type() == ""
    for text, kind in [
        ('{"device": {"backend": {"type": "oss"}}, "more": 1}', "oss"),
        ("[]", ""),
        ("{", ""),
        ('{"device": {"backend": {"type": 7}}}', ""),
    ]:
        file.write_text(text)
        assert Options(place, bootstrap=image, config=file).backend_type() == kind
        assert config.backend_type(text) == kind
