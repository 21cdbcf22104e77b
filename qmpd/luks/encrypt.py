"""In-place encryption: an image becomes the payload of a LUKS2 volume whose header lies elsewhere.

The image is worked through in zones. Of each the ciphertext, its place and a checksum go to a journal in
the header first; then the zone is overwritten, then the position moves on, a flush after each of the
three. The zone is locked for users from before it is read until the new position is durable, so the
journal never holds anything older than what a user wrote since. After a crash the zone at the position
is written again if the journal holds it, which may be done any number of times. Plaintext never goes to
the journal.

While this lasts, both copies of the header demand `REQUIREMENT`, so that other software refuses to
activate the volume; a keyslot object of a kind of our own keeps the journal's area from being taken.

Layout of the area, in blocks of 4096 bytes: two positions, written in turn; the record's description;
then the zone. What is in it is authenticated under a key derived from the volume key.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from qmpd.block.batch import Batch, Request
from qmpd.block.child import Child
from qmpd.block.ranges import RangeTable
from qmpd.crypto.block import BlockCrypto
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.formats.luks2_json import Metadata
from qmpd.luks.volume import HeaderIO
from qmpd.luks.work import transform
from qmpd.units import MiB

REQUIREMENT = "qmpd-encrypt-v1"
SLOT_TYPE = "qmpd-encrypt"
ZONE = 1 * MiB
"""Bytes encrypted at a time, at most: what users of the image may have to wait for."""

BLOCK = 4096
_POSITION = struct.Struct(">8sQQ32s")  # magic, sequence, position, checksum
_RECORD = struct.Struct(">8sQQ32s")  # magic, offset, length, checksum
_POSITION_MAGIC, _RECORD_MAGIC = b"qmpdPOS1", b"qmpdZON1"
_KEY_LABEL = b"qmpd in-place encryption journal\0"

Serve = Callable[[Batch], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Journal:
    """Where the journal lies: `offset` in the header, room for zones of `zone` bytes; all in bytes.

    payload_size   of the image that is being encrypted
    """

    offset: int
    zone: int
    payload_size: int

    @property
    def size(self) -> int:
        """Bytes of the area."""
        return 3 * BLOCK + self.zone

    def slot(self) -> dict[str, Any]:
        """Return the keyslot object that holds the area."""
        return {
            "type": SLOT_TYPE,
            "key_size": 1,
            "area": {"type": "journal", "offset": str(self.offset), "size": str(self.size)},
            "zone": str(self.zone),
            "payload_size": str(self.payload_size),
        }


def journal_of(metadata: Metadata) -> Journal | None:
    """Return the journal of a volume that is being encrypted in place, None for any other.

    Raises CommandError for a description that contradicts itself.
    """
    if REQUIREMENT not in metadata.requirements:
        return None
    slots = [slot for slot in metadata.keyslots.values() if slot.type == SLOT_TYPE]
    if len(slots) != 1:
        raise CommandError(f"The volume requires '{REQUIREMENT}' and has {len(slots)} keyslots of that kind, not 1")
    members = metadata.tree["keyslots"][slots[0].id]
    numbers = []
    for name in ("zone", "payload_size"):
        text = members.get(name)
        if not isinstance(text, str) or not text.isascii() or not text.isdigit() or len(text) > 19:
            raise CommandError(f"Keyslot {slots[0].id}: '{name}' is not a number")
        numbers.append(int(text))
    journal = Journal(slots[0].area_offset, *numbers)
    if not 0 < journal.zone <= ZONE or journal.zone % BLOCK:
        raise CommandError(f"Keyslot {slots[0].id}: zones of {journal.zone} bytes, expected {BLOCK} to {ZONE}")
    if slots[0].area_size < journal.size:
        raise CommandError(f"Keyslot {slots[0].id}: area of {slots[0].area_size} bytes, expected {journal.size}")
    return journal


def add_journal(tree: dict[str, Any], payload_size: int, zone: int = ZONE) -> Journal:
    """Make the JSON of a new header that of a volume being encrypted; the journal ends the area of keyslots."""
    config = tree["config"]
    end = 2 * (int(config["json_size"]) + BLOCK) + int(config["keyslots_size"])
    journal = Journal(end - (3 * BLOCK + zone), zone, payload_size)
    tree["keyslots"][str(max(map(int, tree["keyslots"])) + 1)] = journal.slot()
    config["requirements"] = {"mandatory": [REQUIREMENT]}
    return journal


def drop_journal(tree: dict[str, Any]) -> None:
    """Make the JSON that of a finished volume, whatever else it holds."""
    mandatory = [name for name in tree["config"]["requirements"]["mandatory"] if name != REQUIREMENT]
    if mandatory:
        tree["config"]["requirements"]["mandatory"] = mandatory
    else:
        del tree["config"]["requirements"]
    for key in [key for key, slot in tree["keyslots"].items() if slot["type"] == SLOT_TYPE]:
        del tree["keyslots"][key]


def journal_key(volume_key: bytes | bytearray | memoryview, uuid: str) -> SecretBytes:
    """Return the key under which the journal of volume `uuid` is authenticated."""
    return SecretBytes(hmac.digest(volume_key, _KEY_LABEL + uuid.encode(), "sha256"))


def _checksum(key: SecretBytes, *parts: bytes | bytearray) -> bytes:
    with key.view() as view:
        plain = bytearray(view)
    work = hmac.new(plain, digestmod=hashlib.sha256)
    plain[:] = bytes(len(plain))
    for part in parts:
        work.update(part)
    return work.digest()


def _position_block(key: SecretBytes, sequence: int, position: int) -> bytes:
    block = _POSITION.pack(_POSITION_MAGIC, sequence, position, bytes(32))[:-32]
    return block + _checksum(key, block)


async def begin_journal(header: HeaderIO, journal: Journal, key: SecretBytes) -> None:
    """Prepare the journal of a new volume, whose header does not count yet. Raises OSError.

    All of it is written, so that no later write to it finds the disk full.
    """
    await header.pwrite(journal.offset, _position_block(key, 0, 0).ljust(journal.size, b"\0"))


@runtime_checkable
class EncryptingNode(Protocol):
    """A luks node as the job sees it.

    encryption   None once the volume is a plain one
    """

    encryption: Encryption | None

    async def finish_encryption(self) -> None:
        """Make a volume that is all ciphertext a plain one; runs on the data loop. Raises OSError."""


async def describe_progress(header: HeaderIO, journal: Journal) -> str:
    """Tell how far a volume says that it is, which only the volume key would prove. Raises OSError."""
    found = []
    for number in (0, 1):
        block = await header.pread(journal.offset + number * BLOCK, _POSITION.size)
        magic, sequence, position, _ = _POSITION.unpack(block)
        if magic == _POSITION_MAGIC:
            found.append((sequence, position))
    if not found:
        return "the volume is being encrypted in place; its journal does not say how far it came"
    return f"the volume is being encrypted in place: {max(found)[1]} of {journal.payload_size} bytes are"


class Encryption:
    """A payload on its way from plaintext to ciphertext.

    position   bytes that are ciphertext; what follows is plaintext still
    stuck      the zone at the position may be half overwritten: nobody sees it until `step` wrote it again
    worker     name of the job that is at work, None if there is none
    """

    def __init__(
        self, header: HeaderIO, payload: Child, crypto: BlockCrypto, journal: Journal, key: SecretBytes
    ) -> None:
        self._header, self._payload, self._crypto, self._key = header, payload, crypto, key
        self.journal = journal
        self.position = 0
        self.stuck = False
        self.worker: str | None = None
        self._sequence = 0
        self._zones = RangeTable()

    # --- the journal ------------------------------------------------------------------------------

    async def load(self) -> None:
        """Find out where a volume stands. Raises CommandError for a journal that is not its own, OSError."""
        size = self.journal.payload_size
        if self._payload.size != size:
            raise CommandError(f"The volume is being encrypted with {size} bytes of payload, not {self._payload.size}")
        found = []
        for number in (0, 1):
            block = await self._header.pread(self.journal.offset + number * BLOCK, _POSITION.size)
            magic, sequence, position, checksum = _POSITION.unpack(block)
            if magic == _POSITION_MAGIC and hmac.compare_digest(checksum, self._sum(block[:-32])):
                found.append((sequence, position))
        if not found:
            raise CommandError("The journal of the encryption in place is damaged: how far it came is not known")
        self._sequence, self.position = max(found)
        if self.position > size or (self.position % self.journal.zone and self.position != size):
            raise CommandError(f"The journal of the encryption in place is damaged: position {self.position} of {size}")
        self.stuck = await self._record() is not None

    async def _record(self) -> bytearray | None:
        """Return the ciphertext of the zone at the position, None if it has not been begun."""
        if self.position >= self.journal.payload_size:
            return None
        block = await self._header.pread(self.journal.offset + 2 * BLOCK, _RECORD.size)
        magic, offset, length, checksum = _RECORD.unpack(block)
        if magic != _RECORD_MAGIC or offset != self.position or length != self._length():
            return None
        data = await self._header.pread(self.journal.offset + 3 * BLOCK, length)
        return data if hmac.compare_digest(checksum, self._sum(block[:-32], data)) else None

    def _length(self) -> int:
        return min(self.journal.zone, self.journal.payload_size - self.position)

    def _sum(self, *parts: bytes | bytearray) -> bytes:
        return _checksum(self._key, *parts)

    async def _move(self, position: int) -> None:
        """Make a new position durable."""
        sequence = self._sequence + 1
        block = _position_block(self._key, sequence, position)
        await self._header.pwrite(self.journal.offset + sequence % 2 * BLOCK, block)
        await self._header.flush()
        self._sequence, self.position = sequence, position

    # --- work -------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """True when all is ciphertext."""
        return self.position >= self.journal.payload_size

    async def step(self) -> int:
        """Encrypt one zone, or write again the one that was interrupted; return the bytes it has.

        Raises OSError; the zone is then as it was, or stuck.
        """
        position, length = self.position, self._length()
        async with self._zones.own(position, position + length, exclusive=True):
            assert position == self.position, "two are at work"
            data = await self._record() if self.stuck else None
            if data is None:
                data = await self._payload.pread(position, length)
                with memoryview(data) as view:
                    await transform(self._crypto.encrypt, self._crypto.in_place([Request(position, view)]))
                self.stuck = True
                block = _RECORD.pack(_RECORD_MAGIC, position, length, bytes(32))[:-32]
                await self._header.pwrite(self.journal.offset + 3 * BLOCK, data)
                await self._header.pwrite(self.journal.offset + 2 * BLOCK, block + self._sum(block, data))
                await self._header.flush()
            await self._payload.pwrite(position, data)
            await self._payload.flush()
            await self._move(position + length)
            self.stuck = False
        return length

    async def clear(self) -> None:
        """Overwrite the journal of a finished volume. Raises OSError."""
        await self._header.pwrite(self.journal.offset, bytes(self.journal.size))
        await self._header.flush()

    def wipe(self) -> None:
        """Destroy the key."""
        self._key.wipe()

    # --- users ------------------------------------------------------------------------------------

    async def serve(self, batch: Batch, encrypted: Serve, plain: Serve) -> None:
        """Hand every part of a batch to who serves ciphertext or plaintext, with its zones locked.

        Parts in a stuck zone fail with EIO.
        """
        mine = await self._zones.acquire([(one.offset, one.end, False) for one in batch])
        try:
            low = self.position
            high = low + self._length() if self.stuck else low
            below, above = Batch(), Batch()
            for request in batch:
                if request.offset < high and request.end > low < high:
                    request.fail(errno.EIO)
                    continue
                if request.end <= low:
                    below.append(request)
                elif request.offset >= low:
                    above.append(request)
                else:
                    cut = low - request.offset
                    below.append(request.part(request.offset, 0, cut))
                    above.append(request.part(low, cut, len(request.view) - cut))
            if below:
                await encrypted(below)
            if above:
                await plain(above)
        finally:
            self._zones.release(mine)

    async def quiet(self, offset: int, length: int, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` with the zones of the range locked. Raises OSError, EIO for a stuck zone."""
        async with self._zones.own(offset, offset + length, exclusive=False):
            low = self.position
            if self.stuck and offset < low + self._length() and offset + length > low:
                raise OSError(errno.EIO, "the zone is half encrypted")
            await work()
