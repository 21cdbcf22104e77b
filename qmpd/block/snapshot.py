"""External snapshots: an overlay comes above a node, and takes over all who use it.

Model: external_snapshot_action (QEMU blockdev.c), bdrv_append and bdrv_replace_node (block.c).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from qmpd.block import filename, opening, protocol_names, reopen
from qmpd.block.backing import refresh_names
from qmpd.block.change import cumulative, reaches
from qmpd.block.insertion import move_parents
from qmpd.block.node import BlockNode
from qmpd.block.options import NodeOptions
from qmpd.block.perm import ChildRole, Perm
from qmpd.errors import CommandError, QmpdError
from qmpd.qapi.bind import build

if TYPE_CHECKING:
    from qmpd.block.child import Child
    from qmpd.block.graph import Graph

log = logging.getLogger(__name__)


@asynccontextmanager
async def above(graph: Graph, node: BlockNode, overlay: BlockNode) -> AsyncIterator[None]:
    """Put `overlay` above `node`; undone if the block raises, else `node` becomes read-only at its end.

    Raises CommandError for an overlay that will not do; then nothing has changed.
    """
    async with graph.drained(node, overlay):
        if cumulative(overlay)[0] & Perm.CONSISTENT_READ:
            raise CommandError("The overlay is already in use")
        if overlay.is_filter:
            raise CommandError("Filters cannot be used as overlays")
        if "backing" in overlay.children:
            raise CommandError("The overlay already has a backing image")
        if not overlay.supports_backing:
            raise CommandError("The overlay does not support backing images")
        if reaches(node, overlay):
            raise CommandError(f"Making '{node.name}' a backing child of '{overlay.name}' would create a cycle")
        moved = _append(graph, node, overlay)
        try:
            yield
        except BaseException:
            _take_away(graph, node, overlay, moved)
            raise
    try:
        await reopen.set_read_only(graph, node, True)
    except QmpdError as error:  # who still writes to it may, as in the reference
        log.info("node '%s' stays writable below its overlay: %s", node.name, error)


def _append(graph: Graph, node: BlockNode, overlay: BlockNode) -> list[Child]:
    """Give `overlay` the backing file `node`, and all other parents of `node`; return the edges that moved."""
    with graph.change() as tran:
        parents = list(node.parents)
        tran.attach(overlay, "backing", ChildRole.COW, node)
        move_parents(tran, node, overlay)
        moved = [edge for edge in parents if edge.node is overlay]
    refresh_names([overlay])
    return moved


def _take_away(graph: Graph, node: BlockNode, overlay: BlockNode, moved: list[Child]) -> None:
    """Undo `_append`."""
    with graph.change() as tran:
        for edge in reversed(moved):
            tran.replace(edge, node)
        tran.detach(overlay.children["backing"])
    refresh_names([node, overlay])


async def open_overlay(
    graph: Graph, node: BlockNode, file: str, image_format: str, name: str | None, *, make: bool
) -> BlockNode:
    """Return an overlay for `node` without its backing file, its image made or there already. Raises CommandError.

    It gets the options of `node`: whether it may be written to, cache and discard; there is none for a secret, so
    nothing of it is slow, and it may be opened in the middle of a transaction.
    """
    if make:
        await _make(graph, node, file, image_format, name)
    entry = graph.registry.drivers.get(image_format)
    if entry is None:
        raise CommandError(f"Unknown driver '{image_format}'")
    tree: dict[str, Any] = {"driver": image_format}
    if name is not None:
        tree["node-name"] = name
    if entry.cls.supports_backing:
        tree["backing"] = None
    if entry.cls.is_protocol:
        tree |= protocol_names.options_of(graph.registry, file) | {"driver": image_format}
    else:
        tree["file"] = protocol_names.options_of(graph.registry, file)
    like = node.node_options
    options = NodeOptions(
        node_name=name,
        discard=like.discard,
        cache_direct=like.cache_direct,
        cache_no_flush=like.cache_no_flush,
        read_only=node.read_only,
        auto_read_only=like.auto_read_only,
    )
    return await opening.open_tree(graph, tree, nullcontext, options)


async def _make(graph: Graph, node: BlockNode, file: str, image_format: str, name: str | None) -> None:
    """Make an image whose backing file is that of `node` (bdrv_img_create). Raises CommandError, OSError."""
    registry = graph.registry
    if image_format not in registry.drivers:
        raise CommandError(f"Unknown file format '{image_format}'")
    place = protocol_names.options_of(registry, file)
    if image_format not in registry.creators and image_format != "raw":  # which only blockdev-create does not make
        raise CommandError(f"Format driver '{image_format}' does not support image creation")
    if not registry.drivers[image_format].cls.supports_backing:
        raise CommandError(f"Backing file not supported for file format '{image_format}'")
    if place["driver"] not in registry.creators:
        raise CommandError(f"Protocol driver '{place['driver']}' does not support creating new images")
    backing = filename.node_filename(node)
    if file == backing:
        raise CommandError("Error: Trying to create an image with the same filename as the backing file")
    if name is not None:
        filename.check_node_name(name)
    await _create(graph, "file", {**place, "size": 0})
    options = {"file": place, "size": node.size, "backing-file": backing, "backing-fmt": node.driver_name}
    await _create(graph, image_format, options)


async def _create(graph: Graph, driver: str, options: dict[str, Any]) -> None:
    entry = graph.registry.creators[driver]
    assert entry.options is not None
    members = {name: value for name, value in options.items() if name != "driver"}
    await entry.cls(graph).create(build(entry.options, members))
