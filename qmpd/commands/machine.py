"""Handlers of qapi/machine.json: the machine, as far as there is one without a guest."""

from __future__ import annotations

import os
from typing import Any, Protocol, runtime_checkable

from qmpd.aio.loop import DataLoop
from qmpd.context import Context
from qmpd.qapi.registry import command


@runtime_checkable
class _IoThread(Protocol):
    """An object that is an I/O thread."""

    @property
    def data_loop(self) -> DataLoop:
        """The loop that the thread runs."""

    def wire_info(self) -> dict[str, Any]:
        """Return IOThreadInfo."""


@command("query-status")
async def query_status(ctx: Context) -> dict[str, Any]:
    """Say what the machine is doing."""
    return {"running": ctx.machine.running, "status": ctx.machine.status}


@command("stop")
async def stop(ctx: Context) -> None:
    """Stop the machine."""
    ctx.machine.stop()


@command("cont")
async def cont(ctx: Context) -> None:
    """Let the machine go on."""
    ctx.machine.cont()


@command("system_reset")
async def system_reset(ctx: Context) -> None:
    """Reset the machine; devices that wait to be unplugged go."""
    await ctx.machine.system_reset()


@command("system_powerdown")
async def system_powerdown(ctx: Context) -> None:
    """Press the power button."""
    ctx.machine.powerdown()


@command("query-name")
async def query_name(ctx: Context) -> dict[str, Any]:
    """Return the name of the machine, if it was given one."""
    name = ctx.machine.options.name
    return {} if name is None else {"name": name}


@command("query-uuid")
async def query_uuid(ctx: Context) -> dict[str, Any]:
    """Return the identifier of the machine."""
    return {"UUID": ctx.machine.options.uuid}


@command("query-kvm")
async def query_kvm(ctx: Context) -> dict[str, Any]:
    """Say whether KVM could be used, and whether the command line asked for it."""
    present = os.access("/dev/kvm", os.R_OK | os.W_OK)
    return {"enabled": present and ctx.machine.options.kvm, "present": present}


@command("query-target")
async def query_target(ctx: Context) -> dict[str, Any]:
    """Return the architecture that is modelled."""
    return {"arch": "x86_64"}


@command("query-iothreads")
async def query_iothreads(ctx: Context) -> list[dict[str, Any]]:
    """List the I/O threads, in the order of QEMU's table of objects."""
    return [one.wire_info() for one in ctx.objects.hash_order() if isinstance(one, _IoThread)]


@command("query-vnc")
async def query_vnc(ctx: Context) -> dict[str, Any]:
    """Say that there is no VNC server."""
    return {"enabled": False}
