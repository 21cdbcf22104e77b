"""Requests in flight on a node, and the widening of unaligned ones.

A widened write reads what surrounds it, so it owns its whole aligned range from that read to the
end of its write; every other write that overlaps, of the same batch too, waits in order.
Nothing here belongs to an event loop: a node may move between loops while it is drained.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.dirty_bitmap import mark
from qmpd.units import MiB, align_down, align_up

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode

ZERO_CHUNK = 1 * MiB
"""Bytes of zeroes written at once where a driver has no zero write of its own."""

_zeroes = memoryview(bytes(ZERO_CHUNK))


class Owned:
    """A range in flight; `waiters` wake when it ends."""

    __slots__ = ("end", "exclusive", "start", "waiters")

    def __init__(self, start: int, end: int, exclusive: bool) -> None:
        self.start, self.end, self.exclusive = start, end, exclusive
        self.waiters: list[asyncio.Future[None]] = []


class RangeTable:
    """Ranges of one node that are in flight.

    Shared owners may overlap each other, exclusive ones nothing. A newcomer waits for every
    earlier range that it conflicts with, arrived or still waiting: first come, first served.
    """

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[Owned] = []

    @property
    def busy(self) -> bool:
        """True while any range is owned or awaited."""
        return bool(self._ranges)

    @asynccontextmanager
    async def own(self, start: int, end: int, *, exclusive: bool) -> AsyncIterator[None]:
        """Own bytes [start, end) for the length of the block."""
        mine = await self.acquire(((start, end, exclusive),))
        try:
            yield
        finally:
            self.release(mine)

    async def acquire(self, wanted: Iterable[tuple[int, int, bool]]) -> list[Owned]:
        """Own several ranges (start, end, exclusive) at once; `release` what is returned.

        All take their place in the order of arrival first and then wait, so that two callers
        with several ranges each cannot wait for one another. The ranges of one call do not
        conflict among themselves: the caller has separated those that do.
        """
        earlier = list(self._ranges)
        mine = [Owned(*one) for one in wanted]
        self._ranges.extend(mine)
        try:
            for one in mine:
                for other in earlier:
                    if (one.exclusive or other.exclusive) and one.start < other.end and other.start < one.end:
                        await self._ended(other)
        except BaseException:
            self.release(mine)
            raise
        return mine

    async def _ended(self, other: Owned) -> None:
        if other.end < 0:
            return
        future = asyncio.get_running_loop().create_future()
        other.waiters.append(future)
        await future

    def release(self, mine: list[Owned]) -> None:
        """End the ranges that `acquire` returned."""
        for one in mine:
            self._ranges.remove(one)
            one.end = -1
            for future in one.waiters:
                if not future.done():
                    future.set_result(None)
            one.waiters.clear()


def _aligned(batch: Batch, alignment: int) -> bool:
    if alignment == 1:
        return True
    mask = alignment - 1
    return not any((r.offset | len(r.view)) & mask for r in batch)


async def read(node: BlockNode, batch: Batch) -> None:
    """Read `batch` from `node`, widening through a bounce buffer what is not aligned."""
    alignment = node.request_alignment
    if _aligned(batch, alignment):
        await node.preadv(batch)
        return
    wide = Batch()
    bounced: list[tuple[Request, Request]] = []
    for request in batch:
        start, end = align_down(request.offset, alignment), align_up(request.end, alignment)
        if start == request.offset and end == request.end:
            wide.append(request)
            continue
        bounce = Request(start, memoryview(bytearray(end - start)), request)
        wide.append(bounce)
        bounced.append((request, bounce))
    await node.preadv(wide)
    for request, bounce in bounced:
        if not bounce.error:
            skip = request.offset - bounce.offset
            request.view[:] = bounce.view[skip : skip + len(request.view)]


async def write(node: BlockNode, batch: Batch, flags: WriteFlags = WriteFlags.NONE) -> None:
    """Write `batch` to `node`; unaligned requests become read, modify, write of the aligned range."""
    late_flush = bool(flags) and flags & WriteFlags.FUA and not node.supports_fua  # `&` of an IntFlag is slow
    if late_flush:
        flags &= ~WriteFlags.FUA
    alignment = node.request_alignment
    if node.node_options.detect_zeroes in ("on", "unmap"):
        rest = await _divert_zeroes(node, batch, flags)
    else:
        rest = batch
    try:
        if alignment == 1:
            if rest:
                await node.pwritev(rest, flags)
        else:
            for group in _without_conflicts(rest, alignment):
                await _write_group(node, group, flags, alignment)
    finally:
        if node.dirty_bitmaps and not flags & WriteFlags.UNCHANGED:
            for request in batch:
                mark(node, request.offset, len(request.view))
    for request in batch:
        if request.end > node.wr_highest_offset and not request.error:
            node.wr_highest_offset = request.end
    if node.write_threshold:
        node.check_write_threshold(max((request.end for request in batch), default=0))
    if late_flush:
        await node.flush()


async def _divert_zeroes(node: BlockNode, batch: Batch, flags: WriteFlags) -> Batch:
    """Turn the requests that hold only zeroes into zero writes; return the others."""
    if node.node_options.detect_zeroes == "unmap":
        flags |= WriteFlags.MAY_UNMAP
    rest = Batch()
    for request in batch:
        aligned = not (request.offset | len(request.view)) % node.request_alignment
        if not aligned or bytes(request.view).count(0) < len(request.view):
            rest.append(request)
            continue
        try:
            async with node.ranges.own(request.offset, request.end, exclusive=False):
                await node.pwrite_zeroes(request.offset, len(request.view), flags)
        except OSError:
            rest.append(request)
    return rest


def _without_conflicts(batch: Batch, alignment: int) -> list[Batch]:
    """Split a batch, keeping its order, so that no widened range meets another of its group."""
    if _aligned(batch, alignment):
        return [batch] if batch else []
    groups: list[Batch] = []
    current = Batch()
    taken: list[tuple[int, int, bool]] = []
    for request in batch:
        start, end = align_down(request.offset, alignment), align_up(request.end, alignment)
        wide = start != request.offset or end != request.end
        if any((wide or other) and start < high and low < end for low, high, other in taken):
            groups.append(current)
            current, taken = Batch(), []
        current.append(request)
        taken.append((start, end, wide))
    groups.append(current)
    return groups


async def _write_group(node: BlockNode, batch: Batch, flags: WriteFlags, alignment: int) -> None:
    wanted = []
    unaligned: list[Request] = []
    ready = Batch()
    for request in batch:
        start, end = align_down(request.offset, alignment), align_up(request.end, alignment)
        wide = start != request.offset or end != request.end
        wanted.append((start, end, wide))
        (unaligned if wide else ready).append(request)
    mine = await node.ranges.acquire(wanted)
    try:
        if unaligned:
            ready.extend(await _modify(node, unaligned, alignment))
        if ready:
            await node.pwritev(ready, flags)
    finally:
        node.ranges.release(mine)


async def _modify(node: BlockNode, requests: list[Request], alignment: int) -> list[Request]:
    """Return aligned requests that carry `requests` and, around them, what is stored now."""
    wide: list[Request] = []
    edges = Batch()
    for request in requests:
        start, end = align_down(request.offset, alignment), align_up(request.end, alignment)
        bounce = Request(start, memoryview(bytearray(end - start)), request)
        wide.append(bounce)
        if start != request.offset:
            edges.append(bounce.part(start, 0, alignment))
        if end != request.end and (end - alignment != start or start == request.offset):
            edges.append(bounce.part(end - alignment, end - alignment - start, alignment))
        if start != request.offset:
            node.debug_event("pwritev_rmw_head")
        if end != request.end:
            node.debug_event("pwritev_rmw_tail")
    await node.preadv(edges)
    ready = []
    for request, bounce in zip(requests, wide, strict=True):
        if not bounce.error:
            skip = request.offset - bounce.offset
            bounce.view[skip : skip + len(request.view)] = request.view
            ready.append(bounce)
    return ready


async def write_zeroes(node: BlockNode, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
    """Make [offset, offset + length) of `node` read as zeroes.

    The aligned middle goes to the driver; if it has no zero write, zeroes are written in chunks
    of ZERO_CHUNK, unless NO_FALLBACK asks for ENOTSUP. Raises OSError.
    """
    late_flush = flags & WriteFlags.FUA and not node.supports_fua
    if late_flush:
        flags &= ~WriteFlags.FUA
    alignment = node.request_alignment
    end = offset + length
    start, stop = align_up(offset, alignment), align_down(end, alignment)
    try:
        if start >= stop:
            await _write_zero_bytes(node, offset, end, flags)
        else:
            await _write_zero_bytes(node, offset, start, flags)
            await _zero_aligned(node, start, stop, flags)
            await _write_zero_bytes(node, stop, end, flags)
    finally:
        if node.dirty_bitmaps:
            mark(node, offset, length)
    node.wr_highest_offset = max(node.wr_highest_offset, end)
    if node.write_threshold:
        node.check_write_threshold(end)
    if late_flush:
        await node.flush()


async def _zero_aligned(node: BlockNode, start: int, stop: int, flags: WriteFlags) -> None:
    try:
        async with node.ranges.own(start, stop, exclusive=False):
            await node.pwrite_zeroes(start, stop - start, flags)
    except OSError as error:
        if error.errno != errno.ENOTSUP or flags & WriteFlags.NO_FALLBACK:
            raise
        await _write_zero_bytes(node, start, stop, flags & WriteFlags.FUA)


async def _write_zero_bytes(node: BlockNode, start: int, end: int, flags: WriteFlags) -> None:
    while start < end:
        length = min(ZERO_CHUNK, end - start)
        batch = Batch.single(start, _zeroes[:length])
        await write(node, batch, flags)
        batch.raise_first()
        start += length


async def discard(node: BlockNode, offset: int, length: int) -> None:
    """Discard the aligned part of the range, if the node's options say so. Raises OSError.

    Only whole units of the driver's alignment are forgotten; the edges keep their data.
    """
    if node.node_options.discard != "unmap":
        return
    alignment = node.request_alignment
    start, stop = align_up(offset, alignment), align_down(offset + length, alignment)
    if start < stop:
        async with node.ranges.own(start, stop, exclusive=False):
            try:
                await node.pdiscard(start, stop - start)
            finally:
                if node.dirty_bitmaps:
                    mark(node, start, stop - start)
