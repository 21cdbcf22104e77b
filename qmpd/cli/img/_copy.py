"""Copying between images: windows of 2 MiB, several in flight, zeroes found and left out where that is allowed.

At most `parallel` windows are in memory. Unless told otherwise, writes begin in the order of the disk, so that a
format that allocates as it goes lays its clusters out in that order too.
"""

from __future__ import annotations

import asyncio
import enum
import mmap
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from qmpd.aio import eager
from qmpd.aio.copying import available
from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.node import BlockNode
from qmpd.cli.img._status import Stretch, salvaged_stretches, stretches
from qmpd.units import KiB, MiB, align_down, align_up

if TYPE_CHECKING:
    from qmpd.block.backend import BlockBackend
    from qmpd.block.throttle_group import ThrottleState
    from qmpd.cli.img._copy_plain import Piece
    from qmpd.cli.img._progress import Progress

WINDOW = 2 * MiB
"""Bytes that one worker copies at a time."""

_zeroes = bytes(WINDOW)

SECTOR = 512
"""Bytes that are lost at once when something cannot be read."""

STRIDE = 64 * KiB
"""Bytes that are compared with zeroes at once."""

_zero_stride = bytes(STRIDE)

Buffer = bytearray | mmap.mmap


class Zeroes(enum.Enum):
    """What is done where the source is zero.

    SKIP   nothing: the target is zero there already     PUNCH  a zero write
    WRITE  zeroes are written as data: the target knows no better way, or is to be allocated
    """

    SKIP = enum.auto()
    PUNCH = enum.auto()
    WRITE = enum.auto()


class Source(NamedTuple):
    """An input and the place of its first byte in the output."""

    backend: BlockBackend
    start: int


@dataclass(slots=True, eq=False, repr=False)
class _Window:
    """A part of the output, at most WINDOW bytes of data in it, from one source.

    data   (offset, length) in the output of what is to be read       zero   of what is zero
    """

    source: Source
    start: int
    data: list[tuple[int, int]] = field(default_factory=list)
    zero: list[tuple[int, int]] = field(default_factory=list)
    end: int = 0


@dataclass(slots=True, eq=False, repr=False)
class Copier:
    """One copy.

    sparse      bytes of zeroes in a row that are not written as data; 0: never looked for
    base        copy only what a source holds above this node: the target shows it as well
    overlay     the same for a base of nothing; the target has a backing file
    compress    write compressed clusters of this many bytes, 0: do not compress
    limit       lets writes through at a rate
    salvage     told of each sector that cannot be read (offset, error), which counts as zero; None: it is an error
    """

    sources: Sequence[Source]
    target: BlockBackend
    progress: Progress
    zeroes: Zeroes
    sparse: int = 4 * KiB
    parallel: int = 8
    in_order: bool = True
    base: BlockNode | None = None
    overlay: bool = False
    compress: int = 0
    flags: WriteFlags = WriteFlags.NONE
    limit: ThrottleState | None = None
    salvage: Callable[[str, int, OSError], None] | None = None
    _begun: int = 0
    _turns: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    _taken: int = 0

    async def run(self) -> None:
        """Copy everything. Raises OSError."""
        if self.zeroes is Zeroes.SKIP and self._is_simple() and available():
            from qmpd.cli.img._copy_plain import PlainCopier

            others = self._copy_pieces
            await PlainCopier(self.sources, self.target, self.progress, self.sparse, self.in_order, others).run()
        else:
            await self._copy_all(self._windows())

    def _is_simple(self) -> bool:
        """Say whether only what the sources show now is copied, as fast as can be."""
        wanted = self.sparse and not self.overlay and self.base is None and not self.compress
        return bool(wanted) and not self.flags and self.limit is None and self.salvage is None

    async def _copy_pieces(self, pieces: Sequence[Piece]) -> None:
        await self._copy_all(_piece_windows(pieces))

    async def _copy_all(self, windows: AsyncIterator[_Window]) -> None:
        self._begun = self._taken = 0
        door = asyncio.Lock()
        async with asyncio.TaskGroup() as group:
            for _ in range(self.parallel):
                group.create_task(self._worker(windows, door))

    async def _windows(self) -> AsyncIterator[_Window]:
        if self.compress:
            async for whole in self._cluster_windows():
                yield whole
            return
        below = self._backing_size() if self.overlay else 0
        for source in self.sources:
            node = source.backend.node
            assert node is not None
            window: _Window | None = None
            async for stretch in self._stretches(node, source.backend.size, joined=False):
                for one in _cut(stretch, self.zeroes is Zeroes.WRITE):
                    if window is not None and (window.end != one.start or one.end > window.start + WINDOW):
                        yield window
                        window = None
                    if window is None:
                        window = _Window(source, one.start)
                    window.end = one.end
                    if self.overlay and one.zero and not one.present and one.start + source.start >= below:
                        continue
                    if one.zero:
                        window.zero.append((one.start, one.length))
                    elif one.data or one.present:
                        window.data.append((one.start, one.length))
            if window is not None:
                yield window

    async def _cluster_windows(self) -> AsyncIterator[_Window]:
        """Like `_windows`, in whole clusters of the target: a compressed cluster is written once and as a whole."""
        for source in self.sources:
            node = source.backend.node
            assert node is not None
            done, size = 0, source.backend.size
            async for stretch in self._stretches(node, size, joined=True):
                if stretch.zero or not (stretch.data or stretch.present):
                    continue
                at = max(align_down(stretch.start, self.compress), done)
                done = min(align_up(stretch.end, self.compress), size)
                while at < done:
                    stop = min(done, align_down(at, WINDOW) + WINDOW)
                    yield _Window(source, at, data=[(at, stop - at)], end=stop)
                    at = stop

    def _stretches(self, node: BlockNode, size: int, *, joined: bool) -> AsyncIterator[Stretch]:
        if self.salvage is None:
            return stretches(node, 0, size, base=self.base, joined=joined)
        return salvaged_stretches(node, 0, size, self.base, self.salvage)

    def _backing_size(self) -> int:
        """Return the bytes of the target's backing file: behind them it is zero by itself."""
        assert self.target.node is not None
        backing = self.target.node.children.get("backing")
        return 0 if backing is None else backing.size

    async def _worker(self, windows: AsyncIterator[_Window], door: asyncio.Lock) -> None:
        buffer = mmap.mmap(-1, WINDOW)  # on pages of its own: the kernel copies to odd addresses at half the speed
        while True:
            async with door:
                try:
                    window = await anext(windows)
                except StopAsyncIteration:
                    return
                number, self._taken = self._taken, self._taken + 1
            await self._copy(window, number, buffer)
            self.progress.add(window.end - window.start)

    async def _copy(self, window: _Window, number: int, buffer: mmap.mmap) -> None:
        with memoryview(buffer) as view:
            reads = Batch(
                Request(offset, view[offset - window.start : offset - window.start + length])
                for offset, length in window.data
            )
            if reads:
                await window.source.backend.preadv(reads)
                if self.salvage is not None:
                    for request in reads:
                        if request.error:
                            await self._salvage(window.source.backend, request.offset, request.view)
                else:
                    reads.raise_first()
            writes, holes = self._plan(window, reads, buffer)
            if self.in_order and self._begun != number:
                turn = self._turns[number] = asyncio.get_running_loop().create_future()
                await turn
                del self._turns[number]
            try:  # the write has to have begun, not ended, before the next one may begin
                work = eager.start(self._write(writes, holes), asyncio.get_running_loop())
            finally:
                self._begun += 1
                following = self._turns.get(self._begun)
                if following is not None and not following.done():
                    following.set_result(None)
            if work is not None:
                await work

    async def _salvage(self, backend: BlockBackend, offset: int, view: memoryview) -> None:
        """Read what can be read, the rest is zero: halves of what failed, down to sectors."""
        assert self.salvage is not None
        half = align_up(len(view) // 2, SECTOR)
        for start, part in ((offset, view[:half]), (offset + half, view[half:])):
            batch = Batch.single(start, part)
            if part:
                await backend.preadv(batch)
            if part and batch[0].error:
                if len(part) > SECTOR:
                    await self._salvage(backend, start, part)
                    continue
                self.salvage("offset", start, OSError(batch[0].error, os.strerror(batch[0].error)))
                part[:] = bytes(len(part))

    async def _write(self, writes: Batch, holes: list[tuple[int, int]]) -> None:
        if writes:
            if self.limit is not None:
                await self.limit.admit(True, writes.total)
            compressed = WriteFlags.COMPRESSED if self.compress else WriteFlags.NONE
            await self.target.pwritev(writes, self.flags | compressed)
            writes.raise_first()
        for offset, length in holes:
            await self.target.pwrite_zeroes(offset, length, WriteFlags.MAY_UNMAP | self.flags)

    def _plan(self, window: _Window, reads: Batch, buffer: mmap.mmap) -> tuple[Batch, list[tuple[int, int]]]:
        """Return what is to be written where in the target, as data and as holes."""
        shift = window.source.start
        writes = Batch()
        holes: list[tuple[int, int]] = []
        for offset, length in window.zero:
            if self.zeroes is Zeroes.WRITE:
                writes.append(Request(offset + shift, memoryview(_zeroes)[:length]))
            elif self.zeroes is Zeroes.PUNCH:
                holes.append((offset + shift, length))
        for request in reads:
            if self.compress:
                for at in range(0, len(request.view), self.compress):
                    piece = request.view[at : at + self.compress]
                    if any(piece) or self.zeroes is not Zeroes.SKIP:
                        writes.append(Request(request.offset + at + shift, piece))
                continue
            if not self.sparse or self.zeroes is Zeroes.WRITE:
                writes.append(Request(request.offset + shift, request.view))
                continue
            at = request.offset - window.start
            for start, length, zero in runs(buffer, at, len(request.view), self.sparse, request.offset):
                if not zero:
                    place = start - at
                    writes.append(Request(request.offset + place + shift, request.view[place : place + length]))
                elif self.zeroes is Zeroes.PUNCH:
                    holes.append((request.offset + start - at + shift, length))
        return writes, holes


async def _piece_windows(pieces: Sequence[Piece]) -> AsyncIterator[_Window]:
    """Cut pieces, which are in order, into windows."""
    window: _Window | None = None
    for piece in pieces:
        at, end = piece.offset, piece.offset + piece.length
        while at < end:
            start = align_down(at, WINDOW)
            stop = min(end, start + WINDOW)
            if window is not None and (window.source is not piece.source or stop > window.start + WINDOW):
                yield window
                window = None
            if window is None:
                window = _Window(piece.source, at)
            window.data.append((at, stop - at))
            window.end = stop
            at = stop
    if window is not None:
        yield window


def _cut(stretch: Stretch, zero_as_data: bool) -> list[Stretch]:
    """Cut a stretch into pieces of WINDOW bytes; a hole stays whole if it is not written as data."""
    if stretch.length <= WINDOW or (not zero_as_data and (stretch.zero or not (stretch.data or stretch.present))):
        return [stretch]
    pieces = []
    start = stretch.start
    while start < stretch.end:
        stop = min(stretch.end, align_down(start, WINDOW) + WINDOW)
        pieces.append(
            Stretch(start, stop - start, stretch.depth, stretch.present, stretch.zero, stretch.data, stretch.compressed)
        )
        start = stop
    return pieces


def runs(buffer: Buffer, at: int, length: int, grain: int, offset: int) -> list[tuple[int, int, bool]]:
    """Return (start in buffer, length, is zero) over buffer[at : at + length], in grains of the disk.

    grain    bytes of zeroes that count        offset   place on the disk of buffer[at]
    """
    found: list[tuple[int, int, bool]] = []
    end = at + length
    done = at
    for start, stop in _blank(buffer, at, end, grain, offset):
        if found and found[-1][2] and done == start:
            found[-1] = (found[-1][0], stop - found[-1][0], True)
        else:
            if done < start:
                found.append((done, start - done, False))
            found.append((start, stop - start, True))
        done = stop
    if done < end:
        found.append((done, end - done, False))
    return found


def _blank(buffer: Buffer, at: int, end: int, grain: int, offset: int) -> Iterator[tuple[int, int]]:
    """Yield stretches of whole grains that are zero; a first one cut off by the disk's grid counts as one.

    Only grains whose first byte is zero are looked into, and those are found at the speed of C. Where one is zero
    more are likely to follow: they are compared many at a time.
    """
    first = min(end, at + grain - offset % grain) if offset % grain else at
    if at < first and not any(buffer[at:first]):
        yield at, first
    heads = bytes(buffer[first:end:grain])
    stride = max(grain, align_down(STRIDE, grain))
    known = first
    index = heads.find(0)
    while index >= 0:
        start = first + index * grain
        if start + stride <= end and (start == known or grain == stride) and _is_blank(buffer, start, start + stride):
            stop = start + stride
        else:
            stop = min(end, start + grain)
            if not _is_blank(buffer, start, stop):
                index = heads.find(0, index + 1)
                continue
        yield start, stop
        known = stop
        index = heads.find(0, (stop - first + grain - 1) // grain)


def _is_blank(buffer: Buffer, start: int, stop: int) -> bool:
    return buffer[start:stop] == (_zeroes[: stop - start] if stop - start != STRIDE else _zero_stride)


def knows_zeroes(node: BlockNode) -> bool:
    """Say whether a node has a better way to be zero than being written to."""
    while node.driver_name == "raw" and "file" in node.children:
        node = node.children["file"].node
    return type(node).pwrite_zeroes is not BlockNode.pwrite_zeroes
