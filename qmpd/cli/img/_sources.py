"""What else than the data of a source a tool looks at: one of its internal snapshots, its dirty bitmaps."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from qmpd.block import dirty_bitmap
from qmpd.cli.img import _opts
from qmpd.errors import CommandError
from qmpd.units import align_up

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode

PREFIX = "snapshot."
DIRECTORY_ENTRY = 24
"""Bytes of a bitmap's entry in the directory without its name."""


async def show_snapshot(node: BlockNode, wanted: str) -> None:
    """Have a read-only node show an internal snapshot, named by id or name or as snapshot.id=,snapshot.name=.

    Raises CommandError.
    """
    members: dict[str, str] = {}
    if wanted.startswith(PREFIX):
        for key, value in _opts.parse(wanted):
            if key not in ("snapshot.id", "snapshot.name"):
                hint = f"qmpd-img: Failed in parsing snapshot param '{wanted}'"
                raise CommandError(f"Invalid parameter '{key}'", hint=hint)
            members[key.removeprefix(PREFIX)] = value
    try:
        if not node.supports_snapshots:
            raise CommandError(
                f"Block format '{node.driver_name}' used by device '' does not support temporarily loading"
                " internal snapshots"
            )
        if members:
            found = node.find_snapshot(members.get("id"), members.get("name"))
        else:
            found = node.find_snapshot(wanted, None) or node.find_snapshot(None, wanted)
        if found is None:
            raise CommandError("Can't find snapshot")
        await node.snapshot_show(found["id"], found["name"])
    except OSError as error:
        raise CommandError(f"Failed to load snapshot: {os.strerror(error.errno or 0)}") from error
    except CommandError as error:
        raise CommandError(f"Failed to load snapshot: {error}") from error


def check_bitmaps(node: BlockNode, *, skip_broken: bool) -> None:
    """Refuse a source whose bitmaps cannot be copied. Raises CommandError."""
    if not node.keeps_bitmaps:
        raise CommandError("Source lacks bitmap support")
    for bitmap in node.dirty_bitmaps:
        if bitmap.persistent and bitmap.inconsistent and not skip_broken:
            hint = "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
            raise CommandError(f"Cannot copy inconsistent bitmap '{bitmap.name}'", hint=hint)


def copy_bitmaps(source: BlockNode, target: BlockNode) -> None:
    """Give `target` the persistent bitmaps of `source`; inconsistent ones are left out. Raises CommandError."""
    for bitmap in source.dirty_bitmaps:
        if not bitmap.persistent or bitmap.name is None:
            continue
        if bitmap.inconsistent:
            sys.stderr.write(f"qmpd-img: warning: Skipping inconsistent bitmap '{bitmap.name}'\n")
            continue
        try:
            made = dirty_bitmap.add(
                target, bitmap.name, bitmap.granularity, persistent=True, disabled=not bitmap.enabled
            )
        except CommandError as error:
            raise CommandError(f"Failed to create bitmap {bitmap.name}: {error}") from error
        try:
            dirty_bitmap.check_mergeable(made, bitmap)
        except CommandError as error:
            target.dirty_bitmaps.remove(made)
            raise CommandError(f"Failed to populate bitmap {bitmap.name}: {error}") from error
        made.merge(bitmap)


def bitmaps_size(source: BlockNode, cluster_size: int) -> int:
    """Return the bytes that the persistent bitmaps of `source` take in an image with these clusters, at most."""
    total = directory = 0
    for bitmap in source.dirty_bitmaps:
        if bitmap.persistent and bitmap.name is not None:
            clusters = -(-(bitmap.bits + 7 >> 3) // cluster_size)
            total += clusters * cluster_size + align_up(clusters * 8, cluster_size)
            directory += align_up(DIRECTORY_ENTRY + len(bitmap.name.encode("utf-8", "surrogateescape")), 8)
    return total + align_up(directory, cluster_size)
