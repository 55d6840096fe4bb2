"""``ctr-remote``: the one command of it that users of Nydus need, ``images rpull``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from nydus import __version__
from nydus.cli.lazy import run
from nydus.errors import ConfigError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-a",
    "--address",
    envvar="CONTAINERD_ADDRESS",
    default="/run/containerd/containerd.sock",
    show_default=True,
    type=click.Path(path_type=Path),
    help="containerd's socket.",
)
@click.option("-n", "--namespace", envvar="CONTAINERD_NAMESPACE", default="default", show_default=True)
@click.version_option(__version__, "-v", "--version", prog_name="ctr-remote")
@click.pass_context
def ctr_remote(context: click.Context, address: Path, namespace: str) -> None:
    """Pull images lazily into containerd; for everything else there is ctr."""
    context.obj = (address, namespace)


@click.group()
def images() -> None:
    """Images in containerd."""


for _name in ("images", "image", "i"):
    ctr_remote.add_command(images, _name)


@images.command()
@click.argument("reference", metavar="REF")
@click.option(
    "--snapshotter",
    envvar="CONTAINERD_SNAPSHOTTER",
    default="nydus",
    show_default=True,
    help="Name of the snapshotter plugin.",
)
@click.option("--plain-http", is_flag=True, help="Use http.")
@click.option("-k", "--skip-verify", is_flag=True, help="Accept any TLS certificate.")
@click.option(
    "--tlscacert", type=click.Path(dir_okay=False, path_type=Path), help="TLS root certificates (PEM)."
)
@click.option("-u", "--user", metavar="USER[:PASSWORD]", help="Sign in to the registry.")
@click.option(
    "--hosts-dir", type=click.Path(file_okay=False, path_type=Path), help="Registry host directories."
)
@click.option("--platform", metavar="OS/ARCH", help="Platform, if not this machine's.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label of the image record.")
@click.option("--use-containerd-labels", is_flag=True, help="Always so; for compatibility.")
@click.option("--skip-content-verify", is_flag=True, hidden=True)
@click.pass_obj
def rpull(
    target: tuple[Path, str],
    reference: str,
    snapshotter: str,
    plain_http: bool,
    skip_verify: bool,
    tlscacert: Path | None,
    user: str | None,
    hosts_dir: Path | None,
    platform: str | None,
    labels: tuple[str, ...],
    use_containerd_labels: bool,
    skip_content_verify: bool,
) -> None:
    """Pull the image REF, leaving in the registry what the snapshotter loads when it is used."""
    from nydus.convert.select import parse_platform
    from nydus.oci.auth import Credentials, docker_credentials
    from nydus.oci.certificates import Certificates
    from nydus.oci.mirrored import mirrored
    from nydus.oci.place import RegistryPlace
    from nydus.oci.reference import parse
    from nydus.snapshotter.pull import Client
    from nydus.snapshotter.template import is_loopback

    started = time.monotonic()
    name = parse(reference)
    place = RegistryPlace(
        name,
        plain_http or is_loopback(name.endpoint),
        skip_verify,
        Credentials(*_user(user)) if user else docker_credentials(name.host),
        certificates=Certificates((str(tlscacert),)) if tlscacert else Certificates(),
    )
    if hosts_dir is not None:
        place, unused = mirrored(place, hosts_dir)
        for text in unused:
            click.echo(f"warning: {text}", err=True)
    with Client(*target, snapshotter) as client:
        done = client.pull(
            name,
            place.open(),
            platform=parse_platform(platform) if platform else None,
            image_labels=dict(_label(text) for text in labels),
            said=click.echo,
        )
    click.echo(
        f"pulled {name} in {time.monotonic() - started:.2f} s:"
        f" {done.lazy} of {done.layers} layers are loaded when used, {done.fetched} bytes downloaded"
    )


def _user(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    return name, password if colon else click.prompt("Password", hide_input=True)


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--label {text!r} is not KEY=VALUE")
    return key, value


def main() -> None:
    run(ctr_remote, "ctr-remote")


if __name__ == "__main__":
    main()
