"""Which version this is, down to the commit where that can be known."""

from __future__ import annotations

import re
from pathlib import Path

from nydus import __version__

_SHA = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def commit() -> str:
    """The git commit of the checkout that runs (full digits); "" where the package was installed otherwise.

    Read from files: starting git would take longer than most commands that print it.
    """
    git = Path(__file__).resolve().parents[2] / ".git"
    try:
        if git.is_file():  # a work tree beside another checkout
            git = git.parent / git.read_text("utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text("utf-8").strip()
        if head.startswith("ref:"):
            head = _resolve(git, head.removeprefix("ref:").strip())
    except (OSError, UnicodeDecodeError):
        return ""
    return head if _SHA.fullmatch(head) else ""


def _resolve(git: Path, name: str) -> str:
    common = git / "commondir"
    if common.exists():
        git = git / common.read_text("utf-8").strip()
    loose = git / name
    if loose.exists():
        return loose.read_text("utf-8").strip()
    for line in (git / "packed-refs").read_text("utf-8").splitlines():
        digits, _, packed = line.partition(" ")
        if packed == name:
            return digits
    return ""


def full() -> str:
    """``v1.2.3-COMMIT``, as result documents have it; ``v1.2.3`` where the commit is not known."""
    digits = commit()
    return f"v{__version__}-{digits}" if digits else f"v{__version__}"
