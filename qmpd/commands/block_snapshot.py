"""Handlers of qapi/block-snapshot.json. Model: external_snapshot_action and qmp_change_backing_file of QEMU."""

from __future__ import annotations

import os

from qmpd.block import chain, reopen
from qmpd.block.backing import refresh_names
from qmpd.commands._overlays import NewOverlay, new_overlay_above, overlay_above
from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.jobs.chains import root_of
from qmpd.qapi.registry import command


@command("blockdev-snapshot")
async def blockdev_snapshot(ctx: Context, *, node: str, overlay: str) -> None:
    """Put an open overlay above a node."""
    async with overlay_above(ctx, node=node, overlay=overlay):
        pass


@command("blockdev-snapshot-sync")
async def blockdev_snapshot_sync(
    ctx: Context,
    *,
    snapshot_file: str,
    device: str | None = None,
    node_name: str | None = None,
    snapshot_node_name: str | None = None,
    format: str = "qcow2",
    mode: str = "absolute-paths",
) -> None:
    """Make or open an overlay, and put it above a node."""
    wanted = NewOverlay(snapshot_file, device, node_name, snapshot_node_name, format, mode)
    async with new_overlay_above(ctx, wanted):
        pass


@command("change-backing-file")
async def change_backing_file(ctx: Context, *, device: str, image_node_name: str, backing_file: str) -> None:
    """Write another name of its backing file into an image, which is made writable for as long as that takes."""
    graph = ctx.graph
    top = root_of(graph, device)
    image = graph.lookup(None, image_node_name)
    if chain.link_below(image) is None:
        raise CommandError("not allowing backing file change on an image without a backing file")
    graph.check_blocked(top)
    if not chain.contains(top, image):
        raise CommandError(f"'{device}' and image file are not in the same chain")
    read_only = image.read_only
    await reopen.set_read_only(graph, image, False)
    try:
        async with graph.drained(image):
            await graph.runner.run(image.change_backing_file(backing_file, image.driver_name))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise CommandError(f"Could not change backing file to '{backing_file}': {reason}") from error
    finally:
        refresh_names([image])
        await reopen.set_read_only(graph, image, read_only)
