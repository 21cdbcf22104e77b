"""Handlers of qapi/device.json: devices plugged, unplugged and looked at."""

from __future__ import annotations

from typing import Any

from qmpd.context import Context
from qmpd.machine.listing import device_properties
from qmpd.qapi.registry import command


@command("device-list-properties")
async def device_list_properties(ctx: Context, *, typename: str) -> list[dict[str, Any]]:
    """List the properties that device_add takes for a type."""
    return device_properties(ctx.services.registry, ctx.objects, typename)


@command("device_add")
async def device_add(ctx: Context, *, options: dict[str, Any]) -> None:
    """Plug a device; what its type makes of the members is checked there, not by the schema."""
    await ctx.machine.device_add(options)


@command("device_del")
async def device_del(ctx: Context, *, id: str) -> None:
    """Unplug a device, or ask the guest to let go of it."""
    await ctx.machine.device_del(id)


@command("device-sync-config")
async def device_sync_config(ctx: Context, *, id: str) -> None:
    """Refuse: no device here has a configuration that follows its backend."""
    raise ctx.machine.refuse_sync(id)
