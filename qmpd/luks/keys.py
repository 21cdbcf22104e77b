"""Key slots of a LUKS header added, changed and erased, so that a crash at any byte locks nobody out.

This is LUKS1, and the way to LUKS2 (`keys2`). The order of the writes is ours. Adding: key material,
flush, salt and iterations while the slot still counts as free, flush, unlock it from disk, then the one
field that makes it count. Erasing: that field first, flush, then the material is overwritten. The field
lies in one sector, whatever slot it is (the rest of slot 6's entry does not). Changing: a new slot is
added, then the old ones are erased.
"""

from __future__ import annotations

import os
from dataclasses import replace

from qmpd.crypto.hashes import digest_size
from qmpd.crypto.kdf import DEFAULT_ITER_TIME_MS, check_pbkdf2_iterations, iterations_for
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.formats import luks1
from qmpd.luks.backup import SavedFirst
from qmpd.luks.create import fill_slot
from qmpd.luks.detect import is_luks2
from qmpd.luks.edits import KeyslotEdit, Passphrase, choose_slots, not_overwritten
from qmpd.luks.keys2 import edit_luks2
from qmpd.luks.policy import current
from qmpd.luks.volume import HeaderIO, Luks1Volume, open_slot, read_padded
from qmpd.luks.work import derive
from qmpd.units import SECTOR, align_up

__all__ = ["KeyslotEdit", "Passphrase", "edit_keyslots"]


async def edit_keyslots(
    target: HeaderIO, edit: KeyslotEdit, passphrase: Passphrase, unlock_with: str | None, *, detached: bool, force: bool
) -> None:
    """Carry out one edit on the header on `target`, which nobody else changes meanwhile.

    unlock_with  id of the secret that unlocks the volume unless the edit names one
    detached     the payload is elsewhere
    force        do what may make the volume unreadable for good
    Raises CommandError, ImageError, OSError; the header is then as it was, or has a slot more that
    opens, or a slot was left half erased.
    """
    if edit.backup is not None:
        target = SavedFirst(target, edit.backup, detached=detached)
    if await is_luks2(target):
        await edit_luks2(target, edit, passphrase, unlock_with, detached=detached, force=force)
        return
    data = await read_padded(target, 0, luks1.HEADER_SIZE)
    volume = Luks1Volume(luks1.parse_header(data, detached=detached))
    edit.check(luks1.SLOTS)
    if edit.state == "inactive":
        for index in await _chosen(target, volume, edit, passphrase, force=force):
            await wipe_slot(target, volume.header, index)
    else:
        await _add(target, volume, edit, passphrase, edit.unlocking(unlock_with), force=force)


def _check_kdf(edit: KeyslotEdit) -> None:
    for name, value in (("pbkdf-memory", edit.pbkdf_memory), ("pbkdf-parallel", edit.pbkdf_parallel)):
        if value is not None:
            raise CommandError(f"Parameter '{name}' needs LUKS version 2")
    if edit.pbkdf not in (None, "pbkdf2"):
        raise CommandError(f"Parameter 'pbkdf' must be 'pbkdf2' in LUKS version 1, not '{edit.pbkdf}'")


async def _add(
    target: HeaderIO, volume: Luks1Volume, edit: KeyslotEdit, passphrase: Passphrase, unlock_with: str, *, force: bool
) -> None:
    """Add a passphrase; with state changed, erase the slots it replaces afterwards."""
    header = volume.header
    _check_kdf(edit)
    active = [i for i, slot in enumerate(header.slots) if slot.enabled]
    free = next((i for i, slot in enumerate(header.slots) if not slot.enabled), None)
    index = edit.keyslot if edit.state == "active" else None
    if index is not None and index in active and not force:
        raise CommandError(f"Refusing to overwrite active keyslot {index} - please erase it first")
    if index is None:
        index = free
    if index is None and edit.state == "active":
        raise CommandError("Can't add a keyslot - all keyslots are in use")
    with passphrase(unlock_with) as current:
        unlocked = await volume.unlock(target, current)
    assert edit.new_secret is not None
    try:
        replaced = await _chosen(target, volume, edit, passphrase, force=force) if edit.state == "changed" else []
        if index is None:  # all are in use: one that is replaced, while another still opens
            if len(replaced) == len(active):
                raise CommandError("Can't change all keyslots - erase all but one first")
            index = replaced.pop(0)
        with passphrase(edit.new_secret) as new:
            filled, material = await _make(header, index, unlocked.key, new, edit)
            spare = None
            if active == [index]:  # which would be the only way in: the new one goes elsewhere first
                spare = (index + 1) % luks1.SLOTS
                copied = replace(filled.slots[index], material_sector=header.slots[spare].material_sector)
                await place_slot(target, header.with_slot(spare, copied), spare, material, new)
            await place_slot(target, filled, index, material, new)
            if spare is not None:
                await wipe_slot(target, header, spare)
    finally:
        unlocked.wipe()
    for slot in replaced:
        await wipe_slot(target, header, slot)


async def _make(
    header: luks1.Luks1Header, index: int, key: bytearray, new: SecretBytes, edit: KeyslotEdit
) -> tuple[luks1.Luks1Header, bytearray]:
    digest_size(header.hash)
    milliseconds = DEFAULT_ITER_TIME_MS if edit.iter_time is None else edit.iter_time
    if edit.iterations is not None:
        check_pbkdf2_iterations(edit.iterations, "The new key slot")

    def work() -> tuple[luks1.Luks1Header, bytearray]:
        rounds = edit.iterations
        if rounds is None:
            rounds = iterations_for(header.hash, len(key), milliseconds)
        rounds = current().iterations(rounds, exact=edit.iterations is not None)
        return fill_slot(header, index, key, new, rounds)

    return await derive(work)


async def place_slot(
    target: HeaderIO, header: luks1.Luks1Header, index: int, material: bytes | bytearray, new: SecretBytes | None
) -> None:
    """Write slot `index` of `header`, which is enabled there, and its material; it counts at the very end.

    new   opens the slot, which is tried before it counts; None if nobody knows what does: it is read back
    A slot that is not enabled stays out of use. Raises CommandError if it does not open, OSError.
    """
    slot = header.slots[index]
    await _write_state(target, index, luks1.DISABLED)
    await target.flush()
    await target.pwrite(slot.material_offset, material)
    await target.flush()
    await _write_entry(target, index, replace(slot, active=luks1.DISABLED))
    await target.flush()
    stored = await read_padded(target, slot.material_offset, align_up(header.material_length, SECTOR))
    if new is None:
        if stored != material:
            raise CommandError(f"The key material of keyslot {index} does not read as it was written")
    else:
        found = await derive(lambda: open_slot(header, slot, stored, new))
        if found is None:
            raise CommandError(f"Keyslot {index} does not open after it was written; it stays unused")
        found[:] = bytes(len(found))
    if slot.enabled:
        await _write_state(target, index, luks1.ENABLED)
        await target.flush()


async def _write_entry(target: HeaderIO, index: int, slot: luks1.Keyslot) -> None:
    await target.pwrite(luks1.Phdr.SIZE + index * luks1.Keyslot.SIZE, slot.pack())


async def _write_state(target: HeaderIO, index: int, active: int) -> None:
    await target.pwrite(luks1.Phdr.SIZE + index * luks1.Keyslot.SIZE, active.to_bytes(4, "big"))


async def _chosen(
    target: HeaderIO, volume: Luks1Volume, edit: KeyslotEdit, passphrase: Passphrase, *, force: bool
) -> list[int]:
    """Return the slots that are erased or replaced. Raises CommandError."""
    active = [index for index, slot in enumerate(volume.header.slots) if slot.enabled]
    matching: list[int] = []
    if edit.old_secret is not None:
        with passphrase(edit.old_secret) as old:
            for index in active if edit.keyslot is None else [edit.keyslot]:
                if index in active and await _opens(target, volume, index, old):
                    matching.append(index)
    return choose_slots(edit, active, active, matching, force=force)


async def _opens(target: HeaderIO, volume: Luks1Volume, index: int, passphrase: SecretBytes) -> bool:
    check_pbkdf2_iterations(volume.header.slots[index].iterations, f"Keyslot {index}")
    check_pbkdf2_iterations(volume.header.phdr.mk_digest_iterations, "The volume key digest")
    key = await volume.try_slot(target, index, passphrase)
    if key is None:
        return False
    key[:] = bytes(len(key))
    return True


async def wipe_slot(target: HeaderIO, header: luks1.Luks1Header, index: int) -> None:
    """Erase slot `index`: it stops to count, then its material is overwritten. Raises OSError."""
    slot = header.slots[index]
    await _write_state(target, index, luks1.DISABLED)
    await target.flush()
    try:
        await target.pwrite(slot.material_offset, os.urandom(align_up(header.material_length, SECTOR)))
        await target.flush()
    except OSError as error:
        raise not_overwritten(index, error) from error
    await _write_entry(target, index, replace(slot, active=luks1.DISABLED, iterations=0, salt=bytes(32)))
    await target.flush()
