"""Changing the size of a qcow2 image's guest disk."""

from __future__ import annotations

import errno
import logging
import struct
from typing import TYPE_CHECKING

from qmpd.block.batch import WriteFlags
from qmpd.drivers._qcow2_image import Corruption, Image
from qmpd.drivers._qcow2_map import find_slice
from qmpd.drivers._qcow2_prealloc import preallocate
from qmpd.drivers._qcow2_write import free_entry, writable_slice
from qmpd.drivers._qcow2_zero import zero_range
from qmpd.errors import CommandError
from qmpd.formats.qcow2 import ENTRY_SIZE, MAX_L1_BYTES, OFFSET_MASK, pack_entries, zero_entries
from qmpd.formats.qcow2_header import L1_OFFSET, SIZE_OFFSET
from qmpd.units import SECTOR, align_up

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from qmpd.block.child import Child


async def resize(
    image: Image, size: int, old: int, backing: Child | None, preallocation: str, *, exact: bool = True
) -> int:
    """Make the guest disk `size` bytes long, `old` before; return the new size.

    The node is drained. Raises CommandError, OSError; then the size is what it was.
    """
    header = image.header
    if image.dead:
        raise OSError(errno.ENOMEDIUM, "the image is corrupt")
    if size % SECTOR:
        raise CommandError("The new size must be a multiple of 512")
    if header.nb_snapshots and header.version < 3:
        raise CommandError("Can't resize a v2 image which has snapshots")
    if preallocation != "off" and size < old:
        raise CommandError("Preallocation can't be used for shrinking an image")
    if size < old:
        await _shrink(image, size, old)
    else:
        await _grow_l1(image, header.l1_entries_for(size))
        end = min(size, align_up(old, image.cluster_size))
        if backing is not None:
            end = max(end, min(size, backing.size))
        if end > old:
            await zero_range(image, old, end - old, WriteFlags.NONE, backing, size)
        if image.external:
            preallocation = await _grow_data(image, old, size, preallocation, exact)
        if preallocation != "off":
            await preallocate(image, old, size, preallocation)
    await image.flush()
    await image.write_header_field(SIZE_OFFSET, struct.pack(">Q", size))
    header.size = size
    if size < old:
        await _cut_file(image)
        if image.external:
            await _cut_data(image, size)
    return size


async def _grow_data(image: Image, old: int, size: int, preallocation: str, exact: bool) -> str:
    """Make the external data file `size` bytes long; return how the clusters of the new part are to be linked.

    What is linked reads as zeroes whatever was in the file; what is not linked does so anyway. Raises OSError.
    """
    data = image.data
    if image.raw and preallocation == "off" and image.encryption is None:
        preallocation = "metadata"
    if preallocation != "off":
        size = align_up(size, image.cluster_size)
    there = min(data.size, size)
    if preallocation != "off" and old < there:
        await data.pwrite_zeroes(old, there - old)
    if data.size < size or (preallocation == "off" and data.size != size):
        mode = preallocation if preallocation in ("falloc", "full") else "off"
        await data.node.truncate(size, exact=exact, preallocation=mode)
    return preallocation


async def _cut_data(image: Image, size: int) -> None:
    """Cut the external data file off where the guest disk ends; that it stays long is no failure."""
    try:
        if image.data.size > size:
            await image.data.node.truncate(size, exact=False)
    except (OSError, CommandError) as error:
        log.warning("qcow2: the data file could not be shortened: %s", error)


async def _cut_file(image: Image) -> None:
    """Cut off what of the file is no longer in use at its end; that it stays long is no failure."""
    await image.flush()
    used = await image.refcounts.end_of_use(-(-image.file.size >> image.cluster_bits)) << image.cluster_bits
    if used < image.file.size:
        try:
            await image.file.node.truncate(used, exact=False)
        except (OSError, CommandError) as error:
            log.warning("qcow2: the file could not be shortened: %s", error)


async def _grow_l1(image: Image, entries: int) -> None:
    """Move the L1 table to a place where `entries` fit. Raises CommandError, OSError."""
    header = image.header
    if entries <= header.l1_size:
        return
    if entries * ENTRY_SIZE > MAX_L1_BYTES:
        raise CommandError("Failed to grow the L1 table: File too large")
    old = (header.l1_table_offset >> image.cluster_bits, -(-header.l1_size * ENTRY_SIZE >> image.cluster_bits))
    length = align_up(entries * ENTRY_SIZE, image.cluster_size)
    async with image.lock:
        await image.before_change()
        await image.flush()
        clusters = length >> image.cluster_bits
        image.file.debug_event("l1_grow_alloc_table")
        first = await image.refcounts.allocate_run(clusters, "L1 table")
        offset = first << image.cluster_bits
        try:
            await image.check_overlap(offset, length)
            table = zero_entries(length // ENTRY_SIZE)
            table[: len(image.l1)] = image.l1
            image.file.debug_event("l1_grow_write_table")
            await image.file.pwrite(offset, pack_entries(table))
            await image.flush()
            image.file.debug_event("l1_grow_activate_table")
            await image.write_header_field(L1_OFFSET, struct.pack(">IQ", entries, offset))
        except BaseException:
            if not image.dead:
                await image.refcounts.give_back([(first, clusters)])
            raise
        del table[entries:]
        image.l1 = table
        header.l1_size, header.l1_table_offset = entries, offset
        image.overlaps.set_area("active-l1", (offset, entries * ENTRY_SIZE))
        if old[1]:
            image.free(*old, "other")


async def _shrink(image: Image, size: int, old: int) -> None:
    """Give up the clusters and L2 tables that lie wholly after `size`."""
    table_span = image.cluster_bits + image.l2_bits
    first = align_up(size, image.cluster_size)
    async with image.lock:
        await image.before_change()
        for index in range(first >> table_span, min(len(image.l1), image.header.l1_entries_for(old))):
            entry = image.l1[index]
            if entry & OFFSET_MASK:
                start = max(first, index << table_span)
                await _drop_clusters(image, start, (index + 1) << table_span, whole=start == index << table_span)
                if start == index << table_span:
                    image.l2.forget(entry & OFFSET_MASK, (entry & OFFSET_MASK) + image.cluster_size)
                    image.set_l1(index, 0)
                    image.free((entry & OFFSET_MASK) >> image.cluster_bits, 1, "other")


async def _drop_clusters(image: Image, start: int, end: int, *, whole: bool) -> None:
    """Free the clusters of [start, end), within one L2 table; `whole`: the table goes as well."""
    span = image.cluster_bits + image.slice_bits
    offset = start
    try:
        while offset < end:
            stop = min(end, (offset >> span) + 1 << span)
            place = await (find_slice(image, offset) if whole else writable_slice(image, offset))
            assert place is not None
            table = place.slice.table
            for at in range(place.index, place.index + (stop - offset >> image.cluster_bits)):
                if table[at]:
                    free_entry(image, table[at], "other")
                    if not whole:
                        table[at] = 0
                if image.extended and not whole:
                    table[image.bitmaps_at + at] = 0
            if not whole:
                image.l2.mark(place.slice)
            offset = stop
    except Corruption as found:
        raise OSError(await image.fail(found), found.text) from found
