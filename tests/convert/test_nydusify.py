"""The command, as users and their scripts run it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from documents import load
from faulty import BasicAuth, FaultyRegistry
from nydusify_command import Nydusify, one_fatal_line

from nydus.oci import model
from nydus.oci.archive import open_archive
from nydus.oci.place import RegistryPlace
from nydus.oci.reference import parse

pytestmark = pytest.mark.vectors


def test_a_conversion_says_what_scripts_look_for(nydusify: Nydusify, source: str, tmp_path: Path) -> None:
    target = f"{source.rpartition(':')[0]}:nydus"
    done = nydusify(
        "convert", "--source", source, "--target", target, "--plain-http", "--output-json", "out.json"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    words = ["pulling", "pulled", "converting", "converted", "pushing", "pushed"]
    positions = [done.stderr.index(f'level=info msg="{word} image ') for word in words]
    assert positions == sorted(positions)
    assert re.search(r'msg="pulled image \S+ , elapse \d', done.stderr)
    assert all(line.startswith('time="') for line in done.stderr.splitlines())
    figures = json.loads((tmp_path / "cwd/out.json").read_text())
    assert set(figures) >= {
        "SourceImageSize", "TargetImageSize", "SourcePullElapsed", "ConversionElapsed", "TargetPushElapsed"
    }  # fmt: skip
    assert figures["SourceImageSize"] == 83630
    assert sorted(p.name for p in (tmp_path / "cwd").iterdir()) == ["out.json"]


def test_quiet_and_json(nydusify: Nydusify, source: str) -> None:
    arguments = ["convert", "--source", source, "--plain-http", "--quiet"]
    assert nydusify(*arguments, "--target-suffix=-a").stderr == ""
    done = nydusify(*arguments, "--target-suffix=-b", "--json")
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["target"] == f"{source}-b" and found["source_size"] == 83630
    assert 0 < found["start_size"] < found["target_size"]
    assert [layer["reused"] for layer in found["layers"]] == [True] * 3
    assert all(layer["size"] > 0 for layer in found["layers"])
    name = source.rpartition(":")[0]
    done = nydusify("copy", "--source", f"{source}-b", "--target", f"{name}:c", "--plain-http", "--json")
    assert "copied 5 blobs" in done.stderr
    assert json.loads(done.stdout)["digest"] == found["digest"]
    done = nydusify("check", "--target", f"{source}-b", "--plain-http", "--no-mount", "-q", "--json")
    assert done.stderr == "" and json.loads(done.stdout)["verified"]
    done = nydusify("check", "--target", f"{name}:none", "--plain-http", "--no-mount", "-q", "--json")
    assert done.returncode == 1
    assert "manifest unknown" in done.stderr and "manifest unknown" in json.loads(done.stdout)["error"]


def test_options_in_the_ways_of_go(nydusify: Nydusify, source: str) -> None:
    done = nydusify(
        "convert",
        "-source",
        source,
        "--target-suffix=-n",
        "--plain-http=true",
        "--oci=false",
        "-fs-version",
        "5",
    )
    assert done.returncode == 0, done.stderr
    manifest = load(RegistryPlace(parse(source), plain_http=True).open(), "latest-n")
    assert manifest["annotations"][model.NYDUS_FS_VERSION] == "5"


def test_options_from_the_environment_are_told(nydusify: Nydusify, source: str) -> None:
    done = nydusify("convert", "--target-suffix", "-n", env={"SOURCE": source, "PLAIN_HTTP": "true"})
    assert done.returncode == 0, done.stderr
    assert "--source is taken from the environment variable SOURCE" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "UP//x", "--target", "a:b"], "invalid image reference 'UP//x'"),
        (
            ["--source", "a", "--target", "b", "--target-suffix", "c"],
            "exactly one of --target and --target-suffix",
        ),
        (["--source", "a"], "exactly one of"),
        (["--target", "a"], "--source"),
        (["--source", "a", "--target", "b", "--no-such"], "--no-such"),
        (["--source", "a", "--target", "b", "--fs-version", "7"], "fs-version must be 5 or 6"),
        (["--source", "a", "--target", "b", "--compressor", "xz"], "compressor must be one of"),
        (["--source", "a", "--target", "b", "--chunk-size", "5000"], "chunk-size must be a power of two"),
        (["--source", "a", "--target", "b", "--chunk-size", "big"], "'big' is not a number"),
        (["--source", "a", "--target", "b", "--prefetch-dir", "etc"], "is not absolute"),
        (["--source", "a", "--target", "b", "--platform", "amd64"], "is not os/architecture"),
        (["--source", "a", "--target", "b", "--push-retry-delay", "soon"], "is not a duration"),
        (["--source", "a", "--target", "b", "--push-chunk-size", "much"], "'much' is not a size"),
        (["--source", "a", "--target", "b", "--plain-http=perhaps"], "neither true nor false"),
        (["--source", f"a@sha256:{'0' * 64}", "--target-suffix", "-n"], "cannot be used with a digest"),
        (["--source", "a", "--target", "b", "--target-archive", "no/dir/x.tar"], "its folder does not exist"),
        (["--source", "a", "--target", "b", "--source-archive", "no.tar"], "no.tar: No such file"),
    ],
)
def test_wrong_options(nydusify: Nydusify, arguments: list[str], words: str) -> None:
    done = nydusify("convert", *arguments)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert "level=fatal" in done.stderr and "Traceback" not in done.stderr


def test_commands_and_help(nydusify: Nydusify) -> None:
    assert nydusify("no-such-command").returncode == 3
    for arguments in ((), ("--help",), ("convert", "--help")):
        done = nydusify(*arguments)
        assert done.returncode == 0 and "Usage" in done.stdout
    assert nydusify("--version").stdout.startswith("Version     : v")


def test_failures_are_one_line(
    nydusify: Nydusify, server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    target = f"{source.rpartition(':')[0]}:nydus"

    def convert(reference: str, *more: str) -> str:
        return one_fatal_line(nydusify("convert", "--source", reference, "--target", target, *more))

    assert "does not speak TLS" in convert(source)
    assert server.seen == []
    assert "cannot connect: Connection refused" in convert("127.0.0.1:1/a:b", "--plain-http")
    message = convert(source + "x", "--plain-http", "--output-json", "out.json")
    assert "404 manifest unknown: small:latestx (MANIFEST_UNKNOWN)" in message
    assert (tmp_path / "cwd/out.json").read_text() == "null"
    server.intercepts.append(BasicAuth("me", "secret"))
    assert "401 " in convert(source, "--plain-http")


def test_credentials_of_docker(
    nydusify: Nydusify, server: FaultyRegistry, source: str, tmp_path: Path
) -> None:
    server.intercepts.append(BasicAuth("me", "secret"))
    config = {"auths": {server.host: {"auth": "bWU6c2VjcmV0"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ("convert", "--source", source, "--target-suffix", "-n", "--plain-http")
    assert nydusify(*arguments, env={"DOCKER_CONFIG": str(tmp_path)}).returncode == 0
    assert nydusify(*arguments).returncode == 1


def test_archives(nydusify: Nydusify, vectors: Path, tmp_path: Path) -> None:
    done = nydusify(
        "convert", "--source", "r.io/small:v1", "--source-archive", str(vectors / "oci/source.tar"),
        "--target", "r.io/small:v2", "--target-archive", "out.tar",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "cwd").iterdir()] == ["out.tar"]
    found = load(open_archive(tmp_path / "cwd/out.tar"), "v2")
    assert found["annotations"][model.NYDUS_SOURCE_REFERENCE] == "r.io/small:v1"


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")],
)
def test_an_interrupted_conversion_leaves_nothing(
    server: FaultyRegistry, source: str, number: int, code: int, words: str
) -> None:
    import sys

    from faulty import is_blob

    server.intercepts.append(lambda handler: bool(is_blob(handler) and time.sleep(0.5)))
    process = subprocess.Popen(
        [Path(sys.executable).with_name("nydusify"), "convert", "--source", source, "--target-suffix=-n",
         "--plain-http"], stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    time.sleep(0.5)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == code
    assert "Traceback" not in stderr and words in stderr
    deadline = time.monotonic() + 5
    while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, check=False).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (server.store.repository("small") / "_tags/latest-n").exists()


def test_an_interrupted_conversion_goes_on(nydusify: Nydusify, server: FaultyRegistry, source: str) -> None:
    """The same command again takes over the layers that were done, and gives the same image."""
    import signal
    import sys
    import threading

    from faulty import is_blob

    layers = load(RegistryPlace(parse(source), plain_http=True).open(), "latest")["layers"]
    last, released = min(layers, key=lambda layer: layer["size"])["digest"], threading.Event()
    server.intercepts.append(
        lambda handler: bool(is_blob(handler) and last in handler.path and released.wait(20))
    )
    command = ("convert", "--source", source, "--target-suffix=-n", "--plain-http")
    home = {**os.environ, "HOME": str(nydusify._folder.parent)}
    with subprocess.Popen(
        [Path(sys.executable).with_name("nydusify"), *command], stderr=subprocess.PIPE, text=True, env=home
    ) as process:
        assert process.stderr
        for line in process.stderr:
            if "converted layer 2/3" in line:
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
        assert process.returncode == 130
    released.set()
    server.intercepts.clear()
    assert not (server.store.repository("small") / "_tags/latest-n").exists()
    done = nydusify(*command, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {layer["source"] for layer in found["layers"] if not layer["reused"]} == {last}
    fresh = json.loads(nydusify(*command, "--json", "--no-reuse").stdout)
    assert not any(layer["reused"] for layer in fresh["layers"])
    assert fresh["digest"] == found["digest"]


def test_what_a_check_leaves(nydusify: Nydusify, source: str, tmp_path: Path) -> None:
    """Scripts look for these files; older ones in the work folder itself."""
    nydus = f"{source}-nydus"
    merged = ("--merge-platform", "--platform", "linux/amd64")
    assert nydusify("convert", "--source", source, "--target", nydus, "--plain-http", *merged).returncode == 0
    output = tmp_path / "cwd/output"
    for more in (("--source", source), ()):
        done = nydusify("check", "--target", nydus, "--plain-http", "--no-mount", *more)
        assert done.returncode == 0, done.stderr
        found = {path.name for path in (output / "target").iterdir()}
        documents = {
            f"{kind}_{what}.json" for kind in ("oci", "nydus") for what in ("index", "manifest", "config")
        }
        assert found == {*documents, "nydus_output.json", "nydus_bootstrap"}
        report = json.loads((output / "nydus_bootstrap_debug.json").read_text())
        assert report["fs_version"] == "6" and len(report["blobs"]) == 3
        assert (output / "nydus_bootstrap").read_bytes()[1024:1028] == bytes.fromhex("e2e1f5e0")
        assert json.loads((output / "nydus_manifest.json").read_text())["layers"]
        assert (output / "oci_manifest.json").exists() == bool(more)
        assert len(list((output / "source").iterdir())) == 2 * bool(more)


@pytest.mark.skipif(not shutil.which("skopeo"), reason="needs skopeo")
def test_one_of_several_images_in_an_archive(nydusify: Nydusify, vectors: Path, tmp_path: Path) -> None:
    layout = tmp_path / "images"
    for name in ("one", "two"):
        command = ["skopeo", "copy", "-q", f"oci-archive:{vectors}/oci/source.tar", f"oci:{layout}:{name}"]
        subprocess.run(command, check=True)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for path in sorted(layout.rglob("*")):
            archive.add(path, str(path.relative_to(layout)), recursive=False)
    for place in (layout, tmp_path / "images.tar"):
        found = nydusify("info", "--target-archive", f"{place}:two")
        assert found.returncode == 0 and "an ordinary OCI image" in found.stdout, found.stderr
        message = one_fatal_line(nydusify("info", "--target-archive", f"{place}:three"))
        assert "no image 'three'; it has one, two" in message
    done = nydusify("copy", "--source", f"file://{layout}:two", "--target", "file://two.tar")
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_fetched_first_is_told(nydusify: Nydusify, source: str) -> None:
    arguments = ("convert", "--source", source, "--target", f"{source}-n", "--plain-http", "--quiet")
    done = nydusify(*arguments, "--prefetch-patterns", stdin="".join(f"/no/{n}\n" for n in range(7)))
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "level=warning" in line and "not in the image: /no/0, " in line and "/no/4 and 2 more" in line
