"""Keys of layers wrapped as PKCS #7 enveloped data (RFC 5652), for RSA certificates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nydus.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.x509 import Certificate

_SEQUENCE, _OBJECT, _PARTS = 0x30, 0x06, 0xA0  # tags of DER; the last is [0], constructed
_ENVELOPED = bytes.fromhex("2a864886f70d010703")
_RSA = bytes.fromhex("2a864886f70d010101")  # with the padding of PKCS #1 v1.5
_AES = bytes.fromhex("6086480165030401")  # and one more byte:
_CBC, _GCM = {2: 16, 42: 32}, {6: 16, 46: 32}  # -> length of the key


def load(path: str, data: bytes) -> Certificate:
    """The certificate of a recipient, PEM or DER.

    Raises:
        ConfigError: it is none, or its key is not an RSA key.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    pem = b"-----BEGIN" in data
    try:
        found = x509.load_pem_x509_certificate(data) if pem else x509.load_der_x509_certificate(data)
        key = found.public_key()
    except Exception as error:  # also UnsupportedAlgorithm, which is no ValueError
        raise ConfigError(f"{path}: not a certificate: {error}") from None
    if not isinstance(key, RSAPublicKey):
        raise ConfigError(f"{path}: PKCS #7 needs a certificate of an RSA key; use jwe: for others")
    return found


def wrap(data: bytes, certificates: Sequence[Certificate]) -> bytes:
    """Enveloped data in DER that the owner of any of the certificates' keys can read."""
    from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

    builder = pkcs7.PKCS7EnvelopeBuilder().set_data(data)
    for certificate in certificates:
        builder = builder.add_recipient(certificate)
    return builder.encrypt(Encoding.DER, [pkcs7.PKCS7Options.Binary])


def unwrap(packet: bytes, key: RSAPrivateKey) -> bytes | None:
    """What was wrapped; None if it is not for this key, or not in a known form.

    Neither ``cryptography`` nor OpenSSL reads AES-GCM in enveloped data, which is what ocicrypt writes, hence
    this reader.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15

    try:
        ((_, message),) = _values(packet)
        (_, kind), (_, explicit) = _values(message)
        ((_, enveloped),) = _values(explicit)
        _, (_, recipients), (_, content), *_ = _values(enveloped)
        if kind != _ENVELOPED:
            return None
        wrapped = [
            _values(recipient)
            for tag, recipient in _values(recipients)
            if tag == _SEQUENCE  # others agree on a key, or have it from elsewhere
        ]
        _, (_, cipher), (tag, encrypted) = _values(content)
        if tag == _PARTS:
            encrypted = b"".join(part for _, part in _values(encrypted))
        (_, algorithm), (_, parameters) = _values(cipher)
    except ValueError:
        return None
    for _, _, (_, how), (_, secret), *_ in (each for each in wrapped if len(each) >= 4):
        try:
            if _values(how)[0] == (_OBJECT, _RSA):
                return _decrypt(algorithm, parameters, key.decrypt(secret, PKCS1v15()), encrypted)
        except (ValueError, IndexError, InvalidTag):
            continue
    return None


def _decrypt(algorithm: bytes, parameters: bytes, key: bytes, data: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.padding import PKCS7

    mode = algorithm[-1] if algorithm[:-1] == _AES else 0
    if len(key) == _GCM.get(mode):
        (tag, nonce), *_ = _values(parameters)
        if tag == _SEQUENCE:  # Go's library puts the parameters into one too many
            (_, nonce), *_ = _values(nonce)
        return AESGCM(key).decrypt(nonce, data, None)
    if len(key) == _CBC.get(mode):
        context, padding = (
            Cipher(algorithms.AES(key), modes.CBC(parameters)).decryptor(),
            PKCS7(128).unpadder(),
        )
        return padding.update(context.update(data) + context.finalize()) + padding.finalize()
    raise ValueError("another cipher or key")


def _values(data: bytes) -> list[tuple[int, bytes]]:
    """Tags and contents of values that follow each other in DER.

    Raises:
        ValueError: one is cut short, or of a length that is not known before.
    """
    found, start = [], 0
    while start < len(data):
        head = data[start : start + 2]
        if len(head) < 2 or head[1] == 0x80:
            raise ValueError("no length")
        start += 2
        size = head[1]
        if size & 0x80:
            size, start = int.from_bytes(data[start : start + (size & 0x7F)]), start + (size & 0x7F)
        if size > len(data) - start:
            raise ValueError("cut short")
        found.append((head[0], data[start : start + size]))
        start += size
    return found
