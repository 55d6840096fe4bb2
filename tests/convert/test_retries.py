"""What a conversion says of a network that fails, and how soon."""

from __future__ import annotations

import re

import pytest
from faulty import BasicAuth, FaultyHandler, FaultyRegistry, Times, is_blob, status
from nydusify_command import Nydusify, one_fatal_line

pytestmark = pytest.mark.vectors


def is_layer(handler: FaultyHandler) -> bool:
    """The config of the image is asked for first."""
    assert isinstance(handler.registry, FaultyRegistry)
    return is_blob(handler) and len([path for path in handler.registry.paths("GET") if "/blobs/" in path]) > 1


def test_each_retry_is_told_with_its_layer(nydusify: Nydusify, server: FaultyRegistry, source: str) -> None:
    server.intercepts.append(Times(1, is_layer, status(429, Retry_After="0.3")))
    done = nydusify("convert", "--source", source, "--target", f"{source}-n", "--plain-http", "--quiet")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "level=warning" in line and 'msg="layer ' in line
    assert "429 made to fail" in line and "trying again in 0.3 s" in line


def test_a_registry_that_asks_for_too_much_patience(
    nydusify: Nydusify, server: FaultyRegistry, source: str
) -> None:
    server.intercepts.append(Times(99, is_layer, status(429, Retry_After="3600")))
    message = one_fatal_line(
        nydusify("convert", "--source", source, "--target", f"{source}-n", "--plain-http")
    )
    assert message.startswith("layer ") and "it asks to be left alone for 3600 s" in message


@pytest.mark.parametrize("more", [(), ("--oci-ref",), ("--merge-platform",)])
def test_a_target_that_may_not_be_written_is_found_out_first(
    nydusify: Nydusify, server: FaultyRegistry, source: str, more: tuple[str, ...]
) -> None:
    refused = BasicAuth("me", "secret")
    server.intercepts.append(lambda handler: "/other/" in handler.path and refused(handler))
    target = f"{server.host}/other/app:n"
    message = one_fatal_line(
        nydusify("convert", "--source", source, "--target", target, "--plain-http", *more)
    )
    assert message.startswith(f"target {target}: ") and "401" in message and "docker login" in message
    assert len([path for path in server.paths("GET") if "/blobs/" in path]) == 1  # the config


def test_a_target_that_cannot_be_reached_is_told_at_once(
    nydusify: Nydusify, server: FaultyRegistry, source: str
) -> None:
    done = nydusify("convert", "--source", source, "--target", "127.0.0.1:1/a:n", "--plain-http")
    message = one_fatal_line(done)
    assert message == "target 127.0.0.1:1/a:n: 127.0.0.1:1: cannot connect: Connection refused"
    warnings = [line for line in done.stderr.splitlines() if "level=warning" in line]
    assert warnings and all("cannot connect" in line and "trying again in" in line for line in warnings)
    assert len([path for path in server.paths("GET") if "/blobs/" in path]) == 1


def test_a_backend_that_cannot_be_written_is_found_out_first(
    nydusify: Nydusify, server: FaultyRegistry, source: str
) -> None:
    config = '{"endpoint": "127.0.0.1:1", "scheme": "http", "bucket_name": "b", "region": "r"}'
    message = one_fatal_line(
        nydusify(
            "convert", "--source", source, "--target", f"{source}-n", "--plain-http",
            "--backend-type", "s3", "--backend-config", config,
        )
    )  # fmt: skip
    assert message.startswith("target s3 bucket b: ")
    assert len([path for path in server.paths("GET") if "/blobs/" in path]) == 1


@pytest.mark.parametrize("command", [("info",), ("mount", "--target"), ("check", "--target")])
def test_retries_are_log_lines_of_every_command(nydusify: Nydusify, command: tuple[str, ...]) -> None:
    done = nydusify(*command, "127.0.0.1:1/a:n", "--plain-http")
    assert one_fatal_line(done) == "127.0.0.1:1: cannot connect: Connection refused"
    assert "trying again in" in done.stderr
    assert all(re.match(r'time="\S+" level=\w+ msg=', line) for line in done.stderr.splitlines())
