"""Where sub-commands of ``nydus-image`` that read data find the image and its blobs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nydus.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from nydus.image import Image
    from nydus.storage.backend import Backend, BackendMetrics

Command = TypeVar("Command", bound=Callable[..., Any])

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

_OPTIONS = (
    click.option("--backend-type", metavar="TYPE", help="Kind of backend that holds blobs."),
    click.option("--backend-config", metavar="JSON", help="Configuration of the backend."),
    click.option("--backend-config-file", metavar="FILE", help="The same in a file."),
)


def backend_options(command: Command) -> Command:
    """The options that describe a backend, as keyword arguments of the same names."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class Sources:
    """Several backends as one: each blob comes from the first that has it."""

    def __init__(self, *backends: Backend) -> None:
        self._backends = backends
        self._homes: dict[str, Backend] = {}

    @property
    def metrics(self) -> BackendMetrics:
        return self._backends[-1].metrics

    def _home(self, blob_id: str) -> Backend:
        home = self._homes.get(blob_id)
        if home is None:
            home = self._backends[-1]
            for backend in self._backends[:-1]:
                try:
                    backend.size(blob_id)
                except BackendError:
                    continue
                home = backend
                break
            self._homes[blob_id] = home
        return home

    def read(self, blob_id: str, offset: int, size: int) -> bytes:
        return self._home(blob_id).read(blob_id, offset, size)

    def size(self, blob_id: str) -> int:
        return self._home(blob_id).size(blob_id)

    def doubt(self, blob_id: str) -> None:
        self._home(blob_id).doubt(blob_id)

    def close(self) -> None:
        for backend in self._backends:
            backend.close()


def open_blobs(
    *,
    blob: str | None = None,
    blob_dir: str | None = None,
    backend_type: str | None = None,
    backend_config: str | None = None,
    backend_config_file: str | None = None,
    config: str | None = None,
) -> Backend:
    """The backend that the options of a command describe; the caller closes it.

    Raises:
        click.UsageError: none was given, or contradictory ones.
        ConfigError: a configuration that cannot be used.
    """
    from nydus.image import open_backend
    from nydus.storage.backends.localfs import LocalFs

    found: list[Backend] = []
    if blob:
        found.append(LocalFs(blob_file=blob))
    if blob_dir:
        if not Path(blob_dir).is_dir():
            raise ConfigError(f"{blob_dir}: not a directory")
        found.append(LocalFs(dir=blob_dir))
    if backend_type:
        if (backend_config is None) == (backend_config_file is None):
            raise click.UsageError("--backend-type needs one of --backend-config and --backend-config-file")
        document = _read_json(backend_config_file) if backend_config is None else _parse(backend_config)
        found.append(open_backend({"type": backend_type, "config": document})[0])
    if config:
        found.append(open_backend(_read_json(config))[0])
    if not found:
        raise ConfigError("no source of blobs: give --blob, --blob-dir, --config or --backend-type")
    return found[0] if len(found) == 1 else Sources(*found)


@contextmanager
def open_image(bootstrap: str, blobs: Backend, *, threads: int = 0) -> Iterator[Image]:
    """The image of a bootstrap file, or of a blob that holds its bootstrap. Closes ``blobs`` at the end."""
    from nydus import image

    with closing(blobs), image.open(bootstrap, blobs, threads=threads) as opened:
        yield opened


def one_bootstrap(argument: str | None, option: str | None) -> str:
    """The bootstrap that a command got as its argument or by ``-B``."""
    if (argument is None) == (option is None):
        raise click.UsageError("give the bootstrap, once")
    return argument or option or ""


def configured_bootstrap(config: str) -> str:
    """The bootstrap that a blob cache entry names (``config.metadata_path``, nydusd.md 4)."""
    document = _read_json(config)
    for key in ("config", "config_v2"):
        section = document.get(key)
        if isinstance(section, Mapping) and isinstance(section.get("metadata_path"), str):
            return str(section["metadata_path"])
    raise ConfigError(f"{config}: 'config.metadata_path' is missing")


def _read_json(path: str | None) -> Mapping[str, Any]:
    try:
        text = Path(path or "").read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8") from None
    return _parse(text, path or "")


def _parse(text: str, where: str = "--backend-config") -> Mapping[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{where}: expected an object, got {type(document).__name__}")
    return document
