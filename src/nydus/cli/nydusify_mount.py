"""``nydusify mount`` (alias ``view``)."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import click

from nydus.cli.gostyle import GoCommand, decryption_key, given, option, reporting, tell_environment
from nydus.cli.logs import Log
from nydus.errors import ConfigError, NydusError


@click.command(cls=GoCommand, short_help="Mount a Nydus image until interrupted.")
@option("--target", env="TARGET", help="Reference of the Nydus image.")
@option("--target-archive", type=click.Path(), help="The image as an OCI layout folder.")
@option("--target-insecure", env="TARGET_INSECURE", is_flag=True, help="Accept any TLS certificate there.")
@option("--plain-http", env="PLAIN_HTTP", is_flag=True, help="Speak http to the registry.")
@option("--backend-type", env="BACKEND_TYPE", help="Read blobs from this backend; default: the registry.")
@option("--backend-config", env="BACKEND_CONFIG", help="Its configuration as JSON.")
@option("--backend-config-file", env="BACKEND_CONFIG_FILE", help="A file with that.")
@option("--prefetch", env="PREFETCH", is_flag=True, help="Fetch everything in the background.")
@option("--mount-path", env="MOUNT_PATH", default="./image-fs", help="Where to mount. [./image-fs]")
@option("--platform", help="os/architecture; default: this machine's.")
@decryption_key
@option("--work-dir", env="WORK_DIR", default="./tmp", help="For documents, cache and socket. [./tmp]")
@option(
    "--nydusd", env="NYDUSD", default="nydusd", help="The daemon to mount with; default: the built-in one."
)
@reporting
@click.pass_context
def mount(ctx: click.Context, /, **values: Any) -> None:
    """Mount a Nydus image until interrupted.

    On SIGINT or SIGTERM the image is unmounted, the daemon ended, and all that was made is removed.
    """
    from nydus.cli.nydusify_places import backend_config, one_platform, source_place
    from nydus.convert.backend import backend_place
    from nydus.convert.documents import BOOTSTRAP, read_bootstrap_layer
    from nydus.convert.mounting import backend_of, mounted
    from nydus.convert.select import select
    from nydus.oci.encryption import private_keys

    log: Log = ctx.obj if isinstance(ctx.obj, Log) else Log()
    tell_environment(ctx, log)
    place = source_place(
        values["target"],
        values["target_archive"],
        plain_http=values["plain_http"],
        insecure=values["target_insecure"],
        option="target",
    )
    keys = private_keys(values["decryption_key"])
    if os.geteuid() != 0:
        raise ConfigError("mounting needs root")
    found = backend_config(values["backend_type"], values["backend_config"], values["backend_config_file"])
    backend = backend_place(*found).device if found else backend_of(place)
    reader = place.open()
    platform = one_platform(values["platform"])
    _, images = select(reader, place.target, str(place), [platform] if platform else (), nydus=True)
    image = next((found for found in images if found.is_nydus), None)
    if image is None:
        raise NydusError(f"{place}: is not a Nydus image")
    log.info("pulling bootstrap", image=place)
    where = f"{place}: bootstrap layer"
    files, _ = read_bootstrap_layer(reader, image.manifest.layers[-1], where, keys)
    work_dir, mountpoint = Path(values["work_dir"]), Path(values["mount_path"])
    stop = threading.Event()
    try:
        made = [path for path in (work_dir, mountpoint) if not path.exists()]
        work_dir.mkdir(parents=True, exist_ok=True)
        mountpoint.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=work_dir, prefix="nydusify-"))
    except OSError as error:
        raise NydusError(f"{error.filename}: {error.strerror}") from error
    try:
        bootstrap = folder / Path(BOOTSTRAP).name
        try:
            (folder / "nydus_manifest.json").write_bytes(image.raw_manifest)
            (folder / "nydus_config.json").write_bytes(image.raw_config)
            bootstrap.write_bytes(files[BOOTSTRAP])
        except OSError as error:
            raise NydusError(f"{folder}: {error.strerror}") from error
        daemon = values["nydusd"] if given(ctx, "nydusd") else ""
        log.info("mounting image", image=place)
        with mounted(
            backend, bootstrap, mountpoint, folder / "fs", prefetch=values["prefetch"], nydusd=daemon
        ) as process:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            log.result(
                f"mounted at {mountpoint}; Ctrl-C unmounts it",
                {"image": str(place), "mountpoint": str(mountpoint.absolute()), "pid": process.pid},
            )
            while not stop.wait(0.2):
                if process.poll() is not None:
                    raise NydusError(f"nydusd ended with status {process.returncode}")
        log.info("unmounted")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            if path.is_dir() and not os.path.ismount(path) and not any(path.iterdir()):
                path.rmdir()
