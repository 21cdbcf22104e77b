"""LUKS2 volumes over children: both copies read, the right one believed, keyslots tried by priority.

Reading never writes: a damaged copy is reported (`Luks2Volume.problem`) and left to whoever repairs.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping
from typing import Any

from qmpd.crypto import af
from qmpd.crypto.block import BlockCrypto
from qmpd.crypto.cipher import CipherSpec, check_spec
from qmpd.crypto.hashes import digest_size
from qmpd.crypto.ivgen import IvKind
from qmpd.crypto.kdf import argon2, check_argon2, check_pbkdf2_iterations, pbkdf2
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError, ImageError, shortened
from qmpd.formats import luks2
from qmpd.formats.luks2_json import Digest, Keyslot, Metadata, Segment
from qmpd.luks import policy
from qmpd.luks.encrypt import REQUIREMENT, journal_of
from qmpd.luks.memory import NotEnoughMemory
from qmpd.luks.volume import HeaderIO, Unlocked, read_padded
from qmpd.luks.work import derive, derive_heavy
from qmpd.units import SECTOR, align_up

KNOWN_REQUIREMENTS: tuple[str, ...] = (REQUIREMENT,)
"""Mandatory requirements that we meet; a volume with any other is not opened."""

_SALT_SIZES = range(8, 65)


async def read_copies(source: HeaderIO, image: str) -> luks2.Found:
    """Read both copies of the header and return the one to believe.

    Never more is read than 4 MiB for a copy. Raises ImageError if neither is valid, OSError.
    """
    binary: luks2.BinaryHeader | None = None
    primary: luks2.Copy | ImageError
    try:
        binary = luks2.parse_binary(await read_padded(source, 0, luks2.BINARY_SIZE), 0, image)
        primary = luks2.parse_copy(await read_padded(source, 0, binary.hdr_size), 0, image)
    except ImageError as error:
        if error.field == "LUKS2 header version":
            raise  # the magic before it is right: this is another version, not a damaged copy
        primary = error
    secondary: luks2.Copy | ImageError = ImageError(image, None, "LUKS2 secondary header", "missing", "there")
    for offset in luks2.secondary_offsets(primary, binary):
        try:
            block = await read_padded(source, offset, luks2.BINARY_SIZE)
            size = luks2.parse_binary(block, offset, image).hdr_size
            secondary = luks2.parse_copy(await read_padded(source, offset, size), offset, image)
            break
        except ImageError as error:
            secondary = error
    found = luks2.choose(primary, secondary)
    need = found.copy.metadata.total_size
    if source.size < need:
        raise ImageError(image, None, "LUKS2 header", f"on a device of {source.size} bytes", f"at least {need}")
    return found


LONGEST_NAME = 128
"""Letters in the name of a cipher or hash: dm-crypt's own names are shorter, and errors repeat them."""


def parse_encryption(text: str, key_length: int, sector_size: int = SECTOR) -> CipherSpec:
    """Return what "aes-xts-plain64" and the like mean. Raises CommandError for what is not supported."""
    if len(text) > LONGEST_NAME:
        raise CommandError(f"Encryption of {len(text)} letters, '{text[:40]}…', not supported")
    cipher, _, rest = text.partition("-")
    mode, dash, generator = rest.partition("-")
    if not dash and mode != "ecb":  # which has no initial values
        raise CommandError(f"Unexpected cipher mode string format '{rest}'")
    iv, _, iv_hash = generator.partition(":")
    spec = CipherSpec(cipher, mode, iv, iv_hash or None, key_length, sector_size)
    if spec.iv_hash:
        digest_size(spec.iv_hash)
    check_spec(spec)
    if mode != "ecb" and spec.iv_kind is IvKind.NULL:  # equal sectors would look equal
        raise CommandError(f"IV generator '{iv}' not supported")
    return spec


class Luks2Volume:
    """A LUKS2 header whose payload we can serve: one segment of kind crypt, no requirement unknown to us.

    problem   what is wrong with the copy that was not believed, None if nothing is
    journal   of a volume that is being encrypted in place: not for users, whoever opens it checks that
    """

    version = 2

    def __init__(self, found: luks2.Found, key_length: int | None = None) -> None:
        """Check what the volume needs of us. Raises CommandError for volumes that are valid but not ours to open.

        key_length   bytes of the volume key, where that is known even if no slot is left to tell
        """
        self.copy, self.problem = found.copy, found.problem
        metadata = self.metadata = found.copy.metadata
        self.journal = journal_of(metadata)
        self.segment = _only_segment(metadata)
        self.digest = _digest_of(metadata, self.segment)
        digest_size(self.digest.hash)
        slots = [slot for slot in metadata.keyslots.values() if slot.id in self.digest.keyslots]
        lengths = {slot.key_size for slot in slots} or {key_length or 0}
        if len(lengths) != 1 or 0 in lengths:
            raise CommandError("No usable keyslot: the volume key has no single length")
        self.spec = parse_encryption(self.segment.encryption, lengths.pop(), self.segment.sector_size)

    @property
    def payload_offset(self) -> int:
        """See `Volume.payload_offset`."""
        return self.segment.offset

    @property
    def payload_length(self) -> int | None:
        """See `Volume.payload_length`."""
        return self.segment.size

    @property
    def first_sector(self) -> int:
        """See `Volume.first_sector`."""
        return self.segment.iv_tweak

    def costs(self) -> Mapping[int, policy.Cost]:
        """See `Volume.costs`."""
        slots = self.metadata.keyslots.values()
        return {int(slot.id): policy.Cost.of(slot.kdf) for slot in slots if slot.kdf is not None and slot.kdf.salt}

    def info(self) -> dict[str, Any]:
        """See `Volume.info`: the members that QEMU has for LUKS1, then those of LUKS2 alone."""
        digest = self.digest
        slots = [_slot_info(slot) for slot in sorted(self.metadata.keyslots.values(), key=lambda one: int(one.id))]
        info: dict[str, Any] = {
            "cipher-alg": f"{self.spec.cipher}-{self.spec.key_bits}",
            "cipher-mode": self.spec.mode,
            "ivgen-alg": self.spec.iv or "plain64",
        }
        if self.spec.iv == "essiv":
            info["ivgen-hash-alg"] = self.spec.iv_hash
        info |= {
            "hash-alg": digest.hash,
            "detached-header": self.payload_offset == 0,
            "payload-offset": self.payload_offset,
            "master-key-iters": digest.iterations,
            "uuid": self.copy.uuid,
            "slots": slots,
            "version": self.version,
            "sector-size": self.spec.sector_size,
        }
        if self.copy.label:
            info["label"] = self.copy.label
        if self.copy.subsystem:
            info["subsystem"] = self.copy.subsystem
        if self.problem is not None:
            info["problem"] = self.problem
        return info

    async def unlock(self, source: HeaderIO, passphrase: SecretBytes) -> Unlocked:
        """Try the keyslots of this volume's digest, preferred ones first; see `Volume.unlock`.

        Slots of priority 0 are left out, as are those whose kind or derivation is unknown.
        """
        slots = [
            slot
            for slot in self.metadata.keyslots.values()
            if slot.id in self.digest.keyslots and slot.priority and slot.kdf is not None and slot.kdf.salt
        ]
        slots.sort(key=lambda slot: (-slot.priority, int(slot.id)))
        check_pbkdf2_iterations(self.digest.iterations, "The volume key digest")
        for slot in slots:
            check_cost(slot)
        digest = policy.Cost("pbkdf2", self.digest.hash, self.digest.iterations)
        policy.current().check(self.version, self.spec, digest, self.costs())
        short: NotEnoughMemory | None = None
        for slot in slots:
            try:
                key = await self.try_slot(source, slot, passphrase)
            except NotEnoughMemory as error:  # another slot may do with less
                short = short or error
                continue
            if key is not None:
                return Unlocked(key, int(slot.id))
        if short is not None:
            raise short
        raise CommandError("Invalid password, cannot unlock any keyslot")

    async def try_slot(self, source: HeaderIO, slot: Keyslot, passphrase: SecretBytes) -> bytearray | None:
        """Return the volume key if the slot takes the passphrase. Raises CommandError, OSError."""
        length = align_up(slot.key_size * slot.stripes, SECTOR)
        if length > min(slot.area_size, af.MAX_MATERIAL):
            raise CommandError(f"Keyslot {slot.id} is corrupted (area of {slot.area_size} bytes, {length} needed)")
        spec = parse_encryption(slot.area_encryption, slot.area_key_size)
        material = await read_padded(source, slot.area_offset, length)

        def work() -> bytearray | None:
            return open_slot(slot, spec, self.digest, material, passphrase)

        assert slot.kdf is not None
        if slot.kdf.type == "pbkdf2":
            return await derive(work)
        return await derive_heavy(work, slot.kdf.memory, f"Keyslot {slot.id}")


def _slot_info(slot: Keyslot) -> dict[str, Any]:
    """Return QCryptoBlockInfoLUKSSlot; kinds of slots that hold no volume key are not active."""
    kdf = slot.kdf
    row: dict[str, Any] = {"active": kdf is not None}
    if kdf is not None:
        row |= {"iters": kdf.iterations or kdf.time, "stripes": slot.stripes}
    row |= {"key-offset": slot.area_offset, "slot": int(slot.id)}
    if kdf is not None:
        row["priority"] = slot.priority
        if kdf.salt:  # a derivation that we know
            row["pbkdf"] = kdf.type
        if kdf.memory:
            row |= {"pbkdf-memory": kdf.memory, "pbkdf-parallel": kdf.cpus}
    return row


def check_cost(slot: Keyslot) -> None:
    """Refuse a slot that asks too much, before anything is derived. Raises CommandError."""
    kdf = slot.kdf
    assert kdf is not None
    if kdf.type == "pbkdf2":
        check_pbkdf2_iterations(kdf.iterations, f"Keyslot {slot.id}")
    else:
        check_argon2(kdf.time, kdf.memory, kdf.cpus, f"Keyslot {slot.id}")


def open_slot(
    slot: Keyslot, spec: CipherSpec, digest: Digest, material: bytearray, passphrase: SecretBytes
) -> bytearray | None:
    """Return the volume key if `material`, which is used up, opens with the passphrase; takes long."""
    kdf = slot.kdf
    assert kdf is not None
    salt = decode(kdf.salt, f"Keyslot {slot.id} salt", _SALT_SIZES)
    with passphrase.view() as secret:
        if kdf.type == "pbkdf2":
            slot_key = pbkdf2(kdf.hash, secret, salt, kdf.iterations, slot.area_key_size)
        else:
            slot_key = argon2(kdf.type, secret, salt, (kdf.time, kdf.memory, kdf.cpus), slot.area_key_size)
    crypto = BlockCrypto(spec, slot_key)
    try:
        with memoryview(material) as view:
            crypto.decrypt([(0, view, view)])
        key = af.merge(material, slot.key_size, slot.stripes, slot.af_hash)
    finally:
        crypto.wipe()
        slot_key[:] = bytes(len(slot_key))
        material[:] = bytes(len(material))
    if proves(digest, key):
        return key
    key[:] = bytes(len(key))
    return None


def proves(digest: Digest, key: bytearray) -> bool:
    """Say whether `key` is the one that the digest stands for. Raises CommandError for a damaged digest."""
    salt = decode(digest.salt, f"Digest {digest.id} salt", range(32, 33))
    expected = decode(digest.digest, f"Digest {digest.id}", range(20, 65))
    if len(expected) not in (20, digest_size(digest.hash)):
        raise CommandError(f"Digest {digest.id} has {len(expected)} bytes, expected 20 or those of {digest.hash}")
    return hmac.compare_digest(pbkdf2(digest.hash, key, salt, digest.iterations, len(expected)), expected)


def decode(text: str, what: str, sizes: range) -> bytes:
    """Return the bytes of a base64 text, of a size in `sizes`. Raises CommandError."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CommandError(f"{what} is not valid base64") from error
    if len(data) not in sizes:
        raise CommandError(f"{what} has {len(data)} bytes, expected {sizes[0]} to {sizes[-1]}")
    return data


def _only_segment(metadata: Metadata) -> Segment:
    """Return the segment to serve, or refuse by name what would cost data or secrecy."""
    for name in metadata.requirements:
        if name.startswith(("online-reencrypt", "offline-reencrypt")):
            raise CommandError(f"The volume is being reencrypted (requirement '{shortened(name)}'); finish that first")
        if name not in KNOWN_REQUIREMENTS:
            raise CommandError(f"The volume requires '{shortened(name)}', which is not supported")
    regular = [segment for segment in metadata.segments.values() if not segment.backup]
    if len(regular) != 1:
        raise CommandError(f"The volume has {len(regular)} segments, only one is supported")
    segment = regular[0]
    if segment.type != "crypt":
        raise CommandError(f"Segment type '{shortened(segment.type)}' is not supported")
    if segment.integrity:
        raise CommandError("A volume with integrity protection is not supported")
    if segment.encryption.startswith(("cipher_null", "null")):
        raise CommandError(f"Segment encryption '{shortened(segment.encryption)}' is none: refused")
    return segment


def _digest_of(metadata: Metadata, segment: Segment) -> Digest:
    digest = next(one for one in metadata.digests.values() if segment.id in one.segments)
    if digest.type != "pbkdf2":
        raise CommandError(f"Digest type '{shortened(digest.type)}' is not supported")
    return digest
