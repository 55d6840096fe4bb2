"""``nydusify mount`` (alias ``view``)."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from nydus.cli.gostyle import GoCommand, decryption_key, given, option, reporting, tell_environment
from nydus.cli.logs import Log
from nydus.cli.nydusify_places import SOURCE, SOURCE_ARCHIVE
from nydus.errors import ConfigError, NydusError

#: What is in a folder ``fs`` of ours.
_MARK = "nydusd_config.json"


@click.command(cls=GoCommand, short_help="Mount a Nydus image until interrupted.")
@option("--target", env="TARGET", help=SOURCE)
@option("--target-archive", type=click.Path(), help=SOURCE_ARCHIVE)
@option("--target-insecure", env="TARGET_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@option(
    "--plain-http",
    "--target-plain-http",
    env=["PLAIN_HTTP", "TARGET_PLAIN_HTTP"],
    is_flag=True,
    help="Speak http to the registry.",
)
@option("--backend-type", env="BACKEND_TYPE", help="Read blobs from this backend; default: the registry.")
@option("--backend-config", env="BACKEND_CONFIG", help="Its configuration as JSON.")
@option("--backend-config-file", env="BACKEND_CONFIG_FILE", help="A file with that.")
@option("--prefetch", env="PREFETCH", is_flag=True, help="Fetch everything in the background.")
@option("--mount-path", env="MOUNT_PATH", default="./image-fs", help="Where to mount. [./image-fs]")
@option("--platform", help="os/architecture; default: this machine's.")
@decryption_key
@option("--work-dir", env="WORK_DIR", default="./tmp", help="For documents, cache, socket. [./tmp]")
@option(
    "--nydusd", env="NYDUSD", default="nydusd", help="The daemon to mount with; default: the built-in one."
)
@reporting
@click.pass_context
def mount(ctx: click.Context, /, **values: Any) -> None:
    """Mount a Nydus image until interrupted.

    On SIGINT or SIGTERM the image is unmounted, the daemon ended, and all that was made is removed. Until
    then the work folder has nydus_manifest.json, nydus_config.json and nydus_bootstrap, and in fs the
    configuration, API socket (nydus_api.sock) and cache of the daemon. An image in an archive or in
    containerd is unpacked there first.
    """
    from nydus import rafs
    from nydus.cli.nydusify_places import backend_config, one_platform, source_place
    from nydus.convert.backend import backend_place
    from nydus.convert.documents import BOOTSTRAP, read_bootstrap_layer
    from nydus.convert.mounting import backend_of, mounted, unpack
    from nydus.convert.select import select
    from nydus.oci.encryption import ENCRYPTED, private_keys
    from nydus.oci.place import ArchivePlace

    log: Log = ctx.obj if isinstance(ctx.obj, Log) else Log()
    tell_environment(ctx, log)
    place = source_place(
        values["target"],
        values["target_archive"],
        plain_http=values["plain_http"],
        insecure=values["target_insecure"],
        option="target",
        work_dir=values["work_dir"],
    )
    keys = private_keys(values["decryption_key"])
    if os.geteuid() != 0:
        raise ConfigError("mounting needs root")
    found = backend_config(values["backend_type"], values["backend_config"], values["backend_config_file"])
    reader = place.open()
    platform = one_platform(values["platform"])
    _, images = select(reader, place.target, str(place), [platform] if platform else (), nydus=True)
    image = next((found for found in images if found.is_nydus), None)
    if image is None:
        raise NydusError(f"{place}: is not a Nydus image")
    log.info("pulling bootstrap", image=place)
    where = f"{place}: bootstrap layer"
    layer = image.manifest.layers[-1]
    files, _ = read_bootstrap_layer(reader, layer, where, keys)
    if len(image.manifest.layers) == 1 and not found and rafs.read(files[BOOTSTRAP], where).blobs:
        raise ConfigError(f"{place}: its blobs are in a storage backend; say which with --backend-type")
    documents = {
        "nydus_manifest.json": image.raw_manifest,
        "nydus_config.json": image.raw_config,
        "nydus_bootstrap": files[BOOTSTRAP],
    }
    work_dir, mountpoint = Path(values["work_dir"]), Path(values["mount_path"])
    stop = threading.Event()
    with _made(mountpoint, "--mount-path"), _work_files(work_dir, documents) as folder:
        bootstrap = work_dir / "nydus_bootstrap"
        if layer.media_type.endswith(ENCRYPTED):  # it holds the keys of the blobs
            bootstrap.chmod(0o600)
        if found:
            backend = backend_place(*found).device
        elif isinstance(place, ArchivePlace):
            log.info("unpacking image", image=place)
            backend = unpack(reader, image.manifest, folder / "blobs")
        else:
            backend = backend_of(place)
        daemon = values["nydusd"] if given(ctx, "nydusd") else ""
        log.info("mounting image", image=place)
        with mounted(
            backend, bootstrap, mountpoint, folder, prefetch=values["prefetch"], nydusd=daemon
        ) as mount:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            log.result(
                f"mounted at {mountpoint}, with the work folder {work_dir} and the API at {mount.socket}; "
                "Ctrl-C unmounts it",
                {
                    "image": str(place),
                    "mountpoint": str(mountpoint.absolute()),
                    "pid": mount.process.pid,
                    "work_dir": str(work_dir.absolute()),
                    "api_socket": str(mount.socket.absolute()),
                },
            )
            while not stop.wait(0.2):
                if mount.process.poll() is not None:
                    raise NydusError(f"nydusd ended with status {mount.process.returncode}")
        log.info("unmounted")


@contextmanager
def _made(path: Path, option: str) -> Iterator[None]:
    """An existing folder; removed at the end if it was made here."""
    try:
        new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NydusError(f"{option} {error.filename}: {error.strerror}") from error
    try:
        yield
    finally:
        if new and not os.path.ismount(path):
            with suppress(OSError):  # somebody has put something there
                path.rmdir()


@contextmanager
def _work_files(work_dir: Path, documents: dict[str, bytes]) -> Iterator[Path]:
    """Documents in the work folder, and the folder ``fs`` for the daemon; both are gone at the end.

    What a mount that was killed has left is replaced.

    Raises:
        ConfigError: another mount uses the work folder, or it has a ``fs`` of somebody else.
    """
    from nydus.daemon.client import DaemonClient

    folder = work_dir / "fs"
    with ExitStack() as stack:
        stack.enter_context(_made(work_dir, "--work-dir"))
        try:
            lock = os.open(work_dir, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(NydusError):  # no daemon answers
                DaemonClient((folder / "nydus_api.sock").resolve(), timeout=5).state()
                raise BlockingIOError
        except BlockingIOError:
            what = "another mount uses it; give each its own, or umount what one that was killed has left"
            raise ConfigError(f"--work-dir {work_dir}: {what}") from None
        except OSError as error:
            raise NydusError(f"--work-dir {work_dir}: {error.strerror}") from error
        try:
            if (folder / _MARK).exists():
                shutil.rmtree(folder)
            elif folder.exists():
                raise ConfigError(f"--work-dir {work_dir}: has something called fs; name another folder")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            (folder / _MARK).touch(mode=0o600)
            for name, data in documents.items():
                path = work_dir / name
                path.unlink(missing_ok=True)
                stack.callback(path.unlink, missing_ok=True)
                path.write_bytes(data)
        except OSError as error:
            raise NydusError(f"{error.filename}: {error.strerror}") from error
        yield folder
