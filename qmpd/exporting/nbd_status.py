"""Metadata contexts: what NBD_CMD_BLOCK_STATUS reports of a backend.

base:allocation        bit 0 nothing is stored, bit 1 reads as zeroes; the whole chain is asked
qemu:allocation-depth  0 nowhere, 1 in the node itself, 2 in its backing node, ...
"""

from __future__ import annotations

from qmpd.block.backend import BlockBackend
from qmpd.block.child import Child
from qmpd.block.node import BlockNode
from qmpd.protocols.nbd import STATE_HOLE, STATE_ZERO

MAX_QUERY = 64 << 30
"""Bytes asked of the node at once; a longer query is answered for its beginning."""


async def allocation(backend: BlockBackend, offset: int, length: int) -> list[tuple[int, int]]:
    """Return (length, state) for the range or its beginning. Raises OSError."""
    found = await backend.block_status(offset, min(length, MAX_QUERY))
    return [
        (extent.length, (0 if extent.data else STATE_HOLE) | (STATE_ZERO if extent.zero else 0)) for extent in found
    ]


async def depth(backend: BlockBackend, offset: int, length: int) -> list[tuple[int, int]]:
    """Return (length, layer that provides it) for the range or its beginning. Raises OSError."""

    async def work(root: Child) -> list[tuple[int, int]]:
        return await _layers(root.node, offset, min(length, MAX_QUERY), 1)

    return await backend.visit(work)


async def _layers(node: BlockNode, offset: int, length: int, level: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    below = node.children.get("backing")
    for extent in await node.block_status(offset, length):
        if extent.allocated:
            found.append((extent.length, level))
        elif below is None:
            found.append((extent.length, 0))
        else:
            inside = min(extent.length, max(0, below.node.size - extent.offset))
            if inside:
                found += await _layers(below.node, extent.offset, inside, level + 1)
            if inside < extent.length:
                found.append((extent.length - inside, 0))
    return found
