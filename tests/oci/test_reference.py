from __future__ import annotations

import pytest

from nydus.errors import ConfigError
from nydus.oci.reference import parse

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "normal", "endpoint"),
    [
        ("ubuntu", "docker.io/library/ubuntu:latest", "registry-1.docker.io"),
        ("index.docker.io/ubuntu:22.04", "docker.io/library/ubuntu:22.04", "registry-1.docker.io"),
        ("me/app:v1", "docker.io/me/app:v1", "registry-1.docker.io"),
        ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest", "127.0.0.1:5000"),
        ("localhost/app", "localhost/app:latest", "localhost"),
        ("Host/app", "Host/app:latest", "Host"),
        ("[::1]:5000/a/b_c/d__e:T-1.x", "[::1]:5000/a/b_c/d__e:T-1.x", "[::1]:5000"),
        (f"ghcr.io/a/b@{DIGEST}", f"ghcr.io/a/b@{DIGEST}", "ghcr.io"),
        (f"ghcr.io/a/b:v1@{DIGEST}", f"ghcr.io/a/b:v1@{DIGEST}", "ghcr.io"),
    ],
)
def test_references_are_normalised(text: str, normal: str, endpoint: str) -> None:
    reference = parse(text)
    assert str(reference) == normal
    assert reference.endpoint == endpoint
    assert parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text",
    ["", "UPPER", "a//b", "host:5000/", "a:b:c", "app:", "http://x/y", "a@sha256:12", "-a", "a/-b", "x" * 300,
     "a b", "app:" + "t" * 129, "a.b:99999x/y", "app\n"],
)  # fmt: skip
def test_wrong_references_are_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ConfigError, match="invalid image reference"):
        parse(text)


def test_a_digest_goes_before_a_tag() -> None:
    assert parse(f"h.io/a:v1@{DIGEST}").target == DIGEST
    assert parse("h.io/a:v1").target == "v1"
    with pytest.raises(ConfigError):
        parse("h.io/a").with_tag("bad tag")
