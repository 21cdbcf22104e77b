"""Changing the JSON of a LUKS2 header: one copy after the other, so that one of them is always whole.

Source: LUKS2 On-Disk Format Specification 1.1.x, section 2.5; the order (first copy, flush, second copy,
flush) is cryptsetup's, and so is mending a copy that was not believed before anything is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from qmpd.errors import CommandError
from qmpd.formats import luks2
from qmpd.formats.luks2_json import dump_json, parse_json
from qmpd.luks.luks2 import read_copies
from qmpd.luks.volume import HeaderIO

Change = Callable[[dict[str, Any]], None]
"""Changes a tree in place: the JSON of a header, its lists and objects copied beforehand."""


async def update_header(target: HeaderIO, change: Change, image: str = "header") -> None:
    """Read the header on `target`, apply `change` to its JSON and write both copies, flushed.

    The caller holds the lock of the header. What the new JSON breaks is found before anything is
    written. Raises CommandError, ImageError, OSError.
    """
    found = await read_copies(target, image)
    tree = copied(found.copy.metadata.tree)
    change(tree)
    await write_copies(target, found, tree, image)


async def write_copies(target: HeaderIO, found: luks2.Found, tree: Mapping[str, Any], image: str = "header") -> None:
    """Write `tree` in place of the copy that was `found`. Raises CommandError, ImageError, OSError."""
    binary = found.copy.binary
    text = dump_json(tree)
    room = binary.hdr_size - luks2.BINARY_SIZE
    if len(text) >= room:
        raise CommandError(f"The header's JSON would take {len(text)} bytes, there is room for {room - 1}")
    parse_json(text.ljust(room, b"\0"), image, luks2.BINARY_SIZE)
    if found.problem is not None:
        await _write_both(target, binary, dump_json(found.copy.metadata.tree), damaged_first=found)
    await _write_both(target, replace(binary, seqid=binary.seqid + 1), text)


async def _write_both(
    target: HeaderIO, binary: luks2.BinaryHeader, text: bytes, *, damaged_first: luks2.Found | None = None
) -> None:
    places = [0, binary.hdr_size]
    if damaged_first is not None:
        places.remove(damaged_first.copy.binary.hdr_offset)
    for place in places:
        await target.pwrite(place, luks2.pack_copy(replace(binary, salt=os.urandom(64)), text, place))
        await target.flush()


def copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree of JSON whose objects and lists are new ones; the caller may change it."""

    def one(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: one(member) for name, member in value.items()}
        return [one(member) for member in value] if isinstance(value, list) else value

    return {name: one(member) for name, member in tree.items()}
