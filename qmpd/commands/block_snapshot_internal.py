"""Handlers of qapi/block-snapshot-internal.json. Model: internal_snapshot_action of QEMU's blockdev.c."""

from __future__ import annotations

from typing import Any

from qmpd.commands._snapshots import create_internal, delete_internal
from qmpd.context import Context
from qmpd.qapi.registry import command


@command("blockdev-snapshot-internal-sync")
async def blockdev_snapshot_internal_sync(ctx: Context, *, device: str, name: str) -> None:
    """Make an internal snapshot while no request is in flight."""
    await create_internal(ctx, device, name)


@command("blockdev-snapshot-delete-internal-sync")
async def blockdev_snapshot_delete_internal_sync(
    ctx: Context, *, device: str, id: str | None = None, name: str | None = None
) -> dict[str, Any]:
    """Delete an internal snapshot, and describe it."""
    return await delete_internal(ctx, device, id, name)
