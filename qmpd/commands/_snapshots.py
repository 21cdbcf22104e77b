"""Internal snapshots by the name of a device: for their commands and for transactions."""

from __future__ import annotations

import os
import time
from typing import Any

from qmpd.block.node import BlockNode
from qmpd.block.perm import ChildRole
from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.jobs.chains import root_of


async def create_internal(ctx: Context, device: str, name: str) -> None:
    """Make an internal snapshot while no request is in flight. Raises CommandError."""
    top = root_of(ctx.graph, device)
    if top.read_only:
        raise CommandError(f"Device '{device}' is read only")
    node = _keeper(top)
    if node is None:
        raise CommandError(
            f"Block format '{top.driver_name}' used by device '{device}' does not support internal snapshots"
        )
    if not name:
        raise CommandError("Name is empty")
    _check_listed(node)
    if node.find_snapshot(None, name) is not None:
        raise CommandError(f"Snapshot with name '{name}' already exists on device '{device}'")
    clock = time.time_ns() // 1000 * 1000 if ctx.services.machine is None else 0
    try:
        async with ctx.graph.drained(node):
            await ctx.graph.runner.run(node.snapshot_create(name, vm_clock=clock, icount=None))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise CommandError(f"Failed to create snapshot '{name}' on device '{device}': {reason}") from error


async def delete_internal(ctx: Context, device: str, identifier: str | None, name: str | None) -> dict[str, Any]:
    """Delete an internal snapshot; return its SnapshotInfo. Raises CommandError."""
    top = root_of(ctx.graph, device)
    if identifier is None and name is None:
        raise CommandError("Name or id must be provided")
    node = _keeper(top)
    if node is None:
        raise CommandError("Failed to get a snapshot list: Operation not supported")
    _check_listed(node)
    found = node.find_snapshot(identifier, name)
    if found is None:
        shown = ("null" if one is None else one for one in (identifier, name))
        raise CommandError("Snapshot with id '{}' and name '{}' does not exist on device '{}'".format(*shown, device))
    if node.read_only:
        raise CommandError("Device is read only")
    try:
        async with ctx.graph.drained(node):
            await ctx.graph.runner.run(node.snapshot_delete(found["name"], found["id"]))
    except OSError as error:
        raise CommandError(f"Failed to delete snapshot: {os.strerror(error.errno or 0)}") from error
    return found


def _check_listed(node: BlockNode) -> None:
    """Refuse a node whose data is in a file of its own: it cannot have internal snapshots. Raises CommandError."""
    if "data-file" in node.children:
        raise CommandError("Failed to get a snapshot list: Operation not supported")


def _keeper(node: BlockNode) -> BlockNode | None:
    """Return the node that keeps internal snapshots for `node`: itself, or what it stores everything in."""
    while not node.supports_snapshots:
        stores = ChildRole.DATA | ChildRole.METADATA | ChildRole.FILTERED
        below = [edge.node for edge in node.children.values() if edge.role & stores]
        if len(below) != 1 or "backing" in node.children:
            return None
        node = below[0]
    return node
