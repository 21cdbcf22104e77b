"""Hash algorithms by the names that LUKS headers and QEMU's schema (QCryptoHashAlgo) use."""

from __future__ import annotations

import functools
import hashlib

from qmpd.errors import CommandError

NAMES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3")
"""QCryptoHashAlgo's members, in its order."""


@functools.cache
def digest_size(name: str) -> int:
    """Return the bytes of a digest of `name`.

    Raises CommandError with QEMU's text for a name it does not know, and the same text for one
    that the installed OpenSSL does not offer (ripemd160 without the legacy provider).
    """
    if name in NAMES:
        try:
            hashlib.pbkdf2_hmac(name, b"", b"", 1)  # an algorithm may exist and yet be refused to HMAC
            return hashlib.new(name).digest_size
        except ValueError:
            pass
    shown = name if len(name) <= 100 else f"{name[:40]}…"  # a header's name may be as long as the header
    raise CommandError(f"Hash algorithm '{shown}' not supported")


def available() -> tuple[str, ...]:
    """Return the names that can be used here, in QEMU's order."""

    def usable(name: str) -> bool:
        try:
            return digest_size(name) > 0
        except CommandError:
            return False

    return tuple(filter(usable, NAMES))
