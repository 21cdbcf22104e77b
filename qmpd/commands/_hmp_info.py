"""`info ...` for people."""

from __future__ import annotations

from typing import Any

from qmpd.commands._hmp_call import qmp
from qmpd.commands._hmp_table import info
from qmpd.context import Context
from qmpd.version import QEMU_LEVEL, VERSION

_IOTHREAD = ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch")


@info("version", help="show the version")
async def version(ctx: Context, values: dict[str, Any]) -> str:
    """Show the level of compatibility and the program's own version."""
    level = ".".join(str(part) for part in QEMU_LEVEL)
    return f"{level} (qmpd {VERSION})\n"


@info("status", help="show what the machine is doing")
async def status(ctx: Context, values: dict[str, Any]) -> str:
    """Show the run state."""
    machine = ctx.machine
    if machine.running:
        return "VM status: running\n"
    detail = "" if machine.status == "paused" else f" ({machine.status})"
    return f"VM status: paused{detail}\n"


@info("name", help="show the name of the machine")
async def name(ctx: Context, values: dict[str, Any]) -> str:
    """Show the name, if there is one."""
    found = ctx.machine.options.name
    return f"{found}\n" if found else ""


@info("uuid", help="show the identifier of the machine")
async def uuid(ctx: Context, values: dict[str, Any]) -> str:
    """Show the identifier."""
    return f"{ctx.machine.options.uuid}\n"


@info("kvm", help="show whether KVM is used")
async def kvm(ctx: Context, values: dict[str, Any]) -> str:
    """Show whether the command line asked for KVM and it is there."""
    reply = await qmp(ctx, "query-kvm")
    return f"kvm support: {'enabled' if reply['enabled'] else 'disabled'}\n"


@info("vnc", help="show the VNC servers")
async def vnc(ctx: Context, values: dict[str, Any]) -> str:
    """Show that there is none."""
    return "None\n"


@info("chardev", help="show the character devices")
async def chardev(ctx: Context, values: dict[str, Any]) -> str:
    """Show the monitors' sockets."""
    rows = await qmp(ctx, "query-chardev")
    return "".join(f"{row['label']}: filename={row['filename']}\n" for row in rows)


@info("iothreads", help="show the I/O threads")
async def iothreads(ctx: Context, values: dict[str, Any]) -> str:
    """Show the I/O threads with their parameters."""
    printed = ""
    for row in await qmp(ctx, "query-iothreads"):
        printed += f"{row['id']}:\n  thread_id={row['thread-id']}\n"
        printed += "".join(f"  {key}={row[key]}\n" for key in _IOTHREAD)
    return printed
