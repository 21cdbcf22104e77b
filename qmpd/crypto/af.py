"""The anti-forensic splitter: a key becomes `stripes` times as many bytes, all of which are needed.

Source: LUKS1 On-Disk Format Specification 1.2.3, section 2.4 (AFsplit, AFmerge, H1 as diffusion).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from qmpd.crypto.hashes import digest_size

MAX_MATERIAL = 4 * 1024 * 1024
"""Bytes of split key at most: 4000 stripes of the longest key known, and room to spare."""


def _diffuse(block: bytes, hash_name: str, size: int) -> bytes:
    """Return `block` with every digest-sized piece replaced by the hash of its number and itself."""
    pieces = []
    for index, start in enumerate(range(0, len(block), size)):
        piece = block[start : start + size]
        pieces.append(hashlib.new(hash_name, index.to_bytes(4, "big") + piece).digest()[: len(piece)])
    return b"".join(pieces)


def _xor(left: bytes | memoryview, right: bytes | memoryview) -> bytes:
    return (int.from_bytes(left, "little") ^ int.from_bytes(right, "little")).to_bytes(len(left), "little")


def _check(length: int, stripes: int) -> None:
    if length < 1 or stripes < 1 or length * stripes > MAX_MATERIAL:
        raise ValueError(f"a key of {length} bytes in {stripes} stripes is beyond {MAX_MATERIAL} bytes")


def split(
    key: bytes | bytearray | memoryview,
    stripes: int,
    hash_name: str,
    random: Callable[[int], bytes] = os.urandom,
) -> bytearray:
    """Return `len(key) * stripes` bytes from which `merge` makes `key` again.

    Raises CommandError for an unknown hash, ValueError beyond MAX_MATERIAL.
    """
    length, size = len(key), digest_size(hash_name)
    _check(length, stripes)
    material = bytearray(random(length * (stripes - 1)))
    running = bytes(length)
    with memoryview(material) as view:
        for start in range(0, len(material), length):
            running = _diffuse(_xor(running, view[start : start + length]), hash_name, size)
    material += _xor(running, memoryview(key))
    return material


def merge(material: bytes | bytearray | memoryview, length: int, stripes: int, hash_name: str) -> bytearray:
    """Return the key of `length` bytes that was split into `material`.

    Raises CommandError for an unknown hash, ValueError beyond MAX_MATERIAL or for too little material.
    """
    size = digest_size(hash_name)
    _check(length, stripes)
    if len(material) < length * stripes:
        raise ValueError(f"{len(material)} bytes of key material, {length * stripes} needed")
    running = bytes(length)
    with memoryview(material) as view:
        for start in range(0, length * (stripes - 1), length):
            running = _diffuse(_xor(running, view[start : start + length]), hash_name, size)
        last = length * (stripes - 1)
        return bytearray(_xor(running, view[last : last + length]))
