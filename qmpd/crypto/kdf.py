"""Key derivation: PBKDF2, its cost limits, and how many iterations a wanted time buys.

Every function here takes long on purpose and runs without the interpreter's lock: callers use a thread.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import time

from qmpd.crypto.hashes import digest_size
from qmpd.errors import CommandError

MAX_PBKDF2_ITERATIONS = 200_000_000
"""A header asking for more is refused: at a few million a second this is minutes, and no program
makes such headers, but 2**32 - 1 of them would keep a thread busy for an hour."""

MAX_ARGON2_MEMORY_KIB = 4 * 1024 * 1024
MAX_ARGON2_TIME = 1000
MAX_ARGON2_PARALLEL = 4
"""Limits of LUKS2's argon2 parameters: cryptsetup's own maxima (4 GiB, 4 threads), and passes beyond use."""

_MAX_U32 = (1 << 32) - 1

DEFAULT_ITER_TIME_MS = 2000
MIN_ITERATIONS = 1000
"""QEMU's default of `iter-time`, and the floor below which it never goes."""


def check_pbkdf2_iterations(iterations: int, what: str) -> None:
    """Refuse a count read from a header that is zero or beyond the limit. Raises CommandError."""
    if not 0 < iterations <= MAX_PBKDF2_ITERATIONS:
        raise CommandError(f"{what} asks for {iterations} PBKDF2 iterations, expected 1 to {MAX_PBKDF2_ITERATIONS}")


def pbkdf2(
    hash_name: str,
    password: bytes | bytearray | memoryview,
    salt: bytes,
    iterations: int,
    length: int,
) -> bytearray:
    """Return a key of `length` bytes. Raises CommandError for an unknown hash or a count out of range."""
    digest_size(hash_name)
    check_pbkdf2_iterations(iterations, "The key derivation")
    return bytearray(hashlib.pbkdf2_hmac(hash_name, password, salt, iterations, length))


@functools.cache
def pbkdf2_rate(hash_name: str, length: int) -> int:
    """Return the iterations that one second of this machine's processor buys; measured once.

    length   bytes of key wanted: every digest begun costs all the iterations anew
    """
    digest_size(hash_name)
    iterations = 1 << 14
    while True:
        start = time.thread_time()
        hashlib.pbkdf2_hmac(hash_name, b"password", b"abcdefghijklmnop", iterations, length)
        taken = time.thread_time() - start
        if taken >= 0.05:
            return max(1, int(iterations / taken))
        iterations *= 4


def iterations_for(hash_name: str, length: int, milliseconds: int) -> int:
    """Return the iterations that take about `milliseconds`, never fewer than MIN_ITERATIONS.

    Raises CommandError when that is more than a header can hold or an opener would accept.
    """
    iterations = pbkdf2_rate(hash_name, length) * milliseconds // 1000
    if iterations > _MAX_U32:
        text = os.strerror(errno.ERANGE)
        raise CommandError(f"PBKDF iterations {iterations} larger than {_MAX_U32}: {text}")
    if iterations > MAX_PBKDF2_ITERATIONS:
        raise CommandError(f"PBKDF iterations {iterations} larger than {MAX_PBKDF2_ITERATIONS}")
    return max(iterations, MIN_ITERATIONS)
