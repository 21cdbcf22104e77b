"""preallocate: a filter that lets a file grow in large steps, ahead of the writes beyond its end.

Options: BlockdevOptionsPreallocate (qapi/block-drivers.json). What was added ahead is not seen above
and is cut off when the node closes, or when nobody may write and resize any more. While it is there
nobody else may write or resize below. Model: QEMU block/preallocate.c.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.change import Transaction
from qmpd.block.child import Child
from qmpd.block.filter import FilterNode
from qmpd.block.node import ReopenStep
from qmpd.block.options import NodeOptions
from qmpd.block.perm import ChildRole, Perm
from qmpd.block.ranges import RangeTable
from qmpd.errors import CommandError
from qmpd.qapi.registry import driver
from qmpd.units import SECTOR, MiB, align_up

log = logging.getLogger(__name__)

_GROWING = Perm.WRITE | Perm.RESIZE


@dataclass(frozen=True, slots=True)
class PreallocateOptions:
    """BlockdevOptionsPreallocate.

    prealloc_align  bytes that the end of the file is a multiple of
    prealloc_size   bytes added ahead of the end of a write
    """

    file: Child
    prealloc_align: int = 1 * MiB
    prealloc_size: int = 128 * MiB


def _check(options: PreallocateOptions) -> None:
    """Raise CommandError unless files can grow in such steps."""
    for name, value in (("prealloc-align", options.prealloc_align), ("prealloc-size", options.prealloc_size)):
        if not 0 <= value < 1 << 62:
            raise CommandError(f"Value '{value}' is out of range for parameter '{name}'")
    if options.prealloc_align % SECTOR:
        raise CommandError(f"prealloc-align parameter of preallocate filter is not aligned to {SECTOR}")
    below = options.file.node.request_alignment
    if options.prealloc_align % below:
        raise CommandError(
            "prealloc-align parameter of preallocate filter is not aligned to underlying node "
            f"request alignment ({below})"
        )


@driver("preallocate", schema="BlockdevOptionsPreallocate", options=PreallocateOptions)
class PreallocateNode(FilterNode):
    """Keeps space ahead of the end.

    _data_end    where the file ends for who is above, None while nobody may write and resize
    _file_end    where it ends below; None if a step ahead failed, it is then asked for
    _zero_start  from here to the end of the file there are only zeroes
    """

    reopens = True
    reopen_takes = ("prealloc-align", "prealloc-size")

    _data_end: int | None = None
    _file_end: int | None = None
    _zero_start = 0

    async def open(self, options: PreallocateOptions) -> None:
        """Check the alignment."""
        self.attach_file(options.file)
        _check(options)
        self._align, self._ahead = options.prealloc_align, options.prealloc_size
        self._dropping: asyncio.Task[None] | None = None
        self._cutting = asyncio.Lock()
        self._filling = RangeTable()

    async def prepare_reopen(self, options: PreallocateOptions, generic: NodeOptions) -> ReopenStep:
        """Check the other steps."""
        _check(options)

        def step(tran: Transaction) -> None:
            old = self._align, self._ahead

            def restore() -> None:
                self._align, self._ahead = old

            self._align, self._ahead = options.prealloc_align, options.prealloc_size
            tran.on_undo(restore)

        return step

    async def close(self) -> None:
        """Cut off what was added ahead."""
        try:
            await self._cut()
        finally:
            self._data_end = None

    # --- permissions ----------------------------------------------------------------------------

    def child_perm(self, name: str, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Take write and resize alone while there is, or may be, something ahead."""
        if perm & _GROWING == _GROWING or self._data_end is not None:
            return perm | _GROWING, shared & ~_GROWING
        return perm, shared

    def commit_perm(self) -> None:
        """Begin when somebody may write and resize, and end when nobody may any more."""
        growing = self.perm & _GROWING == _GROWING
        if growing and self._data_end is None:
            self._restart(self.file.size)
        elif not growing and self._data_end is not None and self._dropping is None:
            self._dropping = asyncio.get_running_loop().create_task(self._drop())

    async def _drop(self) -> None:
        """Cut off what is ahead, then give back the permissions that were kept for that."""
        try:
            await self.graph.runner.run(self._cut())
            if self.perm & _GROWING != _GROWING and self.graph.get(self.name) is self:
                self._data_end = None
                with self.graph.change() as tran:
                    tran.touch(self)
        except OSError as error:
            log.error("node '%s': cutting off what was preallocated failed: %s", self.name, error.strerror)
        finally:
            self._dropping = None

    # --- the end of the file ----------------------------------------------------------------------

    def _restart(self, size: int) -> None:
        self._data_end = self._file_end = self._zero_start = size

    async def _cut(self) -> None:
        async with self._cutting:
            if self._data_end is None:
                return
            end = self.file.size if self._file_end is None else self._file_end
            if self._data_end < end:
                await self.file.node.truncate(self._data_end)
            self._file_end = self._data_end

    async def _before_write(self, offset: int, length: int, *, zeroes: bool) -> bool:
        """Add space ahead if a write needs it; True if the range is zero already, as was asked for."""
        end = offset + length
        if self._data_end is None or end <= self._data_end:
            return False
        self._data_end = self.size = end
        if not zeroes:
            self._zero_start = end
        if self._file_end is None:
            self._file_end = self.file.size
        if end <= self._file_end:
            return zeroes and offset >= self._zero_start
        start = min(offset, self._file_end) if zeroes else self._file_end
        stop = align_up(end + self._ahead, self._align or 1)
        self._file_end = stop
        try:
            async with self._filling.own(start, stop, exclusive=True):
                await self.file.pwrite_zeroes(start, stop - start, WriteFlags.NO_FALLBACK)
        except OSError:
            self._file_end = None
            return False
        return zeroes

    async def preadv(self, batch: Batch) -> None:
        """Read from the child."""
        await self.file.preadv(batch)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write, into space that is there already."""
        start = min(request.offset for request in batch)
        await self._before_write(start, max(request.end for request in batch) - start, zeroes=False)
        mine = await self._filling.acquire([(request.offset, request.end, False) for request in batch])
        try:
            await self.file.pwritev(batch, flags)
        finally:
            self._filling.release(mine)
        self._follow()

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero; what was just added ahead is zero as it is."""
        mergeable = not flags & ~WriteFlags.NO_FALLBACK
        if not await self._before_write(offset, length, zeroes=mergeable):
            async with self._filling.own(offset, offset + length, exclusive=False):
                await self.file.pwrite_zeroes(offset, length, flags)
        self._follow()

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Resize; what is ahead already serves for preallocation that was asked for."""
        if self._data_end is not None and size > self._data_end:
            end = self.file.size if self._file_end is None else self._file_end
            if preallocation == "falloc" and size <= end:
                self._data_end = self.size = size
                return
            if preallocation != "falloc":
                await self._cut()
        await self.file.node.truncate(size, exact=exact, preallocation=preallocation)
        if self._data_end is not None:
            self._restart(size)
        self._follow()

    def child_resized(self) -> None:
        """Follow the child."""
        self._follow()

    def _follow(self) -> None:
        self.size = self.file.size if self._data_end is None else self._data_end
