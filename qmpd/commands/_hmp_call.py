"""How a command for people calls its counterpart in QMP."""

from __future__ import annotations

from typing import Any

from qmpd.context import Context
from qmpd.errors import CommandError


async def qmp(ctx: Context, name: str, **arguments: Any) -> Any:
    """Run the QMP command `name` with keyword arguments and return its result.

    Raises what it raises, and CommandError if this program does not have it.
    """
    entry = ctx.services.registry.commands.get(name)
    if entry is None or name not in ctx.services.schema.commands:
        raise CommandError(f"the command '{name}' is not available")
    return await entry.handler(ctx, **arguments)
