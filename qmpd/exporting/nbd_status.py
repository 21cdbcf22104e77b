"""What a chain of nodes holds: for metadata contexts, and for reads that skip holes.

base:allocation        bit 0 nothing is stored, bit 1 reads as zeroes; the whole chain is asked
qemu:allocation-depth  0 nowhere, 1 in the node itself, 2 in its backing node, ...
"""

from __future__ import annotations

from typing import NamedTuple

from qmpd.block.backend import BlockBackend
from qmpd.block.child import Child
from qmpd.block.node import BlockNode
from qmpd.protocols.nbd import STATE_HOLE, STATE_ZERO

MAX_QUERY = 64 << 30
"""Bytes asked of the node at once; a longer query is answered for its beginning."""


class Stretch(NamedTuple):
    """Bytes of one kind, as the guest sees them.

    state   of base:allocation           depth   layer that provides them, 0 for none
    """

    offset: int
    length: int
    state: int
    depth: int


async def chain_status(backend: BlockBackend, offset: int, length: int) -> list[Stretch]:
    """Return what the range, or its beginning, consists of. Raises OSError."""

    async def work(root: Child) -> list[Stretch]:
        return await _layers(root.node, offset, min(length, MAX_QUERY), 1)

    return await backend.visit(work)


async def _layers(node: BlockNode, offset: int, length: int, level: int) -> list[Stretch]:
    found: list[Stretch] = []
    below = node.children.get("backing") or (node.primary() if node.is_filter else None)
    for extent in await node.block_status(offset, length):
        if extent.allocated:
            state = (0 if extent.data else STATE_HOLE) | (STATE_ZERO if extent.zero else 0)
            found.append(Stretch(extent.offset, extent.length, state, level))
            continue
        inside = 0 if below is None else min(extent.length, max(0, below.node.size - extent.offset))
        if inside and below is not None:
            found += await _layers(below.node, extent.offset, inside, level + 1)
        if inside < extent.length:  # zeroes beyond a short backing node count as that node's
            nothing, layer = STATE_HOLE | STATE_ZERO, 0 if below is None else level + 1
            found.append(Stretch(extent.offset + inside, extent.length - inside, nothing, layer))
    return found
