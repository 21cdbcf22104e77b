"""Initial values of sectors: plain, plain64, plain64be, benbi, null and essiv.

A sector's number counts 512-byte units from the start of the payload whatever the sector size is
(dm-crypt without `iv_large_sectors`, which is how LUKS1 and LUKS2 use it).
Source: the IV generators of dm-crypt (Linux, drivers/md/dm-crypt.c, head comment).
"""

from __future__ import annotations

import enum
import hashlib

from qmpd.errors import CommandError


class IvKind(enum.IntEnum):
    """How a sector number becomes an initial value; the numbers are those of the compiled loop."""

    NONE = 0
    PLAIN = 1
    PLAIN64 = 2
    PLAIN64BE = 3
    BENBI = 4
    NULL = 5
    ESSIV = 6


KINDS = {
    "plain": IvKind.PLAIN,
    "plain64": IvKind.PLAIN64,
    "plain64be": IvKind.PLAIN64BE,
    "benbi": IvKind.BENBI,
    "null": IvKind.NULL,
    "essiv": IvKind.ESSIV,
}
"""The generators by the name that headers use."""


def kind_of(name: str) -> IvKind:
    """Return the generator called `name`. Raises CommandError (text: QEMU)."""
    try:
        return KINDS[name]
    except KeyError:
        raise CommandError(f"IV generator '{name}' not supported") from None


def plain_iv(kind: IvKind, sector: int, length: int) -> bytes:
    """Return the `length` bytes that `kind` makes of `sector`; for ESSIV, what is then encrypted."""
    if kind is IvKind.PLAIN:
        return (sector & 0xFFFFFFFF).to_bytes(4, "little").ljust(length, b"\0")
    if kind in (IvKind.PLAIN64, IvKind.ESSIV):
        return sector.to_bytes(8, "little").ljust(length, b"\0")
    if kind is IvKind.PLAIN64BE:
        return sector.to_bytes(8, "big").rjust(length, b"\0")
    if kind is IvKind.BENBI:
        shift = 5 if length == 16 else 6  # cipher blocks in 512 bytes
        return (((sector << shift) + 1) & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "big").rjust(length, b"\0")
    return bytes(length)


def essiv_key(hash_name: str, key: bytes | bytearray | memoryview) -> bytes:
    """Return the key of the cipher that encrypts sector numbers: the hash of the volume key."""
    return hashlib.new(hash_name, key).digest()
