"""LUKS1 headers: bytes in, values out, and back; no file, no key, no asyncio.

Source: LUKS1 On-Disk Format Specification 1.2.3, figures 1 to 4; every integer is big-endian. The
checks, their order and their texts are QEMU's where it has them (asked with one field broken at a
time); where its arithmetic wraps around at 32 bits, ours does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from qmpd.crypto.af import MAX_MATERIAL
from qmpd.crypto.cipher import CipherSpec, check_spec
from qmpd.crypto.hashes import digest_size
from qmpd.crypto.ivgen import IvKind, kind_of
from qmpd.errors import CommandError
from qmpd.formats.layout import Layout, bytes6, bytes20, bytes32, bytes40, u16, u32
from qmpd.units import SECTOR, align_up

MAGIC = b"LUKS\xba\xbe"
VERSION = 1
SLOTS = 8
STRIPES = 4000
"""Anti-forensic stripes of every slot; the format allows others, no program writes them."""
ENABLED, DISABLED = 0x00AC71F3, 0x0000DEAD
HEADER_SIZE = 592
"""Bytes of the header proper: the fields and the eight slots."""
ALIGNMENT = 4096
"""Key material starts at multiples of this, the first slot's right after the first 4096 bytes."""
DIGEST_SIZE = 20


@dataclass(frozen=True, slots=True)
class Phdr(Layout):
    """The fields before the slots."""

    SIZE: ClassVar[int] = 208
    magic: bytes6
    version: u16
    cipher_name: bytes32  # NUL-terminated, as are the other names
    cipher_mode: bytes32  # "xts-plain64"
    hash_spec: bytes32
    payload_offset: u32  # in 512-byte sectors
    key_bytes: u32  # bytes of the volume key
    mk_digest: bytes20  # PBKDF2 of the volume key
    mk_digest_salt: bytes32
    mk_digest_iterations: u32
    uuid: bytes40


@dataclass(frozen=True, slots=True)
class Keyslot(Layout):
    """One of the eight slots."""

    SIZE: ClassVar[int] = 48
    active: u32  # ENABLED or DISABLED
    iterations: u32  # PBKDF2 rounds
    salt: bytes32
    material_sector: u32  # start of the split key, in 512-byte sectors
    stripes: u32

    @property
    def enabled(self) -> bool:
        """True if the slot holds a key."""
        return self.active == ENABLED

    @property
    def material_offset(self) -> int:
        """Byte at which the split key starts."""
        return self.material_sector * SECTOR


@dataclass(frozen=True, slots=True)
class Luks1Header:
    """A header whose every field was checked, or one about to be written.

    spec   what the cipher fields mean      hash   the name of the hash of all key derivations
    """

    phdr: Phdr
    slots: tuple[Keyslot, ...]
    spec: CipherSpec
    hash: str

    @property
    def payload_offset(self) -> int:
        """Byte at which the payload starts in its file."""
        return self.phdr.payload_offset * SECTOR

    @property
    def material_length(self) -> int:
        """Bytes of split key in a slot, before rounding up to sectors."""
        return self.phdr.key_bytes * STRIPES

    @property
    def uuid(self) -> str:
        """The volume's UUID as text."""
        return text_of(self.phdr.uuid)

    def pack(self) -> bytes:
        """Return the HEADER_SIZE bytes."""
        return self.phdr.pack() + b"".join(slot.pack() for slot in self.slots)

    def with_slot(self, index: int, slot: Keyslot) -> Luks1Header:
        """Return the header with one slot replaced."""
        return replace(self, slots=(*self.slots[:index], slot, *self.slots[index + 1 :]))

    def info(self) -> dict[str, Any]:
        """Return QCryptoBlockInfoLUKS (wire names), which QEMU shows as format-specific data.

        A payload that starts at 0 is what it calls a detached header.
        """
        info: dict[str, Any] = {
            "cipher-alg": f"{self.spec.cipher}-{self.spec.key_bits}",
            "cipher-mode": self.spec.mode,
            "ivgen-alg": self.spec.iv,
        }
        if self.spec.iv == "essiv":
            info["ivgen-hash-alg"] = self.spec.iv_hash
        info |= {
            "hash-alg": self.hash,
            "detached-header": self.payload_offset == 0,
            "payload-offset": self.payload_offset,
            "master-key-iters": self.phdr.mk_digest_iterations,
            "uuid": self.uuid,
            "slots": [_slot_info(slot) for slot in self.slots],
        }
        return info


def _slot_info(slot: Keyslot) -> dict[str, Any]:
    info: dict[str, Any] = {"active": slot.enabled, "key-offset": slot.material_offset}
    if slot.enabled:
        info |= {"iters": slot.iterations, "stripes": slot.stripes}
    return info


def text_of(field: bytes) -> str:
    """Return a NUL-terminated name as text; bytes that are no UTF-8 show as U+FFFD."""
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def parse_header(data: bytes | bytearray | memoryview, *, detached: bool) -> Luks1Header:
    """Return the header in the first HEADER_SIZE bytes of `data`, every field checked.

    data      bytes from the start of the volume; a shorter volume is filled up with zeroes by the caller
    detached  the payload lies elsewhere, so that it cannot overlap the key material
    Raises CommandError with QEMU's text.
    """
    phdr = Phdr.unpack_from(data)
    if phdr.magic != MAGIC:
        raise CommandError("Volume is not in LUKS format")
    if phdr.version != VERSION:
        raise CommandError(f"LUKS version {phdr.version} is not supported")
    slots = tuple(Keyslot.unpack_from(data, Phdr.SIZE + i * Keyslot.SIZE) for i in range(SLOTS))
    _check_layout(phdr, slots, detached=detached)
    spec, hash_name = _parse_names(phdr)
    if phdr.key_bytes * STRIPES > MAX_MATERIAL:  # cannot be, with the ciphers known today
        raise CommandError(f"LUKS key length {phdr.key_bytes} is beyond {MAX_MATERIAL // STRIPES} bytes")
    return Luks1Header(phdr, slots, spec, hash_name)


def _check_layout(phdr: Phdr, slots: tuple[Keyslot, ...], *, detached: bool) -> None:
    for field, name in (
        (phdr.cipher_name, "cipher name"),
        (phdr.cipher_mode, "cipher mode"),
        (phdr.hash_spec, "hash spec"),
    ):
        if b"\0" not in field:
            raise CommandError(f"LUKS header {name} is not NUL terminated")
    if not detached and phdr.payload_offset < ALIGNMENT // SECTOR:
        raise CommandError("LUKS payload is overlapping with the header")
    if phdr.mk_digest_iterations == 0:
        raise CommandError("LUKS key iteration count is zero")
    length = -(-phdr.key_bytes * STRIPES // SECTOR)
    for i, slot in enumerate(slots):
        _check_slot(i, slot)
        if not detached and slot.material_sector + length > phdr.payload_offset:
            raise CommandError(f"Keyslot {i} is overlapping with the encrypted payload")
        for j in range(i + 1, SLOTS):
            if abs(slot.material_sector - slots[j].material_sector) < length:
                raise CommandError(f"Keyslots {i} and {j} are overlapping in the header")


def _check_slot(index: int, slot: Keyslot) -> None:
    if slot.stripes != STRIPES:
        signed = slot.stripes - (1 << 32) if slot.stripes >> 31 else slot.stripes
        raise CommandError(f"Keyslot {index} is corrupted (stripes {signed} != {STRIPES})")
    if slot.active not in (ENABLED, DISABLED):
        raise CommandError(f"Keyslot {index} state (active/disable) is corrupted")
    if slot.enabled and slot.iterations == 0:
        raise CommandError(f"Keyslot {index} iteration count is zero")
    if slot.material_sector < ALIGNMENT // SECTOR:
        raise CommandError(f"Keyslot {index} is overlapping with the LUKS header")


def _parse_names(phdr: Phdr) -> tuple[CipherSpec, str]:
    """Return the meaning of the cipher and hash fields, in QEMU's order of complaint."""
    cipher, whole = text_of(phdr.cipher_name), text_of(phdr.cipher_mode)
    mode, dash, generator = whole.partition("-")
    if not dash:
        raise CommandError(f"Unexpected cipher mode string format '{whole}'")
    iv, colon, iv_hash = generator.partition(":")
    if colon:
        digest_size(iv_hash)
    spec = CipherSpec(cipher, mode, iv, iv_hash if colon else None, phdr.key_bytes)
    hash_name = text_of(phdr.hash_spec)
    check_spec(replace(spec, iv="plain64", iv_hash=None))  # cipher, mode and key length alone
    digest_size(hash_name)
    if kind_of(iv) is IvKind.NULL:  # equal sectors would look equal
        raise CommandError(f"IV generator '{iv}' not supported")
    check_spec(spec)
    return spec, hash_name


def layout_length(key_bytes: int) -> tuple[int, int]:
    """Return the bytes from one slot's key material to the next one's, and those of the whole header.

    QEMU's and cryptsetup's layout: every slot rounded up to 4096.
    """
    step = align_up(key_bytes * STRIPES, ALIGNMENT)
    return step, ALIGNMENT + SLOTS * step


def new_header(
    spec: CipherSpec,
    hash_name: str,
    uuid: str,
    digest: tuple[bytes, bytes, int],
    *,
    detached: bool,
) -> Luks1Header:
    """Return a header with no slot in use.

    digest   (PBKDF2 of the volume key, its salt, its iterations)
    Raises CommandError for what `parse_header` would not take.
    """
    check_spec(spec)
    digest_size(hash_name)
    step, length = layout_length(spec.key_length)
    generator = f"{spec.iv}:{spec.iv_hash}" if spec.iv_hash else spec.iv
    phdr = Phdr(
        magic=MAGIC,
        version=VERSION,
        cipher_name=spec.cipher.encode(),
        cipher_mode=f"{spec.mode}-{generator}".encode(),
        hash_spec=hash_name.encode(),
        payload_offset=0 if detached else length // SECTOR,
        key_bytes=spec.key_length,
        mk_digest=digest[0],
        mk_digest_salt=digest[1],
        mk_digest_iterations=digest[2],
        uuid=uuid.encode(),
    )
    slots = tuple(empty_slot((ALIGNMENT + i * step) // SECTOR) for i in range(SLOTS))
    return Luks1Header(phdr, slots, spec, hash_name)


def empty_slot(material_sector: int) -> Keyslot:
    """Return an unused slot whose key material has its place at `material_sector`."""
    return Keyslot(DISABLED, 0, bytes(32), material_sector, STRIPES)
