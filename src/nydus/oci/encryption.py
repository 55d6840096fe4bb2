"""Encrypted layers as containerd, skopeo and buildah have them (ocicrypt): AES-256-CTR, wrapped keys as JWE.

The key of a layer is in an annotation, encrypted for each recipient. Of the ways that ocicrypt knows to do
that there is JWE here, with RSA or elliptic-curve keys; not PKCS #7, PGP, PKCS #11 or key providers.
"""

from __future__ import annotations

import base64
import hmac
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from nydus.errors import ConfigError, FormatError
from nydus.oci import model

if TYPE_CHECKING:
    from jwcrypto.jwk import JWK

T = TypeVar("T")

#: What an encrypted layer's media type ends with.
ENCRYPTED = "+encrypted"
_PREFIX = "org.opencontainers.image.enc."
_KEYS = f"{_PREFIX}keys."
_JWE = f"{_KEYS}jwe"
_PUBLIC = f"{_PREFIX}pubopts"
_CIPHER = "AES_256_CTR_HMAC_SHA256"
_ALGORITHMS = ["RSA-OAEP", "RSA-OAEP-256", "ECDH-ES+A256KW", "A256GCM"]


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


def recipients(texts: Sequence[str]) -> list[JWK]:
    """The public keys that ``jwe:FILE`` name: PEM, a certificate, or a JWK.

    Raises:
        ConfigError: another way than JWE, or the file is no such key.
    """
    found = []
    for text in texts:
        kind, colon, path = text.partition(":")
        if kind != "jwe" or not path:
            known = f"{kind!r} cannot be used" if colon else f"{text!r} is not jwe:<file>"
            raise ConfigError(f"recipient of an encrypted image: {known}; use jwe:<file of a public key>")
        found.append(_load(path, None))
    return found


def private_keys(texts: Sequence[str]) -> list[JWK]:
    """The private keys that ``FILE[:PASSWORD]``, ``FILE:pass=PASSWORD`` or ``FILE:file=FILE`` name.

    Raises:
        ConfigError: a file is no such key, or the password is wrong.
    """
    found = []
    for text in texts:
        path, _, password = text.partition(":")
        if password.startswith("file="):
            password = _read(password.removeprefix("file=")).decode(errors="replace").rstrip("\r\n")
        else:
            password = password.removeprefix("pass=")
        key = _load(path, password.encode() or None)
        if not key.has_private:
            raise ConfigError(f"{path}: is a public key; a private one is needed to decrypt")
        found.append(key)
    return found


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _load(path: str, password: bytes | None) -> JWK:
    from jwcrypto.common import JWException
    from jwcrypto.jwk import JWK

    data = _read(path)
    try:
        key = JWK.from_json(data) if data.lstrip().startswith(b"{") else JWK.from_pem(data, password)
    except (JWException, ValueError, TypeError) as error:  # cryptography says TypeError of passwords
        raise ConfigError(f"{path}: not a usable key: {error}") from None
    if key["kty"] not in ("RSA", "EC"):
        raise ConfigError(f"{path}: is a key of type {key['kty']}, not of RSA or an elliptic curve")
    return key


def encrypt(data: bytes, keys: Sequence[JWK]) -> tuple[bytes, dict[str, str]]:
    """Encrypts a layer for recipients; returns what is stored and the annotations of its descriptor."""
    from jwcrypto.jwe import JWE

    key, nonce = os.urandom(32), os.urandom(16)
    stored = _ctr(key, nonce, data)
    private = model.encode(_Private(key, model.digest(data), {"nonce": nonce}))
    public = model.encode(_Public(_CIPHER, hmac.digest(key, stored, "sha256")))
    if len(keys) == 1:
        token = JWE(private, {"enc": "A256GCM", "alg": _algorithm(keys[0])}, recipient=keys[0])
    else:
        token = JWE(private, {"enc": "A256GCM"})
        for each in keys:
            token.add_recipient(each, {"alg": _algorithm(each)})
    wrapped = base64.b64encode(token.serialize().encode()).decode()
    return stored, {_JWE: wrapped, _PUBLIC: base64.b64encode(public).decode()}


def _algorithm(key: JWK) -> str:
    return "RSA-OAEP" if key["kty"] == "RSA" else "ECDH-ES+A256KW"


def decrypt(data: bytes, annotations: Mapping[str, str], keys: Sequence[JWK], where: str) -> bytes:
    """The plain bytes of an encrypted layer, verified.

    Raises:
        ConfigError: none of the keys fits, or the layer is not encrypted for JWE.
        FormatError: the annotations or the bytes are damaged.
    """
    if not keys:
        raise ConfigError(f"{where}: is encrypted, and no private key was given")
    wrapped = [text for text in annotations.get(_JWE, "").split(",") if text]
    if not wrapped:
        kinds = ", ".join(key.removeprefix(_KEYS) for key in annotations if key.startswith(_KEYS))
        raise ConfigError(f"{where}: is encrypted for {kinds or 'nobody'}; only jwe can be used")
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


def _unwrap(wrapped: Sequence[str], keys: Sequence[JWK], where: str) -> _Private:
    from jwcrypto.common import JWException
    from jwcrypto.jwe import JWE

    for text in wrapped:
        data = _unpack(text, where)
        for key in keys:
            try:
                token = JWE(algs=_ALGORITHMS)
                token.deserialize(data.decode())
                token.decrypt(key)
            except (JWException, ValueError, TypeError, KeyError):
                continue  # for another recipient, as far as one can tell
            return _decode(token.payload, _Private, where)
    raise ConfigError(f"{where}: is encrypted, and none of the {len(keys)} keys given fits")


def _unpack(text: str, where: str) -> bytes:
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
