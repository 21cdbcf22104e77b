"""Copying what is stored plainly: from file to file, without a way through the graph for each piece.

A source that keeps its bytes in files (raw, qcow2 that is neither compressed nor encrypted) and a target that is
empty and makes room for them need no more of the graph than to know where things are. While one step is being copied
the next one is prepared. Everything else is handed back, to be copied window by window.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from qmpd.aio.copying import Part
from qmpd.aio.pool import BufferPool
from qmpd.block.filling import begin_filling, plain_source
from qmpd.cli.img._status import stretches
from qmpd.units import MiB, align_down

if TYPE_CHECKING:
    from qmpd.aio.disk import DiskFile
    from qmpd.block.backend import BlockBackend
    from qmpd.block.filling import Filling
    from qmpd.block.node import BlockNode
    from qmpd.cli.img._copy import Source
    from qmpd.cli.img._progress import Progress

AT_ONCE = 64 * MiB
"""Bytes of data after which the tables are brought up to date and progress is shown."""

PIECES_AT_ONCE = 2048
"""The same in pieces, where they are small."""

BORDER = 2 * MiB
"""Bytes; one step ends and the next begins at a multiple of it, so that no cluster is filled in two steps."""


class Piece(NamedTuple):
    """Data: `length` bytes at `offset` of the source, `at` in the target; `place` in `disk`, None: it is not plain."""

    source: Source
    offset: int
    at: int
    length: int
    disk: DiskFile | None
    place: int

    def cut(self, length: int) -> tuple[Piece, Piece]:
        """Return the first `length` bytes and the others."""
        rest = self.length - length
        first = self._replace(length=length)
        return first, Piece(self.source, self.offset + length, self.at + length, rest, self.disk, self.place + length)


@dataclass(slots=True, eq=False, repr=False)
class PlainCopier:
    """A copy of `sources` into `target`, which is zero now.

    sparse     bytes of zeroes in a row that are left out       in_order   lay the data out in the order of the disk
    others     copies what is not plain
    """

    sources: Sequence[Source]
    target: BlockBackend
    progress: Progress
    sparse: int
    in_order: bool
    others: Callable[[list[Piece]], Awaitable[None]]
    _files: dict[BlockNode, tuple[DiskFile, int] | None] = field(default_factory=dict)
    _pieces: list[Piece] = field(default_factory=list)
    _pool: BufferPool = field(default_factory=BufferPool)
    _steps: list[asyncio.Future[None]] = field(default_factory=list)
    _latest: Filling | None = None
    _size: int = 0
    _passed: int = 0

    async def run(self) -> None:
        """Copy everything. Raises OSError."""
        try:
            for source in self.sources:
                async for piece in self._extents(source):
                    self._pieces.append(piece)
                    self._size += piece.length
                    if self._size >= AT_ONCE or len(self._pieces) >= PIECES_AT_ONCE:
                        await self._step(align_down(piece.at + piece.length, BORDER))
            await self._step(None)
            await self._settle()
        finally:  # a step that was begun is ended, or the image would be left with clusters that nothing refers to
            await asyncio.gather(*self._steps, return_exceptions=True)

    async def _extents(self, source: Source) -> AsyncIterator[Piece]:
        """Yield what is data, in pieces of AT_ONCE bytes at most."""
        node, size = source.backend.node, source.backend.size
        assert node is not None
        direct = _all_direct(node)
        async for one in stretches(node, 0, size, first=AT_ONCE):
            if one.zero or not (one.data or one.present):
                self._passed += one.length
                continue
            disk, place = None, 0
            if direct and one.host is not None and one.file is not None and not one.compressed:
                if one.file not in self._files:
                    self._files[one.file] = plain_source(one.file)
                found = self._files[one.file]
                if found is not None:
                    disk, place = found[0], found[1] + one.host
            for at in range(one.start, one.end, AT_ONCE):
                length = min(AT_ONCE, one.end - at)
                yield Piece(source, at, source.start + at, length, disk, place + at - one.start)

    async def _step(self, border: int | None) -> None:
        """Copy what was gathered before `border`: what is plain first, so that the others find its clusters made."""
        pieces, later = self._pieces, []
        if border is not None:
            while pieces and pieces[-1].at >= border:
                later.append(pieces.pop())
            if pieces and pieces[-1].at + pieces[-1].length > border:
                first, rest = pieces[-1].cut(border - pieces[-1].at)
                pieces[-1] = first
                later.append(rest)
            later.reverse()
        self._pieces, self._size = later, sum(piece.length for piece in later)
        plain = [Part(one.at, one.length, one.place, one.disk) for one in pieces if one.disk is not None]
        filling = await self._begin(plain) if plain else None
        if filling is not None:
            pieces = [one for one in pieces if one.disk is None]
            self._steps.append(asyncio.ensure_future(self._fill(filling, plain)))
            await self._settle(but=1)
        self.progress.add(self._passed)
        self._passed = 0
        if pieces:
            await self._settle()
            await self.others(pieces)

    async def _settle(self, but: int = 0) -> None:
        """Wait for the steps that are being copied, all but the last few. Raises OSError."""
        while len(self._steps) > but:
            await asyncio.shield(self._steps[0])
            del self._steps[0]

    async def _fill(self, filling: Filling, parts: list[Part]) -> None:
        grain = max(self.sparse, filling.grain)
        await filling.fill(parts, grain=grain, in_order=self.in_order, pool=self._pool)
        self.progress.add(sum(part.length for part in parts))

    async def _begin(self, parts: list[Part]) -> Filling | None:
        """Return what takes the parts from file to file; None if the target does not let us. Raises OSError."""
        node = self.target.node
        assert node is not None
        ranges: list[tuple[int, int]] = []
        for part in parts:
            if ranges and ranges[-1][1] == part.at:
                ranges[-1] = (ranges[-1][0], part.at + part.length)
            else:
                ranges.append((part.at, part.at + part.length))
        if self._latest is not None:
            await self._latest.settled.wait()
        self._latest = filling = await begin_filling(node, ranges)
        if filling is not None and max(self.sparse, filling.grain) % filling.grain:
            await filling.give_up()
            return None
        return filling


def _all_direct(node: BlockNode) -> bool:
    """Say whether nothing in a chain of images counts, changes or watches what is read."""
    below: BlockNode | None = node
    while below is not None:
        place = below.direct_read()
        if place is None or place.crypto is not None:
            return False
        backing = below.children.get("backing")
        below = None if backing is None else backing.node
    return True
