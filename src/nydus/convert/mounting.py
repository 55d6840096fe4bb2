"""A Nydus image mounted by a nydusd of its own."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nydus.daemon.client import DaemonClient
from nydus.errors import ConfigError, MountError, NydusError
from nydus.oci.auth import Credentials
from nydus.oci.connections import held
from nydus.oci.mirrored import MirroredPlace
from nydus.oci.model import Manifest, data_layers
from nydus.oci.place import LayoutPlace, RegistryPlace, Source, SourcePlace, proxy_for

_START_SECONDS = 30.0
_STOP_SECONDS = 20.0
_PIECE = 4 << 20
#: What fits into the address of a UNIX socket, with room for names that the daemon derives.
_SOCKET_PATH = 96


def registry_backend(place: RegistryPlace) -> dict[str, Any]:
    """The ``device.backend`` of a daemon that reads blobs from the repository of an image."""
    reference, mine = place.reference, place.credentials
    scheme, host = "http" if place.plain_http else "https", reference.endpoint
    insecure, authorities, proxy = place.insecure, list(place.certificates.ca), place.proxy
    if isinstance(place, MirroredPlace) and (server := place.server):
        # The sign-in data are its own, too.
        scheme, host, mine = server.scheme, server.name, place.credentials_of(server)
        if not server.for_origin:
            raise ConfigError(f"{host}: nydusd cannot use path, client or header of a server in hosts.toml")
        insecure, proxy = server.skip_verify, server.proxy or proxy_for(scheme, host)
        authorities += [path for path in server.ca if path not in authorities]
    config: dict[str, Any] = {
        "scheme": scheme,
        "host": host,
        "repo": reference.repository,
        "skip_verify": insecure,
        "ca_cert_files": authorities,
        "timeout": 30,
        "connect_timeout": 5,
    }
    if mine and mine.username and mine.password:
        config["auth"] = base64.b64encode(f"{mine.username}:{mine.password}".encode()).decode()
    elif mine and mine.registry_token:
        config["registry_token"] = mine.registry_token
    elif mine:
        raise ConfigError(f"{host}: nydusd cannot use an identity token; log in with a password")
    if proxy:
        config["proxy"] = {"url": proxy, "fallback": False}
    if isinstance(place, MirroredPlace):
        _add_mirrors(config, place, mine)
    return {"type": "registry", "config": config}


def _add_mirrors(config: dict[str, Any], place: MirroredPlace, mine: Credentials | None) -> None:
    """Has the daemon read where we do.

    It shows all hosts the same sign-in data, so that mirrors for which these are not meant, or that want
    more, are left out; what they have is in the registry, too.
    """
    mirrors = [host for host in place.mirrors if host.for_mirror]
    if mine:
        mirrors = [host for host in mirrors if place.credentials_of(host) == mine]
    config["mirrors"] = [
        {
            "host": host.address,
            "namespace": place.namespace_of(host),
            "skip_verify": host.skip_verify,
            "headers": dict(host.headers),
        }
        for host in mirrors
    ]
    for host in mirrors:
        config["ca_cert_files"] += [path for path in host.ca if path not in config["ca_cert_files"]]


def backend_of(place: SourcePlace) -> dict[str, Any]:
    """The ``device.backend`` for an image.

    Raises:
        ConfigError: the blobs of an archive cannot be mounted in place; see :func:`unpack`.
    """
    if isinstance(place, RegistryPlace):
        return registry_backend(place)
    if isinstance(place, LayoutPlace):
        folder = (place.path / "blobs" / "sha256").absolute()
        return {"type": "localfs", "config": {"dir": str(folder)}}
    raise ConfigError(f"{place}: the image in an archive cannot be mounted; unpack the archive first")


def unpack(source: Source, manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Has the blobs of a Nydus image in a folder, which is made; the ``device.backend`` for them.

    Of an index over ordinary layers (oci-ref) these are had, too.

    Raises:
        BackendError: a blob is damaged. NydusError: the folder cannot be written.
    """
    sizes: dict[str, int | None] = dict.fromkeys(data_layers(manifest))
    sizes |= {layer.digest: layer.size for layer in manifest.layers[:-1]}
    try:
        folder.mkdir()
        for digest, size in sizes.items():
            with closing(source.blob(digest, size)) as stream:
                with open(folder / digest.partition(":")[2], "wb") as file:
                    while piece := stream.read(_PIECE):
                        file.write(piece)
    except OSError as error:
        raise NydusError(f"{error.filename or folder}: {error.strerror}") from error
    return {"type": "localfs", "config": {"dir": str(folder.absolute())}}


@dataclass(frozen=True, slots=True)
class Mount:
    """A daemon that serves a mounted image, and the socket of its API."""

    process: subprocess.Popen[bytes]
    socket: Path


@contextmanager
def mounted(
    backend: dict[str, Any],
    bootstrap: Path,
    mountpoint: Path,
    folder: Path,
    *,
    prefetch: bool = False,
    nydusd: str = "",
) -> Iterator[Mount]:
    """Mounts an image while the context lasts; afterwards nothing is left of mount and daemon.

    Args:
        mountpoint: an existing folder.
        folder: for the daemon's configuration, socket, log and cache. The name of a socket is short; where
            this one's would be too long it is a symbolic link.
        nydusd: command; the one of this package by default.

    Raises:
        MountError: the daemon did not get the image mounted; the text is its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cache = folder / "nydus_blobs"
    config = {
        "device": {
            "backend": backend,
            "cache": {"type": "blobcache", "config": {"work_dir": str(cache.absolute())}},
        },
        "mode": "direct",
        "digest_validate": False,
        "iostats_files": False,
        "enable_xattr": True,
        "fs_prefetch": {"enable": prefetch, "threads_count": 4, "merging_size": 131072},
    }
    config_file, socket, log = folder / "nydusd_config.json", folder / "nydus_api.sock", folder / "nydusd.log"
    elsewhere = ""
    if len(os.fsencode(socket.absolute())) > _SOCKET_PATH:
        elsewhere = tempfile.mkdtemp(prefix="nydusify-")
        link, socket = socket, Path(elsewhere) / socket.name
        link.unlink(missing_ok=True)
        link.symlink_to(socket)
    descriptor = os.open(config_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # it may hold a password
    with os.fdopen(descriptor, "w") as file:
        json.dump(config, file)
    socket.unlink(missing_ok=True)
    command = [nydusd] if nydusd else [sys.executable, "-P", "-m", "nydus.cli.nydusd"]
    command += ["--config", str(config_file), "--mountpoint", str(mountpoint), "--bootstrap", str(bootstrap)]
    command += ["--apisock", str(socket), "--log-level", "warn"]
    with held():
        try:
            with open(log, "wb") as output:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
        except OSError as error:
            raise MountError(f"cannot start {command[0]}: {error.strerror}") from error
        try:
            _wait(process, DaemonClient(socket), log)
            yield Mount(process, socket)
        finally:
            _stop(process, mountpoint)
            if elsewhere:
                shutil.rmtree(elsewhere, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], client: DaemonClient, log: Path) -> None:
    """Returns when the daemon serves the mount."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            if client.state() == "RUNNING":
                return
            reason = "it is not ready"
        except NydusError as error:
            reason = str(error)
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise MountError(f"nydusd did not mount the image: {lines[-1] if lines else reason}")
        time.sleep(0.02)


def _stop(process: subprocess.Popen[bytes], mountpoint: Path) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if os.path.ismount(mountpoint):  # it died without doing this itself
        subprocess.run(["umount", "-l", str(mountpoint)], check=False, capture_output=True)
