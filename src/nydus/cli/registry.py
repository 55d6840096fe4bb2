"""``nydus registry``: an OCI registry in a folder, for air-gapped machines, demonstrations and tests."""

from __future__ import annotations

from pathlib import Path

import click

from nydus.cli.lazy import Ended


@click.command()
@click.argument("root", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--address", default="127.0.0.1:5000", show_default=True, metavar="HOST:PORT", help="Where to listen."
)
@click.option("--throttle", type=float, metavar="BYTES", help="Send at most this many bytes a second.")
def registry(root: Path, address: str, throttle: float | None) -> None:
    """Serve the images in the folder ROOT over plain http until interrupted; ROOT is made if missing.

    There is no sign-in: do not listen on an address that others can reach unless everybody may write.
    """
    from nydus.errors import NydusError
    from nydus.oci.server import RegistryServer

    try:
        server = RegistryServer(root, address, throttle)
    except NydusError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or root}: {error.strerror}") from error
    try:
        click.echo(f"serving {root} on http://{server.host}", err=True)
        server.serve_forever()
    except (KeyboardInterrupt, Ended):
        pass
    finally:
        server.stop()
