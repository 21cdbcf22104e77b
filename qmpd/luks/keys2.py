"""Key slots of a LUKS2 header added, changed and erased, so that a crash at any byte locks nobody out.

A passphrase is added by writing its key material where no slot of either copy has any, flush, unlocking
it from there, and only then both copies of the JSON that names it, one after the other. Changing one is
the same, but for the JSON, which then names the new place in the old slot: from one write to the next
the old passphrase is out and the new one in. What is erased leaves both copies, then its material is
overwritten. Digests follow; tokens lose their references to slots that are gone, as in cryptsetup, and
stay as they are otherwise, like all that we do not know.
"""

from __future__ import annotations

import os
from typing import Any

from qmpd.crypto.kdf import check_pbkdf2_iterations
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError, ImageError
from qmpd.formats import luks2
from qmpd.formats.luks2_json import MAX_OBJECTS, STRIPES, Metadata, dump_json
from qmpd.luks.create2 import AREA_ALIGNMENT, Luks2Options, costs_for, seal
from qmpd.luks.edits import KeyslotEdit, Passphrase, choose_slots, not_overwritten
from qmpd.luks.luks2 import Luks2Volume, check_cost, read_copies
from qmpd.luks.update2 import copied, write_copies
from qmpd.luks.volume import HeaderIO, read_padded
from qmpd.units import MiB, align_up

Area = tuple[int, int]
"""Offset and length in bytes."""

WIPE_CHUNK = 1 * MiB

_HEADER = "header"


async def edit_luks2(
    target: HeaderIO, edit: KeyslotEdit, passphrase: Passphrase, unlock_with: str | None, *, detached: bool, force: bool
) -> None:
    """Carry out one edit; see `keys.edit_keyslots`."""
    found = await read_both(target)
    volume = Luks2Volume(found)
    if not detached and volume.payload_offset < found.copy.metadata.total_size:
        raise CommandError("LUKS payload is overlapping with the header")
    if volume.journal is not None:
        raise CommandError("Key slots cannot be changed while the volume is being encrypted in place")
    edit.check(MAX_OBJECTS)
    work = _Edit(target, found, volume, edit, passphrase, force=force)
    if edit.state == "inactive":
        await work.erase(await work.chosen())
    else:
        await work.add(edit.unlocking(unlock_with))


async def read_both(target: HeaderIO, image: str = _HEADER) -> luks2.Found:
    """Like `read_copies`; two copies of one age that say different things are found out as well."""
    found = await read_copies(target, image)
    if found.problem is not None:
        return found
    size = found.copy.binary.hdr_size
    other = 0 if found.copy.binary.hdr_offset else size
    try:
        twin = luks2.parse_copy(await read_padded(target, other, size), other, image)
    except ImageError as error:
        return luks2.Found(found.copy, f"one copy of the header is damaged: {error}")
    if twin.metadata.tree != found.copy.metadata.tree:
        return luks2.Found(found.copy, "the copies of the header differ")
    return found


class _Edit:
    """One edit under way."""

    def __init__(
        self,
        target: HeaderIO,
        found: luks2.Found,
        volume: Luks2Volume,
        edit: KeyslotEdit,
        passphrase: Passphrase,
        *,
        force: bool,
    ) -> None:
        self.target, self.found, self.volume, self.edit = target, found, volume, edit
        self.passphrase, self.force = passphrase, force
        self.metadata: Metadata = found.copy.metadata
        self.active = sorted(int(key) for key in volume.digest.keyslots)

    async def chosen(self) -> list[int]:
        """Return the slots that are erased or replaced. Raises CommandError, OSError."""
        edit = self.edit
        matching: list[int] = []
        if edit.old_secret is not None:
            with self.passphrase(edit.old_secret) as old:
                for index in self.active if edit.keyslot is None else [edit.keyslot]:
                    if index in self.active and await self._opens(index, old):
                        matching.append(index)
        used = [int(key) for key in self.metadata.keyslots]
        slots = choose_slots(edit, self.active, used, matching, force=self.force)
        for index in slots:
            slot = self.metadata.keyslots.get(str(index))
            if slot is not None and slot.kdf is None and not self.force:
                raise CommandError(f"Keyslot {index} is of type '{slot.type}' and may hold what others need")
            if slot is not None and edit.state == "changed" and index not in self.active:
                raise CommandError(f"Keyslot {index} does not hold the key of this volume")
        return slots

    async def _opens(self, index: int, passphrase: SecretBytes) -> bool:
        slot = self.metadata.keyslots[str(index)]
        if slot.kdf is None or not slot.kdf.salt:
            return False
        check_pbkdf2_iterations(self.volume.digest.iterations, "The volume key digest")
        check_cost(slot)
        key = await self.volume.try_slot(self.target, slot, passphrase)
        if key is None:
            return False
        key[:] = bytes(len(key))
        return True

    # --- adding -------------------------------------------------------------------------------------

    def _free_slot(self) -> int:
        """Return the slot for a new passphrase, or the one that it replaces by force. Raises CommandError."""
        index = self.edit.keyslot
        used = {int(key) for key in self.metadata.keyslots}
        if index is None:
            index = next((i for i in range(MAX_OBJECTS) if i not in used), None)
            if index is None:
                raise CommandError("Can't add a keyslot - all keyslots are in use")
        elif index in used:
            if not self.force:
                raise CommandError(f"Refusing to overwrite active keyslot {index} - please erase it first")
            if index not in self.active:
                raise CommandError(f"Keyslot {index} does not hold the key of this volume")
        return index

    async def add(self, unlock_with: str) -> None:
        """Add a passphrase, or put it in place of others. Raises CommandError, OSError."""
        edit = self.edit
        options = Luks2Options(
            hash_alg=self.volume.digest.hash,
            iter_time=edit.iter_time,
            iterations=edit.iterations,
            pbkdf=edit.pbkdf,
            pbkdf_memory=edit.pbkdf_memory,
            pbkdf_parallel=edit.pbkdf_parallel,
        )
        options.checked()
        changing = edit.state == "changed"
        index = -1 if changing else self._free_slot()
        if not changing:
            find_gap(self.metadata, self.volume.spec.key_length)
        with self.passphrase(unlock_with) as current:
            unlocked = await self.volume.unlock(self.target, current)
        try:
            replaced: list[int] = []
            if changing:
                replaced = await self.chosen()
                index = replaced[0]
            elif index in self.active:
                replaced = [index]
            costs = await costs_for(options)
            assert edit.new_secret is not None
            with self.passphrase(edit.new_secret) as new:
                slot, material = await seal(unlocked.key, new, costs, options.hash, 0)
                await self._make_room(replaced)
                slot["area"]["offset"] = str(find_gap(self.metadata, self.volume.spec.key_length)[0])
                await self._store(index, slot, material, new, replaced)
        finally:
            unlocked.wipe()

    async def _make_room(self, replaced: list[int]) -> None:
        """Where there is none, erase what will be replaced first, if something is left that opens the volume."""
        try:
            find_gap(self.metadata, self.volume.spec.key_length)
        except CommandError:
            if not replaced or set(self.active) <= set(replaced):
                raise
            await self.erase(replaced)
            self.found = await read_both(self.target)
            self.metadata = self.found.copy.metadata

    async def _store(
        self, index: int, slot: dict[str, Any], material: bytearray, new: SecretBytes, replaced: list[int]
    ) -> None:
        """Write the material, see that it opens, then both copies, then overwrite what was replaced."""
        tree = copied(self.metadata.tree)
        before = self.volume.metadata.tree  # of which a slot may have been erased to make room
        if "priority" in before["keyslots"].get(str(index), {}):
            slot["priority"] = before["keyslots"][str(index)]["priority"]
        for key, token in before["tokens"].items():
            if str(index) in token["keyslots"]:
                tree["tokens"][key]["keyslots"] = token["keyslots"]
        tree["keyslots"][str(index)] = slot
        self._digest(tree)["keyslots"] = _with(self._digest(tree)["keyslots"], str(index))
        for other in replaced:
            if other != index:
                forget(tree, str(other))
        fresh = luks2.Found(_as_copy(self.found.copy, tree), None)
        await self.target.pwrite(int(slot["area"]["offset"]), material)
        await self.target.flush()
        stored = fresh.copy.metadata.keyslots[str(index)]
        key = await Luks2Volume(fresh).try_slot(self.target, stored, new)
        if key is None:
            raise CommandError(f"Keyslot {index} does not open after it was written; it stays unused")
        key[:] = bytes(len(key))
        await write_copies(self.target, self.found, tree, _HEADER)
        await self._overwrite(replaced)

    def _digest(self, tree: dict[str, Any]) -> dict[str, Any]:
        digest: dict[str, Any] = tree["digests"][self.volume.digest.id]
        return digest

    # --- erasing ------------------------------------------------------------------------------------

    async def erase(self, slots: list[int]) -> None:
        """Erase slots: out of both copies first, then their material. Raises CommandError, OSError."""
        tree = copied(self.metadata.tree)
        for index in slots:
            forget(tree, str(index))
        await write_copies(self.target, self.found, tree, _HEADER)
        await self._overwrite(slots)

    async def _overwrite(self, slots: list[int]) -> None:
        for index in slots:
            slot = self.metadata.keyslots.get(str(index))
            if slot is None:
                continue
            try:
                await overwrite(self.target, (slot.area_offset, slot.area_size))
            except OSError as error:
                raise not_overwritten(index, error) from error


def _with(ids: list[str], key: str) -> list[str]:
    return ids if key in ids else sorted([*ids, key], key=int)


def forget(tree: dict[str, Any], key: str) -> None:
    """Take a keyslot and all references to it out of a tree."""
    tree["keyslots"].pop(key, None)
    for section in ("digests", "tokens"):
        for one in tree.get(section, {}).values():
            if key in one["keyslots"]:
                one["keyslots"] = [other for other in one["keyslots"] if other != key]


def _as_copy(copy: luks2.Copy, tree: dict[str, Any]) -> luks2.Copy:
    """Return what `tree` will be once it is written, every rule checked. Raises CommandError, ImageError."""
    try:
        data = luks2.pack_copy(copy.binary, dump_json(tree), 0)
    except ValueError as error:
        raise CommandError(f"The header has no room left: {error}") from error
    return luks2.parse_copy(data, 0, _HEADER)


async def overwrite(target: HeaderIO, area: Area) -> None:
    """Fill an area with random bytes and flush. Raises OSError."""
    offset, length = area
    length = max(0, min(length, target.size - offset))
    for at in range(offset, offset + length, WIPE_CHUNK):
        await target.pwrite(at, os.urandom(min(WIPE_CHUNK, offset + length - at)))
    await target.flush()


def areas_of(metadata: Metadata) -> list[Area]:
    """Return the areas of all keyslots, whatever their kind, in order of place."""
    return sorted((slot.area_offset, slot.area_size) for slot in metadata.keyslots.values())


def area_length(key_length: int) -> int:
    """Return the bytes that the area of a slot takes for a volume key of `key_length` bytes."""
    return align_up(key_length * STRIPES, AREA_ALIGNMENT)


def find_gap(metadata: Metadata, key_length: int, taken: list[Area] | None = None) -> Area:
    """Return the first place in the keyslot area that nothing uses, as cryptsetup looks for it.

    taken   what is in use, in order of place; by default the areas of all keyslots
    Raises CommandError if there is none.
    """
    length = area_length(key_length)
    at = 2 * metadata.metadata_size
    for offset, size in areas_of(metadata) if taken is None else taken:
        if at + length <= offset:
            break
        at = max(at, align_up(offset + size, AREA_ALIGNMENT))
    if at + length > metadata.total_size:
        raise CommandError(
            f"No space for a new keyslot: it takes {length} bytes, the keyslot area has {metadata.keyslots_size}"
        )
    return at, length
