"""External snapshots, for their commands and for transactions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from qmpd.block import snapshot
from qmpd.block.node import BlockNode
from qmpd.context import Context
from qmpd.errors import CommandError


@asynccontextmanager
async def overlay_above(ctx: Context, *, node: str, overlay: str) -> AsyncIterator[None]:
    """Put an open overlay above a node, for good if the block ends well (blockdev-snapshot). Raises CommandError."""
    below = await _below(ctx, node, node)
    async with snapshot.above(ctx.graph, below, ctx.graph.lookup(overlay, overlay)):
        yield


@dataclass(frozen=True, slots=True)
class NewOverlay:
    """BlockdevSnapshotSync."""

    snapshot_file: str
    device: str | None = None
    node_name: str | None = None
    snapshot_node_name: str | None = None
    format: str = "qcow2"
    mode: str = "absolute-paths"


@asynccontextmanager
async def new_overlay_above(ctx: Context, wanted: NewOverlay) -> AsyncIterator[None]:
    """Make or open an overlay, and put it above a node, for good if the block ends well (blockdev-snapshot-sync).

    Raises CommandError.
    """
    below, name = await _below(ctx, wanted.device, wanted.node_name), wanted.snapshot_node_name
    if wanted.node_name is not None and name is None:
        raise CommandError("New overlay node-name missing")
    if name is not None and ctx.graph.get(name) is not None:
        raise CommandError("New overlay node-name already in use")
    make = wanted.mode != "existing"
    overlay = await snapshot.open_overlay(ctx.graph, below, wanted.snapshot_file, wanted.format, name, make=make)
    try:
        async with snapshot.above(ctx.graph, below, overlay):
            yield
    finally:
        await ctx.graph.drop_unreferenced(overlay)


async def _below(ctx: Context, device: str | None, node_name: str | None) -> BlockNode:
    """Return the node that a snapshot is to keep as it is. Raises CommandError."""
    node = ctx.graph.lookup(device, node_name)
    ctx.graph.check_blocked(node)
    if not node.read_only:
        try:
            await ctx.graph.runner.run(node.flush())
        except OSError as error:
            raise CommandError("An IO error has occurred") from error
    return node
