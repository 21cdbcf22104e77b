"""What is asked of the key slots of a LUKS header, of either version, and what is refused unasked.

The options are BlockdevAmendOptionsLUKS and, with what is ours, BlockdevAmendOptionsLUKSExt
(qapi/block-amend.json). Model: qcrypto_block_luks_amend_options (QEMU crypto/block-luks.c); texts as the
reference where it has them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError

Passphrase = Callable[[str], SecretBytes]
"""Returns a copy of the secret with that id, which the caller wipes. Raises CommandError."""


@dataclass(frozen=True, slots=True)
class KeyslotEdit:
    """One change of the key slots; secrets are ids.

    state           "active": add, "inactive": erase, "changed": put a new passphrase in place of an old one
    keyslot         number of a slot, None: found by `old_secret`, or the first free one
    iter_time       milliseconds of key derivation for what is added
    secret          unlocks the volume; None takes the secret the node was opened with
    iterations      exact rounds of pbkdf2 or passes of argon2, in place of a time
    pbkdf           LUKS2: "pbkdf2", "argon2i", "argon2id" (the default)
    pbkdf_memory    KiB, pbkdf_parallel threads of argon2
    backup          name of a new file that the header is copied to before it is changed
    """

    state: str
    new_secret: str | None = None
    old_secret: str | None = None
    keyslot: int | None = None
    iter_time: int | None = None
    secret: str | None = None
    iterations: int | None = None
    pbkdf: str | None = None
    pbkdf_memory: int | None = None
    pbkdf_parallel: int | None = None
    backup: str | None = None

    def check(self, slots: int) -> None:
        """Refuse what makes no sense whatever the header holds; it has room for `slots`. Raises CommandError."""
        if self.state == "inactive":
            self._check_erase()
        elif self.state == "active":
            if self.new_secret is None:
                raise CommandError("'new-secret' is required to activate a keyslot")
            if self.old_secret is not None:
                raise CommandError("'old-secret' must not be given when activating keyslots")
        else:
            if self.new_secret is None:
                raise CommandError("'new-secret' is required to change a keyslot")
            if self.keyslot is None and self.old_secret is None:
                raise CommandError(
                    "To change keyslot(s), either explicit keyslot index or the password currently contained in "
                    "them must be given"
                )
        if self.iterations is not None and self.iter_time is not None:
            raise CommandError("'iterations' and 'iter-time' exclude each other")
        if self.iterations is not None and not 1 <= self.iterations < 1 << 32:
            raise CommandError(f"Parameter 'iterations' takes 1 to {(1 << 32) - 1}, not {self.iterations}")
        if self.keyslot is not None:
            check_index(self.keyslot, slots)

    def _check_erase(self) -> None:
        if self.new_secret is not None:
            raise CommandError("'new-secret' must not be given when erasing keyslots")
        costs = (self.iter_time, self.iterations, self.pbkdf, self.pbkdf_memory, self.pbkdf_parallel)
        names = ("iter-time", "iterations", "pbkdf", "pbkdf-memory", "pbkdf-parallel")
        for name, value in zip(names, costs, strict=True):
            if value is not None:
                raise CommandError(f"'{name}' must not be given when erasing keyslots")
        if self.keyslot is None and self.old_secret is None:
            raise CommandError(
                "To erase keyslot(s), either explicit keyslot index or the password currently contained in them "
                "must be given"
            )

    def unlocking(self, default: str | None) -> str:
        """Return the id of the secret that unlocks the volume. Raises CommandError if there is none."""
        chosen = self.secret or (self.old_secret if self.state == "changed" else None) or default
        if chosen is None:
            raise CommandError("Parameter 'key-secret' is required for cipher")
        return chosen


def check_index(index: int, slots: int) -> None:
    """Raise CommandError unless `index` is the number of a slot."""
    if not 0 <= index < slots:
        raise CommandError(f"Invalid keyslot {index} specified, must be between 0 and {slots - 1}")


def choose_slots(
    edit: KeyslotEdit, active: Collection[int], used: Collection[int], matching: Collection[int], *, force: bool
) -> list[int]:
    """Return the slots that an edit erases or replaces.

    active     slots from which the volume key can be had     used   those, and other ones that hold something
    matching   those of the active ones that the old secret opens; without one it does not count
    Raises CommandError for what is not there, and for the last way into the volume without `force`.
    """
    index = edit.keyslot
    if index is None:
        if not matching:
            raise CommandError("No keyslots match given (old) password for erase operation")
        if set(matching) == set(active) and not force and edit.state == "inactive":
            raise CommandError(
                "All the active keyslots match the (old) password that was given and erasing them will erase all "
                "the data in the image irreversibly - refusing operation"
            )
        return sorted(matching)
    if edit.old_secret is not None and index not in matching:
        raise CommandError(f"Given keyslot {index} doesn't contain the given old password for erase operation")
    if index not in used and (edit.state == "changed" or not force):
        raise CommandError(f"Given keyslot {index} is already erased (inactive) ")
    if edit.state == "inactive" and list(active) == [index] and not force:
        raise CommandError(
            f"Attempt to erase the only active keyslot {index} which will erase all the data in the image "
            "irreversibly - refusing operation"
        )
    return [index]


def not_overwritten(index: int, error: OSError) -> CommandError:
    """Return what to say of a slot that is out of the header, but whose material is still there."""
    reason = os.strerror(error.errno or errno.EIO)
    return CommandError(f"Keyslot {index} is erased, but its key material could not be overwritten: {reason}")
