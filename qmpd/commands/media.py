"""Handlers of qapi/media.json: trays and media of the drives that have them."""

from __future__ import annotations

from qmpd.context import Context
from qmpd.machine import media
from qmpd.qapi.registry import command


@command("eject")
async def eject(ctx: Context, *, device: str | None = None, id: str | None = None, force: bool = False) -> None:
    """Open the tray and take the medium out; without a guest nothing locks a tray, `force` or not."""
    await media.eject(ctx.machine, device, id)


@command("blockdev-open-tray")
async def blockdev_open_tray(
    ctx: Context, *, device: str | None = None, id: str | None = None, force: bool = False
) -> None:
    """Open the tray."""
    media.open_tray(ctx.machine, device, id)


@command("blockdev-close-tray")
async def blockdev_close_tray(ctx: Context, *, device: str | None = None, id: str | None = None) -> None:
    """Close the tray."""
    media.close_tray(ctx.machine, device, id)


@command("blockdev-remove-medium")
async def blockdev_remove_medium(ctx: Context, *, id: str) -> None:
    """Take the medium out of the open tray."""
    await media.remove_medium(ctx.machine, None, id)


@command("blockdev-insert-medium")
async def blockdev_insert_medium(ctx: Context, *, id: str, node_name: str) -> None:
    """Put a node into the empty open tray."""
    media.insert_medium(ctx.machine, id, node_name)


@command("blockdev-change-medium")
async def blockdev_change_medium(
    ctx: Context,
    *,
    filename: str,
    device: str | None = None,
    id: str | None = None,
    format: str | None = None,
    force: bool = False,
    read_only_mode: str = "retain",
) -> None:
    """Open an image and put it in place of the medium."""
    await media.change_medium(
        ctx.machine, device, id, filename, image_format=format, mode=read_only_mode, slow=ctx.out_of_turn
    )
