"""The handlers of qapi/block-export.json: the NBD server and block exports."""

from __future__ import annotations

from typing import Any

from qmpd.context import Context
from qmpd.exporting.nbd_server import DEFAULT_CONNECTIONS, DEFAULT_HANDSHAKE_SECONDS, Limits
from qmpd.qapi.registry import command


@command("nbd-server-start")
async def nbd_server_start(
    ctx: Context,
    *,
    addr: dict[str, Any],
    handshake_max_seconds: int = DEFAULT_HANDSHAKE_SECONDS,
    tls_creds: str | None = None,
    tls_authz: str | None = None,
    max_connections: int = DEFAULT_CONNECTIONS,
) -> None:
    """Start the NBD server, one per daemon."""
    await ctx.services.exports.start_server(
        {"type": addr["type"], **addr["data"]},
        limits=Limits(max_connections, handshake_max_seconds),
        tls_creds=tls_creds,
        tls_authz=tls_authz,
        inherited=ctx.session is None,
    )


@command("nbd-server-add")
async def nbd_server_add(ctx: Context, *, options: dict[str, Any]) -> None:
    """Export a node by NBD, the old way: the export's name is its id, a read-only node is exported so."""
    name = options.get("name", options["device"])
    node = ctx.graph.lookup(options["device"], options["device"])
    members: dict[str, Any] = {
        "type": "nbd",
        "id": name,
        "node-name": node.name,
        "writable": options.get("writable", False) and not node.read_only,
        "name": name,
    }
    if "description" in options:
        members["description"] = options["description"]
    if "bitmap" in options:
        members["bitmaps"] = [options["bitmap"]]
    await ctx.services.exports.add(members)


@command("nbd-server-remove")
async def nbd_server_remove(ctx: Context, *, name: str, mode: str = "safe") -> None:
    """Remove an NBD export by its id."""
    await ctx.services.exports.remove(name, mode)


@command("nbd-server-stop")
async def nbd_server_stop(ctx: Context) -> None:
    """Stop the NBD server and delete every NBD export."""
    ctx.services.exports.require_server()
    async with ctx.out_of_turn():
        await ctx.services.exports.stop_server()


@command("block-export-add")
async def block_export_add(ctx: Context, *, options: dict[str, Any]) -> dict[str, Any]:
    """Create an export of any type, and say where it is if that was asked."""
    report = options.get("report-uri", False)
    members = {name: options[name] for name in options if name != "report-uri"}
    export = await ctx.services.exports.add(members, inherited=ctx.session is None)
    uri = export.uri() if report else None
    return {} if uri is None else {"uri": uri}


@command("block-export-del")
async def block_export_del(ctx: Context, *, id: str, mode: str = "safe") -> None:
    """Delete an export."""
    await ctx.services.exports.remove(id, mode)


@command("query-block-exports")
async def query_block_exports(ctx: Context) -> list[dict[str, Any]]:
    """List the exports, newest first."""
    return ctx.services.exports.query()
