"""Images that only some may read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import load
from faulty import FaultyHandler, FaultyRegistry, Times, status
from nydusify_command import Nydusify, one_fatal_line

from nydus.convert.changes import Selection
from nydus.convert.check import check
from nydus.convert.commit import build_parts, put_committed
from nydus.convert.image import image as convert_image
from nydus.convert.opened import open_nydus, store_blob
from nydus.convert.options import ConvertOptions
from nydus.errors import ConfigError, FormatError
from nydus.oci import encryption, model
from nydus.oci.place import RegistryPlace
from nydus.oci.reference import parse
from nydus.oci.transport import Policy

pytestmark = pytest.mark.vectors


def keys(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Names -> (private key, public key)."""
    made = {}
    for name, kind in (
        ("rsa", ["RSA"]),
        ("ec", ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"]),
        ("other", ["RSA"]),
    ):
        private, public = folder / f"{name}.pem", folder / f"{name}.pub"
        subprocess.run(["openssl", "genpkey", "-quiet", "-algorithm", *kind, "-out", private], check=True)
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
        made[name] = (private, public)
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def readers(
    pairs: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[str, list[str]]]]:
    """Names -> (recipient, files with which skopeo and we can decrypt), one for each way to wrap a key."""
    found = {name: (f"jwe:{public}", [str(private)]) for name, (private, public) in pairs.items()}
    folder = tmp_path_factory.mktemp("readers")
    command = ["openssl", "req", "-x509", "-new", "-key", pairs["other"][0], "-subj", "/CN=x"]
    subprocess.run([*command, "-out", folder / "cert.pem"], check=True, capture_output=True)
    found["cert"] = (f"pkcs7:{folder}/cert.pem", [str(pairs["other"][0]), f"{folder}/cert.pem"])
    if not shutil.which("gpg"):
        yield found
        return
    home = tempfile.mkdtemp(prefix="gnupg-")  # a socket's path must be short
    gpg = ["gpg", "--batch", "--quiet", "--homedir", home]
    key = "Key-Type: RSA\nKey-Length: 2048\nSubkey-Type: RSA\nSubkey-Length: 2048\n%no-protection\n"
    name = "Name-Real: Ann\nName-Email: ann@example.org\n"
    subprocess.run([*gpg, "--gen-key"], input=f"{key}{name}".encode(), check=True, capture_output=True)
    done = subprocess.run([*gpg, "--export-secret-keys", "ann"], check=True, capture_output=True)
    (folder / "ann.gpg").write_bytes(done.stdout)
    found["gpg"] = ("pgp:ann@example.org", [f"{folder}/ann.gpg"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GNUPGHOME", home)
        yield found
    subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False)
    shutil.rmtree(home)


def keyring() -> dict[str, str]:
    return {"GNUPGHOME": os.environ.get("GNUPGHOME", "/nowhere")}


@pytest.fixture
def image(nydusify: Nydusify, source: str, pairs: dict[str, tuple[Path, Path]]) -> str:
    recipients = ",".join(f"jwe:{pairs[name][1]}" for name in ("rsa", "ec"))
    target = f"{source}-secret"
    done = nydusify(
        *("convert", "--source", source, "--target", target, "--plain-http"),
        *("--encrypt-recipients", recipients),
    )
    assert done.returncode == 0, done.stderr
    return target


def test_its_documents(server: FaultyRegistry, image: str) -> None:
    manifest = load(RegistryPlace(parse(image), plain_http=True).open(), parse(image).tag)
    *blobs, last = manifest["layers"]
    assert all(blob["annotations"]["containerd.io/snapshot/nydus-encrypted-blob"] == "true" for blob in blobs)
    assert last["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
    assert {"org.opencontainers.image.enc.keys.jwe", "org.opencontainers.image.enc.pubopts"} <= set(
        last["annotations"]
    )
    assert last["annotations"][model.NYDUS_BOOTSTRAP] == "true"
    assert manifest["config"]["content"]["rootfs"]["diff_ids"][:-1] == [blob["digest"] for blob in blobs]
    stored = b"".join(path.read_bytes() for path in server.store.blobs.iterdir())
    assert b"image.boot" not in stored, "a bootstrap in a blob would have its key"


@pytest.mark.parametrize("name", ["rsa", "ec"])
def test_a_recipient_can_use_it(
    nydusify: Nydusify,
    source: str,
    image: str,
    pairs: dict[str, tuple[Path, Path]],
    name: str,
    tmp_path: Path,
) -> None:
    key = ("--decryption-key", str(pairs[name][0]))
    common = ("--source", source, "--plain-http", *key)
    work = tmp_path / "work"
    done = nydusify("check", "--target", image, "--no-mount", "--work-dir", str(work), *common)
    assert done.returncode == 0 and "the same as" in done.stderr, done.stderr
    assert (work / "target/nydus_bootstrap").stat().st_mode & 0o077 == 0, (
        "the bootstrap has the keys of blobs"
    )
    found = json.loads(nydusify("info", image, "--plain-http", "--json", *key).stdout)
    assert found["encrypted"] and found["files"] > 0
    back = f"{source}-back"
    done = nydusify("convert", "--reverse", "--source", image, "--target", back, "--plain-http", *key)
    assert done.returncode == 0, done.stderr
    plain = f"{source}-plain"
    assert nydusify("convert", "--source", source, "--target", plain, "--plain-http").returncode == 0
    done = nydusify("check", "--source", back, "--target", plain, "--plain-http", "--no-mount")
    assert done.returncode == 0, done.stderr


@pytest.mark.root
def test_it_can_be_mounted(
    nydusify: Nydusify, source: str, image: str, pairs: dict[str, tuple[Path, Path]]
) -> None:
    key = ("--decryption-key", str(pairs["rsa"][0]))
    done = nydusify("check", "--source", source, "--target", image, "--plain-http", *key)
    assert done.returncode == 0 and "the same as" in done.stderr, done.stderr


def test_others_cannot_use_it(
    nydusify: Nydusify, source: str, image: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    (tmp_path / "files").write_text("/\n")
    files = ("--prefetch-files", str(tmp_path / "files"))
    for arguments in (
        ("check", "--target", image),
        ("convert", "--reverse", "--source", image, "--target", f"{source}-back"),
        ("optimize", "--source", image, "--target", f"{source}-o", *files),
    ):
        assert "is encrypted, and no private key was given" in one_fatal_line(
            nydusify(*arguments, "--plain-http")
        )
    options = ("convert", "--source", source, "--target", f"{source}-d", "--plain-http")
    for arguments in (
        ("chunkdict", "generate", "--sources", f"{image},{image}", "--plain-http"),
        (*options, "--chunk-dict", f"bootstrap:registry:{image}"),
    ):
        assert "its chunks cannot be shared" in one_fatal_line(nydusify(*arguments))
    other = ("--decryption-key", str(pairs["other"][0]))
    message = one_fatal_line(nydusify("check", "--target", image, "--plain-http", *other))
    assert "is encrypted, and none of the 1 keys given fits" in message
    public = ("--decryption-key", str(pairs["rsa"][1]))
    assert "is a public key" in one_fatal_line(nydusify("check", "--target", image, "--plain-http", *public))
    done = nydusify("info", image, "--plain-http")
    assert done.returncode == 0 and "encrypted; --decryption-key shows" in done.stdout


@pytest.mark.parametrize(
    ("recipient", "words"),
    [
        ("pkcs11:x", "'pkcs11' cannot be used; use jwe:"),
        ("key.pem", "does not say how"),
        ("jwe:none", "No such file"),
        ("pgp:x@y", "pgp:x@y: "),
    ],
)
def test_wrong_recipients(nydusify: Nydusify, source: str, recipient: str, words: str) -> None:
    options = ("--source", source, "--target-suffix=-n", "--plain-http", "--encrypt-recipients", recipient)
    assert words in one_fatal_line(nydusify("convert", *options))


@pytest.mark.parametrize("password", ["secret", "pass=word"])
def test_a_key_with_a_password(tmp_path: Path, pairs: dict[str, tuple[Path, Path]], password: str) -> None:
    locked, file = tmp_path / "locked.pem", tmp_path / "password"
    file.write_text(f"{password}\n")
    command = [
        "openssl",
        "pkcs8",
        "-topk8",
        "-in",
        pairs["rsa"][0],
        "-out",
        locked,
        "-passout",
        f"file:{file}",
    ]
    subprocess.run(command, check=True)
    assert encryption.private_keys([f"{locked}:pass={password}", f"{locked}:file={file}"])
    with pytest.raises(ConfigError, match="not a usable key"):
        encryption.private_keys([f"{locked}:pass=wrong"])


def test_a_changed_layer_is_noticed(pairs: dict[str, tuple[Path, Path]]) -> None:
    key = encryption.private_keys([str(pairs["rsa"][0])])
    stored, annotations = encryption.encrypt(b"data" * 100, encryption.recipients([f"jwe:{pairs['rsa'][1]}"]))
    assert encryption.decrypt(stored, annotations, key, "x") == b"data" * 100
    with pytest.raises(FormatError, match="wrong HMAC"):
        encryption.decrypt(b"\0" + stored[1:], annotations, key, "x")
    for name in annotations:
        with pytest.raises(FormatError, match=r"not base64|is wrong"):
            encryption.decrypt(stored, {**annotations, name: "?"}, key, "x")


@pytest.mark.skipif(not shutil.which("skopeo"), reason="needs skopeo")
@pytest.mark.skipif(not shutil.which("gpg"), reason="needs gpg")
@pytest.mark.parametrize("names", [["rsa"], ["ec"], ["cert"], ["gpg"], ["rsa", "ec", "cert", "gpg"]])
def test_skopeo_understands_it(
    nydusify: Nydusify,
    source: str,
    readers: dict[str, tuple[str, list[str]]],
    names: list[str],
    tmp_path: Path,
) -> None:
    """What it encrypted we can decrypt, and what we encrypted it can."""
    layout = tmp_path / "layout"
    run = ["skopeo", "copy", "-q", "--src-tls-verify=false"]
    plain = f"{source}-plain"
    assert nydusify("convert", "--source", source, "--target", plain, "--plain-http").returncode == 0
    recipients = [readers[name][0] for name in names]
    subprocess.run(
        [*run, *(f"--encryption-key={recipient}" for recipient in recipients), "--encrypt-layer=-1",
         f"docker://{plain}", f"oci:{layout}:x"], check=True,
    )  # fmt: skip
    for name in names:
        done = nydusify(
            *("check", "--target-archive", str(layout), "--no-mount"),
            *("--decryption-key", readers[name][1][0]),
        )
        assert done.returncode == 0, done.stderr
    secret = f"{source}-secret"
    done = nydusify(
        *("convert", "--source", source, "--target", secret, "--plain-http"),
        *("--encrypt-recipients", ",".join(recipients)),
        env=keyring(),
    )
    assert done.returncode == 0, done.stderr
    for name in names:
        back = tmp_path / name
        keys = [f"--decryption-key={file}" for file in readers[name][1]]
        subprocess.run([*run, *keys, f"docker://{secret}", f"oci:{back}:x"], check=True)
        done = nydusify(
            "check", "--target-archive", str(back), "--source", source, "--plain-http", "--no-mount"
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("gpg"), reason="needs gpg")
def test_it_can_be_optimized(
    server: FaultyRegistry,
    nydusify: Nydusify,
    source: str,
    image: str,
    pairs: dict[str, tuple[Path, Path]],
    readers: dict[str, tuple[str, list[str]]],
    tmp_path: Path,
) -> None:
    key = ("--decryption-key", str(pairs["rsa"][0]))
    (tmp_path / "files").write_text("/bin/busybox\n/etc/hostname\n/\n")
    target = f"{source}-fast"
    options = (
        "--source",
        image,
        "--target",
        target,
        "--prefetch-files",
        str(tmp_path / "files"),
        "--plain-http",
    )
    message = one_fatal_line(nydusify("optimize", *options, *key))
    assert "say with --encrypt-recipients who may read the new image" in message
    recipients = f"{readers['cert'][0]},{readers['gpg'][0]}"
    done = nydusify("optimize", *options, *key, "--encrypt-recipients", recipients, env=keyring())
    assert done.returncode == 0, done.stderr
    manifest = load(RegistryPlace(parse(target), plain_http=True).open(), parse(target).tag)
    *blobs, last = manifest["layers"]
    assert all(blob["annotations"]["containerd.io/snapshot/nydus-encrypted-blob"] == "true" for blob in blobs)
    assert last["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
    assert last["annotations"]["containerd.io/snapshot/nydus-separated-blob-with-prefetch-files"]
    assert not any(name.endswith("keys.jwe") for name in last["annotations"]), "who could read the old one"
    for name in ("cert", "gpg"):
        done = nydusify(
            *("check", "--source", source, "--target", target, "--plain-http", "--no-mount"),
            *("--decryption-key", readers[name][1][0]),
        )
        assert done.returncode == 0 and "the same as" in done.stderr, done.stderr
    assert "none of the 1 keys given fits" in one_fatal_line(
        nydusify("check", "--target", target, "--plain-http", *key)
    )
    stored = b"".join(path.read_bytes() for path in server.store.blobs.iterdir())
    assert b"image.boot" not in stored
    plain = f"{source}-plain"
    assert nydusify("convert", "--source", source, "--target", plain, "--plain-http").returncode == 0
    message = one_fatal_line(
        nydusify("optimize", "--source", plain, *options[2:], "--encrypt-recipients", readers["rsa"][0])
    )
    assert "is not encrypted, nor would its blobs be" in message


def test_it_can_be_committed_to(
    source: str, image: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    place = RegistryPlace(parse(image), plain_http=True)
    keys = encryption.private_keys([str(pairs["ec"][0])])
    base = open_nydus(place, keys=keys)
    upper, build = tmp_path / "upper", tmp_path / "build"
    upper.mkdir()
    build.mkdir()
    (upper / "new").write_bytes(b"a secret of the container" * 10_000)
    parts = build_parts(base, upper, "/", Selection(), build)
    assert b"image.boot" not in parts[0].path.read_bytes(), "a bootstrap in a blob would have its key"
    target = RegistryPlace(parse(f"{source}-committed"), plain_http=True)
    writer = target.open_sink()
    layers = {part.what: store_blob(part.path, writer, encrypted=base.encrypted) for part in parts}
    readers = encryption.recipients([f"jwe:{pairs['other'][1]}"])
    put_committed(base, parts, layers, [], writer, target.reference.tag, readers)
    other = encryption.private_keys([str(pairs["other"][0])])
    (tmp_path / "check").mkdir()
    check(target, None, None, tmp_path / "check", keys=other)
    made = open_nydus(target, keys=other)
    assert made.encrypted and all(blob.cipher for blob in made.tree.blobs)
    with pytest.raises(ConfigError, match="none of the 1 keys given fits"):
        open_nydus(target, keys=keys)
    with pytest.raises(ConfigError, match="say with --encrypt-recipients"):
        base.require_readers(())


def test_a_layer_that_is_built_twice_has_the_keys_of_the_blob_that_is_stored(
    server: FaultyRegistry, source: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Each attempt has other keys; the upload of the last layer fails after all are built."""

    last: list[str] = []

    def is_last(handler: FaultyHandler) -> bool:
        if handler.command != "PUT" or "digest=" not in handler.path:
            return False
        last.extend([handler.path.rpartition("digest=")[2]] * (len(server.paths("PUT")) == 3))
        return handler.path.rpartition("digest=")[2] in last

    refused = Times(Policy().attempts, is_last, status(503))
    server.intercepts.append(refused)
    target = RegistryPlace(parse(f"{server.host}/small:secret"), plain_http=True)
    private, public = pairs["ec"]
    options = ConvertOptions(recipients=(f"jwe:{public}",), workers=1, retry_delay=0.1)
    convert_image(RegistryPlace(parse(source), plain_http=True), target, options)
    assert refused.left == 0
    key = encryption.private_keys([str(private)])
    check(target, RegistryPlace(parse(source), plain_http=True), None, tmp_path, keys=key)
