"""Where the sub-commands of nydusify write images: the counterpart of their sources."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nydus.cli.nydusify_places import image_name, image_reference, work_dir
from nydus.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from nydus.oci.place import LayoutPlace, SinkPlace, SourcePlace
    from nydus.oci.reference import Reference

#: What every option with a target says of it.
TARGET = "Reference to push to, containerd://NAMESPACE/REFERENCE, or file://PATH (see --target-archive)."
TARGET_ARCHIVE = (
    "Write this archive (.tar, .tar.gz, .tar.zst) or OCI layout (FOLDER/, FOLDER:NAME); push nothing."
)
log = logging.getLogger(__name__)

_OF_LAYOUTS = {"blobs", "index.json", "oci-layout"}


@contextmanager
def target_place(
    text: str | None,
    archive: str | None,
    source: SourcePlace | None,
    *,
    folder: Path,
    plain_http: bool,
    insecure: bool,
    push_chunk_size: int = 0,
    containerd: Path | None = None,
) -> Iterator[SinkPlace]:
    """What ``--target`` or ``--target-archive`` say, for writing one image while the context lasts.

    An archive and an image of containerd come into being when it ends without an error. If it ends with one,
    the blobs that are complete are kept, for the same command again. With ``--target-archive``, ``--target``
    says what the image is called.

    Args:
        source: whose name the image keeps in an archive or layout where no other is given.
        folder: the work folder; see :func:`~nydus.cli.nydusify_places.work_dir`.
        containerd: socket; by default what the environment says.

    Raises:
        ConfigError: nothing can be written there; raised before anything is done.
    """
    from nydus.containerd.store import SCHEME, containerd_place, write_image
    from nydus.oci.layout import Layout
    from nydus.oci.place import LayoutPlace, registry_place

    option = "--target-archive"
    if text and text.startswith("file://"):
        if archive:
            raise ConfigError(f"--target {text} and --target-archive cannot be used together")
        archive, text, option = text.removeprefix("file://"), None, "--target"
    if archive:
        if text and text.startswith(SCHEME):
            raise ConfigError(f"--target {text} and --target-archive cannot be used together")
        name = _tagged(text, source)
        path, tag = _layout_path(archive)
        if path is None:
            with _new_archive(Path(archive), name, folder, option) as layout:
                yield layout
        else:
            with _layout(path, tag, name, option) as layout:
                yield layout
    elif not text:
        raise ConfigError("--target or --target-archive is needed")
    elif text.startswith(SCHEME):
        place = containerd_place(text, containerd)
        with _aside(folder, text) as made:
            yield LayoutPlace(made, name=text)
            write_image(Layout(made), place)
    else:
        yield registry_place(
            image_reference(text, "target"),
            plain_http=plain_http,
            insecure=insecure,
            push_chunk_size=push_chunk_size,
        )


def _tagged(text: str | None, source: SourcePlace | None) -> Reference:
    """What the image is called in an archive or layout."""
    from nydus.oci.reference import Reference

    if text:
        name = image_reference(text, "target")
        if name.digest:
            raise ConfigError(f"--target {name}: must be a tag, not a digest")
        return name
    name = image_name(source) if source is not None else Reference("localhost", "image", "latest")
    return name if name.tag and not name.digest else name.with_tag(name.tag or "latest")


def _layout_path(text: str) -> tuple[Path | None, str]:
    """Folder of the layout, and name in it, of ``PATH``, ``PATH/`` or ``PATH:NAME``; None for an archive."""
    colons = [place for place, letter in enumerate(text) if letter == ":"]
    for end in (len(text), *colons):
        if text[:end].endswith("/") or Path(text[:end]).is_dir():
            return Path(text[:end]), text[end + 1 :]
    return None, ""


@contextmanager
def _layout(path: Path, tag: str, name: Reference, option: str) -> Iterator[LayoutPlace]:
    """An OCI layout, to which an image is added. One that is new goes again if it has no blob in the end."""
    from nydus.oci.layout import IMAGE_NAME, REF_NAME, Layout
    from nydus.oci.place import LayoutPlace

    new = not path.exists()
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: its folder does not exist")
    if tag.startswith(("sha256:", "sha512:")):
        raise ConfigError(f"{option} {path}:{tag}: the name must not be a digest")
    try:
        there = set() if new else {entry.name for entry in path.iterdir()}
        tempfile.TemporaryFile(dir=path.parent if new else path).close()
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written: {error.strerror}") from error
    if there - _OF_LAYOUTS and "oci-layout" not in there:
        raise ConfigError(f"{option} {path}: is a folder that is no OCI layout; name another, or a file")
    layout = Layout(path, str(name)).create()
    if not tag:
        for entry in layout.index().manifests:
            other = entry.annotations.get(IMAGE_NAME, str(name))
            if entry.annotations.get(REF_NAME) == name.tag and other != str(name):
                what = f"has an image {name.tag!r} already, which is {other}"
                raise ConfigError(f"{option} {path}: {what}; say {path}:NAME for another name")
    try:
        yield LayoutPlace(path, tag or name.tag, str(path), str(name))
    except BaseException:
        with suppress(OSError, BackendError):
            if new and not _has_blobs(path):
                shutil.rmtree(path)
        raise


def _has_blobs(layout: Path) -> bool:
    blobs = layout / "blobs/sha256"
    return blobs.is_dir() and any(blobs.iterdir())


@contextmanager
def _aside(folder: Path, target: str) -> Iterator[Path]:
    """A folder for a layout, in the work folder; what an earlier command for the same target left is in it.

    Raises:
        ConfigError: another command is at work for that target.
    """
    with work_dir(folder) as base:
        path = base / f"nydusify-{hashlib.sha256(os.fsencode(target)).hexdigest()[:16]}"
        try:
            path.mkdir(exist_ok=True)
            lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for half in (path / "blobs").glob(".*"):  # of a process that was killed
                    half.unlink()
                (path / "index.json").unlink(missing_ok=True)
            except BaseException:
                os.close(lock)
                raise
        except BlockingIOError:
            raise ConfigError(f"{target} is being written by another command (in {path})") from None
        except OSError as error:
            raise ConfigError(f"--work-dir {base}: {error.strerror}") from error
        try:
            yield path
        except BaseException:
            if _has_blobs(path):
                log.warning("what is done is kept in %s: the same command goes on there", path)
            else:
                shutil.rmtree(path)
            raise
        else:
            shutil.rmtree(path)
        finally:
            os.close(lock)


@contextmanager
def _new_archive(path: Path, reference: Reference, folder: Path, option: str) -> Iterator[LayoutPlace]:
    """A layout in the work folder that becomes an archive when the context ends without an error."""
    from nydus.oci.archive import compression_of, write_archive
    from nydus.oci.layout import Layout
    from nydus.oci.place import LayoutPlace

    compression_of(path)
    if path.exists() and not path.is_file():  # a device would be replaced
        raise ConfigError(f"{option} {path}: is no regular file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: its folder does not exist")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written: {error.strerror}") from error
    with _aside(folder, str(path.absolute())) as layout:
        yield LayoutPlace(layout, name=str(path))
        write_archive(Layout(layout), path, reference)
