"""Headers put back from a backup, so that a crash at any byte leaves a volume that opens.

Over a header of the same volume the writes go in an order in which a passphrase of before or one of
the backup opens at every moment: something of the backup gets its place first where the old header has
nothing, if need be for the time of the work only; then it counts; then everything else follows. Over
anything else there is no such order: what is there stops being a header, and the new one comes last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from qmpd.errors import CommandError, ImageError
from qmpd.formats import luks1, luks2
from qmpd.formats.luks2_json import Metadata, dump_json
from qmpd.luks.backup import Bytes
from qmpd.luks.identity import Area, Parsed, other_volume, parse
from qmpd.luks.keys import place_slot
from qmpd.luks.keys2 import areas_of, find_gap, forget, read_both
from qmpd.luks.update2 import copied, write_copies
from qmpd.luks.volume import HeaderIO, read_padded
from qmpd.units import SECTOR, MiB, align_up

CHUNK = 1 * MiB
_HEADER = "header"


async def restore_header(target: HeaderIO, image: bytes, *, force: bool, known: Parsed | None = None) -> None:
    """Put the header in `image`, a whole backup, in place of the one on `target`.

    force    also over the header of another volume, and where no order of the writes survives a crash
    known    the header as the nodes that are open on it have read it: no other volume's takes its place
    Raises CommandError, ImageError for what is no backup, OSError.
    """
    source = Bytes(image)
    new = await parse(source, "backup")
    if new.length > len(image):
        raise CommandError(f"The backup has {len(image)} bytes, its header takes {new.length}")
    image = image[: new.length]
    if new.length > target.size:
        raise CommandError(f"The LUKS header takes {new.length} bytes, there are {target.size}")
    if new.requirements and not force:
        raise CommandError(f"The backup is of a volume at work (requirement '{new.requirements[0]}')")
    if not new.slots and not force:
        raise CommandError("The backup has no key slot in use: nothing would open the volume")
    try:
        old = await parse(target, _HEADER)
    except (CommandError, ImageError):
        old = None
    foreign = other_volume(new, known) if known is not None else []
    if foreign:
        raise CommandError(f"The backup is not of the volume that is open ({'; '.join(foreign)})")
    if old is None:
        await _replace(target, image, new)
        return
    foreign = other_volume(new, old)
    if foreign and not force:
        raise CommandError(f"The backup is of another volume ({'; '.join(foreign)})")
    if old.requirements and not force:
        raise CommandError(f"The volume is at work (requirement '{old.requirements[0]}'): a backup would undo it")
    if old.payload_offset and new.length > old.payload_offset:
        raise CommandError(f"The backup's header of {new.length} bytes would cover payload at {old.payload_offset}")
    if foreign or old.requirements:
        await _replace(target, image, new)
    elif new.luks1 is not None:
        assert old.luks1 is not None
        if _layout(old.luks1) == _layout(new.luks1):
            await _restore_luks1(target, image, old.luks1, new.luks1)
        elif force:
            await _replace(target, image, new)
        else:
            raise CommandError("The backup has its key slots elsewhere: no order of writes would survive a crash")
    else:
        await _Restore2(target, image, new, force=force).run()


async def _replace(target: HeaderIO, image: bytes, new: Parsed) -> None:
    """Write all of a header; until its end there is none."""
    for place in (0, *luks2.COPY_SIZES):
        if place + luks2.BINARY_SIZE <= new.length:
            await target.pwrite(place, bytes(luks2.BINARY_SIZE))
    await target.flush()
    if new.luks1 is not None:
        await _copy(target, image, luks1.ALIGNMENT, new.length)
        await target.flush()
        await target.pwrite(0, image[: luks1.ALIGNMENT])
        await target.flush()
        return
    assert new.luks2 is not None
    copy = new.luks2.copy
    size = copy.binary.hdr_size
    await _copy(target, image, 2 * size, new.length)
    await target.flush()
    for place in (0, size):
        await target.pwrite(place, luks2.pack_copy(copy.binary, dump_json(copy.metadata.tree), place))
        await target.flush()


async def _copy(target: HeaderIO, image: bytes, start: int, end: int) -> None:
    for at in range(start, end, CHUNK):
        await target.pwrite(at, image[at : min(at + CHUNK, end)])


# --- LUKS1 ------------------------------------------------------------------------------------------


def _layout(header: luks1.Luks1Header) -> object:
    """Return all that is not in the slots, and where they have their material."""
    return header.phdr.pack(), [(slot.material_sector, slot.stripes) for slot in header.slots]


async def _restore_luks1(target: HeaderIO, image: bytes, old: luks1.Luks1Header, new: luks1.Luks1Header) -> None:
    """Slot by slot; a slot of the backup opens before the last one of before goes."""
    length = align_up(new.material_length, SECTOR)

    def material(index: int) -> bytes:
        at = new.slots[index].material_offset
        return image[at : at + length]

    same = set()
    for index in range(luks1.SLOTS):
        stored = await read_padded(target, old.slots[index].material_offset, length)
        if old.slots[index] == new.slots[index] and stored == material(index):
            same.add(index)
    wanted = [index for index, slot in enumerate(new.slots) if slot.enabled]
    free = [index for index, slot in enumerate(old.slots) if not slot.enabled]
    order = [index for index in range(luks1.SLOTS) if index not in same]
    if wanted and not any(index in same for index in wanted):
        direct = [index for index in wanted if index in free]
        first = direct[0] if direct else wanted[0]
        order.remove(first)
        if not direct and free:  # a place for the time being, which is made what it should be at the end
            spare = free[0]
            held = replace(new.slots[first], material_sector=new.slots[spare].material_sector)
            await place_slot(target, new.with_slot(spare, held), spare, material(first), None)
            order = [index for index in order if index != spare] + [spare]
        await place_slot(target, new, first, material(first), None)
    for index in order:
        await place_slot(target, new, index, material(index), None)


# --- LUKS2 ------------------------------------------------------------------------------------------


class _Restore2:
    """Both copies and the key slots of a LUKS2 header, over those of the same volume."""

    def __init__(self, target: HeaderIO, image: bytes, new: Parsed, *, force: bool) -> None:
        assert new.luks2 is not None
        self.target, self.image, self.parsed, self.force = target, image, new, force
        self.new: luks2.Copy = new.luks2.copy
        self.spare: Area | None = None

    async def run(self) -> None:
        """Restore. Raises CommandError if no order of the writes survives a crash, OSError."""
        old = await self._whole()
        now, then = old.copy.metadata, self.new.metadata
        if old.copy.binary.hdr_size != self.new.binary.hdr_size or now.keyslots_size != then.keyslots_size:
            if not self.force:
                raise CommandError("The backup has copies or a keyslot area of another size")
            await _replace(self.target, self.image, self.parsed)
            return
        if not self.parsed.slots:  # asked for by force: nothing opens afterwards
            await self._finish()
            await self._fill(0)
            return
        tree = await self._first_step(old)
        if tree is None:
            await _replace(self.target, self.image, self.parsed)
            return
        await write_copies(self.target, await read_both(self.target), tree, _HEADER)
        await self._fill(len(tree["keyslots"]))
        await self._finish()

    async def _whole(self) -> luks2.Found:
        """Return the header, both of whose copies are made to say the same first."""
        found = await read_both(self.target)
        if found.problem is not None:
            await write_copies(self.target, found, found.copy.metadata.tree, _HEADER)
            found = await read_both(self.target)
        return found

    async def _first_step(self, old: luks2.Found) -> dict[str, Any] | None:
        """Put slots of the backup where nothing is, and return the JSON with those alone; None: by force only.

        If that takes the place of slots of before, these go, all but one. Nothing is written unless it works out.
        """
        metadata = old.copy.metadata
        digests = [digest for digest in metadata.digests.values() if digest.segments]
        ids = sorted({key for digest in digests for key in digest.keyslots}, key=int)
        for count in range(max(len(ids), 1)):
            gone = ids[len(ids) - count :]
            kept = [slot for key, slot in metadata.keyslots.items() if key not in gone]
            taken = sorted((slot.area_offset, slot.area_size) for slot in kept)
            ready = [number for number, area in self.parsed.slots.items() if await self._ready(area, taken)]
            spare = None if ready else self._spare(metadata, taken)
            if not ready and spare is None:
                continue
            if gone:
                tree = copied(metadata.tree)
                for key in gone:
                    forget(tree, key)
                await write_copies(self.target, old, tree, _HEADER)
            return await self._place(ready) if spare is None else await self._place_spare(*spare)
        if self.force:
            return None
        raise CommandError("The keyslot area has no room for an order of writes that survives a crash")

    async def _ready(self, area: Area, taken: list[Area]) -> bool:
        """Say whether what the backup has in `area` can be there without harm, or is."""
        offset, size = area
        if not any(offset < at + length and at < offset + size for at, length in taken):
            return True
        return await read_padded(self.target, offset, size) == self.image[offset : offset + size]

    async def _place(self, ready: list[int]) -> dict[str, Any]:
        for number in ready:
            offset, size = self.parsed.slots[number]
            await _copy(self.target, self.image, offset, offset + size)
        await self.target.flush()
        return self._tree_of(ready)

    def _spare(self, now: Metadata, taken: list[Area]) -> tuple[int, Area] | None:
        """Return a slot of the backup and a place for the time being, None if there is none."""
        number = min(self.parsed.slots, key=lambda one: self.parsed.slots[one][1])
        size = self.parsed.slots[number][1]
        try:
            place, length = find_gap(now, self.new.metadata.keyslots[str(number)].key_size, taken)
        except CommandError:
            return None
        return number, (place, min(length, size))

    async def _place_spare(self, number: int, spare: Area) -> dict[str, Any]:
        self.spare = spare
        place, length = spare
        start = self.parsed.slots[number][0]
        for at in range(0, length, CHUNK):
            end = min(at + CHUNK, length)
            await self.target.pwrite(place + at, self.image[start + at : start + end])
        await self.target.flush()
        tree = self._tree_of([number])
        tree["keyslots"][str(number)]["area"] |= {"offset": str(place), "size": str(length)}
        return tree

    def _tree_of(self, keep: Iterable[int]) -> dict[str, Any]:
        """Return the backup's JSON with no other slots than `keep`."""
        tree = copied(self.new.metadata.tree)
        for key in list(tree["keyslots"]):
            if int(key) not in keep:
                forget(tree, key)
        return tree

    async def _fill(self, keep: int) -> None:
        """Write the keyslot area of the backup, but for what the header now refers to (`keep` slots): that is right."""
        at = 2 * self.new.metadata.metadata_size
        now = await read_both(self.target)
        for offset, size in areas_of(now.copy.metadata) if keep else []:
            await _copy(self.target, self.image, at, offset)
            at = offset + size
        await _copy(self.target, self.image, at, self.parsed.length)
        await self.target.flush()

    async def _finish(self) -> None:
        """Make the backup's own header count, then give back what was used meanwhile."""
        now = await read_both(self.target)
        binary = replace(self.new.binary, seqid=now.copy.binary.seqid)
        found = luks2.Found(replace(self.new, binary=binary), now.problem)
        await write_copies(self.target, found, self.new.metadata.tree, _HEADER)
        if self.spare is not None:
            await _copy(self.target, self.image, self.spare[0], sum(self.spare))
            await self.target.flush()
