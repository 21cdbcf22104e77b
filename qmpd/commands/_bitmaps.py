"""Finding the dirty bitmaps that arguments name: for the bitmap commands and for transactions."""

from __future__ import annotations

from typing import Any

from qmpd.block import dirty_bitmap
from qmpd.block.dirty_bitmap import DirtyBitmap, check_mergeable
from qmpd.block.node import BlockNode
from qmpd.context import Context
from qmpd.errors import CommandError


def find_bitmap(ctx: Context, node: str, name: str) -> tuple[BlockNode, DirtyBitmap]:
    """Return a bitmap and the node it belongs to. Raises CommandError."""
    try:
        found = ctx.graph.lookup(node, node)
    except CommandError as error:
        raise CommandError(f"Node '{node}' not found") from error
    dirty_bitmap.resized(found)
    return found, dirty_bitmap.find(found, name)


def merge_sources(
    ctx: Context, node: BlockNode, target: DirtyBitmap, bitmaps: list[str | dict[str, Any]]
) -> list[DirtyBitmap]:
    """Return the bitmaps to merge into `target` of `node`, all of them fit for it. Raises CommandError."""
    sources = []
    for one in bitmaps:
        if isinstance(one, str):
            source = dirty_bitmap.find(node, one)
        else:
            source = find_bitmap(ctx, one["node"], one["name"])[1]
        check_mergeable(target, source)
        sources.append(source)
    return sources
