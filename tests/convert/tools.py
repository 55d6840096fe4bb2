"""Other people's programs for OCI images, as readers and writers that know nothing of us."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

Snapshot = dict[str, tuple[object, ...]]

needs_skopeo = pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")
needs_umoci = pytest.mark.skipif(not shutil.which("umoci"), reason="umoci is not installed")


def skopeo(*arguments: str) -> str:
    """Runs it against registries that speak http; what it prints."""
    command, *rest = arguments
    tls = {
        "copy": ("-q", "--src-tls-verify=false", "--dest-tls-verify=false"),
        "inspect": ("--tls-verify=false",),
        "list-tags": ("--tls-verify=false",),
    }
    return _run("skopeo", command, *tls[command], *rest)


def umoci(*arguments: str) -> str:
    return _run("umoci", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def snapshot(root: Path) -> Snapshot:
    """Everything that a container sees of a file system, by path; the folder itself is ``.``.

    That is: type and mode, owner, time (seconds), size, device, target, content, extended attributes, and the
    names of the same file.
    """
    found: Snapshot = {}
    names: dict[tuple[int, int], list[str]] = {}
    for folder, folders, files in os.walk(root, followlinks=False):
        for path in (Path(folder), *(Path(folder, name) for name in (*folders, *files))):
            name, status = str(path.relative_to(root)), path.lstat()
            if name in found:
                continue
            kind = stat.S_IFMT(status.st_mode)
            content: object = None
            if kind == stat.S_IFREG:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            elif kind == stat.S_IFLNK:
                content = os.readlink(path)
            elif kind in (stat.S_IFCHR, stat.S_IFBLK):
                content = status.st_rdev
            xattrs = {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            }
            same = [name]
            if kind != stat.S_IFDIR:
                same = names.setdefault((status.st_dev, status.st_ino), [])
                same.append(name)
            found[name] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                int(status.st_mtime),
                content,
                xattrs,
                same,
            )
    for *_, same in found.values():
        assert isinstance(same, list)
        same.sort()
    return found


def must_be_equal(one: Snapshot, other: Snapshot) -> None:
    """Fails with every path where two snapshots differ. Nobody says what the time of the root is."""
    one, other = ({**each, ".": each["."][:3] + each["."][4:]} for each in (one, other))
    found = [
        f"{path}: {one.get(path)} != {other.get(path)}"
        for path in sorted(one.keys() | other.keys())
        if one.get(path) != other.get(path)
    ]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@contextmanager
def mounted(reference: str, folder: Path, *options: str) -> Iterator[Path]:
    """Where ``nydusify mount`` shows an image; ``folder`` is made for it."""
    folder.mkdir()
    command = [Path(sys.executable).with_name("nydusify"), "mount", "--target", reference, "--plain-http"]
    with subprocess.Popen(
        [*command, *options, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    ) as process:
        try:
            assert process.stdout
            if not process.stdout.readline():
                raise AssertionError(process.communicate()[1])
            yield folder / "image-fs"
        finally:
            process.terminate()
            process.communicate(timeout=30)
