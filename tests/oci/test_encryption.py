"""Keys of encrypted layers, wrapped in each way that ocicrypt has and we know."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from jwcrypto.jwk import JWK

from nydus.errors import ConfigError, FormatError, NydusError
from nydus.oci import encryption

DATA = b"a layer" * 100
PKCS7 = "org.opencontainers.image.enc.keys.pkcs7"
PGP = "org.opencontainers.image.enc.keys.pgp"
needs_gpg = pytest.mark.skipif(not shutil.which("gpg"), reason="needs gpg")


def certificate(folder: Path, name: str, *kind: str) -> tuple[str, str]:
    """A private key and a certificate of it."""
    key, crt = folder / f"{name}.key", folder / f"{name}.crt"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        *(kind or ("rsa:2048",)),
        "-nodes",
        "-subj",
        f"/CN={name}",
    ]
    subprocess.run([*command, "-keyout", key, "-out", crt], check=True, capture_output=True)
    return str(key), str(crt)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def alice(folder: Path) -> tuple[str, str]:
    return certificate(folder, "alice")


@pytest.fixture(scope="module")
def bob(folder: Path) -> tuple[str, str]:
    return certificate(folder, "bob")


def gpg(*arguments: str, text: str = "") -> bytes:
    command = ["gpg", "--batch", "--quiet", *arguments]
    return subprocess.run(command, input=text.encode(), check=True, capture_output=True).stdout


@pytest.fixture(scope="module")
def keyring() -> Iterator[str]:
    """gpg's keys: Carol's with a password, two of Dora's, Eve's is expired, Frank's only signs."""
    home = tempfile.mkdtemp(prefix="gnupg-")  # a socket's path must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GNUPGHOME", home)
        form = "Key-Type: RSA\nKey-Length: 2048\nKey-Usage: sign\n{sub}"
        form += "Name-Real: {name}\nName-Email: {mail}\n{how}"
        sub = "Subkey-Type: RSA\nSubkey-Length: 2048\nSubkey-Usage: encrypt\n"
        free = "%no-protection\n"
        for name, mail, below, how in (
            ("Carol C", "carol@example.org", sub, "Passphrase: secret word\n"),
            ("Dora", "dora@one.example", sub, free),
            ("Dora", "dora@two.example", sub, free),
            (
                "Eve",
                "eve@example.org",
                sub,
                "Creation-Date: 20200101T000000\nExpire-Date: 20200601T000000\n" + free,
            ),
            ("Frank", "frank@example.org", "", free),
        ):
            more = () if "Expire" not in how else ("--faked-system-time", "20200102T000000")
            gpg(*more, "--gen-key", text=form.format(name=name, mail=mail, sub=below, how=how))
        yield home
    subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False)
    shutil.rmtree(home)


@pytest.fixture
def home(keyring: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GNUPGHOME", keyring)
    return keyring


def exported(path: Path, name: str, *options: str) -> str:
    locked = ("--pinentry-mode", "loopback", "--passphrase", "secret word") if "carol" in name else ()
    path.write_bytes(gpg(*locked, *options, "--export-secret-keys", name))
    return str(path)


def sealed(*recipients: str) -> tuple[bytes, dict[str, str]]:
    return encryption.encrypt(DATA, encryption.recipients(recipients))


def opened(layer: tuple[bytes, dict[str, str]], *keys: str) -> bytes:
    return encryption.decrypt(*layer, encryption.private_keys(keys), "x")


def test_every_certificate_of_several(alice: tuple[str, str], bob: tuple[str, str], folder: Path) -> None:
    layer = sealed(f"pkcs7:{alice[1]}", f"pkcs7:{bob[1]}")
    assert set(layer[1]) == {PKCS7, "org.opencontainers.image.enc.pubopts"}
    assert opened(layer, alice[0]) == opened(layer, bob[0]) == DATA
    assert opened(layer, bob[1], bob[0]) == DATA, "a certificate beside the key, as skopeo wants it"
    other, _ = certificate(folder, "other")
    with pytest.raises(ConfigError, match="none of the 1 keys given fits"):
        opened(layer, other)
    with pytest.raises(ConfigError, match="is a certificate; a private key is needed"):
        opened(layer, bob[1])


def test_openssl_understands_it(alice: tuple[str, str], tmp_path: Path) -> None:
    layer = sealed(f"pkcs7:{alice[1]}")
    packet = base64.b64decode(layer[1][PKCS7])
    read = ["openssl", "smime", "-decrypt", "-binary", "-inform", "DER", "-inkey", alice[0]]
    plain = subprocess.run(read, input=packet, capture_output=True, check=True).stdout
    for cipher in ("-aes-128-cbc", "-aes-256-cbc"):
        write = ["openssl", "smime", "-encrypt", "-binary", "-outform", "DER", cipher, alice[1]]
        packet = subprocess.run(write, input=plain, capture_output=True, check=True).stdout
        assert opened((layer[0], {**layer[1], PKCS7: base64.b64encode(packet).decode()}), alice[0]) == DATA


def test_a_damaged_packet(alice: tuple[str, str]) -> None:
    """Whatever a registry says is there: the layer, or one clear error."""
    stored, annotations = sealed(f"pkcs7:{alice[1]}")
    packet, keys = base64.b64decode(annotations[PKCS7]), encryption.private_keys([alice[0]])
    wrong = [
        packet[:place] + bytes([packet[place] ^ 0x81]) + packet[place + 1 :] for place in range(len(packet))
    ]
    for each in [*wrong, *(packet[:size] for size in range(0, len(packet), 7)), packet + packet]:
        changed = {**annotations, PKCS7: base64.b64encode(each).decode()}
        try:
            assert encryption.decrypt(stored, changed, keys, "x") == DATA
        except NydusError as error:
            assert "x: " in str(error)


def test_what_is_no_recipient(alice: tuple[str, str], folder: Path) -> None:
    _, curve = certificate(folder, "curve", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    for recipient, words in (
        ("pkcs11:key.yaml", "'pkcs11' cannot be used; use jwe:"),
        ("provider:kms", "'provider' cannot be used"),
        (alice[1], "does not say how"),
        (f"pkcs7:{alice[0]}", "not a certificate"),
        (f"pkcs7:{curve}", "needs a certificate of an RSA key; use jwe:"),
        ("pkcs7:/nowhere", "No such file"),
    ):
        with pytest.raises(ConfigError, match=words):
            sealed(recipient)
    for key, words in (
        ("pkcs11:x", "pkcs11"),
        ("provider:x", "provider"),
        (f"{alice[0]}:pass=x", "not a usable"),
    ):
        with pytest.raises(ConfigError, match=words):
            encryption.private_keys([key])


def test_what_is_no_key(alice: tuple[str, str], tmp_path: Path) -> None:
    """A JWK says what it is for, and is not checked until it is used."""
    key = json.loads(JWK.from_pem(Path(alice[0]).read_bytes()).export())
    path = tmp_path / "key.jwk"
    for more in ({"use": "sig"}, {"key_ops": ["sign"]}):
        path.write_text(json.dumps(key | more))
        with pytest.raises(ConfigError, match=r"key\.jwk: not a usable key"):
            encryption.private_keys([str(path)])
        with pytest.raises(ConfigError, match=r"key\.jwk: not a usable key"):
            sealed(f"jwe:{path}")
    for wrong in (
        {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=r"key\.jwk: not a usable key"):
            sealed(f"jwe:{path}")
        with pytest.raises(ConfigError, match=r"key\.jwk: is a public key"):
            encryption.private_keys([str(path)])
    path.write_text(json.dumps(key | {"use": "enc", "key_ops": ["unwrapKey"]}))
    assert opened(sealed(f"pkcs7:{alice[1]}"), str(path)) == DATA


def test_a_wrapped_key_is_small(alice: tuple[str, str]) -> None:
    stored, annotations = sealed(f"pkcs7:{alice[1]}")
    many = base64.b64encode(b"\x30\x00" * (1 << 20)).decode()
    with pytest.raises(FormatError, match="x: an annotation of the encryption is longer than 1048576"):
        opened((stored, {**annotations, PKCS7: many}), alice[0])


def test_an_unknown_way(alice: tuple[str, str]) -> None:
    stored, annotations = sealed(f"pkcs7:{alice[1]}")
    annotations["org.opencontainers.image.enc.keys.provider.kms"] = annotations.pop(PKCS7)
    with pytest.raises(ConfigError, match=r"is encrypted for provider\.kms; jwe, pkcs7, pgp can be used"):
        opened((stored, annotations), alice[0])


@needs_gpg
@pytest.mark.parametrize("password", [":pass=secret word", ":secret word", ":file={}/password"])
@pytest.mark.parametrize("key", ["binary", "armored", "pgp:Carol C"])
def test_a_key_of_gpg_with_a_password(home: str, tmp_path: Path, key: str, password: str) -> None:
    layer = sealed("pgp:carol@example.org")
    assert set(layer[1]) == {PGP, "org.opencontainers.image.enc.pubopts"}
    (tmp_path / "password").write_text("secret word\n")
    if not key.startswith("pgp:"):
        key = exported(tmp_path / "key", "carol", *(["--armor"] if key == "armored" else []))
    assert opened(layer, key + password.format(tmp_path)) == DATA


@needs_gpg
def test_the_right_key_of_several(home: str, tmp_path: Path) -> None:
    layer = sealed("pgp:carol@example.org")
    key, dora = exported(tmp_path / "key", "carol"), exported(tmp_path / "dora", "dora@one.example")
    for wrong in (f"{key}:pass=wrong", key):
        with pytest.raises(ConfigError, match=r"key: gpg cannot decrypt with it: .*(Bad|No) passphrase"):
            opened(layer, wrong)
    with pytest.raises(ConfigError, match="none of the 1 keys given fits"):
        opened(layer, dora)
    assert opened(layer, dora, f"{key}:secret word") == DATA
    both = sealed("pgp:dora@one.example", "pgp:carol@example.org")
    assert opened(both, dora) == opened(both, f"{key}:secret word") == DATA
    assert opened(both, f"{key}:wrong", dora) == DATA


@needs_gpg
def test_names_of_keys(home: str) -> None:
    listed = gpg("--with-colons", "--list-keys", "dora@two.example").decode()
    fingerprint = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr"))
    for name in (
        fingerprint,
        f"0x{fingerprint[-16:].lower()}",
        "dora@two.example",
        "Dora <dora@two.example>",
    ):
        assert encryption.recipients([f"pgp:{name}"])[0].key == fingerprint
    for name, words in (
        ("Dora", f"is the name of 2 keys; use one of .*{fingerprint}"),
        ("dora", "no such key"),  # part of an address could be anybody's
        (fingerprint[-8:], "no such key"),  # short numbers can be forged
        ("eve@example.org", "is expired"),
        ("frank@example.org", "is expired, revoked or not for encryption"),
        ("--version", "no such key"),
        ("Carol C <carol@example.org> ", "no such key"),
    ):
        with pytest.raises(ConfigError, match=words):
            encryption.recipients([f"pgp:{name}"])
        with pytest.raises(ConfigError, match="no such key"):
            encryption.private_keys(["pgp:nobody@example.org"])


@needs_gpg
def test_options_of_the_user_do_not_count(home: str, tmp_path: Path) -> None:
    """``encrypt-to`` would add a reader, ``armor`` another form."""
    key = exported(tmp_path / "dora", "dora@two.example")
    path = Path(home) / "gpg.conf"
    path.write_text("armor\nencrypt-to dora@two.example\n")
    try:
        layer = sealed("pgp:dora@one.example")
    finally:
        path.unlink()
    with pytest.raises(ConfigError, match="none of the 1 keys given fits"):
        opened(layer, key)


@needs_gpg
def test_a_message_that_inflates(home: str, tmp_path: Path) -> None:
    stored, annotations = sealed("pgp:dora@one.example")
    huge = gpg("--trust-model", "always", "-r", "dora@one.example", "--encrypt", text="0" * 50_000_000)
    assert len(huge) < 200_000
    with pytest.raises(NydusError, match=r"gpg cannot decrypt with it: .*too large"):
        opened((stored, {**annotations, PGP: base64.b64encode(huge).decode()}), "pgp:dora@one.example")


@needs_gpg
def test_nothing_of_a_file_of_keys_stays(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, key = sealed("pgp:dora@one.example"), exported(tmp_path / "dora", "dora@one.example")
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        assert opened(layer, key) == DATA
        assert not list(Path(folder).iterdir())
        found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert f"--homedir {folder}" not in found


@needs_gpg
def test_no_place_for_a_file_of_keys(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, key = sealed("pgp:dora@one.example"), exported(tmp_path / "dora", "dora@one.example")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="dora: no temporary folder for gpg: No such file"):
        opened(layer, key)


def test_without_gpg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="install GnuPG"):
        encryption.recipients(["pgp:x@y"])


def test_what_is_wrapped_is_checked(alice: tuple[str, str]) -> None:
    stored, annotations = sealed(f"pkcs7:{alice[1]}")
    write = ["openssl", "smime", "-encrypt", "-binary", "-outform", "DER", "-aes256", alice[1]]
    packet = subprocess.run(write, input=b"no document", capture_output=True, check=True).stdout
    with pytest.raises(FormatError, match="annotation of the encryption is wrong"):
        opened((stored, {**annotations, PKCS7: base64.b64encode(packet).decode()}), alice[0])
