"""Backup: a node as it is at one moment is copied, while it is used. Model: block/backup.c of QEMU.

A copy-before-write filter above the source copies what is about to be written to; the job copies the
rest.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qmpd.block import chain, insertion
from qmpd.block.backend import BlockBackend
from qmpd.block.batch import WriteFlags
from qmpd.block.dirty_bitmap import DirtyBitmap
from qmpd.block.graph import Graph
from qmpd.block.node import BlockNode
from qmpd.block.perm import Perm
from qmpd.errors import CommandError
from qmpd.jobs.block_job import BlockJob, pieces
from qmpd.jobs.chains import device_name
from qmpd.jobs.job import Job, JobManager
from qmpd.jobs.keeping import Keeping, TargetFailed
from qmpd.jobs.layers import Held, held_above
from qmpd.units import MiB

CHUNK = 1 * MiB
"""Bytes that one copy takes at most."""

AT_ONCE = 4
"""Copies under way at a time, unless the client says otherwise."""

INT_MAX = (1 << 31) - 1
LOOK_AGAIN = 0.1


@dataclass(frozen=True, slots=True)
class Perf:
    """BackupPerf.

    max_workers  copies at a time     max_chunk  bytes of one, 0 for any     min_cluster_size  bytes copied as one
    """

    use_copy_range: bool = False
    max_workers: int = AT_ONCE
    max_chunk: int = 0
    min_cluster_size: int = 0


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """BlockdevBackup."""

    device: str
    target: str
    sync: str
    job_id: str | None = None
    speed: int = 0
    bitmap: str | None = None
    bitmap_mode: str | None = None
    compress: bool = False
    on_source_error: str = "report"
    on_target_error: str = "report"
    auto_finalize: bool = True
    auto_dismiss: bool = True
    filter_node_name: str | None = None
    x_perf: Perf = Perf()


class Backup(BlockJob):
    """Copies one node; progress counts what had to be copied at the beginning.

    bitmap   whose bits say what is copied, or that is to know what was written since; None
    """

    job_type = "backup"

    def __init__(
        self,
        manager: JobManager,
        job_id: str,
        source: BlockNode,
        target: BlockNode,
        options: BackupOptions,
        bitmap: DirtyBitmap | None,
    ) -> None:
        super().__init__(
            manager,
            job_id,
            speed=options.speed,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
        )
        self.source, self.target, self.options, self.bitmap = source, target, options, bitmap
        self._before: DirtyBitmap | None = None
        self._filter: BlockNode | None = None
        self._reader: BlockBackend | None = None
        self._copied_all = False

    @property
    def _keeping(self) -> Keeping:
        found: Any = self._filter
        assert isinstance(found, Keeping)
        return found

    async def prepare_graph(self) -> None:
        """Begin to copy before writes; the bitmap, if any, begins anew at the same moment. Raises QmpdError."""
        graph, options = self.source.graph, self.options
        tree: dict[str, Any] = {"driver": "copy-before-write", "file": self.source.name, "target": self.target.name}
        tree["min-cluster-size"] = options.x_perf.min_cluster_size
        made = await insertion.open_above(graph, self.source, tree, options.filter_node_name, self._begin)
        cluster = self._keeping.cluster
        if options.x_perf.max_chunk and options.x_perf.max_chunk < cluster:
            raise CommandError(
                f"Required max-chunk ({options.x_perf.max_chunk}) is less than backup cluster size ({cluster})"
            )
        self._reader = self.new_backend(made, Perm.CONSISTENT_READ, Perm.ALL, internal=True)
        self.hold("main node", made)
        self.hold("target", self.target)
        self.total = self._keeping.to_copy.count

    def _begin(self, made: BlockNode) -> None:
        """Take the filter over at the moment that is kept."""
        self._filter = made
        if self.options.compress:
            self._keeping.copy_flags = WriteFlags.COMPRESSED
        if self.bitmap is not None:
            self._begin_bitmap(self.bitmap)

    def _begin_bitmap(self, bitmap: DirtyBitmap) -> None:
        """Have a bitmap record what is written from now on; what it had is what is copied, in that mode."""
        self._before = bitmap.snapshot()
        bitmap.clear()
        bitmap.busy = True
        if self.options.sync == "bitmap":
            to_copy = self._keeping.to_copy
            to_copy.clear()
            for offset, length in self._before.dirty_areas():
                to_copy.set(offset, min(length, to_copy.size - offset))

    def _end_bitmap(self, bitmap: DirtyBitmap) -> None:
        """Have a bitmap say what the next backup has to copy."""
        before, self._before = self._before, None
        if before is None:
            return
        bitmap.busy = False
        mode = self.options.bitmap_mode
        if mode == "never" or (mode == "on-success" and not self._copied_all):
            bitmap.merge(before)
        elif not self._copied_all:
            to_copy = self._keeping.to_copy
            for offset, length in to_copy.dirty_areas():
                bitmap.set(offset, min(length, bitmap.size - offset))

    # --- the work ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Copy everything, or, for `none`, let the filter do it for as long as the job is there."""
        if self.options.sync == "none":
            while True:
                await self.pause_point()
                await asyncio.sleep(LOOK_AGAIN)
        if self.options.sync == "top":
            await self._leave_out_what_is_below()
        to_copy = self._keeping.to_copy
        ignored = False
        while to_copy.count:
            if ignored:
                raise OSError(errno.EIO, "a part could not be copied")
            ignored = not await self._copy_all()
        await self._visit(self._keeping.target.flush)
        self._show()

    async def _leave_out_what_is_below(self) -> None:
        """Copy what the uppermost image holds only."""
        to_copy, cluster = self._keeping.to_copy, self._keeping.cluster
        below = chain.backing_of(chain.image_of(self.source))
        step = max(64 * CHUNK, cluster)
        for at in range(0, self.source.size, step):
            await self.pause_point()
            length = min(step, self.source.size - at)
            needed: set[int] = set()
            for one in await self._visit(partial(held_above, self.source, below, at, length)):
                if one.held is not Held.BELOW:
                    needed.update(range(one.offset // cluster, -(-(one.offset + one.length) // cluster)))
            for number in range(at // cluster, -(-(at + length) // cluster)):
                if number not in needed:
                    to_copy.reset(number * cluster, cluster)
        self.total = to_copy.count

    async def _copy_all(self) -> bool:
        """Copy once what is still to be copied; False if something failed and that is to be ignored."""
        chunk = max(self.options.x_perf.max_chunk or CHUNK, self._keeping.cluster)
        areas = pieces(self._keeping.to_copy.dirty_areas(), chunk)
        works = ((end - at, partial(self._copy, at, end)) for at, end in areas)
        return all(await self.in_parallel(works, self.options.x_perf.max_workers))

    async def _copy(self, start: int, end: int) -> bool:
        """Copy a piece, again and again if that is what is to be done about errors; False: it is to be left out."""
        while True:
            try:
                await self._visit(partial(self._keeping.copy, start, end))
            except OSError as error:
                reading = not isinstance(error, TargetFailed)
                policy = self.options.on_source_error if reading else self.options.on_target_error
                if not await self.failed(error, policy, reading=reading):
                    return False
                continue
            self._show()
            return True

    def _show(self) -> None:
        self.current = max(self.total - self._keeping.to_copy.count, 0)

    async def _visit(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run something on the data loop that a drain of either side waits for."""
        assert self._reader is not None
        return await self._reader.visit(lambda _: work())

    # --- the end ----------------------------------------------------------------------------------

    async def commit(self) -> None:
        """The copy is whole."""
        self._copied_all = True

    async def clean(self) -> None:
        """Take the filter away."""
        if self.bitmap is not None:
            self._end_bitmap(self.bitmap)
        above, self._filter = self._filter, None
        await self.drop_backends()
        if above is not None:
            await self.take_out(above)
        await self.let_go()


async def new_backup(graph: Graph, jobs: JobManager, options: BackupOptions) -> Job:
    """Return the job, which has begun to copy before writes and not been started. Raises CommandError."""
    source = graph.lookup(options.device, options.device)
    target = graph.lookup(options.target, options.target)
    options, bitmap = _with_bitmap(source, options)
    if source is target:
        raise CommandError("Source and target cannot be the same")
    if options.compress and not target.supports_compressed:
        raise CommandError(f"Compression is not supported for this drive {device_name(target)}")
    graph.check_blocked(source, in_chain=True)
    graph.check_blocked(target, in_chain=True)
    if not 1 <= options.x_perf.max_workers <= INT_MAX:
        raise CommandError(f"max-workers must be between 1 and {INT_MAX}")
    if options.x_perf.max_chunk < 0:
        raise CommandError("max-chunk must be zero (which means no limit) or positive")
    if source.size != target.size:
        raise CommandError("Source and target image have different sizes")
    job_id = device_name(source) if options.job_id is None else options.job_id
    job = Backup(jobs, job_id, source, target, options, bitmap)
    await jobs.admit(job, job.prepare_graph)
    return job


def _with_bitmap(source: BlockNode, options: BackupOptions) -> tuple[BackupOptions, DirtyBitmap | None]:
    """Check what is asked of a bitmap (do_backup_common). Raises CommandError."""
    sync, mode = options.sync, options.bitmap_mode
    if sync in ("incremental", "bitmap") and options.bitmap is None:
        raise CommandError(f"must provide a valid bitmap name for '{sync}' sync mode")
    if sync == "incremental":
        if mode not in (None, "on-success"):
            raise CommandError("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
        sync, mode = "bitmap", "on-success"
    if options.bitmap is None:
        if mode is not None:
            raise CommandError("Cannot specify bitmap sync mode without a bitmap")
        return options, None
    found = next((one for one in source.dirty_bitmaps if one.name == options.bitmap), None)
    if found is None:
        raise CommandError(f"Bitmap '{options.bitmap}' could not be found")
    if mode is None:
        raise CommandError("Bitmap sync mode must be given when providing a bitmap")
    found.check(readonly=True)
    if sync == "none":
        raise CommandError("sync mode 'none' does not produce meaningful bitmap outputs")
    if mode == "never" and sync != "bitmap":
        raise CommandError(f"Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'")
    if mode != "never":
        found.check()
    return replace(options, sync=sync, bitmap_mode=mode), found
