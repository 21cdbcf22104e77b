"""Key derivation: PBKDF2 and argon2, their cost limits, and how many iterations a wanted time buys.

Every function here takes long on purpose and runs without the interpreter's lock: callers use a thread.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import time

from argon2 import low_level
from argon2.exceptions import HashingError

from qmpd.crypto.hashes import digest_size
from qmpd.errors import CommandError

MAX_PBKDF2_ITERATIONS = 200_000_000
"""A header asking for more is refused: at a few million a second this is minutes, and no program
makes such headers, but 2**32 - 1 of them would keep a thread busy for an hour."""

MAX_ARGON2_MEMORY_KIB = 4 * 1024 * 1024
MAX_ARGON2_TIME = 1000
MAX_ARGON2_CPUS = 16
"""Limits of what a header may ask of argon2: 4 GiB as cryptsetup at most writes, passes and threads beyond any use."""

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


def check_argon2(time_cost: int, memory: int, cpus: int, what: str) -> None:
    """Refuse argon2 costs that are impossible or beyond the limits. Raises CommandError.

    memory   KiB, at least 8 for each thread
    """
    for found, low, high, name in (
        (time_cost, 1, MAX_ARGON2_TIME, "passes"),
        (cpus, 1, MAX_ARGON2_CPUS, "threads"),
        (memory, 8 * max(cpus, 1), MAX_ARGON2_MEMORY_KIB, "KiB of memory"),
    ):
        if not low <= found <= high:
            raise CommandError(f"{what} asks for {found} argon2 {name}, expected {low} to {high}")


def argon2(
    kind: str,
    password: bytes | bytearray | memoryview,
    salt: bytes,
    costs: tuple[int, int, int],
    length: int,
) -> bytearray:
    """Return a key of `length` bytes by argon2 version 1.3.

    kind    "argon2i" or "argon2id"          costs   passes, KiB of memory, threads
    Raises CommandError for costs out of range, and where the memory cannot be had.
    """
    check_argon2(*costs, "The key derivation")
    variant = {"argon2i": low_level.Type.I, "argon2id": low_level.Type.ID}[kind]
    try:
        made = low_level.hash_secret_raw(bytes(password), salt, *costs, length, variant, low_level.ARGON2_VERSION)
    except HashingError as error:
        raise CommandError(f"{kind} with {costs[1]} KiB of memory failed: {error}") from error
    return bytearray(made)
