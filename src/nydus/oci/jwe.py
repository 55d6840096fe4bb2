"""Keys of layers wrapped as JWE, with RSA and elliptic-curve keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nydus.errors import ConfigError

if TYPE_CHECKING:
    from jwcrypto.jwk import JWK

_ALGORITHMS = [
    *("RSA-OAEP", "RSA-OAEP-256"),
    *("ECDH-ES+A128KW", "ECDH-ES+A192KW", "ECDH-ES+A256KW"),
    "A256GCM",
]


def load(path: str, data: bytes, password: bytes | None = None, *, private: bool = False) -> JWK:
    """A public or private key: PEM, a certificate, or a JWK.

    Args:
        private: it is to decrypt; otherwise to encrypt.

    Raises:
        ConfigError: it is no such key, not for that, or the password is wrong.
    """
    from jwcrypto.common import JWException
    from jwcrypto.jwk import JWK

    try:
        key = JWK.from_json(data) if data.lstrip().startswith(b"{") else JWK.from_pem(data, password)
        if key["kty"] not in ("RSA", "EC"):
            raise ConfigError(f"{path}: is a key of type {key['kty']}, not of RSA or an elliptic curve")
        if private and not key.has_private:
            raise ConfigError(f"{path}: is a public key; a private one is needed to decrypt")
        key.get_op_key("unwrapKey" if private else "wrapKey")  # a JWK may be for signing only, or wrong
    except (JWException, ValueError, TypeError) as error:  # cryptography says TypeError of passwords
        raise ConfigError(f"{path}: not a usable key: {error}") from None
    return key


def wrap(data: bytes, keys: Sequence[JWK]) -> bytes:
    """A JWE in JSON that the owner of any of the keys can read."""
    from jwcrypto.jwe import JWE

    if len(keys) == 1:
        token = JWE(data, {"enc": "A256GCM", "alg": _algorithm(keys[0])}, recipient=keys[0])
    else:
        token = JWE(data, {"enc": "A256GCM"})
        for each in keys:
            token.add_recipient(each, {"alg": _algorithm(each)})
    return str(token.serialize()).encode()


def _algorithm(key: JWK) -> str:
    return "RSA-OAEP" if key["kty"] == "RSA" else "ECDH-ES+A256KW"


def unwrap(packet: bytes, key: JWK) -> bytes | None:
    """What was wrapped; None if it is not for this key, as far as one can tell."""
    from jwcrypto.common import JWException
    from jwcrypto.jwe import JWE

    try:
        token = JWE(algs=_ALGORITHMS)
        token.deserialize(packet.decode())
        token.decrypt(key)
    except (JWException, ValueError, TypeError, KeyError):
        return None
    return bytes(token.payload)
