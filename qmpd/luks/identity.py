"""Which volume a header belongs to, whatever its version, and how two headers differ."""

from __future__ import annotations

from dataclasses import dataclass

from qmpd.formats import luks1, luks2
from qmpd.luks.backup import luks1_length
from qmpd.luks.detect import is_luks2
from qmpd.luks.keys2 import read_both
from qmpd.luks.luks2 import Luks2Volume
from qmpd.luks.volume import HeaderIO, Luks1Volume, Volume, read_padded
from qmpd.units import SECTOR, align_up

Area = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Parsed:
    """A header of either version that passed every check of its format.

    luks1, luks2     the one that it is
    uuid             of the volume
    digests          what proves the volume's keys: salt and digest of each, in order
    payload_offset   bytes, 0 for a header that lies apart
    encryption       of the payload, cryptsetup's words: cipher, mode, vectors, bytes of key, of a sector
    length           bytes of header, key slots included
    requirements     LUKS2: what a program must know to open the volume
    slots            the areas of the slots that give the volume's key, by number
    """

    luks1: luks1.Luks1Header | None
    luks2: luks2.Found | None
    uuid: str
    digests: tuple[tuple[bytes | str, bytes | str], ...]
    payload_offset: int
    encryption: str
    length: int
    requirements: tuple[str, ...]
    slots: dict[int, Area]

    @property
    def version(self) -> int:
        """1 or 2."""
        return 1 if self.luks1 is not None else 2


async def parse(source: HeaderIO, image: str = "header") -> Parsed:
    """Return the header on `source`, wherever its payload lies. Raises CommandError, ImageError, OSError."""
    if await is_luks2(source):
        return _of_luks2(await read_both(source, image))
    return _of_luks1(luks1.parse_header(await read_padded(source, 0, luks1.HEADER_SIZE), detached=True))


def of_volume(volume: Volume) -> Parsed:
    """Return the header of a volume that is open."""
    if isinstance(volume, Luks2Volume):
        return _of_luks2(luks2.Found(volume.copy, None))
    assert isinstance(volume, Luks1Volume)
    return _of_luks1(volume.header)


def _of_luks1(header: luks1.Luks1Header) -> Parsed:
    phdr = header.phdr
    material = align_up(header.material_length, SECTOR)
    return Parsed(
        header,
        None,
        header.uuid,
        ((phdr.mk_digest_salt, phdr.mk_digest),),
        header.payload_offset,
        f"{luks1.text_of(phdr.cipher_name)}-{luks1.text_of(phdr.cipher_mode)}, {phdr.key_bytes}, {SECTOR}",
        luks1_length(header),
        (),
        {number: (slot.material_offset, material) for number, slot in enumerate(header.slots) if slot.enabled},
    )


def _of_luks2(found: luks2.Found) -> Parsed:
    metadata = found.copy.metadata
    segments = [segment for segment in metadata.segments.values() if not segment.backup]
    segments.sort(key=lambda segment: int(segment.id))
    digests = [one for one in metadata.digests.values() if one.segments]
    ids = {key for digest in digests for key in digest.keyslots}
    slots = {int(key): slot for key, slot in metadata.keyslots.items() if key in ids and slot.kdf is not None}
    lengths = sorted({slot.key_size for slot in slots.values()})
    words = [f"{one.encryption or one.type}, {one.sector_size}" for one in segments]
    return Parsed(
        None,
        found,
        found.copy.uuid,
        tuple(sorted((digest.salt, digest.digest) for digest in digests)),
        segments[0].offset,
        f"{'; '.join(words)}, {lengths}",
        metadata.total_size,
        metadata.requirements,
        {number: (slot.area_offset, slot.area_size) for number, slot in slots.items()},
    )


def other_volume(one: Parsed, two: Parsed) -> list[str]:
    """Return what shows that two headers are not of one volume, in words; empty if they are."""
    found = []
    if one.version != two.version:
        found.append(f"LUKS version {one.version}, not {two.version}")
    if one.uuid != two.uuid:
        found.append(f"uuid {one.uuid}, not {two.uuid}")
    if one.version == two.version and one.digests != two.digests:
        found.append("another volume key")
    if one.payload_offset != two.payload_offset:
        found.append(f"payload at {one.payload_offset}, not {two.payload_offset}")
    if one.version == two.version and one.slots and two.slots and one.encryption != two.encryption:
        found.append(f"encryption {one.encryption}, not {two.encryption}")
    return found


async def compare(one: HeaderIO, two: HeaderIO) -> list[str]:
    """Return how two headers differ, in words: the volume first, then slot by slot. Raises as `parse`."""
    first, second = await parse(one, "first header"), await parse(two, "second header")
    found = other_volume(first, second)
    if first.version != second.version:
        return found
    for number in sorted(first.slots.keys() | second.slots.keys()):
        if number not in second.slots or number not in first.slots:
            found.append(f"slot {number} is in use in the {'first' if number in first.slots else 'second'} header only")
        elif _entry(first, number) != _entry(second, number):
            found.append(f"slot {number} differs")
        elif await _material(one, first, number) != await _material(two, second, number):
            found.append(f"the key material of slot {number} differs")
    if first.luks2 is not None and second.luks2 is not None:
        trees = [dict(one.copy.metadata.tree) for one in (first.luks2, second.luks2)]
        for name in sorted({*trees[0], *trees[1]} - {"keyslots", "digests"}):
            if trees[0].get(name) != trees[1].get(name):
                found.append(f"{name} differ")
    return found


def _entry(header: Parsed, number: int) -> object:
    if header.luks1 is not None:
        return header.luks1.slots[number]
    assert header.luks2 is not None
    return header.luks2.copy.metadata.tree["keyslots"][str(number)]


async def _material(source: HeaderIO, header: Parsed, number: int) -> bytearray:
    return await read_padded(source, *header.slots[number])
