"""Handlers of qapi/control.json: the session itself, and what the daemon says of itself."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Protocol, cast

from qmpd.context import Context
from qmpd.crypto import cipher
from qmpd.qapi.introspect import schema_info
from qmpd.qapi.registry import command
from qmpd.version import QEMU_LEVEL, VERSION


class _Negotiating(Protocol):
    """The part of a client's session that qmp_capabilities needs."""

    def negotiate(self, enable: Iterable[str]) -> None:
        """End the negotiation. Raises CommandNotFound if that was done before."""


@functools.cache
def version_info() -> dict[str, Any]:
    """Return the answer of query-version, which is part of the greeting, too."""
    major, minor, micro = QEMU_LEVEL
    package = f"qmpd {VERSION}"
    if not cipher.engine_name().startswith("compiled"):
        package += f" ({cipher.engine_name()})"
    return {"qemu": {"micro": micro, "minor": minor, "major": major}, "package": package}


@command("qmp_capabilities")
async def qmp_capabilities(ctx: Context, *, enable: list[str] | None = None) -> None:
    """End the capability negotiation of this client."""
    cast(_Negotiating, ctx.session).negotiate(enable or ())


@command("query-version")
async def query_version(ctx: Context) -> dict[str, Any]:
    """Return the level of compatibility and this program's own version."""
    return version_info()


@command("query-commands")
async def query_commands(ctx: Context) -> list[dict[str, Any]]:
    """Return the names of all commands."""
    return [{"name": name} for name in ctx.services.schema.commands]


@command("query-qmp-schema")
async def query_qmp_schema(ctx: Context) -> list[dict[str, Any]]:
    """Return everything a client may want to know of commands, events and types."""
    return schema_info(ctx.services.schema)


@command("query-chardev")
async def query_chardev(ctx: Context) -> list[dict[str, Any]]:
    """Return the character devices, which are the monitors' sockets."""
    return ctx.services.chardevs


@command("quit")
async def quit_daemon(ctx: Context) -> None:
    """End the daemon once the reply has left."""
    ctx.services.quit("host-qmp-quit")
