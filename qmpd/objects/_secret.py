"""What `secret` and `secret_keyring` have in common: decoding and decryption of the loaded bytes.

The order of checks and the texts are those of QEMU's secret_common type.
"""

from __future__ import annotations

import binascii
from typing import Any, ClassVar

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.qom import values
from qmpd.qom.object import Property, QomObject
from qmpd.qom.tree import ObjectTree

_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n"
_KEY_LENGTH = 32  # bytes, AES-256
_BLOCK = 16  # bytes of an AES block, and of the IV

FORMATS = ("raw", "base64")


def decode_base64(text: bytes | bytearray) -> bytearray:
    """Decode as GLib does: newlines skipped, bad padding forgiven, incomplete groups dropped.

    A `=` counts as zero bits wherever it stands; in the third or fourth place of its group of four
    it also drops that byte. Raises CommandError for NUL or any other character.
    """
    if 0 in text:
        raise CommandError("Base64 data contains embedded NUL characters")
    if text.translate(None, _ALPHABET):
        raise CommandError("Base64 data contains invalid characters")
    digits = text.translate(None, b"\n")
    whole = len(digits) - len(digits) % 4
    decoded = bytearray(binascii.a2b_base64(digits[:whole].replace(b"=", b"A")))
    if b"=" not in digits:
        return decoded
    kept, start = bytearray(), 0
    at = digits.find(b"=", 0, whole)
    while at != -1:
        if at % 4 >= 2:
            drop = at // 4 * 3 + at % 4 - 1
            kept += decoded[start:drop]
            start = drop + 1
        at = digits.find(b"=", at + 1, whole)
    kept += decoded[start:]
    decoded[:] = bytes(len(decoded))
    return kept


def _check_key_and_iv(key: SecretBytes, iv: str | None) -> bytearray:
    """Return the decoded IV. Raises CommandError."""
    if len(key) != _KEY_LENGTH:
        raise CommandError(f"Key should be {_KEY_LENGTH} bytes in length")
    if iv is None:
        raise CommandError("IV is required to decrypt secret")
    vector = decode_base64(iv_bytes(iv))
    if len(vector) != _BLOCK:
        raise CommandError(f"IV should be {_BLOCK} bytes in length not {len(vector)}")
    return vector


def decrypt(key: SecretBytes, vector: bytearray, ciphertext: bytearray) -> bytearray:
    """Return the plain text: AES-256-CBC, the last byte telling how much padding to drop."""
    if len(ciphertext) % _BLOCK:
        raise CommandError(f"Length {len(ciphertext)} must be a multiple of block size {_BLOCK}")
    plain = bytearray(len(ciphertext) + _BLOCK - 1)
    with key.view() as key_view:
        worker = Cipher(algorithms.AES256(key_view), modes.CBC(vector)).decryptor()
        worker.update_into(ciphertext, plain)
    del plain[len(ciphertext) :]
    padding = plain[-1] if plain else 0
    if padding > _BLOCK:
        plain[:] = bytes(len(plain))
        raise CommandError(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    if padding:
        del plain[-padding:]
    return plain


def iv_bytes(text: str) -> bytes:
    """Return text from JSON as the bytes QEMU sees: UTF-8, a NUL in its two-byte form."""
    return text.encode().replace(b"\0", b"\xc0\x80")


def _set_format(self: SecretCommon, value: Any) -> None:
    self.format = values.enum("format", value, FORMATS)


def _set_keyid(self: SecretCommon, value: Any) -> None:
    self.keyid = values.string("keyid", value)


def _set_iv(self: SecretCommon, value: Any) -> None:
    self.iv = values.string("iv", value)


class SecretCommon(QomObject):
    """A secret: loaded once, on creation; setting a property later does not change its bytes."""

    qom_type = "secret_common"
    abstract = True
    interfaces = ("user-creatable",)
    qom_properties: ClassVar[tuple[Property, ...]] = (
        Property("iv", "string", get=lambda self: self.iv or "", set=_set_iv),
        Property("keyid", "string", get=lambda self: self.keyid or "", set=_set_keyid),
        Property("format", "QCryptoSecretFormat", get=lambda self: self.format, set=_set_format),
    )

    def __init__(self, secret_format: str, keyid: str | None, iv: str | None) -> None:
        super().__init__()
        self.format, self.keyid, self.iv = secret_format, keyid, iv
        self._plain: SecretBytes | None = None

    def load(self) -> bytearray:
        """Return the bytes as they were given, before decoding. Raises CommandError."""
        raise NotImplementedError

    def complete(self, objects: ObjectTree) -> None:
        """Load, decrypt if there is a key, decode."""
        raw = self.load()
        plain = raw
        try:
            if self.keyid is not None:
                with objects.secret(self.keyid) as key:
                    plain = self._decrypt(key, raw)
            elif self.format == "base64":
                plain = decode_base64(raw)
            self._plain = SecretBytes.take(plain)
        finally:
            raw[:] = bytes(len(raw))

    def _decrypt(self, key: SecretBytes, raw: bytearray) -> bytearray:
        # An iv that is missing or wrong is reported before ciphertext that is not base64.
        vector = _check_key_and_iv(key, self.iv)
        return decrypt(key, vector, decode_base64(raw) if self.format == "base64" else raw)

    def reveal(self) -> SecretBytes:
        """Return a copy of the secret, which the caller wipes (SecretSource)."""
        if self._plain is None:
            raise CommandError(f"Secret with id '{self.name}' has no data")
        return self._plain.clone()

    def delete(self) -> None:
        """Wipe the bytes."""
        if self._plain is not None:
            self._plain.wipe()
            self._plain = None
