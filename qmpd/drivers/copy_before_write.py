"""copy-before-write: a filter that copies the old data to a target before it is overwritten.

Options: BlockdevOptionsCbw (qapi/block-drivers.json). What the file held when the filter was put in
place can be read through a snapshot-access node: from the target where it was copied, from the file
where nothing was written yet. Model: QEMU block/copy-before-write.c and block/block-copy.c.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from qmpd.block import dirty_bitmap
from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.child import Child
from qmpd.block.dirty_bitmap import DirtyBitmap
from qmpd.block.filename import node_filename
from qmpd.block.filter import FilterNode
from qmpd.block.node import Extent
from qmpd.block.perm import ChildRole, Perm
from qmpd.block.ranges import RangeTable
from qmpd.errors import CommandError
from qmpd.jobs.keeping import TargetFailed
from qmpd.qapi.registry import driver
from qmpd.units import KiB, MiB, align_down, align_up, is_power_of_two

log = logging.getLogger(__name__)

DEFAULT_CLUSTER = 64 * KiB
"""Bytes copied at least, unless the target has larger clusters (BLOCK_COPY_CLUSTER_SIZE_DEFAULT)."""

CHUNK = 1 * MiB
"""Bytes of memory that one copy takes at most."""

MAX_INT64 = (1 << 63) - 1
MAX_TIMEOUT = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class BitmapName:
    """BlockDirtyBitmap: a bitmap by the name of its node and its own."""

    node: str
    name: str


@dataclass(frozen=True, slots=True)
class CbwOptions:
    """BlockdevOptionsCbw.

    bitmap            what is to be kept; None means everything
    on_cbw_error      whether a failed copy fails the write, or gives up the snapshot
    cbw_timeout       seconds that a copy may take, 0 means any
    min_cluster_size  bytes
    """

    file: Child
    target: Child
    bitmap: BitmapName | None = None
    on_cbw_error: str = "break-guest-write"
    cbw_timeout: int = 0
    min_cluster_size: int = 0


@driver("copy-before-write", schema="BlockdevOptionsCbw", options=CbwOptions)
class CopyBeforeWriteNode(FilterNode):
    """Copies, then lets the write go on.

    cluster     bytes that are copied as one
    to_copy     what is still to be copied if it is written to
    done        what is in the target
    accessible  what `snapshot_preadv` may read
    """

    child_roles: ClassVar[Mapping[str, ChildRole]] = {
        "file": ChildRole.FILTERED | ChildRole.PRIMARY,
        "target": ChildRole.DATA,
    }

    copy_flags = WriteFlags.NONE

    async def open(self, options: CbwOptions) -> None:
        """Make the three bitmaps; they show in the description of the node, nameless."""
        if not 0 <= options.cbw_timeout <= MAX_TIMEOUT:
            raise CommandError("Parameter 'cbw-timeout' expects uint32_t")
        chosen = self._find_bitmap(options.bitmap)
        self.attach_file(options.file)
        self.target, self.options = options.target, options
        self.cluster = self._cluster_size(options.min_cluster_size)
        self.to_copy = self._nameless()
        self.done = self._nameless()
        self.accessible = self._nameless()
        if chosen is None:
            self.to_copy.set(0, self.size)
        else:
            self._take(chosen)
        self.accessible.merge(self.to_copy)
        self._error = 0
        self._copies, self._reads = RangeTable(), RangeTable()
        self._late: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait for copies that outlived their time limit."""
        if self._late:
            await asyncio.wait(self._late)

    def _find_bitmap(self, wanted: BitmapName | None) -> DirtyBitmap | None:
        if wanted is None:
            return None
        node = self.graph.get(wanted.node)
        if node is None:
            raise CommandError(f"Node '{wanted.node}' not found")
        return dirty_bitmap.find(node, wanted.name)

    def _take(self, chosen: DirtyBitmap) -> None:
        try:
            chosen.check(readonly=True)
            dirty_bitmap.check_mergeable(self.to_copy, chosen)
        except CommandError as error:
            what = f"Failed to merge bitmap '{chosen.name}' to internal copy-bitmap"
            raise CommandError(f"Cannot create block-copy-state: {what}: {error}") from error
        self.to_copy.merge(chosen)

    def _nameless(self) -> DirtyBitmap:
        bitmap = dirty_bitmap.create(self, None, self.cluster)
        bitmap.enabled = False
        return bitmap

    def _cluster_size(self, least: int) -> int:
        """Return what is copied as one: the target's clusters, but not less than asked for."""
        unsigned = least & (1 << 64) - 1
        if unsigned > MAX_INT64:
            raise CommandError(f"Cannot create block-copy-state: min-cluster-size too large: {unsigned} > {MAX_INT64}")
        if least and not is_power_of_two(least):
            raise CommandError("Cannot create block-copy-state: min-cluster-size needs to be a power of 2")
        info = self.target.node.image_info()
        if "dirty-flag" not in info and "backing" not in self.target.node.children:
            log.warning("node '%s': the target does not tell its cluster size", self.name)
        return max(least, DEFAULT_CLUSTER, int(info.get("cluster-size", 0)))

    # --- permissions and descriptions -------------------------------------------------------------

    def child_perm(self, name: str, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Write to the target, in whose backing chain the file may be; nobody else writes to the file."""
        if name == "target":
            return Perm.WRITE, Perm.ALL & ~Perm.RESIZE
        if self.parents:
            return perm | Perm.CONSISTENT_READ, shared & ~(Perm.WRITE | Perm.RESIZE)
        return perm, shared

    def exact_filename(self) -> str:
        """That of the file, whatever it is."""
        return node_filename(self.file.node)

    def allocated_size(self) -> int | None:
        """That of the file."""
        return self.file.node.allocated_size()

    # --- writes -----------------------------------------------------------------------------------

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Copy what is there, then write."""
        if not flags & WriteFlags.UNCHANGED:
            for request in batch:
                try:
                    await self._keep(request.offset, request.end)
                except OSError as error:
                    request.fail(error.errno or errno.EIO)
            batch = Batch(request for request in batch if not request.error)
        if batch:
            await super().pwritev(batch, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Copy what is there, then zero."""
        if not flags & WriteFlags.UNCHANGED:
            await self._keep(offset, offset + length)
        await super().pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        """Copy what is there, then discard."""
        await self._keep(offset, offset + length)
        await super().pdiscard(offset, length)

    async def _keep(self, start: int, end: int) -> None:
        """Have the clusters of [start, end) in the target, as far as they are to be kept. Raises OSError."""
        if self._error:
            return
        start, end = align_down(start, self.cluster), align_up(end, self.cluster)
        try:
            await self._in_time(start, end)
        except OSError as error:
            if self.options.on_cbw_error == "break-guest-write":
                raise
            self._error = error.errno or errno.EIO
            log.error("node '%s': copying failed, its snapshot is lost: %s", self.name, error.strerror)
        else:
            self.done.set(start, end - start)
        async with self._reads.own(start, end, exclusive=True):
            pass  # reads of the old data from the file have ended

    async def _in_time(self, start: int, end: int) -> None:
        if not self.options.cbw_timeout:
            await self.copy(start, end)
            return
        task = asyncio.get_running_loop().create_task(self.copy(start, end))
        finished, _ = await asyncio.wait((task,), timeout=self.options.cbw_timeout)
        if not finished:
            self._late.add(task)
            task.add_done_callback(self._late_end)
            raise OSError(errno.ETIMEDOUT, "the copy takes too long")
        task.result()

    def _late_end(self, task: asyncio.Task[None]) -> None:
        self._late.discard(task)
        error = task.exception()
        if error is not None:
            log.error("node '%s': a copy failed after its time: %s", self.name, error)

    async def copy(self, start: int, end: int) -> None:
        """Copy what of [start, end) is still to be copied; only one copy of a cluster is made at a time."""
        async with self._copies.own(start, end, exclusive=True):
            stop = min(end, self.to_copy.size)
            areas = [(at, length) for at, length, dirty in self.to_copy.runs(start, stop) if dirty]
            for at, length in areas:
                for piece in range(at, at + length, max(CHUNK, self.cluster)):
                    size = min(max(CHUNK, self.cluster), at + length - piece)
                    await self._copy_piece(piece, size)
                    self.to_copy.reset(piece, size)

    async def _copy_piece(self, start: int, length: int) -> None:
        if start + length > self.target.size:
            raise TargetFailed(errno.EIO, "the target is too small")
        if self.copy_flags & WriteFlags.COMPRESSED:  # which wants whole clusters
            step = max(CHUNK, int(self.target.node.image_info().get("cluster-size", 0)))
            for at in range(start, start + length, step):
                await self._put(at, await self.file.pread(at, min(step, start + length - at)))
            return
        for extent in await self.file.block_status(start, length):
            if extent.zero:
                await self._put(extent.offset, None, extent.length)
                continue
            for at in range(extent.offset, extent.offset + extent.length, CHUNK):
                await self._put(at, await self.file.pread(at, min(CHUNK, extent.offset + extent.length - at)))

    async def _put(self, offset: int, data: bytearray | None, length: int = 0) -> None:
        """Write data to the target, or zeroes. Raises TargetFailed."""
        try:
            if data is None:
                await self.target.pwrite_zeroes(offset, length)
                return
            copy = Batch.single(offset, memoryview(data))
            await self.target.pwritev(copy, self.copy_flags)
            copy.raise_first()
        except OSError as error:
            raise TargetFailed(error.errno or errno.EIO, "writing to the target failed") from error

    # --- the snapshot -----------------------------------------------------------------------------

    async def snapshot_preadv(self, batch: Batch) -> None:
        """Read what was there at the beginning; EACCES where it was not kept, or is lost."""
        for request in batch:
            try:
                await self._read_old(request)
            except OSError as error:
                request.fail(error.errno or errno.EIO)

    async def _read_old(self, request: Request) -> None:
        end = min(request.end, self.accessible.size)
        if end < request.end:
            there = max(end - request.offset, 0)
            request.view[there:] = bytes(len(request.view) - there)
        at = request.offset
        while at < end:
            self._check_accessible(at, end)
            _, length, done = next(iter(self.done.runs(at, end)))
            part = Batch.of((request.part(at, at - request.offset, length),))
            if done:
                await self.target.preadv(part)
            else:
                async with self._reads.own(at, at + length, exclusive=False):
                    if self.done.get(at):
                        continue
                    await self.file.preadv(part)
            part.raise_first()
            at += length

    def _check_accessible(self, start: int, end: int) -> None:
        if self._error or any(not kept for _, _, kept in self.accessible.runs(start, end)):
            raise OSError(errno.EACCES, "this part of the snapshot is not kept")

    async def snapshot_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Say what the target or the file has there; all of it counts as the snapshot's own."""
        end = min(offset + length, self.accessible.size)
        found: list[Extent] = []
        if offset < end:
            self._check_accessible(offset, end)
        for at, size, done in list(self.done.runs(offset, end)):
            for extent in await (self.target if done else self.file).block_status(at, size):
                whole = extent if extent.allocated else extent._replace(data=True, zero=False, host=None, file=None)
                found.append(whole._replace(allocated=True))
        if end < offset + length:
            start = max(offset, end)
            found.append(Extent(start, offset + length - start, data=False, zero=True))
        return found

    async def snapshot_discard(self, offset: int, length: int) -> None:
        """Keep whole clusters of the range no longer."""
        start, end = align_up(offset, self.cluster), align_down(offset + length, self.cluster)
        if start < end:
            self.accessible.reset(start, end - start)
            self.to_copy.reset(start, end - start)
            await self.target.pdiscard(start, end - start)
