"""Reference counts of a qcow2 image: which host clusters are in use, and by how many.

Increments are made at once, in memory, before anything refers to the cluster; decrements only
when what referred to it is durably gone (`Image.free`), so the order on disk is always refcount
blocks, refcount table, then the tables that refer to clusters. After a crash there are leaks at
most. All methods that may allocate are called under the image's metadata lock.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from qmpd.drivers._qcow2_cache import Slice, SliceCache
from qmpd.formats.qcow2 import (
    MAX_REFCOUNT_TABLE_BYTES,
    OFFSET_MASK,
    REFCOUNT_TABLE_MASK,
    RefcountCodec,
    hex0,
    pack_entries,
    zero_entries,
)

if TYPE_CHECKING:
    from qmpd.drivers._qcow2_image import Image

SLICE_LENGTH = 4096
"""Bytes of a refcount block that are read and written at once."""

SECTOR_ENTRIES = 64
"""Refcount table entries in 512 bytes: the unit in which a changed table is written."""


class Refcounts:
    """The refcount table and the cached slices of its blocks.

    table         offsets of the blocks, native integers; index = cluster >> block_bits
    dirty         sectors of `table` that differ from the disk
    moved         first cluster and clusters of the table's old place while the header on disk
                  does not know the new one yet
    hint          no free cluster lies below this one
    tail          host offset after the last compressed data, where more fits into its cluster; 0: nowhere
    damaged       a check found the structure itself broken
    """

    def __init__(self, image: Image, table: array[int]) -> None:
        header = image.header
        self.image = image
        self.table = table
        self.table_offset = header.refcount_table_offset
        self.table_clusters = header.refcount_table_clusters
        self.codec = RefcountCodec(header.refcount_order)
        self.block_bits = header.refcount_block_bits
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        length = min(SLICE_LENGTH, header.cluster_size)
        self.per_slice = self.codec.count(length)
        slices = image.settings.refcount_blocks * header.cluster_size // length
        self.cache = SliceCache(length, slices, image.read_metadata, self.codec.unpack, self.codec.pack)
        self.dirty: set[int] = set()
        self.moved: tuple[int, int] | None = None
        self.hint = 0
        self.tail = 0
        self.damaged = False

    # --- single refcounts -------------------------------------------------------------------

    async def _slice(self, cluster: int) -> Slice | None:
        """Return the slice that holds the refcount of `cluster`, None if it has no block."""
        index = cluster >> self.block_bits
        block = self.table[index] & REFCOUNT_TABLE_MASK if index < len(self.table) else 0
        if not block:
            return None
        if block & self.cluster_size - 1:
            await self.image.corrupt(
                f"Refblock offset {hex0(block)} unaligned (reftable index: {hex0(index)})", fatal=True
            )
            raise OSError(errno.EIO, "refcount block is not aligned")
        within = (cluster & (1 << self.block_bits) - 1) // self.per_slice
        offset = block + within * self.cache.length
        if self.cache.get(offset) is None:
            self.image.file.debug_event("refblock_load")
        return await self.cache.load(offset)

    async def get(self, cluster: int) -> int:
        """Return the refcount of a host cluster (its number). Raises OSError."""
        found = await self._slice(cluster)
        return 0 if found is None else found.table[cluster % self.per_slice]

    async def peek(self, cluster: int) -> int:
        """Return a refcount as `get` does, for a check: nothing is reported. Raises OSError."""
        index = cluster >> self.block_bits
        block = self.table[index] & REFCOUNT_TABLE_MASK if index < len(self.table) else 0
        if not block:
            return 0
        if block & self.cluster_size - 1 or block >= self.image.file.size:
            raise OSError(errno.EIO, "refcount block has no proper place")
        return await self.get(cluster)

    async def count_used(self, end: int, enough: int) -> int:
        """Return how many clusters before cluster `end` are in use; `enough` or more end the count. Raises OSError."""
        used = cluster = 0
        while cluster < end and used < enough:
            index = cluster >> self.block_bits
            if index >= len(self.table):
                break
            block = self.table[index] & REFCOUNT_TABLE_MASK
            if not block:
                cluster = index + 1 << self.block_bits
                continue
            if block & self.cluster_size - 1 or block >= self.image.file.size:
                raise OSError(errno.EIO, "refcount block has no proper place")
            found = await self._slice(cluster)
            assert found is not None
            counts = found.table[: end - cluster]
            used += len(counts) - counts.count(0)
            cluster += self.per_slice
        return used

    async def put(self, cluster: int, value: int) -> None:
        """Set the refcount of a cluster whose block exists (repair). Raises OSError."""
        found = await self._slice(cluster)
        if found is None or value > self.codec.maximum:
            raise OSError(errno.EINVAL, "refcount cannot be stored")
        found.table[cluster % self.per_slice] = value
        self.cache.mark(found)
        if not value:
            self.hint = min(self.hint, cluster)

    async def stored(self) -> AsyncIterator[tuple[int, int]]:
        """Yield (cluster, refcount) of all refcounts on disk that are not zero (check)."""
        for index, entry in enumerate(self.table):
            offset = entry & REFCOUNT_TABLE_MASK
            if not offset or offset & self.cluster_size - 1 or offset >= self.image.file.size:
                continue
            for number in range(self.cluster_size // self.cache.length):
                found = await self.cache.load(offset + number * self.cache.length)
                base = (index << self.block_bits) + number * self.per_slice
                values = [(base + at, value) for at, value in enumerate(found.table) if value]
                for pair in values:
                    yield pair

    async def end_of_use(self, end: int) -> int:
        """Return the cluster after the last one before `end` that is in use. Raises OSError."""
        while end > 0:
            base = (end - 1) // self.per_slice * self.per_slice
            found = await self._slice(base)
            if found is not None:
                for at in range(end - 1 - base, -1, -1):
                    if found.table[at]:
                        return base + at + 1
            end = base
        return 0

    async def add(self, cluster: int, count: int, delta: int) -> None:
        """Change the refcounts of `count` neighbouring clusters by `delta`.

        A refcount that would leave its range is EINVAL: the image is inconsistent. Decrements
        never make a block; increments do. Raises OSError.
        """
        if delta < 0:
            self.close_tail(cluster, count)
        end = cluster + count
        while cluster < end:
            found = await self._slice(cluster)
            if found is None:
                if delta < 0:
                    raise OSError(errno.EINVAL, "refcount would fall below zero")
                await self._new_block(cluster >> self.block_bits)
                continue
            table, at = found.table, cluster % self.per_slice
            stop = min(self.per_slice, at + end - cluster)
            values = table[at:stop]
            if delta < 0 and min(values) < -delta:
                raise OSError(errno.EINVAL, "refcount would fall below zero")
            if delta > 0 and max(values) > self.codec.maximum - delta:
                raise OSError(errno.EINVAL, "refcount would overflow")
            for place in range(at, stop):
                table[place] += delta
            self.cache.mark(found)
            if delta < 0 and cluster < self.hint and 0 in table[at:stop]:
                self.hint = cluster + table[at:stop].index(0)
            cluster += stop - at

    # --- allocation -------------------------------------------------------------------------

    async def allocate(self, count: int, what: str = "data cluster") -> list[tuple[int, int]]:
        """Take `count` free clusters; return runs (first cluster, clusters). Raises OSError.

        On an error nothing stays taken.
        """
        self.image.file.debug_event("cluster_alloc")
        runs: list[tuple[int, int]] = []
        try:
            while count:
                run = await self._take_checked(count, what)
                if runs and sum(runs[-1]) == run[0]:
                    runs[-1] = (runs[-1][0], runs[-1][1] + run[1])
                else:
                    runs.append(run)
                count -= run[1]
        except BaseException:
            await self.give_back(runs)
            raise
        return runs

    def close_tail(self, first: int, count: int) -> None:
        """Pack nothing more into these clusters: they are being given up."""
        if self.tail and first <= self.tail >> self.cluster_bits < first + count:
            self.tail = 0

    async def allocate_bytes(self, length: int) -> int:
        """Take room for compressed data, one cluster of it at most, right after the last if it fits there.

        Every cluster that it touches has one more reference. Returns the host offset. Raises OSError.
        """
        bits = self.cluster_bits
        start = self.tail
        if start and await self.get(start >> bits) in (0, self.codec.maximum):
            start = 0
        if not start or -start % self.cluster_size < length:
            [(fresh, _)] = await self.allocate(1, "compressed cluster")
            if not start or self.tail != start or (start >> bits) + 1 != fresh:
                start = fresh << bits
            else:
                await self._add_to_tail(start >> bits, fresh)
        else:
            await self._add_to_tail(start >> bits, None)
        end = start + length
        self.tail = end if end & self.cluster_size - 1 else 0
        return start

    async def _add_to_tail(self, cluster: int, fresh: int | None) -> None:
        try:
            await self.add(cluster, 1, 1)
        except OSError:
            if fresh is not None:
                await self.give_back([(fresh, 1)])
            raise

    async def _take_checked(self, most: int, what: str) -> tuple[int, int]:
        """Take neighbours as `_take` does, but never the header of an image with wrong refcounts."""
        run = await self._take(most)
        if run[0] == 0:
            await self.give_back([run])
            if what == "data cluster":
                await self.image.check_overlap(0, self.cluster_size)
            await self.image.corrupt(f"Preventing invalid allocation of {what} at offset 0", fatal=True)
            raise OSError(errno.EIO, "cluster 0 counts as free")
        return run

    async def give_back(self, runs: list[tuple[int, int]]) -> None:
        """Free clusters that nothing on disk or in memory refers to."""
        for first, count in runs:
            await self.add(first, count, -1)

    async def _take(self, most: int) -> tuple[int, int]:
        """Take the first free clusters from the hint on, up to `most` neighbours."""
        while True:
            cluster = self.hint
            self._check_place(cluster)
            found = await self._slice(cluster)
            if found is None:
                await self._new_block(cluster >> self.block_bits)
                continue
            if self.hint != cluster:
                continue
            table, at = found.table, cluster % self.per_slice
            try:
                start = table.index(0, at)
            except ValueError:
                self.hint = cluster - at + self.per_slice
                continue
            stop = start
            limit = min(start + most, self.per_slice)
            while stop < limit and not table[stop]:
                table[stop] = 1
                stop += 1
            self.cache.mark(found)
            self.hint = cluster - at + stop
            return cluster - at + start, stop - start

    def _check_place(self, cluster: int) -> None:
        if cluster << self.cluster_bits > OFFSET_MASK:
            raise OSError(errno.EFBIG, "no place left that an L2 entry can name")

    async def allocate_run(self, count: int, what: str) -> int:
        """Take `count` neighbouring clusters; return the first. For tables. Raises OSError."""
        if count == 1:
            return (await self.allocate(1, what))[0][0]
        spare: list[tuple[int, int]] = []
        try:
            while True:
                first, got = await self._take_checked(count, what)
                if got == count:
                    return first
                spare.append((first, got))
                start = first + got
                taken = await self._take_at(start, count - got)
                if taken == count - got:
                    spare.pop()
                    return first
                if taken:
                    spare.append((start, taken))
        finally:
            await self.give_back(spare)

    async def _take_at(self, cluster: int, count: int) -> int:
        """Take free clusters from `cluster` on while they are free; return how many."""
        taken = 0
        while taken < count:
            self._check_place(cluster)
            found = await self._slice(cluster)
            if found is None:
                await self._new_block(cluster >> self.block_bits)
                continue
            at = cluster % self.per_slice
            if found.table[at]:
                break
            found.table[at] = 1
            self.cache.mark(found)
            taken += 1
            cluster += 1
        return taken

    # --- structures -------------------------------------------------------------------------

    async def _new_block(self, index: int) -> None:
        """Make the refcount block `index`, which describes itself: it is its first cluster."""
        if index >= len(self.table):
            await self._grow(index)
            return
        cluster = index << self.block_bits
        if cluster == 0:
            await self.image.corrupt("Preventing invalid allocation of refcount block at offset 0", fatal=True)
            raise OSError(errno.EIO, "the first refcount block is missing")
        offset = cluster << self.cluster_bits
        await self.image.check_overlap(offset, self.cluster_size)
        await self.image.zero_cluster(offset)
        if self.table[index] & REFCOUNT_TABLE_MASK:
            return
        self._add_block(index, offset)
        first = self.cache.insert(offset, self.codec.zeroes(self.cache.length))
        first.table[0] = 1
        self.cache.mark(first)

    def _add_block(self, index: int, offset: int) -> None:
        self.table[index] = offset
        self.dirty.add(index // SECTOR_ENTRIES)
        self.image.overlaps.add_table("refcount-block", offset)

    async def _grow(self, index: int) -> None:
        """Move the refcount table to a larger place, at the start of the area it could not reach.

        The new blocks that cover this area come first, then the table; the header is changed by
        the next write of the metadata, after both are durable. Once the blocks are zeroed there
        is no await: a write of the metadata sees all of the change or nothing.
        """
        while self.moved is not None:
            await self.image.write_metadata(everything=True)
        per_cluster = self.cluster_size // 8
        wanted = max(index + 1, len(self.table) * 3 // 2)
        clusters = -(-wanted // per_cluster)
        first_block = len(self.table)
        start = first_block << self.block_bits
        blocks = 1
        while True:
            needed = blocks + clusters
            if first_block + blocks > clusters * per_cluster:
                clusters += 1
            elif needed > blocks << self.block_bits:
                blocks += 1
            else:
                break
        if clusters * self.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise OSError(errno.EFBIG, "the refcount table cannot grow further")
        self._check_place(start + needed)
        offset = start << self.cluster_bits
        await self.image.check_overlap(offset, needed * self.cluster_size)
        for number in range(blocks):
            await self.image.zero_cluster(offset + number * self.cluster_size)
        new = zero_entries(clusters * per_cluster)
        new[: len(self.table)] = self.table
        old = (self.table_offset >> self.cluster_bits, self.table_clusters)
        self.table = new
        self.moved = old
        self.table_offset = offset + blocks * self.cluster_size
        self.table_clusters = clusters
        self.dirty = set(range(-(-len(new) // SECTOR_ENTRIES)))
        self.image.overlaps.set_area("refcount-table", (self.table_offset, clusters * self.cluster_size))
        for number in range(blocks):
            self._add_block(first_block + number, offset + number * self.cluster_size)
        for number in range(0, needed, self.per_slice):
            place = offset + (number >> self.block_bits) * self.cluster_size
            place += (number & (1 << self.block_bits) - 1) // self.per_slice * self.cache.length
            fresh = self.cache.insert(place, self.codec.zeroes(self.cache.length))
            for at in range(min(self.per_slice, needed - number)):
                fresh.table[at] = 1
            self.cache.mark(fresh)

    def begin_table_write(self) -> tuple[set[int], list[tuple[int, bytes]]]:
        """Return the changed sectors of the refcount table, and (offset, bytes) of each; they count as clean."""
        sectors, self.dirty = self.dirty, set()
        parts = []
        for sector in sorted(sectors):
            entries = self.table[sector * SECTOR_ENTRIES : (sector + 1) * SECTOR_ENTRIES]
            parts.append((self.table_offset + sector * SECTOR_ENTRIES * 8, pack_entries(entries)))
        return sectors, parts
