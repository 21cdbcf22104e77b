"""Handlers of qapi/luks-binding.json: which payloads a detached header belongs to."""

from __future__ import annotations

from typing import Any

from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.luks.binding import BindableNode
from qmpd.qapi.registry import command


def _node(ctx: Context, name: str) -> BindableNode:
    node = ctx.graph.lookup(None, name)
    if not isinstance(node, BindableNode):
        raise CommandError(f"Node '{name}' is no LUKS volume")
    return node


@command("luks-payload-bind")
async def luks_payload_bind(ctx: Context, *, node_name: str, mark: bool = False) -> dict[str, Any]:
    """Bind the header of a node to its payload."""
    return {"binding": await _node(ctx, node_name).bind_payload(mark=mark)}


@command("luks-payload-unbind")
async def luks_payload_unbind(ctx: Context, *, node_name: str) -> dict[str, Any]:
    """Forget what the header of a node is bound to."""
    return {"removed": await _node(ctx, node_name).unbind_payload()}
