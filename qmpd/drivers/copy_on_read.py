"""copy-on-read: a filter that writes into the image below what reads brought from its backing chain.

Options: BlockdevOptionsCor (qapi/block-drivers.json).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from qmpd.block import chain
from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.child import Child
from qmpd.block.filter import FilterNode
from qmpd.block.node import BlockNode
from qmpd.block.perm import ChildRole, Perm
from qmpd.block.ranges import RangeTable
from qmpd.errors import CommandError
from qmpd.qapi.registry import driver
from qmpd.units import align_down, align_up


@dataclass(frozen=True, slots=True)
class CorOptions:
    """BlockdevOptionsCor.

    bottom  name of the lowest node whose data is copied
    """

    file: Child
    bottom: str | None = None


@driver("copy-on-read", schema="BlockdevOptionsCor", options=CorOptions)
class CopyOnReadNode(FilterNode):
    """Copies what it reads."""

    can_compress = True

    async def open(self, options: CorOptions) -> None:
        """Find the bottom node, which must lie below."""
        self.attach_file(options.file)
        self._bottom: BlockNode | None = None
        self._frozen: list[Child] = []
        self._copies = RangeTable()
        if options.bottom is None:
            return
        bottom = self.graph.get(options.bottom)
        if bottom is None:
            raise CommandError(f"Bottom node '{options.bottom}' not found")
        if bottom.is_filter:
            raise CommandError(f"Bottom node '{options.bottom}' is a filter")
        if not chain.contains(self.file.node, bottom):
            raise CommandError(f"Bottom node '{options.bottom}' is not in the chain of '{self.file.node.name}'")
        self._frozen = chain.freeze(self, bottom)
        self._bottom = bottom

    async def close(self) -> None:
        """Let the links to the bottom node change again."""
        chain.thaw(self._frozen)
        await super().close()

    def child_perm(self, name: str, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Write without changing what is seen, on top of what the parents do."""
        return perm | Perm.WRITE_UNCHANGED, shared

    async def preadv(self, batch: Batch) -> None:
        """Read; what the image itself did not hold is then written into it."""
        unit = self._unit()
        size = align_up(self.size, unit)
        wanted = [(align_down(r.offset, unit), min(align_up(r.end, unit), size), False) for r in batch]
        mine = await self._copies.acquire(wanted)
        try:
            await self.file.preadv(batch)
            holes = [r for r in batch if not r.error and await self._missing(r.offset, len(r.view))]
        finally:
            self._copies.release(mine)
        for request in holes:
            await self._copy(request, unit)

    async def prefetch(self, offset: int, length: int) -> None:
        """Copy what of the range the image does not hold, and read nothing else. Raises OSError."""
        unit = self._unit()
        start = align_down(offset, unit)
        end = min(align_up(offset + length, unit), align_down(self.size, self.request_alignment))
        await self._copy_units(start, end)

    def _unit(self) -> int:
        """Bytes that are copied at least: a cluster of the image, so that it allocates whole ones."""
        below = self.file.node.image_info()
        return max(int(below.get("cluster-size", 0)), self.request_alignment, 512)

    async def _missing(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return (offset, length) of what the image does not hold and is to get."""
        missing = [(e.offset, e.length) for e in await self.file.block_status(offset, length) if not e.allocated]
        if self._bottom is None or not missing:
            return missing
        return [part for at, size in missing for part in await self._above_bottom(at, size)]

    async def _above_bottom(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return what of the range is held by a backing image, down to the bottom node."""
        image = chain.image_of(self.file.node)
        node = None if image is self._bottom else chain.backing_of(image)
        found: list[tuple[int, int]] = []
        todo = [(offset, length)]
        while node is not None and todo:
            below: list[tuple[int, int]] = []
            for at, size in todo:
                inside = min(size, max(0, node.size - at))
                if inside:
                    for extent in await node.block_status(at, inside):
                        (found if extent.allocated else below).append((extent.offset, extent.length))
            todo, node = below, None if node is self._bottom else chain.backing_of(node)
        return found

    async def _copy(self, request: Request, unit: int) -> None:
        """Copy the units around a request; a failure leaves them where they were, which harms nobody."""
        start = align_down(request.offset, unit)
        end = min(align_up(request.end, unit), align_down(self.size, self.request_alignment))
        with contextlib.suppress(OSError):
            await self._copy_units(start, end)

    async def _copy_units(self, start: int, end: int) -> None:
        async with self._copies.own(start, end, exclusive=True):
            for at, length in await self._missing(start, end - start):
                data = bytearray(length)
                copy = Batch.single(at, memoryview(data))
                await self.file.preadv(copy)
                copy.raise_first()
                self.file.debug_event("cor_write")
                if data.count(0) == length:
                    await self.file.pwrite_zeroes(at, length, WriteFlags.UNCHANGED)
                else:
                    await self.file.pwritev(copy, WriteFlags.UNCHANGED)
                    copy.raise_first()

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write, never between the reading and the writing of a copy."""
        mine = await self._copies.acquire([(r.offset, r.end, False) for r in batch])
        try:
            await super().pwritev(batch, flags)
        finally:
            self._copies.release(mine)

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero, never between the reading and the writing of a copy."""
        async with self._copies.own(offset, offset + length, exclusive=False):
            await super().pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        """Discard, never between the reading and the writing of a copy."""
        async with self._copies.own(offset, offset + length, exclusive=False):
            await super().pdiscard(offset, length)
