"""Handlers of qapi/block-core.json: nodes made, deleted and shown."""

from __future__ import annotations

import errno
import os
from typing import Any

from qmpd.block import info, stats
from qmpd.block.backend import BlockBackend
from qmpd.block.perm import Perm
from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.jobs.block_job import BlockJob
from qmpd.qapi.registry import command


@command("blockdev-add")
async def blockdev_add(ctx: Context, *, options: dict[str, Any]) -> None:
    """Open a tree of nodes; the key derivation of an encrypted one runs out of turn."""
    await ctx.graph.blockdev_add(options, ctx.out_of_turn)


@command("blockdev-del")
async def blockdev_del(ctx: Context, *, node_name: str) -> None:
    """Delete a node that nothing uses, with the children that were made for it."""
    await ctx.graph.blockdev_del(node_name)


@command("query-named-block-nodes")
async def query_named_block_nodes(ctx: Context, *, flat: bool = False) -> list[dict[str, Any]]:
    """Describe every node, newest first."""
    return [info.device_info(node, flat=flat) for node in ctx.graph.nodes()]


@command("query-block")
async def query_block(ctx: Context) -> list[dict[str, Any]]:
    """Describe every disk device; a program without devices has none."""
    if ctx.services.machine is None:
        return []
    reply = []
    for device in ctx.services.machine.block_devices():
        row = device.query_block_row()
        node = device.backend.node
        if node is not None:
            row["inserted"] = info.device_info(node, flat=False, backend=device.backend)
            row["inserted"]["cache"]["writeback"] = device.write_cache
        reply.append(row)
    return reply


@command("query-blockstats")
async def query_blockstats(ctx: Context, *, query_nodes: bool = False) -> list[dict[str, Any]]:
    """Count what went through every disk device or, with `query_nodes`, every node."""
    if query_nodes:
        return [info.node_stats(node, chain=False) for node in reversed(ctx.graph.nodes())]
    if ctx.services.machine is None:
        return []
    reply = []
    for device in ctx.services.machine.block_devices():
        node = device.backend.node
        row: dict[str, Any] = {"device": device.backend.name, "qdev": device.qdev}
        if node is None:
            row["stats"] = stats.to_wire(device.backend.stats, 0)
        else:
            row |= info.node_stats(node, device.backend, chain=True)
        reply.append(row)
    return reply


@command("x-debug-query-block-graph")
async def debug_query_block_graph(ctx: Context) -> dict[str, Any]:
    """Show nodes, backends and edges with their permissions."""
    return info.debug_graph(ctx.graph)


@command("query-block-jobs")
async def query_block_jobs(ctx: Context) -> list[dict[str, Any]]:
    """List the jobs that work on block nodes."""
    return [job.to_block_wire() for job in ctx.jobs.newest_first() if isinstance(job, BlockJob)]


@command("block-set-write-threshold")
async def block_set_write_threshold(ctx: Context, *, node_name: str, write_threshold: int) -> None:
    """Ask for one event when a write ends beyond an offset."""
    node = ctx.graph.get(node_name)
    if node is None:
        raise CommandError(f"Device '{node_name}' not found")
    node.write_threshold = write_threshold


@command("block_resize")
async def block_resize(ctx: Context, *, size: int, device: str | None = None, node_name: str | None = None) -> None:
    """Change the size of a node that nobody keeps from being resized."""
    node = ctx.graph.lookup(device, node_name)
    if size >= 1 << 63 or size < 0:
        raise CommandError("Parameter 'size' expects a >0 size")
    ctx.graph.check_blocked(node)
    backend = BlockBackend(ctx.graph, lambda: "an unnamed block device", Perm.RESIZE, Perm.ALL)
    try:
        async with ctx.graph.drained(node):
            backend.insert(node)
            if node.read_only:
                raise CommandError("Image is read-only")
            await backend.truncate(size)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            raise CommandError("Image format driver does not support resize") from error
        raise CommandError(f"Failed to resize the image: {os.strerror(error.errno or errno.EIO)}") from error
    finally:
        await backend.remove()
