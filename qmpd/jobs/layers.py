"""Which images of a chain hold what a range shows. Model: bdrv_is_allocated_above (QEMU block/io.c)."""

from __future__ import annotations

import enum
from typing import NamedTuple

from qmpd.block import chain
from qmpd.block.node import BlockNode


class Held(enum.Enum):
    """Where a stretch comes from."""

    DATA = "data"
    ZERO = "zero"
    BELOW = "below"


class Stretch(NamedTuple):
    """Bytes that come from the same place; BELOW: from none of the images that were looked at."""

    offset: int
    length: int
    held: Held


async def held_above(top: BlockNode, base: BlockNode | None, offset: int, length: int) -> list[Stretch]:
    """Say what of a range the images from `top` down to `base`, which is left out, hold; None: all images.

    Runs on the data loop. What lies behind the end of a lower image reads as zeroes, so it counts as held.
    Raises OSError.
    """
    found: list[Stretch] = []
    stop = None if base is None else chain.image_of(base)
    node: BlockNode | None = chain.image_of(top)
    first = node
    todo = [(offset, length)]
    while node is not None and node is not stop and todo:
        below: list[tuple[int, int]] = []
        for at, size in todo:
            inside = min(size, max(0, node.size - at))
            if inside < size:
                beyond = Stretch(at + inside, size - inside, Held.BELOW if node is first else Held.ZERO)
                found.append(beyond)
            if not inside:
                continue
            for extent in await node.block_status(at, inside):
                if extent.allocated:
                    held = Held.ZERO if extent.zero else Held.DATA
                    found.append(Stretch(extent.offset, extent.length, held))
                else:
                    below.append((extent.offset, extent.length))
        todo, node = below, chain.backing_of(node)
    found += [Stretch(at, size, Held.BELOW) for at, size in todo]
    return _joined(sorted(found))


def _joined(stretches: list[Stretch]) -> list[Stretch]:
    """Put neighbours of one kind together."""
    joined: list[Stretch] = []
    for one in stretches:
        if joined and joined[-1].held is one.held and joined[-1].offset + joined[-1].length == one.offset:
            joined[-1] = joined[-1]._replace(length=joined[-1].length + one.length)
        else:
            joined.append(one)
    return joined
