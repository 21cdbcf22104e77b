"""What state a LUKS header is in: both copies, every key slot, how strong its derivation is, what we do not know.

Nothing is written, and no passphrase is needed; with one, the slots that it opens are named. The look at
key material is that of cryptsetup's keyslot checker: anti-forensic stripes, encrypted, look like noise, so
a sector that does not has been overwritten. Noise written over it shows only in that nothing opens the slot.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from qmpd.aio.pool import in_work_thread
from qmpd.crypto import af
from qmpd.crypto.kdf import check_pbkdf2_iterations
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError, ImageError, QmpdError
from qmpd.formats import luks1, luks2
from qmpd.formats.luks2_json import Keyslot, Metadata
from qmpd.luks import policy
from qmpd.luks.detect import is_luks2
from qmpd.luks.encrypt import SLOT_TYPE, describe_progress
from qmpd.luks.keys2 import areas_of, read_both
from qmpd.luks.luks2 import Luks2Volume, check_cost
from qmpd.luks.volume import HeaderIO, Luks1Volume, Volume, read_padded
from qmpd.units import SECTOR, align_up

MIN_ENTROPY = 0.9
"""Of a sector's bytes, 1 being the most there can be; noise has 0.93 to 0.97 in a sector of 512."""

MIN_PBKDF2 = {"sha1": 1_300_000, "sha256": 600_000, "sha512": 210_000}
MIN_PBKDF2_OTHER = 600_000
MIN_ARGON2_WORK = 2 * 19 * 1024
"""Below these rounds, or KiB times passes, a slot is called weak (OWASP Password Storage, 2023)."""


@dataclass(slots=True)
class SlotReport:
    """One key slot; what does not apply is None.

    active    gives the volume's key        known   of a kind and a derivation that we can use
    damage    what is wrong with it         weakness   what makes its passphrase cheap to guess
    opens     whether the passphrase given opens it
    """

    slot: int
    active: bool
    type: str = "luks1"
    known: bool = True
    pbkdf: str | None = None
    iters: int | None = None
    pbkdf_memory: int | None = None
    pbkdf_parallel: int | None = None
    priority: int | None = None
    damage: str | None = None
    weakness: str | None = None
    opens: bool | None = None


@dataclass(slots=True)
class CopyReport:
    """One of the copies of a LUKS2 header; `problem` is what is wrong with it."""

    offset: int
    problem: str | None = None
    seqid: int | None = None


@dataclass(slots=True)
class Report:
    """What was found; `problems` is empty for a header that is well, `notes` are for whoever keeps it."""

    version: int | None = None
    uuid: str | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    copies: list[CopyReport] = field(default_factory=list)
    slots: list[SlotReport] = field(default_factory=list)
    tokens: int = 0
    requirements: list[str] = field(default_factory=list)
    free: int | None = None

    def to_qapi(self) -> dict[str, Any]:
        """Return LuksHeaderReport (wire names)."""
        info: dict[str, Any] = {"healthy": not self.problems, "problems": self.problems, "notes": self.notes}
        for name in ("version", "uuid", "free"):
            if getattr(self, name) is not None:
                info[name] = getattr(self, name)
        info["slots"] = [_wire(slot, SlotReport) for slot in self.slots]
        if self.version == luks2.VERSION:
            info |= {
                "copies": [_wire(copy, CopyReport) for copy in self.copies],
                "tokens": self.tokens,
                "requirements": self.requirements,
            }
        return info


def _wire(one: object, kind: type) -> dict[str, Any]:
    names: tuple[str, ...] = kind.__slots__  # type: ignore[attr-defined]
    return {name.replace("_", "-"): getattr(one, name) for name in names if getattr(one, name) is not None}


async def verify_header(source: HeaderIO, passphrase: SecretBytes | None = None) -> Report:
    """Look at the header on `source`, of either version. Raises OSError, and CommandError for costs beyond limits."""
    report = Report()
    try:
        if await is_luks2(source):
            report.version = luks2.VERSION
            await _verify_luks2(source, report, passphrase)
        else:
            await _verify_luks1(source, report, passphrase)
    except (ImageError, CommandError) as error:
        if not report.problems:  # those of the copies say more
            report.problems.append(str(error))
        return report
    _sum_up(report, passphrase)
    return report


def _sum_up(report: Report, passphrase: SecretBytes | None) -> None:
    for slot in report.slots:
        if slot.damage is not None:
            report.problems.append(f"slot {slot.slot}: {slot.damage}")
        if slot.weakness is not None:
            report.notes.append(f"slot {slot.slot} is weak: {slot.weakness}")
        if not slot.known and slot.type != SLOT_TYPE:
            report.notes.append(f"slot {slot.slot} is of a kind that is not known: type '{slot.type}'")
    if not any(slot.active for slot in report.slots):
        report.problems.append("no key slot gives the volume's key")
    if passphrase is not None and not any(slot.opens for slot in report.slots):
        report.problems.append("the passphrase opens no slot")


def _hold_to_policy(volume: Volume, hash_name: str, rounds: int, report: Report) -> None:
    try:
        digest = policy.Cost("pbkdf2", hash_name, rounds)
        policy.current().check(volume.version, volume.spec, digest, volume.costs())
    except CommandError as error:
        report.notes.append(str(error))


async def _verify_luks1(source: HeaderIO, report: Report, passphrase: SecretBytes | None) -> None:
    header = luks1.parse_header(await read_padded(source, 0, luks1.HEADER_SIZE), detached=True)
    report.version, report.uuid = luks1.VERSION, header.uuid
    volume = Luks1Volume(header)
    _hold_to_policy(volume, header.hash, header.phdr.mk_digest_iterations, report)
    length = align_up(header.material_length, SECTOR)
    for number, slot in enumerate(header.slots):
        row = SlotReport(number, slot.enabled)
        report.slots.append(row)
        if not slot.enabled:
            continue
        row.pbkdf, row.iters = "pbkdf2", slot.iterations
        row.weakness = _weak_pbkdf2(header.hash, slot.iterations)
        if slot.material_offset + length > source.size:
            row.damage = f"its key material ends at {slot.material_offset + length}, behind the end at {source.size}"
            continue
        row.damage = await _damage(source, slot.material_offset, header.material_length)
        if passphrase is not None:
            check_pbkdf2_iterations(slot.iterations, f"Keyslot {number}")
            check_pbkdf2_iterations(header.phdr.mk_digest_iterations, "The volume key digest")
            row.opens = _opened(await volume.try_slot(source, number, passphrase))


async def _verify_luks2(source: HeaderIO, report: Report, passphrase: SecretBytes | None) -> None:
    report.copies = await _copies(source)
    report.problems += [
        f"the {'secondary' if copy.offset else 'primary'} header is damaged: {copy.problem}"
        for copy in report.copies
        if copy.problem is not None
    ]
    found = await read_both(source)
    if found.problem is not None and not report.problems:
        report.problems.append(found.problem)
    metadata = found.copy.metadata
    report.uuid, report.tokens = found.copy.uuid, len(metadata.tokens)
    report.requirements = list(metadata.requirements)
    report.notes += [f"the volume requires '{name}'" for name in metadata.requirements]
    report.free = metadata.keyslots_size - sum(size for _, size in areas_of(metadata))
    volume: Luks2Volume | None = None
    try:
        volume = Luks2Volume(found)
        _hold_to_policy(volume, volume.digest.hash, volume.digest.iterations, report)
        if volume.journal is not None:
            report.notes.append(await describe_progress(source, volume.journal))
    except QmpdError as error:  # valid, but nothing that we open
        report.notes.append(str(error))
    ids = {key for digest in metadata.digests.values() if digest.segments for key in digest.keyslots}
    for slot in sorted(metadata.keyslots.values(), key=lambda one: int(one.id)):
        report.slots.append(await _verify_slot(source, metadata, slot, slot.id in ids, volume, passphrase))


async def _verify_slot(
    source: HeaderIO,
    metadata: Metadata,
    slot: Keyslot,
    active: bool,
    volume: Luks2Volume | None,
    passphrase: SecretBytes | None,
) -> SlotReport:
    kdf = slot.kdf
    row = SlotReport(int(slot.id), active, slot.type, known=kdf is not None and bool(kdf.salt))
    if kdf is None:
        return row
    row.pbkdf, row.priority = kdf.type, slot.priority
    if kdf.salt:
        row.iters = kdf.iterations or kdf.time
    if kdf.type == "pbkdf2":
        row.weakness = _weak_pbkdf2(kdf.hash, kdf.iterations)
    elif kdf.memory:
        row.pbkdf_memory, row.pbkdf_parallel = kdf.memory, kdf.cpus
        if kdf.memory * kdf.time < MIN_ARGON2_WORK:
            row.weakness = f"{kdf.type} passes {kdf.time} times over {kdf.memory} KiB"
    length = slot.key_size * slot.stripes
    if length > min(slot.area_size, af.MAX_MATERIAL):
        row.damage = f"its area has {slot.area_size} bytes, its key material takes {length}"
        return row
    row.damage = await _damage(source, slot.area_offset, length)
    if passphrase is not None and volume is not None and row.known and slot.id in volume.digest.keyslots:
        check_pbkdf2_iterations(volume.digest.iterations, "The volume key digest")
        check_cost(slot)
        row.opens = _opened(await volume.try_slot(source, slot, passphrase))
    return row


def _opened(key: bytearray | None) -> bool:
    if key is None:
        return False
    key[:] = bytes(len(key))
    return True


async def _copies(source: HeaderIO) -> list[CopyReport]:
    """Look at both copies; one that cannot be told the place of is looked for where it may be."""
    rows = [await _copy(source, 0)]
    sizes = luks2.COPY_SIZES
    binary = luks2.BinaryHeader.unpack_from(await read_padded(source, 0, luks2.BINARY_SIZE))
    if binary.magic == luks2.MAGIC[0] and binary.hdr_size in sizes:
        sizes = (binary.hdr_size,)
    places = [place for place in sizes if await read_padded(source, place, 6) == luks2.MAGIC[1]]
    others = [await _copy(source, place) for place in places or sizes[:1]]
    rows.append(next((row for row in others if row.problem is None), others[0]))
    known = {row.seqid for row in rows if row.problem is None}
    for row in rows:
        if row.problem is None and row.seqid != max(known, key=lambda seqid: seqid or 0):
            row.problem = f"of sequence id {row.seqid}, the other copy is newer"
    return rows


async def _copy(source: HeaderIO, offset: int) -> CopyReport:
    row = CopyReport(offset)
    try:
        size = luks2.parse_binary(await read_padded(source, offset, luks2.BINARY_SIZE), offset, "header").hdr_size
        copy = luks2.parse_copy(await read_padded(source, offset, size), offset, "header")
    except ImageError as error:
        return replace(row, problem=str(error))
    return replace(row, seqid=copy.binary.seqid)


def _weak_pbkdf2(hash_name: str, rounds: int) -> str | None:
    least = MIN_PBKDF2.get(hash_name, MIN_PBKDF2_OTHER)
    return f"{rounds} rounds of pbkdf2 with {hash_name}, {least} are advised" if rounds < least else None


async def _damage(source: HeaderIO, offset: int, length: int) -> str | None:
    """Return where key material does not look like noise, None if all of it does."""
    material = await read_padded(source, offset, length)

    def look() -> int | None:
        whole = range(0, length // SECTOR * SECTOR, SECTOR)
        return next((at for at in whole if entropy(material[at : at + SECTOR]) < MIN_ENTROPY), None)

    found = await in_work_thread(look)
    return None if found is None else f"its key material is damaged at byte {offset + found}: the sector is not random"


def entropy(data: bytes | bytearray) -> float:
    """Return the entropy of the bytes of `data`, as a share of the 8 bits that there can be."""
    total = len(data)
    return -sum(count / total * math.log2(count / total) for count in Counter(data).values()) / 8
