"""What lies where in an image and its backing chain: extents, in order, in memory for a stretch at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpd.units import GiB, KiB, MiB

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode

SALVAGED = 64 * KiB
"""Bytes that count as data when nobody can say what is there."""

CLUSTERS_AT_ONCE = 16384
"""Clusters that one look covers at most, so that a list of extents stays small whatever the cluster size."""


@dataclass(slots=True, eq=False, repr=False)
class Stretch:
    """Bytes [start, start + length) of an image, of one kind; sizes in bytes.

    depth    how many layers below the top they come from
    present  some layer provides them           zero, data  as in `Extent`
    host, file  where they lie in the file of that node, if they have a plain place
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    host: int | None = None
    file: BlockNode | None = None

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self.start + self.length

    def goes_on(self, other: Stretch) -> bool:
        """Say whether `other` continues this one, kind and place."""
        if (self.depth, self.present, self.zero, self.data, self.compressed, self.file) != (
            other.depth,
            other.present,
            other.zero,
            other.data,
            other.compressed,
            other.file,
        ):
            return False
        if self.host is None or other.host is None:
            return self.host is other.host
        return self.host + self.length == other.host


def look_ahead(node: BlockNode) -> int:
    """Return the bytes to ask about at once."""
    cluster = int(node.image_info().get("cluster-size", GiB // CLUSTERS_AT_ONCE))
    return min(max(cluster * CLUSTERS_AT_ONCE, MiB), GiB)


async def stretches(
    node: BlockNode, start: int, end: int, *, base: BlockNode | None = None, joined: bool = True, first: int = GiB
) -> AsyncIterator[Stretch]:
    """Yield what [start, end) of `node` is, down its backing chain; neighbours of one kind joined. Raises OSError.

    base    where to stop: what only it or those below it hold counts as not present
    first   bytes to look at before the first of them is told; later looks go further
    """
    most = look_ahead(node)
    step = min(first, most)
    waiting: Stretch | None = None
    while start < end:
        length = min(step, end - start)
        async for one in _layers(node, start, length, 0, base):
            if waiting is not None and joined and waiting.goes_on(one):
                waiting.length += one.length
                continue
            if waiting is not None:
                yield waiting
            waiting = one
        start += length
        step = min(2 * step, most)
    if waiting is not None:
        yield waiting


async def salvaged_stretches(
    node: BlockNode, start: int, end: int, base: BlockNode | None, lost: Callable[[str, int, OSError], None]
) -> AsyncIterator[Stretch]:
    """Like `stretches`, not joined; where nobody can say what is there it counts as data, and `lost` is told."""
    step = look_ahead(node)
    while start < end:
        length = min(step, end - start)
        try:
            found = [one async for one in _layers(node, start, length, 0, base)]
        except OSError as error:
            if length > SALVAGED:
                step = max(length // 2 // SALVAGED * SALVAGED, SALVAGED)
                continue
            lost("block status at offset", start, error)
            found = [Stretch(start, length, 0, present=True, zero=False, data=True, compressed=False)]
        for one in found:
            yield one
        start += length
        step = min(2 * step, look_ahead(node))


async def _layers(
    node: BlockNode, start: int, length: int, depth: int, base: BlockNode | None
) -> AsyncIterator[Stretch]:
    while node.is_filter and "file" in node.children:
        node = node.children["file"].node
    for extent in await node.block_status(start, length):
        backing = node.children.get("backing")
        if extent.allocated or extent.zero or extent.data or backing is None or backing.node is base:
            yield Stretch(
                extent.offset,
                extent.length,
                depth,
                extent.allocated,
                extent.zero,
                extent.data,
                extent.compressed,
                extent.host,
                extent.file,
            )
        else:
            async for below in _layers(backing.node, extent.offset, extent.length, depth + 1, base):
                yield below
