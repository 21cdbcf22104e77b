"""Handlers of qapi/block-dirty-bitmap.json. Model: block/monitor/bitmap-qmp-cmds.c of QEMU."""

from __future__ import annotations

from typing import Any

from qmpd.block import dirty_bitmap
from qmpd.block.dirty_bitmap import DirtyBitmap
from qmpd.block.node import BlockNode
from qmpd.commands._bitmaps import find_bitmap, merge_sources
from qmpd.context import Context
from qmpd.qapi.registry import command


@command("block-dirty-bitmap-add")
async def block_dirty_bitmap_add(
    ctx: Context,
    *,
    node: str,
    name: str,
    granularity: int | None = None,
    persistent: bool = False,
    disabled: bool = False,
) -> None:
    """Make a bitmap, clean and recording."""
    dirty_bitmap.check_name(name)
    found = ctx.graph.lookup(node, node)
    dirty_bitmap.add(found, name, granularity, persistent=persistent, disabled=disabled)


@command("block-dirty-bitmap-remove")
async def block_dirty_bitmap_remove(ctx: Context, *, node: str, name: str) -> None:
    """Forget a bitmap; a persistent one leaves the image now."""
    found, bitmap = find_bitmap(ctx, node, name)
    bitmap.check(inconsistent=True)
    await _remove(ctx, found, bitmap)


async def _remove(ctx: Context, node: BlockNode, bitmap: DirtyBitmap) -> None:
    if bitmap.persistent:
        assert bitmap.name is not None
        await ctx.graph.runner.run(node.remove_stored_bitmap(bitmap.name))
    node.dirty_bitmaps.remove(bitmap)


@command("block-dirty-bitmap-clear")
async def block_dirty_bitmap_clear(ctx: Context, *, node: str, name: str) -> None:
    """Clean a bitmap."""
    bitmap = find_bitmap(ctx, node, name)[1]
    bitmap.check()
    bitmap.clear()


@command("block-dirty-bitmap-enable")
async def block_dirty_bitmap_enable(ctx: Context, *, node: str, name: str) -> None:
    """Record writes again."""
    bitmap = find_bitmap(ctx, node, name)[1]
    bitmap.check(readonly=True)
    bitmap.enabled = True


@command("block-dirty-bitmap-disable")
async def block_dirty_bitmap_disable(ctx: Context, *, node: str, name: str) -> None:
    """Record writes no more."""
    bitmap = find_bitmap(ctx, node, name)[1]
    bitmap.check(readonly=True)
    bitmap.enabled = False


@command("block-dirty-bitmap-merge")
async def block_dirty_bitmap_merge(
    ctx: Context, *, node: str, target: str, bitmaps: list[str | dict[str, Any]]
) -> None:
    """Add to one bitmap what others have: all of it, or nothing."""
    found, into = find_bitmap(ctx, node, target)
    sources = merge_sources(ctx, found, into, bitmaps)
    for source in sources:
        into.merge(source)


@command("x-debug-block-dirty-bitmap-sha256")
async def debug_block_dirty_bitmap_sha256(ctx: Context, *, node: str, name: str) -> dict[str, Any]:
    """Digest a bitmap."""
    return {"sha256": find_bitmap(ctx, node, name)[1].sha256()}
