"""Creating LUKS1 volumes: header and first key slot, beside the payload or apart from it.

Layout and defaults are QEMU's (block_crypto_create): aes-256 in xts with plain64, sha256, eight slots
of 4000 stripes from byte 4096 on, the payload right after them.
"""

from __future__ import annotations

import os
import uuid as uuids
from collections.abc import Callable
from dataclasses import dataclass, replace

from qmpd.crypto import af
from qmpd.crypto.block import BlockCrypto
from qmpd.crypto.cipher import KEY_BITS, MODES, CipherSpec, check_spec, supported
from qmpd.crypto.hashes import digest_size
from qmpd.crypto.kdf import DEFAULT_ITER_TIME_MS, MIN_ITERATIONS, iterations_for, pbkdf2
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.formats import luks1
from qmpd.luks.policy import current
from qmpd.luks.volume import HeaderIO
from qmpd.luks.work import derive
from qmpd.units import SECTOR, align_up


@dataclass(frozen=True, slots=True)
class Luks1Options:
    """QCryptoBlockCreateOptionsLUKS without its secret; None takes QEMU's default.

    cipher_alg      "aes-128", "aes-192", "aes-256"        cipher_mode     "xts", "cbc", "ctr", "ecb"
    ivgen_hash_alg  for essiv only                         iter_time       milliseconds
    iterations      exact count for the slot instead of a time; never fewer than MIN_ITERATIONS
    uuid            the volume's UUID, random by default
    force           make also what the policy has floors for
    """

    cipher_alg: str | None = None
    cipher_mode: str | None = None
    ivgen_alg: str | None = None
    ivgen_hash_alg: str | None = None
    hash_alg: str | None = None
    iter_time: int | None = None
    iterations: int | None = None
    uuid: str | None = None
    force: bool = False

    @property
    def hash(self) -> str:
        """The hash of all key derivations."""
        return self.hash_alg or "sha256"

    def spec(self) -> CipherSpec:
        """Return the encryption these options mean. Raises CommandError for what is not supported."""
        alg = self.cipher_alg or "aes-256"
        mode = self.cipher_mode or "xts"
        iv = self.ivgen_alg or "plain64"
        cipher, _, bits = alg.rpartition("-")
        known = cipher in KEY_BITS and bits.isdigit() and int(bits) in KEY_BITS[cipher]
        if not known or (mode in MODES and not supported(cipher, mode, int(bits))):
            raise CommandError(f"Algorithm '{alg}' not supported")
        iv_hash = self.ivgen_hash_alg or ("sha256" if iv == "essiv" else None)
        spec = CipherSpec(cipher, mode, iv, iv_hash, int(bits) // 8 * (2 if mode == "xts" else 1))
        check_spec(spec)
        digest_size(self.hash)
        return spec


def header_length(options: Luks1Options) -> int:
    """Return the bytes that header and key slots take: where an attached payload starts."""
    return luks1.layout_length(options.spec().key_length)[1]


async def create_luks1(
    target: HeaderIO,
    options: Luks1Options,
    passphrase: SecretBytes,
    *,
    detached: bool,
    random: Callable[[int], bytes] = os.urandom,
) -> luks1.Luks1Header:
    """Write a fresh volume's header and its first key slot to `target`, flush, and return the header.

    target    holds at least `header_length(options)` bytes: the caller has made the room
    detached  the payload will be elsewhere, starting at its byte 0
    The header itself is written last: a volume half made is not recognised as one.
    Raises CommandError for options that are not supported or a target too small, OSError.
    """
    need = header_length(options)
    if target.size < need:
        raise CommandError(f"The LUKS header takes {need} bytes, there are {target.size}")

    def work() -> tuple[luks1.Luks1Header, bytearray]:
        return make_volume(options, passphrase, detached=detached, random=random)

    header, material = await derive(work)
    blank = bytes(luks1.ALIGNMENT)
    await target.pwrite(0, blank)
    await target.pwrite(header.slots[0].material_offset, material)
    await target.flush()
    await target.pwrite(0, header.pack())
    await target.flush()
    return header


def make_volume(
    options: Luks1Options,
    passphrase: SecretBytes,
    *,
    detached: bool,
    random: Callable[[int], bytes] = os.urandom,
) -> tuple[luks1.Luks1Header, bytearray]:
    """Return a header whose slot 0 takes the passphrase, and that slot's key material; takes long."""
    spec, hash_name = options.spec(), options.hash
    current().check_new(1, spec, hash_name, "pbkdf2")
    key = bytearray(random(spec.key_length))
    try:
        wanted = _iterations(options, hash_name, spec.key_length)
        salt = random(32)
        rounds = max(wanted // 8, MIN_ITERATIONS)
        digest = bytes(pbkdf2(hash_name, key, salt, rounds, luks1.DIGEST_SIZE))
        uuid = options.uuid or str(uuids.UUID(bytes=random(16), version=4))
        header = luks1.new_header(spec, hash_name, uuid, (digest, salt, rounds), detached=detached)
        return fill_slot(header, 0, key, passphrase, wanted, random)
    finally:
        key[:] = bytes(len(key))


def _iterations(options: Luks1Options, hash_name: str, length: int) -> int:
    if options.iterations is not None:
        return current().iterations(options.iterations, exact=True, force=options.force)
    milliseconds = DEFAULT_ITER_TIME_MS if options.iter_time is None else options.iter_time
    return current().iterations(iterations_for(hash_name, length, milliseconds), exact=False, force=options.force)


def fill_slot(
    header: luks1.Luks1Header,
    index: int,
    key: bytes | bytearray | memoryview,
    passphrase: SecretBytes,
    iterations: int,
    random: Callable[[int], bytes] = os.urandom,
) -> tuple[luks1.Luks1Header, bytearray]:
    """Return the header with slot `index` taking the passphrase, and its encrypted key material; takes long."""
    key_bytes = header.phdr.key_bytes
    salt = random(32)
    with passphrase.view() as secret:
        slot_key = pbkdf2(header.hash, secret, salt, iterations, key_bytes)
    material = af.split(key, luks1.STRIPES, header.hash, random)
    material += bytes(align_up(len(material), SECTOR) - len(material))
    crypto = BlockCrypto(header.spec, slot_key)
    try:
        with memoryview(material) as view:
            crypto.encrypt([(0, view, view)])
    finally:
        crypto.wipe()
        slot_key[:] = bytes(key_bytes)
    slot = replace(header.slots[index], active=luks1.ENABLED, iterations=iterations, salt=salt)
    return header.with_slot(index, slot), material
