"""Keys of layers wrapped as PGP messages: the ``gpg`` program does it, with its keyring or exported keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from nydus.errors import ConfigError

#: What a binary file of private keys begins with: a packet of tag 5, old or new form.
_SECRET = (b"\x94", b"\x95", b"\x96", b"\x97", b"\xc5")
_ARMOR = b"-----BEGIN PGP PRIVATE KEY BLOCK-----"
_MOST = 64 << 10  # of a wrapped key; compressed messages can be made to inflate to anything
_USER = re.compile(r"(?P<name>.*?)\s*(?:\([^()]*\)\s*)?(?:<(?P<address>[^<>]*)>)?")
#: So that it says what is matched here; options of the user's must not add recipients or another form.
_COMMON = ("--batch", "--no-tty", "--no-options", "--status-fd", "2")


def is_secret(data: bytes) -> bool:
    """Whether a file holds private keys as gpg exports them."""
    return data[:1] in _SECRET or data.lstrip().startswith(_ARMOR)


def find(name: str, *, secret: bool = False) -> str:
    """The fingerprint of a key in gpg's keyring.

    Args:
        name: exactly the name or address of a user, or 16 or 40 digits of the fingerprint's end.
        secret: the private key must be there.

    Raises:
        ConfigError: there is none that can be used, or there are several.
    """
    listed = _gpg("--with-colons", "--list-secret-keys" if secret else "--list-keys")
    if listed.returncode:
        raise ConfigError(f"pgp:{name}: gpg: {_words(listed)}")
    found: dict[str, bool] = {}  # fingerprint -> whether it can be used
    usable, fingerprint = False, ""
    for line in listed.stdout.decode(errors="replace").splitlines():
        kind, *fields = f"{line}::::::::::::".split(":")
        if kind in ("pub", "sec"):
            # A capital is what the whole key can be used for today.
            usable, fingerprint = secret or ("E" in fields[10] and fields[0] not in "idre"), ""
        elif kind == "fpr" and not fingerprint:
            fingerprint = fields[8]
            digits = name.upper().removeprefix("0X")
            if len(digits) in (16, 40) and fingerprint.endswith(digits):
                found[fingerprint] = usable
        elif kind == "uid" and fields[0] != "r":
            user = re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), fields[8])
            match = _USER.fullmatch(user)
            if name and name in (user, *(match.groups() if match else ())):
                found[fingerprint] = usable
    fitting = [each for each, can in found.items() if can]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ConfigError(f"pgp:{name}: is the name of {len(fitting)} keys; use one of {', '.join(fitting)}")
    what = "is expired, revoked or not for encryption" if found else "gpg's keyring has no such key"
    raise ConfigError(f"pgp:{name}: {what}; gpg --list-{'secret-' * secret}keys shows what it has")


def wrap(data: bytes, fingerprints: Sequence[str]) -> bytes:
    """A message that the owner of any of the keys can read.

    Raises:
        ConfigError: gpg does not do it.
    """
    # No AEAD, which ocicrypt's library does not know; who chose a recipient trusts the key.
    form = ("--rfc4880", "--compress-algo", "none", "--cipher-algo", "AES256", "--trust-model", "always")
    readers = [option for each in fingerprints for option in ("--recipient", each)]
    done = _gpg(*form, "--encrypt", *readers, data=data)
    if done.returncode or not done.stdout:
        raise ConfigError(f"gpg: {_words(done)}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class SecretKeys:
    """Private keys: those of a file, or with ``exported=None`` those of gpg's own keyring."""

    name: str
    exported: bytes | None = field(repr=False)
    password: bytes | None = field(repr=False)

    def unwrap(self, packet: bytes) -> bytes | None:
        """What was wrapped; None if it is for others.

        Raises:
            ConfigError: the password is wrong, or the keys cannot be used.
        """
        options = ["--max-output", str(_MOST)]
        with ExitStack() as stack:
            home = ""
            if self.exported is not None:
                try:
                    home = stack.enter_context(tempfile.TemporaryDirectory(prefix="gpg-"))
                except OSError as error:
                    raise ConfigError(f"{self.name}: no temporary folder for gpg: {error.strerror}") from None
                stack.callback(_end_agent, home)
                done = _gpg("--import", data=self.exported, home=home)
                if done.returncode:
                    raise ConfigError(f"{self.name}: gpg: {_words(done)}")
            password = self.password
            if password is None and self.exported is not None:
                password = b""  # nobody is asked for that of a file
            done = _gpg(*options, "--decrypt", data=packet, home=home, password=password)
        status = done.stderr.decode(errors="replace")
        decrypted = "[GNUPG:] DECRYPTION_OKAY" in status
        if decrypted and not done.returncode:
            return done.stdout
        if decrypted or "pkdecrypt_failed" in status:  # it is for one of the keys
            raise ConfigError(f"{self.name}: gpg cannot decrypt with it: {_words(done)}")
        return None


def _gpg(
    *arguments: str, data: bytes = b"", home: str = "", password: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("gpg") or shutil.which("gpg2")
    if program is None:
        raise ConfigError("PGP keys need the program gpg: install GnuPG")
    command = [program, *_COMMON, *(("--homedir", home) if home else ())]
    descriptors: list[int] = []
    if password is not None:
        read_end, write_end = os.pipe()
        os.write(write_end, password[:4096] + b"\n")
        os.close(write_end)
        descriptors.append(read_end)
        command += ["--pinentry-mode", "loopback", "--passphrase-fd", str(read_end)]
    try:
        return subprocess.run(
            [*command, *arguments],
            input=data,
            capture_output=True,
            pass_fds=descriptors,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise ConfigError(f"{program}: cannot be run: {error.strerror}") from None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _words(done: subprocess.CompletedProcess[bytes]) -> str:
    """What gpg says is wrong."""
    told = re.findall(r"^gpg: (.+)", done.stderr.decode(errors="replace"), re.MULTILINE)
    failed = [line for line in told if "failed" in line]
    return next(iter(failed or told[-1:]), f"it ended with status {done.returncode}")


def _end_agent(home: str) -> None:
    """Ends the agent, and whatever else gpg starts for a folder of keys, and removes its sockets."""
    if program := shutil.which("gpgconf"):
        for arguments in (("--kill", "all"), ("--remove-socketdir",)):
            with suppress(OSError):
                subprocess.run([program, "--homedir", home, *arguments], capture_output=True)
