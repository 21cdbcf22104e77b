"""Filling clusters of a qcow2 image that are not there yet by a copy from file to file.

Room for every cluster that could be needed is taken first; the copy fills as much of it as there is data that is
not zero; the rest of the room is given back; then the L2 entries name what was filled. This order is that of any write
(`_qcow2_write`): a crash leaks clusters at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qmpd.aio.copying import copy
from qmpd.block.direct import DirectWrite, direct_write
from qmpd.drivers._qcow2_image import Corruption, Image
from qmpd.drivers._qcow2_map import find_slice
from qmpd.drivers._qcow2_plan import Plan
from qmpd.drivers._qcow2_write import link_all
from qmpd.units import align_down, align_up

if TYPE_CHECKING:
    from qmpd.aio.copying import Part
    from qmpd.aio.pool import BufferPool
    from qmpd.block.node import BlockNode
    from qmpd.block.ranges import Owned


@dataclass(slots=True, eq=False, repr=False)
class Qcow2Filling:
    """Room taken for guest clusters that have no entry.

    runs   (first cluster, clusters) of the file      below   how the file is written      grain   a cluster
    """

    node: BlockNode
    image: Image
    runs: list[tuple[int, int]]
    below: DirectWrite
    owned: list[Owned]
    generation: int
    grain: int
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    async def fill(self, parts: Sequence[Part], *, grain: int, in_order: bool, pool: BufferPool) -> None:
        """Copy, let the L2 entries name what was written, give back what was not needed. Raises OSError."""
        image, bits = self.image, self.image.cluster_bits
        place = self.below.place
        shift = place.before + place.after
        rooms = [((first << bits) + shift, count << bits) for first, count in self.runs]
        try:
            puts = await copy(
                parts,
                place.disk,
                grain=grain,
                end=self.node.size,
                unit=self.grain,
                rooms=rooms,
                in_order=in_order,
                pool=pool,
            )
            for node, _ in reversed((*self.below.above, *self.below.below)):
                node.child_resized()
            if puts:
                self.below.written(0, max(put.place + put.length for put in puts))
                highest = max(put.at + put.length for put in puts)
                self.node.wr_highest_offset = max(self.node.wr_highest_offset, min(highest, self.node.size))
            plans = [plan for put in puts for plan in self._plans(put.at, put.place - shift, put.length >> bits)]
            left = _without(self.runs, sorted((plan.host >> bits, plan.count) for plan in plans))
            self.runs = []
            await self._give_back(left)
            self.settled.set()
            await asyncio.sleep(0)  # whoever waited for that takes room and has its threads at work before this goes on
            await link_all(image, plans)
            for plan in plans:
                if plan.failed:
                    raise OSError(plan.failed, "the new clusters cannot be linked")
        finally:
            await self.give_up()
        if image.crowded and not image.dead:
            await image.write_metadata()

    def _plans(self, guest: int, host: int, count: int) -> list[Plan]:
        """Return a plan for each stretch of clusters whose entries are in one slice of a table."""
        bits, span = self.image.cluster_bits, 1 << self.image.slice_bits
        plans = []
        while count:
            now = min(count, span - (guest >> bits) % span)
            plan = Plan(guest, now)
            plan.host, plan.fresh = host, True
            plans.append(plan)
            guest, host, count = guest + (now << bits), host + (now << bits), count - now
        return plans

    async def give_up(self) -> None:
        """Give back the room that is left. Raises OSError."""
        runs, self.runs = self.runs, []
        try:
            await self._give_back(runs)
        finally:
            self.settled.set()
            self.image.owned.release(self.owned)
            self.image.leave(self.generation)

    async def _give_back(self, runs: list[tuple[int, int]]) -> None:
        if runs and not self.image.dead:
            async with self.image.lock:
                await self.image.refcounts.give_back(runs)


def _without(runs: list[tuple[int, int]], taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what of `runs` is not in `taken`, which is in order and lies in them; (first, count) each."""
    rest = []
    queue = iter(taken)
    now = next(queue, None)
    for first, count in sorted(runs):
        end = first + count
        while now is not None and now[0] < end:
            if now[0] > first:
                rest.append((first, now[0] - first))
            first = sum(now)
            now = next(queue, None)
        if first < end:
            rest.append((first, end - first))
    return rest


async def begin(node: BlockNode, image: Image, ranges: Sequence[tuple[int, int]]) -> Qcow2Filling | None:
    """Take room for the clusters that `ranges` (start, end) of the guest touch.

    None if one of them has an entry, or the image is not plain; nothing is taken then. Raises OSError.
    """
    if image.encryption is not None or image.external or image.extended or image.bitmaps_fresh or not image.writable:
        return None
    below = direct_write(image.file.node)
    if below is None or below.place.locate is not None or not below.unnoticed() or below.place.disk.direct:
        return None
    clusters = _whole(ranges, image.cluster_size)
    generation = image.enter()
    owned: list[Owned] = []
    try:
        owned = await image.owned.acquire([(start, end, True) for start, end in clusters])
        async with image.lock:
            runs = await _take(image, clusters)
        if runs is not None:
            return Qcow2Filling(node, image, runs, below, owned, generation, image.cluster_size)
    except BaseException:
        image.owned.release(owned)
        image.leave(generation)
        raise
    image.owned.release(owned)
    image.leave(generation)
    return None


def _whole(ranges: Sequence[tuple[int, int]], cluster_size: int) -> list[tuple[int, int]]:
    """Return the ranges of whole clusters that `ranges` touch, apart."""
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        start, end = align_down(start, cluster_size), align_up(end, cluster_size)
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


async def _take(image: Image, clusters: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """Take host clusters for empty guest clusters; None, and none taken, if one is not empty. The lock is held."""
    span = image.cluster_bits + image.slice_bits
    for start, end in clusters:
        while start < end:
            stop = min(end, (start >> span) + 1 << span)
            try:
                place = await find_slice(image, start)
            except Corruption:
                return None  # the write that follows says it
            count = stop - start >> image.cluster_bits
            if place is not None and any(place.slice.table[place.index : place.index + count]):
                return None
            start = stop
    await image.before_change()
    runs = await image.refcounts.allocate(sum(end - start for start, end in clusters) >> image.cluster_bits)
    bits = image.cluster_bits
    if not all(image.overlaps.clear(first << bits, count << bits) for first, count in runs):
        await image.refcounts.give_back(runs)
        return None
    return runs
