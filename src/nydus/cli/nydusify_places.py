"""What the sub-commands of nydusify have in common: naming images."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nydus.cli.gostyle import option as _option
from nydus.cli.gostyle import warn
from nydus.errors import ConfigError, NydusError

if TYPE_CHECKING:
    from nydus.oci.model import Platform
    from nydus.oci.place import ArchivePlace, LayoutPlace, RegistryPlace, SourcePlace
    from nydus.oci.reference import Reference


#: What every option with a source says of it.
SOURCE = "Reference, containerd://NAMESPACE/REFERENCE, or file://PATH of an archive or OCI layout folder."
SOURCE_ARCHIVE = (
    "Read it from this archive (tar, also gzip or zstd) or OCI layout folder; PATH:NAME of several."
)


def source_place(
    reference: str | None,
    archive: str | None,
    *,
    plain_http: bool,
    insecure: bool,
    option: str,
    work_dir: str | None = None,
) -> SourcePlace:
    """The image that ``--source``/``--target`` or the ``-archive`` option of the same name say.

    ``containerd://NAMESPACE/REFERENCE`` is an image in containerd's content store; for archives, which are
    also ``file://PATH``, see :func:`archive_place`. With an archive, the reference says what the image is
    called.

    Args:
        work_dir: for what a compressed archive holds; in TMPDIR without it. Removed when the command ends.

    Raises:
        ConfigError: neither is given, or the reference is wrong.
    """
    if reference and reference.startswith("file://"):
        if archive:
            raise ConfigError(f"--{option} {reference} and --{option}-archive cannot be used together")
        archive, reference = reference.removeprefix("file://"), None
    if archive:
        place = archive_place(archive, str(image_reference(reference, option)) if reference else "")
        return place if work_dir is None else inflated(place, Path(work_dir))
    if not reference:
        raise ConfigError(f"--{option} or --{option}-archive is needed")
    if reference.startswith("containerd://"):
        from nydus.containerd.store import containerd_place

        return containerd_place(reference)
    return source_registry(image_reference(reference, option), plain_http=plain_http, insecure=insecure)


def place_of(values: Mapping[str, Any], side: str) -> SourcePlace:
    """The image to read that the options about the ``source`` or ``target`` say; see :func:`source_place`."""
    return source_place(
        values[side],
        values[f"{side}_archive"],
        plain_http=speaks_http(values, side),
        insecure=values[f"{side}_insecure"],
        option=side,
        work_dir=values["work_dir"],
    )


def plain_http(command: Any) -> Any:
    """Gives a command with a source and a target the options about registries without TLS."""
    for side, help in (
        ("target-", "Speak http to the registry of the target."),
        ("source-", "Speak http to the registry of the source."),
        ("", "Speak http to all registries."),
    ):
        env = f"{side}plain-http".upper().replace("-", "_")
        command = _option(f"--{side}plain-http", env=env, is_flag=True, help=help)(command)
    return command


def speaks_http(values: Mapping[str, Any], side: str) -> bool:
    """Whether to speak http to the registry of the ``source`` or ``target``."""
    return bool(values["plain_http"] or values[f"{side}_plain_http"])


#: How skopeo, podman and buildah name images that are not in registries; all but docker:// look like names.
_TRANSPORT = re.compile(
    r"(docker|https?)://(.*)"
    r"|(oci|oci-archive|docker-archive|docker-daemon|containers-storage|dir|ostree|sif|tarball):(.*)"
)


def image_reference(text: str, option: str) -> Reference:
    """The image in a registry that an option names.

    Raises:
        ConfigError: it is no reference, or one in the form that skopeo has for archives and other places.
    """
    from nydus.oci.reference import parse

    found = _TRANSPORT.fullmatch(text)
    if found is None:
        if os.path.isfile(text):  # noqa: PTH113 - a name that is too long is no error for this
            warn(f"--{option} {text} is the name of an image; the file would be file://{text}")
        return parse(text)
    if found[1]:
        http = " with --plain-http" if found[1] == "http" else ""
        raise ConfigError(f"--{option} {text}: a reference has no {found[1]}://; write {found[2]}{http}")
    kind, (path, _, name) = found[3], found[4].partition(":")
    instead = "there are references, file://PATH and containerd://NAMESPACE/REFERENCE"
    if kind in ("oci", "oci-archive", "docker-archive"):
        path = f"{path.rstrip('/')}/" if kind == "oci" else path
        instead = f"write file://{path}"
        if name and (kind == "oci" or option != "target"):
            instead += f":{name}"
    with suppress(ConfigError):
        instead += f" (or, for an image that is called so, {parse(text)})"
    raise ConfigError(f"--{option} {text}: {kind}: is not known here; {instead}")


def archive_place(text: str, name: str = "") -> LayoutPlace | ArchivePlace:
    """The image in a tar file or an OCI layout folder; of several, the one that ``PATH:NAME`` names.

    Args:
        name: what it is called in messages and annotations; the path if empty.
    """
    from nydus.oci.place import ArchivePlace, LayoutPlace

    colons = [place for place, letter in enumerate(text) if letter == ":"]
    end = next((end for end in (len(text), *colons) if Path(text[:end]).exists()), len(text))
    path = Path(text[:end])
    return (LayoutPlace if path.is_dir() else ArchivePlace)(path, text[end + 1 :], name)


def inflated(place: LayoutPlace | ArchivePlace, folder: Path) -> LayoutPlace | ArchivePlace:
    """The same place; what a compressed archive holds is in ``folder`` until the command ends."""
    import click

    from nydus.oci import archive
    from nydus.oci.place import ArchivePlace

    try:
        if not isinstance(place, ArchivePlace) or not archive.is_compressed(place.path):
            return place
    except OSError:  # said when it is opened
        return place
    context = click.get_current_context()
    base = context.with_resource(work_dir(folder))
    try:
        file = context.with_resource(tempfile.NamedTemporaryFile(dir=base, prefix="nydusify-"))  # noqa: SIM115
    except OSError as error:
        raise NydusError(f"--work-dir {base}: {error.strerror}") from error
    archive.inflate(place.path, file, str(base))
    return replace(place, inflated=Path(file.name))


def image_name(place: SourcePlace) -> Reference:
    """What an image is called that nobody named: in an archive its name there, else that of the file."""
    from nydus.oci.layout import LayoutReader
    from nydus.oci.place import RegistryPlace
    from nydus.oci.reference import TAG, Reference, parse

    if isinstance(place, RegistryPlace):
        return place.reference
    called = place.name
    if not called:
        reader = place.open()
        called = reader.called(place.target) if isinstance(reader, LayoutReader) else ""
    with suppress(ConfigError):
        if "/" in called or ":" in called:
            return parse(called)
    words = re.findall("[a-z0-9]+", re.sub(r"\.(tar|tgz|tzst)\b.*", "", place.path.absolute().name.lower()))
    return Reference("localhost", "-".join(words) or "image", called if TAG.fullmatch(called) else "latest")


#: Set by the option ``--hosts-dir``: directory of the ``hosts.toml`` files that say where to read images.
HOSTS_DIR = "NYDUSIFY_HOSTS_DIR"


def source_registry(reference: Reference, *, plain_http: bool, insecure: bool) -> RegistryPlace:
    """An image in a registry, read from the mirrors that the user has for it.

    Raises:
        ConfigError: a ``hosts.toml`` is wrong.
    """
    from nydus.oci.place import registry_place

    place = registry_place(reference, plain_http=plain_http, insecure=insecure)
    folder = os.environ.get(HOSTS_DIR)
    if not folder:
        return place
    from nydus.oci.mirrored import mirrored

    if not Path(folder).is_dir():
        raise ConfigError(f"--hosts-dir {folder}: not a directory")
    place, unused = mirrored(place, Path(folder))
    for text in unused:
        warn(text)
    return place


@contextmanager
def work_dir(path: Path) -> Iterator[Path]:
    """The folder for temporary files; removed at the end if it was made here.

    Raises:
        NydusError: it cannot be made.
    """
    try:
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NydusError(f"--work-dir {path}: {error.strerror}") from error
    try:
        yield path
    finally:
        if made:
            with suppress(OSError):  # another command has come to use it
                path.rmdir()


def backend_config(
    kind: str | None, text: str | None, file: str | None, option: str = "--backend"
) -> tuple[str, dict[str, Any]] | None:
    """Type and configuration of a storage backend, as the three options of that say; None for none.

    Args:
        option: the three options without ``-type``, ``-config`` and ``-config-file``.

    Raises:
        ConfigError: not exactly one configuration, or it is no JSON object.
    """
    if kind == "registry":  # what older versions of the reference called having none
        kind = None
    if not kind:
        if text or file:
            raise ConfigError(f"{option}-config{'' if text else '-file'} needs {option}-type")
        return None
    if bool(text) == bool(file):
        raise ConfigError(f"{option}-type needs exactly one of {option}-config and {option}-config-file")
    try:
        config = json.loads(text or Path(file or "").read_bytes())
    except OSError as error:
        raise ConfigError(f"{option}-config-file {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option}-config: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{option}-config: not a JSON object")
    return kind, config


def one_platform(text: str | None) -> Platform | None:
    """The platform that ``--platform`` says, if it is given."""
    from nydus.convert.select import parse_platform

    if not text:
        return None
    if "," in text:
        raise ConfigError(f"--platform {text!r}: exactly one platform is needed")
    return parse_platform(text)


def platforms(text: str | None, everything: bool) -> list[Platform] | None:
    """The platforms of ``--platform`` and ``--all-platforms``; None is all, [] this machine's."""
    from nydus.convert.select import parse_platform

    if everything:
        return None
    return [parse_platform(part) for part in (text or "").split(",") if part.strip()]
