"""The handler of qapi/transaction.json: several changes, all or none. Model: qmp_transaction of QEMU's blockdev.c.

An action is a generator function in ACTIONS: it does its change up to its `yield`, undoes it after
the `yield` if that raises, and finishes it if not.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from qmpd.block import dirty_bitmap
from qmpd.commands._bitmaps import find_bitmap, merge_sources
from qmpd.commands._overlays import NewOverlay, new_overlay_above, overlay_above
from qmpd.commands._snapshots import create_internal, delete_internal
from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.jobs.backup import BackupOptions, new_backup
from qmpd.jobs.job import JobGroup
from qmpd.qapi.bind import build
from qmpd.qapi.registry import command

GROUPED = "grouped"
WITH_JOBS = ("blockdev-backup",)
"""Actions that know what a group is."""


@command("transaction")
async def transaction(ctx: Context, *, actions: list[dict[str, Any]], properties: dict[str, Any] | None = None) -> None:
    """Do the actions in their order; a failure undoes those that were done, the last one first."""
    mode = (properties or {}).get("completion-mode", "individual")
    for action in actions:
        if mode == GROUPED and action["type"] not in WITH_JOBS:
            raise CommandError(
                f"Action '{action['type']}' does not support transaction property completion-mode = {mode}"
            )
    group = JobGroup() if mode == GROUPED else None
    async with ctx.graph.drained(*ctx.graph.nodes()), contextlib.AsyncExitStack() as done:
        for action in actions:
            if action["type"] in WITH_JOBS:
                await done.enter_async_context(_backup(ctx, action["data"], group))
            else:
                await done.enter_async_context(ACTIONS[action["type"]](ctx, action["data"]))


@contextlib.asynccontextmanager
async def _backup(ctx: Context, data: dict[str, Any], group: JobGroup | None) -> AsyncIterator[None]:
    job = await new_backup(ctx.graph, ctx.jobs, build(BackupOptions, data))
    if group is not None:
        group.join(job)
    try:
        yield
    except BaseException:
        await job.discard()
        raise
    job.start()


def _abort(ctx: Context, data: dict[str, Any]) -> contextlib.AbstractAsyncContextManager[None]:
    raise CommandError("Transaction aborted using Abort action")


@contextlib.asynccontextmanager
async def _bitmap_add(ctx: Context, data: dict[str, Any]) -> AsyncIterator[None]:
    dirty_bitmap.check_name(data["name"])
    node = ctx.graph.lookup(data["node"], data["node"])
    bitmap = dirty_bitmap.add(
        node,
        data["name"],
        data.get("granularity"),
        persistent=data.get("persistent", False),
        disabled=data.get("disabled", False),
    )
    try:
        yield
    except BaseException:
        node.dirty_bitmaps.remove(bitmap)
        raise


@contextlib.asynccontextmanager
async def _bitmap_remove(ctx: Context, data: dict[str, Any]) -> AsyncIterator[None]:
    """Reserve the bitmap; nobody can use it any more, but it is only forgotten when all is done."""
    node, bitmap = find_bitmap(ctx, data["node"], data["name"])
    bitmap.check(inconsistent=True)
    if bitmap.persistent:
        await ctx.graph.runner.run(node.remove_stored_bitmap(data["name"]))
    bitmap.busy = True
    try:
        yield
    finally:
        bitmap.busy = False
    node.dirty_bitmaps.remove(bitmap)


@contextlib.asynccontextmanager
async def _bitmap_clear(ctx: Context, data: dict[str, Any]) -> AsyncIterator[None]:
    bitmap = find_bitmap(ctx, data["node"], data["name"])[1]
    bitmap.check()
    before = bitmap.snapshot()
    bitmap.clear()
    try:
        yield
    except BaseException:
        bitmap.restore(before)
        raise


def _bitmap_switch(*, enabled: bool) -> Action:
    @contextlib.asynccontextmanager
    async def switch(ctx: Context, data: dict[str, Any]) -> AsyncIterator[None]:
        bitmap = find_bitmap(ctx, data["node"], data["name"])[1]
        bitmap.check(readonly=True)
        before, bitmap.enabled = bitmap.enabled, enabled
        try:
            yield
        except BaseException:
            bitmap.enabled = before
            raise

    return switch


@contextlib.asynccontextmanager
async def _bitmap_merge(ctx: Context, data: dict[str, Any]) -> AsyncIterator[None]:
    node, target = find_bitmap(ctx, data["node"], data["target"])
    sources = merge_sources(ctx, node, target, data["bitmaps"])
    before = target.snapshot()
    for source in sources:
        target.merge(source)
    try:
        yield
    except BaseException:
        target.restore(before)
        raise


@contextlib.asynccontextmanager
async def _snapshot(ctx: Context, data: dict[str, Any]) -> AsyncIterator[None]:
    await create_internal(ctx, data["device"], data["name"])
    try:
        yield
    except BaseException:
        await delete_internal(ctx, data["device"], None, data["name"])
        raise


@contextlib.asynccontextmanager
async def _overlay(ctx: Context, data: dict[str, Any]) -> AsyncIterator[None]:
    async with overlay_above(ctx, node=data["node"], overlay=data["overlay"]):
        yield


@contextlib.asynccontextmanager
async def _new_overlay(ctx: Context, data: dict[str, Any]) -> AsyncIterator[None]:
    async with new_overlay_above(ctx, build(NewOverlay, data)):
        yield


Action = Callable[[Context, dict[str, Any]], contextlib.AbstractAsyncContextManager[None]]

ACTIONS: dict[str, Action] = {
    "abort": _abort,
    "block-dirty-bitmap-add": _bitmap_add,
    "block-dirty-bitmap-remove": _bitmap_remove,
    "block-dirty-bitmap-clear": _bitmap_clear,
    "block-dirty-bitmap-enable": _bitmap_switch(enabled=True),
    "block-dirty-bitmap-disable": _bitmap_switch(enabled=False),
    "block-dirty-bitmap-merge": _bitmap_merge,
    "blockdev-snapshot": _overlay,
    "blockdev-snapshot-internal-sync": _snapshot,
    "blockdev-snapshot-sync": _new_overlay,
}
