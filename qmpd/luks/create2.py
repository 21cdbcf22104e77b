"""Creating LUKS2 volumes: both copies of the header, one key slot, one digest, one segment.

Layout and defaults are cryptsetup's: copies of 16 KiB, key slots to 16 MiB, the payload right behind;
argon2id taking two seconds and up to 1 GiB. Source: LUKS2 On-Disk Format Specification 1.1.x.
"""

from __future__ import annotations

import base64
import os
import time
import uuid as uuids
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from qmpd.crypto import af
from qmpd.crypto.block import BlockCrypto
from qmpd.crypto.cipher import CipherSpec, check_spec
from qmpd.crypto.hashes import digest_size
from qmpd.crypto.kdf import (
    DEFAULT_ITER_TIME_MS,
    MAX_ARGON2_CPUS,
    MAX_ARGON2_TIME,
    MIN_ITERATIONS,
    argon2,
    check_argon2,
    check_pbkdf2_iterations,
    iterations_for,
    pbkdf2,
)
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.formats import luks2
from qmpd.formats.luks2_json import STRIPES, Kdf, dump_json
from qmpd.luks.create import Luks1Options
from qmpd.luks.luks2 import parse_encryption
from qmpd.luks.memory import RESERVE_KIB, available
from qmpd.luks.policy import current
from qmpd.luks.volume import HeaderIO
from qmpd.luks.work import derive, derive_heavy
from qmpd.units import SECTOR, KiB, MiB, align_up

COPY_SIZE = 16 * KiB
KEYSLOTS_SIZE = 16 * MiB - 2 * COPY_SIZE
"""Sizes of one copy and of the area for key slots: cryptsetup's, so that 31 more slots find room."""

AREA_ENCRYPTION, AREA_KEY_SIZE = "aes-xts-plain64", 64
"""How key material is encrypted, whatever the payload's cipher is."""

AREA_ALIGNMENT = 4096
MAX_LABEL = 47
"""Bytes of a label: its field is NUL-terminated."""

DEFAULT_MEMORY_KIB = 1024 * 1024
DEFAULT_PARALLEL = 4
MIN_PASSES, MIN_MEMORY_KIB = 4, 32
"""What argon2 takes by default at most, and the floors below which nothing is made (cryptsetup's)."""

DIGEST_TIME_MS = 125
_TRIAL_MEMORY_KIB = 64 * 1024

Random = Callable[[int], bytes]
Prepare = Callable[[HeaderIO, dict[str, Any], bytearray], Awaitable[None]]
"""Is given the target, the JSON, which it may change, and the volume key, before the header counts."""


@dataclass(frozen=True, slots=True)
class Luks2Options(Luks1Options):
    """What LUKS1 has, and LUKS2's own; None takes the default.

    pbkdf           "pbkdf2", "argon2i", "argon2id" (the default)
    iterations      exact rounds, or passes of argon2, instead of a time
    pbkdf_memory    KiB that argon2 takes: exactly so with `iterations`, else at most
    pbkdf_parallel  threads of argon2
    sector_size     bytes encrypted at a time, 512 to 4096
    """

    sector_size: int | None = None
    pbkdf: str | None = None
    pbkdf_memory: int | None = None
    pbkdf_parallel: int | None = None
    label: str | None = None
    subsystem: str | None = None

    def checked(self) -> CipherSpec:
        """Return the payload's encryption, all other options checked as well. Raises CommandError."""
        plain = Luks1Options.spec(self)  # the zero-argument super() does not survive slots=True
        size = SECTOR if self.sector_size is None else self.sector_size
        spec = CipherSpec(plain.cipher, plain.mode, plain.iv, plain.iv_hash, plain.key_length, size)
        check_spec(spec)
        for name, text in (("label", self.label), ("subsystem", self.subsystem)):
            if text is not None and (len(text.encode("utf-8", "replace")) > MAX_LABEL or "\0" in text):
                raise CommandError(f"Parameter '{name}' takes up to {MAX_LABEL} bytes, none of them NUL")
        if self.kdf_type == "pbkdf2":
            for name, value in (("pbkdf-memory", self.pbkdf_memory), ("pbkdf-parallel", self.pbkdf_parallel)):
                if value is not None:
                    raise CommandError(f"Parameter '{name}' is for argon2 only")
            return spec
        memory = MIN_MEMORY_KIB if self.pbkdf_memory is None else self.pbkdf_memory
        if memory < MIN_MEMORY_KIB:
            raise CommandError(f"Parameter 'pbkdf-memory' expects at least {MIN_MEMORY_KIB} KiB")
        cpus = 1 if self.pbkdf_parallel is None else self.pbkdf_parallel
        check_argon2(max(self.iterations or 0, MIN_PASSES), memory, cpus, "The new key slot")
        return spec

    @property
    def kdf_type(self) -> str:
        """How passphrases become keys."""
        return self.pbkdf or "argon2id"


def header_length() -> int:
    """Return the bytes of header, key slots included: where an attached payload starts."""
    return 2 * COPY_SIZE + KEYSLOTS_SIZE


async def create_luks2(
    target: HeaderIO,
    options: Luks2Options,
    passphrase: SecretBytes,
    *,
    detached: bool,
    random: Random = os.urandom,
    prepare: Prepare | None = None,
) -> dict[str, Any]:
    """Write a fresh volume's header to `target`, flush, and return its JSON.

    target    holds at least `header_length()` bytes: the caller has made the room
    detached  the payload will be elsewhere, starting at its byte 0
    prepare   adds to the header what else the volume needs
    What could be taken for a header goes first, the new copies come last: a volume half made is not
    recognised as one, nor as the one that was there. Raises CommandError, OSError.
    """
    if target.size < header_length():
        raise CommandError(f"The LUKS header takes {header_length()} bytes, there are {target.size}")
    spec = options.checked()
    current().check_new(2, spec, options.hash, options.kdf_type)
    key = bytearray(random(spec.key_length))
    try:
        digest = await derive(lambda: make_digest(options, key, random))
        slot, material = await seal(
            key, passphrase, await costs_for(options), options.hash, 2 * COPY_SIZE, random=random
        )
        tree = {
            "keyslots": {"0": slot},
            "tokens": {},
            "segments": {"0": _segment(spec, 0 if detached else header_length())},
            "digests": {"0": digest},
            "config": {"json_size": str(COPY_SIZE - luks2.BINARY_SIZE), "keyslots_size": str(KEYSLOTS_SIZE)},
        }
        for place in (0, *luks2.COPY_SIZES):
            await target.pwrite(place, bytes(luks2.BINARY_SIZE))
        await target.flush()
        if prepare is not None:
            await prepare(target, tree, key)
    finally:
        key[:] = bytes(len(key))
    copies = [luks2.pack_copy(_binary(options, random), dump_json(tree), place) for place in (0, COPY_SIZE)]
    await target.pwrite(2 * COPY_SIZE, material)
    await target.flush()
    await target.pwrite(0, b"".join(copies))
    await target.flush()
    return tree


def _segment(spec: CipherSpec, offset: int) -> dict[str, Any]:
    words = [spec.cipher, spec.mode]
    if spec.mode != "ecb":  # cryptsetup takes no generator where there are no initial values
        words.append(f"{spec.iv}:{spec.iv_hash}" if spec.iv_hash else spec.iv)
    return {
        "type": "crypt",
        "offset": str(offset),
        "size": "dynamic",
        "iv_tweak": "0",
        "encryption": "-".join(words),
        "sector_size": spec.sector_size,
    }


def _binary(options: Luks2Options, random: Random) -> luks2.BinaryHeader:
    return luks2.BinaryHeader(
        magic=b"",
        version=luks2.VERSION,
        hdr_size=COPY_SIZE,
        seqid=1,
        label=(options.label or "").encode(),
        csum_alg=b"sha256",
        salt=random(64),
        uuid=(options.uuid or str(uuids.UUID(bytes=random(16), version=4))).encode(),
        subsystem=(options.subsystem or "").encode(),
        hdr_offset=0,
        padding=b"",
        csum=b"",
    )


def make_digest(options: Luks2Options, key: bytearray, random: Random = os.urandom) -> dict[str, Any]:
    """Return the digest of a volume key, for keyslot 0 and segment 0; takes long."""
    hash_name = options.hash
    size = digest_size(hash_name)
    if options.iterations is not None:
        rounds = MIN_ITERATIONS
    else:
        rounds = iterations_for(hash_name, size, min(DIGEST_TIME_MS, _iter_time(options)))
    salt = random(32)
    return {
        "type": "pbkdf2",
        "keyslots": ["0"],
        "segments": ["0"],
        "hash": hash_name,
        "iterations": rounds,
        "salt": _b64(salt),
        "digest": _b64(bytes(pbkdf2(hash_name, key, salt, rounds, size))),
    }


def _iter_time(options: Luks2Options) -> int:
    return DEFAULT_ITER_TIME_MS if options.iter_time is None else options.iter_time


async def costs_for(options: Luks2Options) -> Kdf:
    """Return how the key slot is to be derived, salt excepted: as asked for, or measured here.

    Raises CommandError for costs that are impossible, NotEnoughMemory.
    """
    kind, rounds, exact = options.kdf_type, options.iterations, options.iterations is not None
    if kind == "pbkdf2":
        if rounds is None:
            rounds = await derive(lambda: iterations_for(options.hash, AREA_KEY_SIZE, _iter_time(options)))
        rounds = current().iterations(rounds, exact=exact, force=options.force)
        return Kdf(kind, "", hash=options.hash, iterations=rounds)
    cpus = options.pbkdf_parallel or min(DEFAULT_PARALLEL, os.cpu_count() or 1)
    memory = options.pbkdf_memory
    if memory is None:
        free = available()
        memory = DEFAULT_MEMORY_KIB if free is None else min(DEFAULT_MEMORY_KIB, (free - RESERVE_KIB) // 2)
        memory = max(memory, MIN_MEMORY_KIB, 8 * cpus)
    if rounds is not None:
        exactly = Kdf(kind, "", time=max(rounds, MIN_PASSES), memory=memory, cpus=cpus)
        return current().argon2(exactly, exact=True, force=options.force)
    trial = min(memory, max(_TRIAL_MEMORY_KIB, 8 * cpus))
    speed = await derive_heavy(lambda: _argon2_speed(kind, trial, cpus), trial, "Measuring argon2")
    work = speed * _iter_time(options) / 1000
    memory = min(memory, max(trial, int(work) // MIN_PASSES))
    passes = min(max(MIN_PASSES, int(work) // memory), MAX_ARGON2_TIME)
    measured = Kdf(kind, "", time=passes, memory=memory, cpus=min(cpus, MAX_ARGON2_CPUS))
    return current().argon2(measured, exact=False, force=options.force)


def _argon2_speed(kind: str, memory: int, cpus: int) -> float:
    """Return the KiB that argon2 passes over in a second."""
    start = time.monotonic()
    argon2(kind, b"password", bytes(32), (MIN_PASSES, memory, cpus), AREA_KEY_SIZE)
    return MIN_PASSES * memory / max(time.monotonic() - start, 1e-6)


async def seal(
    key: bytes | bytearray | memoryview,
    passphrase: SecretBytes,
    costs: Kdf,
    af_hash: str,
    offset: int,
    *,
    random: Random = os.urandom,
) -> tuple[dict[str, Any], bytearray]:
    """Return a keyslot object of the JSON and its key material, for an area at byte `offset`.

    Raises CommandError, NotEnoughMemory.
    """
    salt = random(32)
    length = align_up(len(key) * STRIPES, SECTOR)
    slot: dict[str, Any] = {
        "type": "luks2",
        "key_size": len(key),
        "af": {"type": "luks1", "stripes": STRIPES, "hash": af_hash},
        "area": {
            "type": "raw",
            "offset": str(offset),
            "size": str(align_up(length, AREA_ALIGNMENT)),
            "encryption": AREA_ENCRYPTION,
            "key_size": AREA_KEY_SIZE,
        },
        "kdf": _kdf_object(costs, salt),
    }

    def work() -> bytearray:
        with passphrase.view() as secret:
            if costs.type == "pbkdf2":
                slot_key = pbkdf2(costs.hash, secret, salt, costs.iterations, AREA_KEY_SIZE)
            else:
                slot_key = argon2(costs.type, secret, salt, (costs.time, costs.memory, costs.cpus), AREA_KEY_SIZE)
        material = af.split(key, STRIPES, af_hash, random)
        material += bytes(length - len(material))
        crypto = BlockCrypto(parse_encryption(AREA_ENCRYPTION, AREA_KEY_SIZE), slot_key)
        try:
            with memoryview(material) as view:
                crypto.encrypt([(0, view, view)])
        finally:
            crypto.wipe()
            slot_key[:] = bytes(len(slot_key))
        return material

    if costs.type == "pbkdf2":
        check_pbkdf2_iterations(costs.iterations, "The new key slot")
        return slot, await derive(work)
    check_argon2(costs.time, costs.memory, costs.cpus, "The new key slot")
    return slot, await derive_heavy(work, costs.memory, "The new key slot")


def _kdf_object(costs: Kdf, salt: bytes) -> dict[str, Any]:
    if costs.type == "pbkdf2":
        return {"type": costs.type, "hash": costs.hash, "iterations": costs.iterations, "salt": _b64(salt)}
    return {
        "type": costs.type,
        "time": costs.time,
        "memory": costs.memory,
        "cpus": costs.cpus,
        "salt": _b64(salt),
    }


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
