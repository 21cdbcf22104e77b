"""Places for data that is written past the graph: what a copy into an image that is empty there goes to.

A copy of a whole disk knows beforehand which ranges it is going to fill. A node that can say where their data
belongs in a file, and what is to be done when it is there, answers with a `Filling`; the data then goes from file
to file by `aio.copying`, in several threads, without a request for each piece of it. What is not plain (data that is
encrypted on its way, ranges that hold something already, a node that filters or counts) gets None and goes through
the nodes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qmpd.aio.copying import available, copy
from qmpd.block.direct import DirectWrite, direct_write

if TYPE_CHECKING:
    from qmpd.aio.copying import Part
    from qmpd.aio.disk import DiskFile
    from qmpd.aio.pool import BufferPool
    from qmpd.block.node import BlockNode


class Filling(Protocol):
    """Ranges of a node that are being filled: one `fill`, which ends it."""

    grain: int
    """Bytes that are written or left out as a whole; zeroes in fewer bytes are written."""

    settled: asyncio.Event
    """Set when the data is written, or failed, and the room that it did not need was given back: who wants an image
    without gaps begins the next filling after that, while the rest of this one is still being done."""

    async def fill(self, parts: Sequence[Part], *, grain: int, in_order: bool, pool: BufferPool) -> None:
        """Copy `parts`, which lie in the ranges, but for the grains that are zero.

        grain   bytes, a multiple of self.grain      pool   where buffers come from
        Raises OSError; then the node shows in these ranges what it did before, or a part of the new data.
        """

    async def give_up(self) -> None:
        """End it without a copy."""


@dataclass(slots=True, eq=False, repr=False)
class InPlace:
    """Ranges whose bytes have their place in a file already."""

    way: DirectWrite
    size: int
    settled: asyncio.Event
    grain: int = 1

    async def fill(self, parts: Sequence[Part], *, grain: int, in_order: bool, pool: BufferPool) -> None:
        """Copy; nothing else is to be done."""
        place = self.way.place
        shift = place.before + place.after
        await copy(parts, place.disk, grain=grain, end=self.size, shift=shift, in_order=False, pool=pool)
        end = max(part.at + part.length for part in parts)
        self.way.written(end, end + shift)

    async def give_up(self) -> None:
        """Nothing was taken."""


async def begin_filling(node: BlockNode, ranges: Sequence[tuple[int, int]]) -> Filling | None:
    """Return the way to fill `ranges` (start, end) of a node, in order and apart, which are zero now; None if there is
    none. Raises OSError.
    """
    if node.read_only or node.dirty_bitmaps or node.write_threshold or node.ranges.busy:
        return None
    if not available() or node.node_options.detect_zeroes in ("on", "unmap"):
        return None
    own = await node.begin_filling(ranges)
    if own is not None:
        return own
    way = direct_write(node)
    if way is None or way.place.locate is not None or way.place.crypto is not None or not way.unnoticed():
        return None
    size, place = node.size, way.place
    if place.disk.direct or size + place.before + place.after > place.disk.size:
        return None
    settled = asyncio.Event()
    settled.set()  # there is no room to give back
    return InPlace(way, size, settled)


def plain_source(node: BlockNode | None) -> tuple[DiskFile, int] | None:
    """Return the file that a node's bytes are in, one after the other, and the offset of the first; None if they are
    not, or not to be read there."""
    place = None if node is None else node.direct_read()
    if place is None or place.locate is not None or place.crypto is not None or place.disk.direct:
        return None
    return place.disk, place.before + place.after
