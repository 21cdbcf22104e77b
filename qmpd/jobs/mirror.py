"""Mirroring: a second node becomes equal to a first one that is in use, and may take its place.

A filter above the source sees every write. In the background mode it marks what was written, and the
job copies it later; in the write-blocking mode a write goes to both sides before it is answered.
The target is a child of the filter, so whoever drains one side drains the other. Used by
blockdev-mirror, and by block-commit of an image that is in use. Model: block/mirror.c of QEMU.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from qmpd.block import chain, dirty_bitmap, insertion, reopen
from qmpd.block.backend import BlockBackend
from qmpd.block.backing import refresh_names
from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.child import Child
from qmpd.block.dirty_bitmap import DirtyBitmap
from qmpd.block.node import BlockNode
from qmpd.block.perm import ChildRole, Perm
from qmpd.block.ranges import RangeTable
from qmpd.errors import CommandError
from qmpd.jobs.block_job import NAP, BlockJob, pieces
from qmpd.jobs.job import JobManager, Status
from qmpd.jobs.layers import Held, Stretch, held_above
from qmpd.units import MiB, align_down, align_up

CHUNK = 1 * MiB
"""Bytes that one copy takes at most."""

AT_ONCE = 4
"""Copies under way at a time."""

LITTLE = 16 * MiB
"""Bytes that may be left when the source is stopped for the end: what its users then wait for."""

PATIENCE = 10
"""Times that the target is brought up to date before so much counts as equal: a busy writer leaves always something."""

LOOK_AGAIN = 0.1
"""Seconds between two looks at whether there is something new to copy (BLOCK_JOB_SLICE_TIME)."""


class MirrorFilter(insertion.JobFilter):
    """What the job puts above its source.

    blocking   writes go to the target before they are answered     dirty   what the target lacks, once set up
    shares_all it is about a commit: the chain below may be written to meanwhile
    stopped    nothing goes to the target any more, which somebody else may want for himself
    """

    driver_name: ClassVar[str] = "mirror_top"
    blocking = False
    shares_all = False
    stopped = False
    target: Child | None = None
    dirty: DirtyBitmap | None = None

    def begin(self, target: Child, granularity: int) -> None:
        """Mark what is written from now on."""
        self.dirty = dirty_bitmap.create(self, None, granularity)
        self.dirty.enabled = False
        self.busy = RangeTable()
        self.target = target

    def child_perm(self, name: str, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Pass on what the parents do; the target is written to."""
        if name == "target":
            return Perm.NONE if self.stopped else Perm.WRITE, Perm.ALL
        if self.shares_all:
            return perm & ~Perm.CONSISTENT_READ, shared | Perm.WRITE | Perm.RESIZE
        return perm, shared

    @asynccontextmanager
    async def _followed(self, ranges: list[tuple[int, int]]) -> AsyncIterator[bool]:
        """Do a write to the source in this block, and one to the target if it gives True."""
        dirty = self.dirty
        if dirty is None:
            yield False
            return
        if not self.blocking:
            try:
                yield False
            finally:
                for start, end in ranges:
                    dirty.set(start, end - start)
            return
        unit = dirty.granularity
        mine = await self.busy.acquire([(align_down(start, unit), align_up(end, unit), True) for start, end in ranges])
        try:
            yield True
        except BaseException:
            for start, end in ranges:
                dirty.set(start, end - start)
            raise
        finally:
            self.busy.release(mine)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write to the source, and mark it or write to the target as well."""
        async with self._followed([(one.offset, one.end) for one in batch]) as both:
            await super().pwritev(batch, flags)
            if both and self.target is not None:
                await self._copy_on(batch, flags)

    async def _copy_on(self, batch: Batch, flags: WriteFlags) -> None:
        """Write to the target what was written to the source; what fails on either side is copied later."""
        assert self.target is not None
        assert self.dirty is not None
        copies = Batch(Request(one.offset, one.view) for one in batch if not one.error)
        try:
            if copies:
                await self.target.pwritev(copies, flags)
        except OSError as error:
            copies.fail(error.errno or errno.EIO)
        for one in (*batch, *copies):
            if one.error:
                self.dirty.set(one.offset, len(one.view))

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero the source, and mark it or zero the target as well."""
        async with self._followed([(offset, offset + length)]) as both:
            await super().pwrite_zeroes(offset, length, flags)
            if both and self.target is not None and self.dirty is not None:
                try:
                    await self.target.pwrite_zeroes(offset, length, flags)
                except OSError:
                    self.dirty.set(offset, length)

    async def pdiscard(self, offset: int, length: int) -> None:
        """Discard in the source; the target gets what is there then."""
        async with self._followed([(offset, offset + length)]) as both:
            await super().pdiscard(offset, length)
            if both and self.dirty is not None:
                self.dirty.set(offset, length)

    async def copy(self, start: int, end: int) -> tuple[int, OSError | None, bool]:
        """Copy what is dirty of [start, end); return the bytes, and what failed, if anything, and if that was a read.

        Runs on the data loop. What was not copied is dirty afterwards.
        """
        dirty, target = self.dirty, self.target
        assert dirty is not None
        assert target is not None
        unit, copied = dirty.granularity, 0
        async with self.busy.own(align_down(start, unit), align_up(end, unit), exclusive=True):
            for at, length, wanted in list(dirty.runs(start, end)):
                if not wanted:
                    continue
                dirty.reset(at, length)
                reading = True
                try:
                    for extent in await self._extents(at, length):
                        reading = True
                        if extent.held is not Held.DATA:
                            reading = False
                            await target.pwrite_zeroes(extent.offset, extent.length, WriteFlags.MAY_UNMAP)
                        else:
                            data = await self.file.pread(extent.offset, extent.length)
                            reading = False
                            await target.pwrite(extent.offset, data)
                except OSError as error:
                    dirty.set(at, length)
                    return copied, error, reading
                copied += length
        return copied, None, False

    async def _extents(self, offset: int, length: int) -> list[Stretch]:
        return await held_above(self.file.node, None, offset, length)


@dataclass(frozen=True, slots=True)
class MirrorOptions:
    """How a mirror job works.

    replaces     the node whose place the target takes; None: the source
    granularity  bytes that are marked as one; None: as the target's clusters
    blocking     writes wait for the target
    above        the images whose data is copied to begin with are those above this node; None: all
    everything   whatever the images hold: the target may hold something else
    nothing      nothing is copied to begin with
    """

    replaces: BlockNode | None = None
    granularity: int | None = None
    on_source_error: str = "report"
    on_target_error: str = "report"
    blocking: bool = False
    above: BlockNode | None = None
    everything: bool = False
    nothing: bool = False


class Mirror(BlockJob):
    """Follows `source` on `target` until it is completed or cancelled."""

    job_type = "mirror"
    commits: ClassVar[bool] = False

    def __init__(
        self,
        manager: JobManager,
        job_id: str,
        source: BlockNode,
        target: BlockNode,
        options: MirrorOptions,
        **named: Any,
    ) -> None:
        super().__init__(manager, job_id, **named)
        self.source, self.target, self.options = source, target, options
        self._filter: MirrorFilter | None = None
        self._reader: BlockBackend | None = None
        self._writer: BlockBackend | None = None
        self._drain = AsyncExitStack()
        self._wake = asyncio.Event()
        self._completing = self._pivots = False
        self._frozen: list[Child] = []
        self._base_was_read_only = False

    # --- the graph --------------------------------------------------------------------------------

    async def prepare_graph(self, filter_name: str | None) -> None:
        """Put the filter above the source, with the target as its child. Raises QmpdError."""
        graph, source, target = self.source.graph, self.source, self.target
        if self.commits:
            self._base_was_read_only = target.read_only
            await reopen.set_read_only(graph, target, False)
        made = insertion.new_filter(graph, MirrorFilter, filter_name, source)
        made.shares_all = self.commits
        await insertion.insert(graph, made, source)
        self._filter = made
        below = chain.contains(source, target)
        shared = Perm.WRITE_UNCHANGED | (Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE if below else Perm.NONE)
        taken = Perm.WRITE | (Perm.RESIZE if self.commits else Perm.NONE)
        self._writer = self.new_backend(target, taken, shared | Perm.WRITE)
        with graph.change() as tran:
            edge = tran.attach(made, "target", ChildRole.DATA, target)
        granularity = self.options.granularity or dirty_bitmap.default_granularity(target)
        made.begin(edge, granularity)
        made.blocking = self.options.blocking
        self._reader = self.new_backend(made, Perm.CONSISTENT_READ, Perm.ALL, internal=True)
        self.hold("main node", made)
        self.hold("source", source)
        self.hold("target", target)
        if self.commits:
            for node, _ in list(chain.links(source, target))[1:]:
                self.hold("intermediate node", node)
            self._frozen = chain.freeze(made, target)

    async def _resize(self) -> None:
        """Check or set the size of the target. Raises CommandError."""
        assert self._writer is not None
        size = self.source.size
        if self.commits:
            if self.target.size < size:
                await self._writer.truncate(size)
        elif self.target.size != size:
            raise CommandError("Source and target image have different sizes")

    # --- the work ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Copy until nothing is left to copy, follow the source from then on, and end with both drained and equal."""
        await self._resize()
        await self._begin()
        passes = 0
        while True:
            await self.pause_point()
            if self._completing and self._left() <= LITTLE:
                if await self._settled():
                    return
                continue
            await self._copy_dirty()
            passes += 1
            if self._left() > (0 if passes < PATIENCE else LITTLE):
                continue
            if self.status is Status.RUNNING:
                await self._flush_target()
                self._show()
                self.become_ready()
            elif not self._completing:
                await self._rest()

    def _left(self) -> int:
        """Return the bytes that are to be copied."""
        return self._dirty.count

    @property
    def _dirty(self) -> DirtyBitmap:
        assert self._filter is not None
        assert self._filter.dirty is not None
        return self._filter.dirty

    async def _begin(self) -> None:
        """Mark what is to be copied to begin with."""
        dirty, size = self._dirty, self.source.size
        if self.options.nothing:
            return
        if self.options.everything and not await self._emptied():
            dirty.set(0, size)
            self._show()
            return
        for at in range(0, size, 64 * CHUNK):
            await self.pause_point()
            look = partial(held_above, self.source, self.options.above, at, min(64 * CHUNK, size - at))
            for one in await self._visit(look):
                if one.held is not Held.BELOW:
                    dirty.set(one.offset, one.length)
        self._show()

    async def _emptied(self) -> bool:
        """Make the target all zeroes, if that costs nothing and frees what it had; say so."""
        if self.target.node_options.discard != "unmap":
            return False
        flags = WriteFlags.MAY_UNMAP | WriteFlags.NO_FALLBACK
        assert self._filter is not None
        target = self._filter.target
        assert target is not None
        try:
            await self._visit(lambda: target.pwrite_zeroes(0, self.source.size, flags))
        except OSError:
            return False
        return True

    async def _visit(self, work: Any) -> Any:
        """Run something on the data loop that a drain of either side waits for."""
        assert self._reader is not None
        return await self._reader.visit(lambda _: work())

    async def _copy_dirty(self) -> None:
        """Copy once what is dirty now, several pieces at a time."""
        assert self._filter is not None
        areas = pieces(self._dirty.dirty_areas(), CHUNK)
        works = ((end - at, partial(self._copy, self._filter, at, end)) for at, end in areas)
        await self.in_parallel(works, AT_ONCE)

    async def _copy(self, above: MirrorFilter, start: int, end: int) -> None:
        copied, error, reading = await self._visit(partial(above.copy, start, end))
        self.current += copied
        self._show()
        if error is not None:
            policy = self.options.on_source_error if reading else self.options.on_target_error
            if not await self.failed(error, policy, reading=reading):
                await asyncio.sleep(NAP)  # it is tried again

    def _show(self) -> None:
        """Have the progress say what is left."""
        self.total = self.current + self._dirty.count

    async def _flush_target(self) -> None:
        assert self._filter is not None
        target = self._filter.target
        assert target is not None
        await self.attempt(lambda: self._visit(target.flush), self.options.on_target_error, reading=False)

    async def _rest(self) -> None:
        """Wait until there may be something to do."""
        self._wake.clear()
        try:
            await asyncio.wait_for(self._wake.wait(), LOOK_AGAIN)
        except TimeoutError:
            pass
        self._show()

    async def _settled(self) -> bool:
        """Stop all requests; say whether nothing was left to copy. They stay stopped then, until the job has ended."""
        assert self._filter is not None
        graph, target = self.source.graph, self._filter.target
        assert target is not None
        await self._flush_target()
        await self._drain.enter_async_context(graph.drained(self._filter))
        try:
            for at, end in list(pieces(self._dirty.dirty_areas(), CHUNK)):
                # The backend that other copies go through is stopped as well: this is not a request of it.
                copied, error, reading = await graph.runner.run(self._filter.copy(at, end))
                self.current += copied
                if error is not None:
                    await self._drain.aclose()
                    policy = self.options.on_source_error if reading else self.options.on_target_error
                    await self.failed(error, policy, reading=reading)
                    return False
            await graph.runner.run(target.flush())
        except BaseException:
            await self._drain.aclose()
            raise
        self._show()
        return True

    # --- the end ----------------------------------------------------------------------------------

    def complete(self) -> None:
        """Have the target take the place of the source."""
        replaces = self.options.replaces
        if replaces is not None and self.source.graph.get(replaces.name) is not replaces:
            raise CommandError(f"Node '{replaces.name}' is gone")
        self._completing = self._pivots = True
        self._wake.set()

    def stop_following(self) -> None:
        """End well, the source staying where it is."""
        self.check_verb("cancel")
        self._completing = True
        self._wake.set()

    def pause(self) -> None:
        """Stop at once, also while there is nothing to do."""
        super().pause()
        self._wake.set()

    def cancel(self) -> None:
        """Stop at once."""
        super().cancel()
        self._wake.set()

    async def commit(self) -> None:
        """Let the target take over, if that was asked for."""
        graph, above = self.source.graph, self._filter
        assert above is not None
        chain.thaw(self._frozen)
        await self.drop_backends()
        self._base_was_read_only = False  # as in the reference, it stays writable unless the job fails
        above.stopped = True
        if self._pivots:
            replaced = self.options.replaces or self.source
            with graph.change() as tran:
                tran.touch(above)
                if replaced is self.source:
                    insertion.move_parents(tran, above, self.target)
                insertion.move_parents(tran, replaced, self.target)
            refresh_names([self.target])
            await reopen.set_read_only(graph, self.target, replaced.read_only)

    async def clean(self) -> None:
        """Take the filter away, and let requests go on."""
        chain.thaw(self._frozen)
        await self.drop_backends()
        above, self._filter = self._filter, None
        graph = self.source.graph
        try:
            if above is not None:
                above.stopped = True
                with graph.change() as tran:
                    tran.touch(above)
                await self.take_out(above)
        finally:
            await self._drain.aclose()
        if self._base_was_read_only:
            await reopen.set_read_only(graph, self.target, True)
        await self.let_go()

    def to_block_wire(self) -> dict[str, Any]:
        """Return BlockJobInfo."""
        reply = super().to_block_wire()
        if not self.commits:
            above = self._filter
            synced = above is not None and above.blocking and above.dirty is not None and not above.dirty.count
            reply["actively-synced"] = synced and self.status in (Status.READY, Status.STANDBY)
        return reply

    def change_copy_mode(self, mode: str) -> None:
        """Have writes wait for the target from now on. Raises CommandError."""
        self.check_verb("change")
        assert self._filter is not None
        if mode == "write-blocking":
            self._filter.blocking = True
        elif self._filter.blocking:
            raise CommandError("Change to copy mode 'background' is not implemented")
