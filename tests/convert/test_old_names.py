"""Options and variables that scripts for older versions of the reference use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nydusify_command import Nydusify, one_fatal_line

pytestmark = pytest.mark.vectors


def test_a_backend_that_is_the_registry(nydusify: Nydusify, source: str) -> None:
    target = ("--target", f"{source}-n", "--plain-http", "--backend-type", "registry")
    done = nydusify("convert", "--source", source, *target)
    assert done.returncode == 0, done.stderr
    done = nydusify("check", "--no-mount", *target)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def bucket(nydusify: Nydusify, source: str, tmp_path: Path) -> tuple[str, str]:
    """A Nydus image whose blobs are in a folder, and the configuration for that."""
    (tmp_path / "bucket").mkdir()
    config = json.dumps({"dir": str(tmp_path / "bucket")})
    target = f"{source}-n"
    variables = {"BACKEND_TYPE": "localfs", "BACKEND_CONFIG": config}
    done = nydusify("convert", "--source", source, "--target", target, "--plain-http", env=variables)
    assert done.returncode == 0, done.stderr
    assert "--backend-type is taken from the environment variable BACKEND_TYPE" in done.stderr
    assert "--source-backend-type" not in done.stderr
    assert list((tmp_path / "bucket").iterdir())
    return target, config


def test_names_of_backends(nydusify: Nydusify, source: str, bucket: tuple[str, str]) -> None:
    target, config = bucket
    check = ("check", "--target", target, "--plain-http", "--no-mount")
    done = nydusify(*check, "--backend-type", "localfs", "--backend-config", config)
    assert done.returncode == 0, done.stderr
    variables = {"BACKEND_TYPE": "localfs", "BACKEND_CONFIG": config}
    done = nydusify(*check, "--source", target, env=variables)  # both sides
    assert done.returncode == 0, done.stderr
    done = nydusify(*check, env=variables)
    assert done.returncode == 0 and "no effect" not in done.stderr, done.stderr
    done = nydusify(
        *check, "--source", source, "--target-backend-type", "localfs", env={"BACKEND_CONFIG": config}
    )
    assert done.returncode == 0, done.stderr
    refused = nydusify(*check, "--source-backend-config", config)
    assert "--source-backend-config needs --source-backend-type" in one_fatal_line(refused)


def test_a_model_from_the_environment(nydusify: Nydusify, source: str) -> None:
    convert = ("convert", "--source", source, "--target", f"{source}-n", "--plain-http")
    said = one_fatal_line(nydusify(*convert, env={"BACKEND_TYPE": "model-artifact"}))
    assert "--backend-type" not in said and "model" in said


def test_the_name_of_what_is_built(nydusify: Nydusify, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    done = nydusify("build", "--source-dir", str(tmp_path / "tree"), env={"BOOTSTRAP": "made"})
    assert done.returncode == 0, done.stderr
    assert "--name is taken from the environment variable BOOTSTRAP" in done.stderr
    assert (tmp_path / "cwd/.nydus-build-output/made.meta").exists()


@pytest.mark.parametrize("variable", ["CONTAINERD_ADDR", "CONTAINERD_ADDRESS"])
def test_the_socket_of_containerd(nydusify: Nydusify, variable: str, tmp_path: Path) -> None:
    variables = {variable: str(tmp_path / "none.sock")}
    assert "none.sock" in one_fatal_line(nydusify("info", "containerd://default/a", env=variables))
    said = nydusify("commit", "--container", "a", "--target", "x", env=variables).stderr
    assert f"--containerd-address is taken from the environment variable {variable}" in said
    assert "none.sock" in said


def test_errors_and_silence_of_info(nydusify: Nydusify, vectors: Path) -> None:
    done = nydusify("info", "--json", "file://none.tar")
    assert done.returncode == 1 and "none.tar" in json.loads(done.stdout)["error"]
    image = f"file://{vectors}/oci/v6-zstd.tar"
    done = nydusify("info", "--quiet", image)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(nydusify("info", "--quiet", "--json", image).stdout)["kind"] == "nydus"
