"""Reading and unlocking LUKS volumes over children of nodes; for drivers, jobs, commands and tools.

`read_volume` takes the header apart, `unlock` derives the volume key. Both versions of LUKS answer
with the same `Volume`; what is special to one lies behind it.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qmpd.crypto import af
from qmpd.crypto.block import BlockCrypto
from qmpd.crypto.cipher import CipherSpec
from qmpd.crypto.kdf import check_pbkdf2_iterations, pbkdf2
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.formats import luks1
from qmpd.luks import policy
from qmpd.luks.work import derive
from qmpd.units import SECTOR, align_up

if TYPE_CHECKING:
    from qmpd.luks.encrypt import Journal


class HeaderIO(Protocol):
    """What holds a header: a `Child`, or a `BlockBackend`."""

    @property
    def size(self) -> int:
        """Bytes there are."""

    async def pread(self, offset: int, length: int) -> bytearray:
        """Return bytes within `size`. Raises OSError."""

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes. Raises OSError."""

    async def flush(self) -> None:
        """Make what was written durable. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Unlocked:
    """A volume key, which whoever holds this wipes (`wipe`), and the slot that gave it."""

    key: bytearray
    slot: int

    def wipe(self) -> None:
        """Overwrite the key."""
        self.key[:] = bytes(len(self.key))

    def __repr__(self) -> str:
        return f"<volume key of {len(self.key)} bytes from slot {self.slot}>"


class Volume(Protocol):
    """A parsed header of either version."""

    @property
    def version(self) -> int:
        """1 or 2."""

    @property
    def spec(self) -> CipherSpec:
        """How the payload is encrypted."""

    @property
    def payload_offset(self) -> int:
        """Byte at which the payload starts in its file."""

    @property
    def payload_length(self) -> int | None:
        """Bytes of payload if the header says so, None for all there is."""

    @property
    def first_sector(self) -> int:
        """Number that the payload's first sector has for its initial value."""

    @property
    def problem(self) -> str | None:
        """What is wrong with a second copy of the header, None if nothing is."""

    @property
    def journal(self) -> Journal | None:
        """The journal of a volume that is being encrypted in place, None for all others."""

    def costs(self) -> Mapping[int, policy.Cost]:
        """Return what the key slots in use cost, by number."""

    def info(self) -> dict[str, Any]:
        """Return format-specific data of ImageInfo (wire names)."""

    async def unlock(self, source: HeaderIO, passphrase: SecretBytes) -> Unlocked:
        """Derive the volume key. Raises CommandError if no slot takes the passphrase, OSError."""


async def read_padded(source: HeaderIO, offset: int, length: int) -> bytearray:
    """Return `length` bytes (bounded by the caller), zeroes where the source has ended."""
    there = max(0, min(length, source.size - offset))
    data = await source.pread(offset, there) if there else bytearray()
    return data + bytes(length - there)


async def read_volume(source: HeaderIO, *, detached: bool) -> Volume:
    """Read and check the header on `source`.

    detached  the payload is elsewhere
    Raises CommandError with QEMU's text for what is no LUKS header or breaks its rules, OSError.
    """
    data = await read_padded(source, 0, luks1.HEADER_SIZE)
    return Luks1Volume(luks1.parse_header(data, detached=detached))


class Luks1Volume:
    """A LUKS1 header and how it is unlocked."""

    version = 1
    first_sector = 0
    payload_length: int | None = None
    problem: str | None = None
    journal: Journal | None = None

    def __init__(self, header: luks1.Luks1Header) -> None:
        self.header = header

    @property
    def spec(self) -> CipherSpec:
        """See `Volume.spec`."""
        return self.header.spec

    @property
    def payload_offset(self) -> int:
        """See `Volume.payload_offset`."""
        return self.header.payload_offset

    def costs(self) -> Mapping[int, policy.Cost]:
        """See `Volume.costs`."""
        slots = enumerate(self.header.slots)
        return {n: policy.Cost("pbkdf2", self.header.hash, slot.iterations) for n, slot in slots if slot.enabled}

    def info(self) -> dict[str, Any]:
        """See `Volume.info`."""
        return self.header.info()

    async def unlock(self, source: HeaderIO, passphrase: SecretBytes) -> Unlocked:
        """Try the slots in order; see `Volume.unlock`.

        The cost that the header asks for is checked before anything is derived: of every slot in
        use, and of the digest.
        """
        header = self.header
        check_pbkdf2_iterations(header.phdr.mk_digest_iterations, "The volume key digest")
        for index, slot in enumerate(header.slots):
            if slot.enabled:
                check_pbkdf2_iterations(slot.iterations, f"Keyslot {index}")
        digest = policy.Cost("pbkdf2", header.hash, header.phdr.mk_digest_iterations)
        policy.current().check(self.version, self.spec, digest, self.costs())
        for index, slot in enumerate(header.slots):
            if not slot.enabled:
                continue
            key = await self.try_slot(source, index, passphrase)
            if key is not None:
                return Unlocked(key, index)
        raise CommandError("Invalid password, cannot unlock any keyslot")

    async def try_slot(self, source: HeaderIO, index: int, passphrase: SecretBytes) -> bytearray | None:
        """Return the volume key if slot `index`, which is in use, takes the passphrase. Raises OSError."""
        header, slot = self.header, self.header.slots[index]
        length = align_up(header.material_length, SECTOR)
        material = await read_padded(source, slot.material_offset, length)

        def work() -> bytearray | None:
            return open_slot(header, slot, material, passphrase)

        return await derive(work)


def open_slot(
    header: luks1.Luks1Header, slot: luks1.Keyslot, material: bytearray, passphrase: SecretBytes
) -> bytearray | None:
    """Return the volume key if `material`, which is used up, opens with the passphrase; takes long."""
    key_bytes = header.phdr.key_bytes
    with passphrase.view() as secret:
        slot_key = pbkdf2(header.hash, secret, slot.salt, slot.iterations, key_bytes)
    crypto = BlockCrypto(header.spec, slot_key)
    try:
        with memoryview(material) as view:
            crypto.decrypt([(0, view, view)])
        key = af.merge(material, key_bytes, slot.stripes, header.hash)
    finally:
        crypto.wipe()
        slot_key[:] = bytes(key_bytes)
        material[:] = bytes(len(material))
    if hmac.compare_digest(key_digest(header, key), header.phdr.mk_digest):
        return key
    key[:] = bytes(key_bytes)
    return None


def key_digest(header: luks1.Luks1Header, key: bytearray) -> bytearray:
    """Return what the header's digest must be for `key` to be the volume key."""
    phdr = header.phdr
    return pbkdf2(header.hash, key, phdr.mk_digest_salt, phdr.mk_digest_iterations, luks1.DIGEST_SIZE)
