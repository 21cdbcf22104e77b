"""The metadata of one open qcow2 image: tables in memory, their order on disk, corruption.

Order of writes. What refers to a cluster reaches the disk only after the cluster's refcount and
its data: `write_metadata` writes refcount blocks, syncs, writes the refcount table and, if it
moved, the header, each followed by a sync, then L2 slices and L1 entries. What a change frees is
given back only when this is durable and no request that may still use the old place is in
flight. So a crash at any point leaves leaked clusters at most; with lazy refcounts the dirty bit
is set before the first change and refcounts are written when the image is closed.

Invariant, at every await: what a table in memory refers to has its refcount in memory.
"""

from __future__ import annotations

import errno
import logging
import struct
import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.ranges import RangeTable
from qmpd.drivers._qcow2_cache import Mutex, Slice, SliceCache
from qmpd.drivers._qcow2_options import Settings
from qmpd.drivers._qcow2_overlap import Overlaps
from qmpd.drivers._qcow2_refcounts import Refcounts
from qmpd.formats.qcow2 import (
    ENTRY_SIZE,
    OFFSET_MASK,
    REFCOUNT_TABLE_MASK,
    pack_entries,
    pack_extended,
    unpack_entries,
    unpack_extended,
    zero_entries,
)
from qmpd.formats.qcow2_header import (
    CORRUPT,
    DATA_FILE,
    DATA_FILE_RAW,
    DIRTY,
    INCOMPATIBLE_OFFSET,
    REFCOUNT_TABLE_OFFSET,
    Header,
)
from qmpd.formats.qcow2_snapshot import BITMAP_IN_USE, FLAGS_OFFSET
from qmpd.units import SECTOR, KiB, align_up

if TYPE_CHECKING:
    from qmpd.block.child import Child
    from qmpd.drivers._qcow2_crypto import Encryption
    from qmpd.formats.qcow2_snapshot import Snapshot, StoredBitmap

log = logging.getLogger(__name__)

Report = Callable[[str, int | None, int | None, bool], None]
"""Tells the world of a corruption: message, offset and size in bytes if known, fatal."""

L1_SECTOR = 512 // ENTRY_SIZE
"""L1 entries in the unit in which a changed L1 table is written."""

MAX_PENDING_FREES = 4096
"""Freed runs that wait for a write of the metadata; more of them start one."""

INLINE_ZEROES = 64 * KiB
"""A table up to this size is zeroed by writing; larger ones by the file's zero write."""


_WRITE_EVENTS = {
    "active-l1": "l1_update",
    "active-l2": "l2_update",
    "refcount-block": "refblock_update_part",
    "refcount-table": "refblock_alloc_hookup",
}
"""What a fault-injecting file is told before tables are written."""


class Corruption(Exception):
    """The image breaks its format; raised where nothing can be awaited, reported by `fail`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Freed:
    """Clusters that nothing refers to any more, `reason` why ("request", "snapshot", "other", "never")."""

    __slots__ = ("count", "first", "generation", "reason")

    def __init__(self, generation: int, first: int, count: int, reason: str) -> None:
        self.generation, self.first, self.count, self.reason = generation, first, count, reason


class Image:
    """An open image, below the driver's guest I/O.

    file       the child with the metadata             header  as in memory; see `update_header`
    data       the child with the guest data: `file`, or if `external` another one, in which each cluster lies
               where the guest sees it; those clusters have no references
    lock       held while clusters are allocated and linked, never across guest data
    owned      guest ranges whose clusters are being allocated, zeroed or discarded
    bitmaps_fresh  persistent bitmaps are there and still right: to be outdated by the first change
    extended   L2 entries have bitmaps; in a slice they follow the entries, from index `bitmaps_at` on
    sub_bits   log2 of the bytes in a subcluster; without extended L2 entries, in a cluster
    encryption how guest data is encrypted, None if it is not
    dead       the image was found corrupt while writable: no more I/O
    """

    def __init__(self, file: Child, header: Header, settings: Settings, *, writable: bool, report: Report) -> None:
        self.file, self.header, self.settings, self.writable = file, header, settings, writable
        self._report = report
        self.data = file
        self.external = bool(header.incompatible & DATA_FILE)
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.l2_bits = header.l2_bits
        self.extended = header.extended
        self.slice_bits = (settings.slice_length // ENTRY_SIZE >> self.extended).bit_length() - 1
        self.bitmaps_at = 1 << self.slice_bits
        self.sub_bits = header.cluster_bits - 5 if self.extended else header.cluster_bits
        self.l1: array[int] = zero_entries(0)
        self._l1_dirty: set[int] = set()
        self.l2 = SliceCache(
            settings.slice_length,
            settings.l2_slices,
            self.read_metadata,
            unpack_extended if self.extended else unpack_entries,
            pack_extended if self.extended else pack_entries,
        )
        self.overlaps = Overlaps(settings.overlap_check, header.cluster_bits)
        self.refcounts: Refcounts
        self.lock = Mutex()
        self.owned = RangeTable()
        self.snapshots: list[Snapshot] = []
        self.bitmaps: list[StoredBitmap] = []
        self.bitmaps_fresh = False
        self.encryption: Encryption | None = None
        self.dead = False
        self.signaled = False
        self._writing = Mutex()
        self._pending: list[Freed] = []
        self._limbo: list[Freed] = []
        self._generation = 0
        self._active: dict[int, int] = {}
        self._next_clean = time.monotonic() + settings.clean_interval
        self._clean_ticks = (0, 0)

    @property
    def raw(self) -> bool:
        """True if the external data file is to read, at every moment, as the guest disk does."""
        return self.external and bool(self.header.autoclear & DATA_FILE_RAW)

    async def load(self) -> None:
        """Read the L1 table and the refcount table, as far as the file reaches. Raises OSError."""
        header = self.header
        self.l1 = await self.read_table(header.l1_table_offset, header.l1_size)
        entries = header.refcount_table_clusters * header.cluster_size // ENTRY_SIZE
        self.file.debug_event("reftable_load")
        table = await self.read_table(header.refcount_table_offset, entries)
        if self.writable:
            table.extend(zero_entries(entries - len(table)))
        self.refcounts = Refcounts(self, table)
        self.place_metadata()

    def place_metadata(self) -> None:
        """State where the tables lie, for the overlap checks."""
        header, overlaps = self.header, self.overlaps
        overlaps.set_area("active-l1", (header.l1_table_offset, header.l1_size * ENTRY_SIZE))
        length = header.refcount_table_clusters * header.cluster_size
        overlaps.set_area("refcount-table", (header.refcount_table_offset, length))
        if self.writable:
            overlaps.set_tables("active-l2", (entry & OFFSET_MASK for entry in self.l1 if entry & OFFSET_MASK))
            blocks = (entry & REFCOUNT_TABLE_MASK for entry in self.refcounts.table if entry)
            overlaps.set_tables("refcount-block", blocks)

    async def read_table(self, offset: int, entries: int) -> array[int]:
        """Return the entries of a table that lie within the file; those after it are zero."""
        there = max(min(entries, (self.file.size - offset) // ENTRY_SIZE), 0)
        return unpack_entries(await self.file.pread(offset, there * ENTRY_SIZE)) if there else zero_entries(0)

    # --- plain access to the file -----------------------------------------------------------

    async def read_metadata(self, offset: int, length: int) -> bytearray:
        """Return bytes of the file; those after its end are zero. Raises OSError."""
        there = max(min(length, self.file.size - offset), 0)
        data = await self.file.pread(offset, there) if there else bytearray()
        data.extend(bytes(length - there))
        return data

    async def read_file(self, batch: Batch) -> None:
        """Read guest data (of `Placed` requests), decrypted; bytes after the file's end are zero. Errors are marked."""
        await self._read_stored(batch)
        if self.encryption is not None:
            await self.encryption.decrypt(batch)

    async def _read_stored(self, batch: Batch) -> None:
        end = self.data.size
        inside = batch
        if any(request.end > end for request in batch):
            inside = Batch()
            for request in batch:
                if request.end <= end:
                    inside.append(request)
                    continue
                there = max(end - request.offset, 0)
                request.view[there:] = bytes(len(request.view) - there)
                if there:
                    inside.append(request.part(request.offset, 0, there))
        if not inside:
            return
        try:
            self.file.debug_event("read_aio")
            await self.data.preadv(inside)
        except OSError as error:
            inside.fail(error.errno or errno.EIO)

    async def zero_cluster(self, offset: int) -> None:
        """Zero a host cluster that is to be a table; nothing refers to it yet. Raises OSError."""
        self.l2.forget(offset, offset + self.cluster_size)
        self.refcounts.cache.forget(offset, offset + self.cluster_size)
        if self.cluster_size <= INLINE_ZEROES:
            await self.file.pwrite(offset, bytes(self.cluster_size))
        else:
            await self.file.pwrite_zeroes(offset, self.cluster_size)

    async def write_header_field(self, offset: int, data: bytes) -> None:
        """Change a field of the header in place, durably. Raises OSError."""
        await self.file.pwrite(offset, data)
        await self.file.flush()

    async def set_incompatible(self, bits: int) -> None:
        """Write the incompatible features, durably. Version 2 has none. Raises OSError."""
        if self.header.version >= 3:
            await self.write_header_field(INCOMPATIBLE_OFFSET, struct.pack(">Q", bits))
            self.header.incompatible = bits

    async def outdate_bitmaps(self) -> None:
        """Mark the persistent bitmaps as in use: what is stored of them is not right from now on.

        Durable on return. Who reads the image later knows by the mark that they miss something.
        Raises OSError.
        """
        async with self.lock:
            place = self.header.bitmaps
            if not self.bitmaps_fresh or place is None:
                return
            for bitmap in self.bitmaps:
                flags = struct.pack(">I", bitmap.flags | BITMAP_IN_USE)
                await self.file.pwrite(place.directory_offset + bitmap.at + FLAGS_OFFSET, flags)
            await self.file.flush()
            self.bitmaps = [bitmap._replace(flags=bitmap.flags | BITMAP_IN_USE) for bitmap in self.bitmaps]
            self.bitmaps_fresh = False

    # --- requests in flight -----------------------------------------------------------------

    def enter(self) -> int:
        """Note a request that may use host clusters it has looked up; hand the result to `leave`."""
        if self.dead:
            raise OSError(errno.ENOMEDIUM, "the image is corrupt")
        self.clean_caches()
        generation = self._generation
        self._active[generation] = self._active.get(generation, 0) + 1
        return generation

    def leave(self, generation: int) -> None:
        """End what `enter` began."""
        left = self._active[generation] - 1
        if left:
            self._active[generation] = left
        else:
            del self._active[generation]

    @property
    def alone(self) -> bool:
        """True if no request but the caller's is in flight."""
        return sum(self._active.values()) == 1

    def free(self, first: int, count: int, reason: str) -> None:
        """Give up one reference to `count` host clusters; nothing in memory refers to them any more."""
        self.file.debug_event("cluster_free")
        self.refcounts.close_tail(first, count)
        self._pending.append(Freed(self._generation, first, count, reason))

    # --- writing metadata -------------------------------------------------------------------

    @property
    def crowded(self) -> bool:
        """True when so much waits to be written that it should be."""
        return (
            self.l2.crowded
            or self.refcounts.cache.crowded
            or len(self._pending) + len(self._limbo) >= MAX_PENDING_FREES
        )

    @property
    def accurate(self) -> bool:
        """True if refcounts on disk are to be right at every moment."""
        return not self.settings.lazy_refcounts

    async def before_change(self) -> None:
        """Set the dirty bit if refcounts are lazy. Called before clusters are taken or freed."""
        if self.settings.lazy_refcounts and not self.header.incompatible & DIRTY:
            await self.set_incompatible(self.header.incompatible | DIRTY)

    async def write_metadata(self, *, durable: bool = False, everything: bool = False) -> None:
        """Write what was changed up to now, in the order that keeps the image consistent.

        durable     it is on stable storage on return, and so is all guest data written before
        everything  refcounts too, even if they are lazy
        Raises OSError; what was not written stays to be written.
        """
        async with self._writing:
            if self.dead:
                raise OSError(errno.ENOMEDIUM, "the image is corrupt")
            freed = await self._write_tables(everything or self.accurate or self.refcounts.cache.crowded)
            if durable or freed:
                await self.sync()
            self._limbo.extend(freed)
            if await self._release() and (self.accurate or everything):
                await self._write_refcounts()

    async def _write_tables(self, with_refcounts: bool) -> list[Freed]:
        """Write all tables as they are at this moment; return what the change of them freed."""
        freed, self._pending = self._pending, []
        if freed and freed[-1].generation == self._generation:
            self._generation += 1
        l2 = self.l2.begin_write()
        l1, self._l1_dirty = self._l1_parts(), set()
        old_l1 = {(offset - self.header.l1_table_offset) // 512 for offset, _ in l1}
        try:
            if self.external and (l2 or l1):
                await self.data.flush()
            if with_refcounts:
                await self._write_refcounts(barrier=bool(l2 or l1))
            elif l2 or l1:
                await self.file.flush()
            await self._write_slices(self._slice_parts(l2), "active-l2")
            await self._write_slices(l1, "active-l1")
        except BaseException:
            self._pending[:0] = freed
            self.l2.end_write(l2, failed=True)
            self._l1_dirty |= old_l1
            raise
        self.l2.end_write(l2, failed=False)
        return freed

    @staticmethod
    def _slice_parts(taken: list[tuple[Slice, bytes]]) -> list[tuple[int, bytes]]:
        return sorted((one.offset, data) for one, data in taken)

    async def _write_refcounts(self, *, barrier: bool = False) -> None:
        """Write refcount blocks, then the table; synced if the table changed or for a `barrier`."""
        refcounts = self.refcounts
        blocks = refcounts.cache.begin_write()
        sectors, table = refcounts.begin_table_write()
        moved = refcounts.moved
        place = struct.pack(">QI", refcounts.table_offset, refcounts.table_clusters)
        try:
            await self._write_slices(self._slice_parts(blocks), "refcount-block")
            if barrier or table or moved is not None:
                await self.file.flush()
            if table:
                await self._write_slices(table, "refcount-table")
                await self.file.flush()
            if moved is not None:
                await self.write_header_field(REFCOUNT_TABLE_OFFSET, place)
                self.header.refcount_table_offset, self.header.refcount_table_clusters = struct.unpack(">QI", place)
        except BaseException:
            refcounts.cache.end_write(blocks, failed=True)
            refcounts.dirty |= sectors
            raise
        refcounts.cache.end_write(blocks, failed=False)
        if moved is not None:
            refcounts.moved = None
            self.free(*moved, "other")

    async def _write_slices(self, parts: list[tuple[int, bytes]], kind: str) -> None:
        """Write (offset, bytes) pairs, sorted by offset, neighbours joined by the file."""
        if not parts:
            return
        batch = Batch()
        for offset, data in parts:
            await self.check_overlap(offset, len(data), kind)
            batch.append(Request(offset, memoryview(data)))
        self.file.debug_event(_WRITE_EVENTS[kind])
        await self.file.pwritev(batch)
        batch.raise_first()

    def _l1_parts(self) -> list[tuple[int, bytes]]:
        start = self.header.l1_table_offset
        return [
            (start + sector * 512, pack_entries(self.l1[sector * L1_SECTOR : (sector + 1) * L1_SECTOR]))
            for sector in sorted(self._l1_dirty)
        ]

    async def _release(self) -> bool:
        """Give back what is durably unreferenced and no request in flight can still use."""
        oldest = min(self._active, default=self._generation + 1)
        ready = [one for one in self._limbo if one.generation < oldest]
        if not ready:
            return False
        self._limbo = [one for one in self._limbo if one.generation >= oldest]
        ready.sort(key=lambda one: one.first)
        await self._discard_host(ready)
        for one in ready:
            try:
                await self.refcounts.add(one.first, one.count, -1)
            except OSError as error:
                log.error("qcow2: freeing %d clusters at %d failed: %s", one.count, one.first, error.strerror)
        return True

    async def _discard_host(self, ready: list[Freed]) -> None:
        """Pass on to the file what nobody will refer to any more, if the options want it."""
        runs: list[list[int]] = []
        for one in ready:
            if one.reason not in self.settings.pass_discard:
                continue
            for cluster in range(one.first, one.first + one.count):
                if await self.refcounts.get(cluster) != 1:
                    continue
                if runs and runs[-1][1] == cluster:
                    runs[-1][1] += 1
                else:
                    runs.append([cluster, cluster + 1])
        for first, end in runs:
            await self.discard_host(first << self.cluster_bits, (end - first) << self.cluster_bits)

    async def discard_host(self, offset: int, length: int) -> None:
        """Discard bytes of the file that exist; a failure is only logged."""
        length = min(length, self.file.size - offset)
        if length <= 0:
            return
        try:
            await self.file.pdiscard(offset, length)
        except OSError as error:
            log.info("qcow2: discarding %d bytes at %d failed: %s", length, offset, error.strerror)

    async def empty_host(self, offset: int, length: int) -> None:
        """Free the space of guest data that is marked as zero, in clusters that stay where they are; a failure
        is only logged.

        The mark may not be durable yet, so the file must read as zeroes there: a discard would
        not promise that.
        """
        length = min(length, self.data.size - offset)
        if self.data.node.node_options.discard != "unmap" or length <= 0:
            return
        try:
            await self.data.pwrite_zeroes(offset, length, WriteFlags.MAY_UNMAP | WriteFlags.NO_FALLBACK)
        except OSError as error:
            log.info("qcow2: freeing %d bytes at %d failed: %s", length, offset, error.strerror)

    async def sync(self) -> None:
        """Make what was written to the files durable, guest data first. Raises OSError."""
        if self.external:
            await self.data.flush()
        await self.file.flush()

    async def flush(self) -> None:
        """Make everything written so far durable. Raises OSError."""
        await self.write_metadata(durable=True)

    async def close(self) -> None:
        """Write everything and mark the image clean. Raises OSError."""
        if self.dead or not self.writable:
            return
        await self.write_metadata(durable=True, everything=True)
        await self.write_metadata(durable=True, everything=True)
        if self.file.size % SECTOR:  # compressed data ends anywhere, but direct I/O reads sectors
            await self.file.pwrite(self.file.size, bytes(-self.file.size % SECTOR))
        if self.header.incompatible & DIRTY:
            await self.set_incompatible(self.header.incompatible & ~DIRTY)

    def clean_caches(self) -> None:
        """Drop slices that were not used during the last interval, if it is time."""
        interval = self.settings.clean_interval
        if interval and time.monotonic() >= self._next_clean:
            self._next_clean = time.monotonic() + interval
            old_l2, old_refcounts = self._clean_ticks
            self._clean_ticks = (self.l2.drop_unused(old_l2), self.refcounts.cache.drop_unused(old_refcounts))

    # --- L1 and L2 --------------------------------------------------------------------------

    def set_l1(self, index: int, entry: int) -> None:
        """Change an L1 entry in memory."""
        if index >= len(self.l1):
            self.l1.extend(zero_entries(align_up(index + 1, L1_SECTOR) - len(self.l1)))
            del self.l1[self.header.l1_size :]
        old = self.l1[index] & OFFSET_MASK
        new = entry & OFFSET_MASK
        self.l1[index] = entry
        self._l1_dirty.add(index // L1_SECTOR)
        if old != new:
            if old:
                self.overlaps.remove_table("active-l2", old)
            if new:
                self.overlaps.add_table("active-l2", new)

    # --- corruption -------------------------------------------------------------------------

    async def check_overlap(self, offset: int, length: int, ignore: str = "") -> None:
        """Refuse a write that would destroy metadata: EIO, and the image is marked corrupt."""
        hit = self.overlaps.find(offset, length, ignore)
        if hit is not None:
            text = f"Preventing invalid write on metadata (overlaps with {hit})"
            await self.corrupt(text, fatal=True, offset=offset, size=length)
            raise OSError(errno.EIO, text)

    async def corrupt(self, text: str, *, fatal: bool, offset: int | None = None, size: int | None = None) -> None:
        """Report that the image breaks its format; a fatal finding in a writable image ends its use."""
        fatal = fatal and self.writable
        if self.signaled and (not fatal or self.header.incompatible & CORRUPT):
            return
        if fatal:
            log.error("qcow2: Marking image as corrupt: %s; further corruption events will be suppressed", text)
        else:
            log.error("qcow2: Image is corrupt: %s; further non-fatal corruption events will be suppressed", text)
        self._report(text, offset, size, fatal)
        self.signaled = True
        if fatal:
            self.dead = True
            try:
                await self.set_incompatible(self.header.incompatible | CORRUPT)
            except OSError as error:
                log.error("qcow2: could not mark the image as corrupt: %s", error.strerror)

    async def fail(self, found: Corruption) -> int:
        """Report a corruption met while looking something up; return the errno for the request."""
        await self.corrupt(found.text, fatal=True)
        return errno.EIO
