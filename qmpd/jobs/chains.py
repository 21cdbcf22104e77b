"""What is asked of jobs that work on chains of images, and what they ask of the chain."""

from __future__ import annotations

from qmpd.block import chain
from qmpd.block.backend import BlockBackend
from qmpd.block.filename import node_filename
from qmpd.block.graph import Graph
from qmpd.block.node import BlockNode
from qmpd.errors import CommandError


def find_image(top: BlockNode, name: str) -> BlockNode | None:
    """Return the image below `top` with that file name (bdrv_find_backing_image)."""
    node = chain.backing_of(chain.image_of(top))
    above = chain.image_of(top)
    while node is not None:
        if name in (node_filename(node), above.backing_file):
            return node
        above, node = node, chain.backing_of(node)
    return None


def lowest_image(top: BlockNode) -> BlockNode:
    """Return the image at the end of a chain (bdrv_find_base)."""
    node = chain.image_of(top)
    while (below := chain.backing_of(node)) is not None:
        node = below
    return node


def overlay_of(top: BlockNode, node: BlockNode) -> BlockNode | None:
    """Return the image in the chain of `top` whose backing image is `node` (bdrv_find_overlay)."""
    wanted, above = chain.image_of(node), chain.image_of(top)
    while (below := chain.backing_of(above)) is not None:
        if below is wanted:
            return above
        above = below
    return None


def backing_format(node: BlockNode, *, mask: bool) -> str:
    """Return the format that an image is told its backing file `node` has; `mask`: a protocol counts as raw."""
    return "raw" if mask and node.is_protocol else node.driver_name


def device_name(node: BlockNode) -> str:
    """Return the name of the drive that a node belongs to, "" if none (bdrv_get_device_name)."""
    names = (edge.parent.name for edge in node.parents if isinstance(edge.parent, BlockBackend))
    return next((name for name in names if name), "")


def root_of(graph: Graph, device: str) -> BlockNode:
    """Return the node that a device holds, or that no other node uses (qmp_get_root_bs). Raises CommandError."""
    node = graph.lookup(device, device)
    if any(isinstance(edge.parent, BlockNode) for edge in node.parents):
        raise CommandError("Need a root block node")
    return node
