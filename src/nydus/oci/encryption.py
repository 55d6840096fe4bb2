"""Encrypted layers as containerd, skopeo and buildah have them (ocicrypt): AES-256-CTR, with wrapped keys.

The key of a layer is in annotations, encrypted for each recipient. Of the ways that ocicrypt knows to do that
there are JWE, PKCS #7 and PGP here; not PKCS #11 or key providers.
"""

from __future__ import annotations

import base64
import hmac
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from nydus.errors import ConfigError, FormatError
from nydus.oci import jwe, model, pgp, pkcs7

if TYPE_CHECKING:
    from jwcrypto.jwk import JWK

T = TypeVar("T")

#: What an encrypted layer's media type ends with.
ENCRYPTED = "+encrypted"
_PREFIX = "org.opencontainers.image.enc."
_KEYS = f"{_PREFIX}keys."
_PUBLIC = f"{_PREFIX}pubopts"
_CIPHER = "AES_256_CTR_HMAC_SHA256"
#: Characters of a wrapped key: thousands of recipients, and not too many to be tried.
_MOST = 1 << 20
_FORMS = "jwe:<file of a public key>, pkcs7:<file of a certificate> or pgp:<name of a key of gpg>"
_WRAP: dict[str, Callable[[bytes, Sequence[Any]], bytes]] = {
    "jwe": jwe.wrap,
    "pkcs7": pkcs7.wrap,
    "pgp": pgp.wrap,
}


class _Public(msgspec.Struct):
    """What everybody may know of a layer's cipher; ``hmac`` is over what is stored."""

    cipher: str
    hmac: bytes
    cipheroptions: dict[str, bytes] | None = {}


class _Private(msgspec.Struct):
    """What only recipients may know; ``digest`` is that of the plain layer."""

    symkey: bytes
    digest: str
    cipheroptions: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Recipient:
    """Who may read a layer; ``kind`` is how its key is wrapped, and says of what type ``key`` is."""

    kind: str
    key: Any


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """What can unwrap keys of layers: a key for JWE and PKCS #7, or keys of PGP."""

    key: JWK | pgp.SecretKeys

    def unwrap(self, kind: str, packet: bytes) -> bytes | None:
        """What was wrapped; None if it is for others.

        Raises:
            ConfigError: it is for this key, which cannot be used.
        """
        if isinstance(self.key, pgp.SecretKeys):
            return self.key.unwrap(packet) if kind == "pgp" else None
        if kind == "pkcs7" and self.key["kty"] == "RSA":
            return pkcs7.unwrap(packet, self.key.get_op_key("unwrapKey"))
        return jwe.unwrap(packet, self.key) if kind == "jwe" else None


def recipients(texts: Sequence[str]) -> list[Recipient]:
    """Those whom ``jwe:FILE`` (PEM, a certificate, or a JWK), ``pkcs7:FILE`` and ``pgp:NAME`` name.

    Raises:
        ConfigError: another way, the file is no such key, or gpg does not have it.
    """
    found = []
    for text in texts:
        kind, colon, name = text.partition(":")
        if kind not in _WRAP or not name:
            known = f"{kind!r} cannot be used" if colon else f"{text!r} does not say how"
            raise ConfigError(f"recipient of an encrypted image: {known}; use {_FORMS}")
        load = jwe.load if kind == "jwe" else pkcs7.load
        found.append(Recipient(kind, pgp.find(name) if kind == "pgp" else load(name, _read(name))))
    return found


def private_keys(texts: Sequence[str]) -> list[PrivateKey]:
    """The private keys that ``FILE`` or ``pgp:NAME`` name.

    Behind it may be ``:file=FILE`` with the password, ``:pass=PASSWORD`` or ``:PASSWORD``. A file is PEM, a
    JWK, or what gpg exports. Certificates, which ocicrypt needs beside a key, are left out.

    Raises:
        ConfigError: a file is no such key, or the password is wrong (of PGP keys: when they are used).
    """
    found = []
    for text in texts:
        scheme, _, rest = text.partition(":")
        if scheme in ("pkcs11", "provider"):
            raise ConfigError(f"--decryption-key {scheme}: keys of that kind cannot be used")
        path, _, password = (rest if scheme == "pgp" else text).partition(":")
        if password.startswith("file="):
            password = _read(password.removeprefix("file=")).decode(errors="replace").rstrip("\r\n")
        else:
            password = password.removeprefix("pass=")
        secret = password.encode() or None
        if scheme == "pgp":
            pgp.find(path, secret=True)
            found.append(PrivateKey(pgp.SecretKeys(f"pgp:{path}", None, secret)))
            continue
        data = _read(path)
        if pgp.is_secret(data):
            found.append(PrivateKey(pgp.SecretKeys(path, data, secret)))
        elif b"-----BEGIN CERTIFICATE-----" not in data or b"PRIVATE KEY-----" in data:
            found.append(PrivateKey(jwe.load(path, data, secret, private=True)))
    if texts and not found:
        raise ConfigError(f"{texts[0]}: is a certificate; a private key is needed to decrypt")
    return found


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def encrypt(data: bytes, readers: Sequence[Recipient]) -> tuple[bytes, dict[str, str]]:
    """Encrypts a layer for recipients; returns what is stored and the annotations of its descriptor.

    Raises:
        ConfigError: gpg does not do it.
    """
    key, nonce = os.urandom(32), os.urandom(16)
    stored = _ctr(key, nonce, data)
    private = model.encode(_Private(key, model.digest(data), {"nonce": nonce}))
    public = model.encode(_Public(_CIPHER, hmac.digest(key, stored, "sha256")))
    annotations = {_PUBLIC: base64.b64encode(public).decode()}
    for kind, wrap in _WRAP.items():
        if keys := [reader.key for reader in readers if reader.kind == kind]:
            annotations[_KEYS + kind] = base64.b64encode(wrap(private, keys)).decode()
    return stored, annotations


def decrypt(data: bytes, annotations: Mapping[str, str], keys: Sequence[PrivateKey], where: str) -> bytes:
    """The plain bytes of an encrypted layer, verified.

    Raises:
        ConfigError: none of the keys fits, or the layer is encrypted in a way that is not known here.
        FormatError: the annotations or the bytes are damaged.
    """
    if not keys:
        raise ConfigError(f"{where}: is encrypted, and no private key was given (--decryption-key)")
    wrapped = [
        (kind, text) for kind in _WRAP for text in annotations.get(_KEYS + kind, "").split(",") if text
    ]
    if not wrapped:
        kinds = ", ".join(key.removeprefix(_KEYS) for key in annotations if key.startswith(_KEYS))
        raise ConfigError(f"{where}: is encrypted for {kinds or 'nobody'}; {', '.join(_WRAP)} can be used")
    public = _decode(_unpack(annotations.get(_PUBLIC, ""), where), _Public, where)
    if public.cipher != _CIPHER:
        raise FormatError("unknown cipher", where=where, expected=_CIPHER, found=public.cipher)
    private = _unwrap(wrapped, keys, where)
    nonce = private.cipheroptions.get("nonce", b"")
    if len(private.symkey) != 32 or len(nonce) != 16:
        raise FormatError("wrong length of key or nonce", where=where)
    if not hmac.compare_digest(hmac.digest(private.symkey, data, "sha256"), public.hmac):
        raise FormatError("the encrypted layer was changed: wrong HMAC", where=where)
    plain = _ctr(private.symkey, nonce, data)
    if private.digest != (found := model.digest(plain)):
        raise FormatError(
            "wrong digest of the decrypted layer", where=where, expected=private.digest, found=found
        )
    return plain


def _unwrap(wrapped: Sequence[tuple[str, str]], keys: Sequence[PrivateKey], where: str) -> _Private:
    unusable = None
    for kind, text in wrapped:
        packet = _unpack(text, where)
        for key in keys:
            try:
                plain = key.unwrap(kind, packet)
            except ConfigError as error:  # another one may do
                unusable = error
                continue
            if plain is not None:
                return _decode(plain, _Private, where)
    raise unusable or ConfigError(f"{where}: is encrypted, and none of the {len(keys)} keys given fits")


def _unpack(text: str, where: str) -> bytes:
    if len(text) > _MOST:
        what = f"an annotation of the encryption is longer than {_MOST} characters"
        raise FormatError(what, where=where)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise FormatError(f"an annotation of the encryption is not base64: {error}", where=where) from None


def _decode(data: bytes, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"an annotation of the encryption is wrong: {error}", where=where) from None


def _ctr(key: bytes, nonce: bytes, data: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    context = Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor()
    return context.update(data) + context.finalize()
