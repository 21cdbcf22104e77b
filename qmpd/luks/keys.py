"""Key slots of a LUKS1 header added and erased, so that a crash at any byte locks nobody out.

Model: qcrypto_block_luks_amend_options (QEMU crypto/block-luks.c); texts as the reference. The order of
the writes is ours. Adding: key material, flush, salt and iterations while the slot still counts as
free, flush, unlock it from disk, then the one field that makes it count. Erasing: that field first,
flush, then the material is overwritten. The field lies in one sector, whatever slot it is (the rest
of slot 6's entry does not).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from qmpd.crypto.hashes import digest_size
from qmpd.crypto.kdf import DEFAULT_ITER_TIME_MS, MIN_ITERATIONS, iterations_for
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.formats import luks1
from qmpd.luks.create import fill_slot
from qmpd.luks.volume import HeaderIO, Luks1Volume, open_slot, read_padded
from qmpd.luks.work import derive
from qmpd.units import SECTOR, align_up

Passphrase = Callable[[str], SecretBytes]
"""Returns a copy of the secret with that id, which the caller wipes. Raises CommandError."""


@dataclass(frozen=True, slots=True)
class KeyslotEdit:
    """BlockdevAmendOptionsLUKS; secrets are ids.

    state      "active": add, "inactive": erase        keyslot    0 to 7, None: QEMU's choice
    iter_time  milliseconds of key derivation for what is added
    secret     unlocks the volume; None takes the secret the node was opened with
    """

    state: str
    new_secret: str | None = None
    old_secret: str | None = None
    keyslot: int | None = None
    iter_time: int | None = None
    secret: str | None = None


async def edit_keyslots(
    target: HeaderIO, edit: KeyslotEdit, passphrase: Passphrase, unlock_with: str | None, *, detached: bool, force: bool
) -> None:
    """Carry out one edit on the header on `target`, which nobody else changes meanwhile.

    unlock_with  id of the secret that unlocks the volume unless the edit names one
    force        do what may make the volume unreadable for good
    Raises CommandError, OSError; the header is then as it was, or a slot was left half erased.
    """
    data = await read_padded(target, 0, luks1.HEADER_SIZE)
    volume = Luks1Volume(luks1.parse_header(data, detached=detached))
    if edit.state == "active":
        await _add(target, volume, edit, passphrase, edit.secret or unlock_with, force=force)
    else:
        await _erase(target, volume, edit, passphrase, force=force)


def _check_index(index: int) -> None:
    if not 0 <= index < luks1.SLOTS:
        raise CommandError(f"Invalid keyslot {index} specified, must be between 0 and {luks1.SLOTS - 1}")


async def _add(
    target: HeaderIO,
    volume: Luks1Volume,
    edit: KeyslotEdit,
    passphrase: Passphrase,
    unlock_with: str | None,
    *,
    force: bool,
) -> None:
    header = volume.header
    if edit.new_secret is None:
        raise CommandError("'new-secret' is required to activate a keyslot")
    if edit.old_secret is not None:
        raise CommandError("'old-secret' must not be given when activating keyslots")
    index = edit.keyslot
    if index is not None:
        _check_index(index)
        if header.slots[index].enabled and not force:
            raise CommandError(f"Refusing to overwrite active keyslot {index} - please erase it first")
    else:
        index = next((i for i, slot in enumerate(header.slots) if not slot.enabled), None)
        if index is None:
            raise CommandError("Can't add a keyslot - all keyslots are in use")
    if unlock_with is None:
        raise CommandError("Parameter 'key-secret' is required for cipher")
    with passphrase(unlock_with) as current:
        unlocked = await volume.unlock(target, current)
    try:
        with passphrase(edit.new_secret) as new:
            await _fill(target, header, index, unlocked.key, new, edit.iter_time)
    finally:
        unlocked.wipe()


async def _fill(
    target: HeaderIO,
    header: luks1.Luks1Header,
    index: int,
    key: bytearray,
    new: SecretBytes,
    iter_time: int | None,
) -> None:
    milliseconds = DEFAULT_ITER_TIME_MS if iter_time is None else iter_time
    digest_size(header.hash)

    def work() -> tuple[luks1.Luks1Header, bytearray]:
        rounds = max(iterations_for(header.hash, len(key), milliseconds), MIN_ITERATIONS)
        return fill_slot(header, index, key, new, rounds)

    filled, material = await derive(work)
    slot = filled.slots[index]
    await target.pwrite(slot.material_offset, material)
    await target.flush()
    await _write_entry(target, index, replace(slot, active=luks1.DISABLED))
    await target.flush()
    length = align_up(header.material_length, SECTOR)
    stored = await read_padded(target, slot.material_offset, length)
    found = await derive(lambda: open_slot(filled, slot, stored, new))
    if found is None:
        raise CommandError(f"Keyslot {index} does not open after it was written; it stays unused")
    found[:] = bytes(len(found))
    await _write_state(target, index, luks1.ENABLED)
    await target.flush()


async def _write_entry(target: HeaderIO, index: int, slot: luks1.Keyslot) -> None:
    await target.pwrite(luks1.Phdr.SIZE + index * luks1.Keyslot.SIZE, slot.pack())


async def _write_state(target: HeaderIO, index: int, active: int) -> None:
    await target.pwrite(luks1.Phdr.SIZE + index * luks1.Keyslot.SIZE, active.to_bytes(4, "big"))


async def _erase(
    target: HeaderIO, volume: Luks1Volume, edit: KeyslotEdit, passphrase: Passphrase, *, force: bool
) -> None:
    if edit.new_secret is not None:
        raise CommandError("'new-secret' must not be given when erasing keyslots")
    if edit.iter_time is not None:
        raise CommandError("'iter-time' must not be given when erasing keyslots")
    active = [index for index, slot in enumerate(volume.header.slots) if slot.enabled]
    if edit.keyslot is not None:
        chosen = await _chosen_slot(target, volume, edit, active, passphrase, force=force)
    elif edit.old_secret is not None:
        with passphrase(edit.old_secret) as old:
            chosen = [index for index in active if await _opens(target, volume, index, old)]
        if not chosen:
            raise CommandError("No keyslots match given (old) password for erase operation")
        if chosen == active and not force:
            raise CommandError(
                "All the active keyslots match the (old) password that was given and erasing them will erase all "
                "the data in the image irreversibly - refusing operation"
            )
    else:
        raise CommandError(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them "
            "must be given"
        )
    for index in chosen:
        await _wipe(target, volume.header, index)


async def _chosen_slot(
    target: HeaderIO, volume: Luks1Volume, edit: KeyslotEdit, active: list[int], passphrase: Passphrase, *, force: bool
) -> list[int]:
    index = edit.keyslot
    assert index is not None
    _check_index(index)
    if edit.old_secret is not None:
        with passphrase(edit.old_secret) as old:
            if index not in active or not await _opens(target, volume, index, old):
                raise CommandError(f"Given keyslot {index} doesn't contain the given old password for erase operation")
    if index not in active and not force:
        raise CommandError(f"Given keyslot {index} is already erased (inactive) ")
    if active == [index] and not force:
        raise CommandError(
            f"Attempt to erase the only active keyslot {index} which will erase all the data in the image "
            "irreversibly - refusing operation"
        )
    return [index]


async def _opens(target: HeaderIO, volume: Luks1Volume, index: int, passphrase: SecretBytes) -> bool:
    key = await volume.try_slot(target, index, passphrase)
    if key is None:
        return False
    key[:] = bytes(len(key))
    return True


async def _wipe(target: HeaderIO, header: luks1.Luks1Header, index: int) -> None:
    slot = header.slots[index]
    await _write_state(target, index, luks1.DISABLED)
    await target.flush()
    await target.pwrite(slot.material_offset, os.urandom(align_up(header.material_length, SECTOR)))
    await target.flush()
    await _write_entry(target, index, replace(slot, active=luks1.DISABLED, iterations=0, salt=bytes(32)))
    await target.flush()
