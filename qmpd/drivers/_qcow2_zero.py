"""Zero writes and discards of a qcow2 image: whole clusters change their L2 entries only.

Version 3 marks a cluster as zero; version 2 has no such mark, so there only images without a
backing file can forget clusters. Parts of clusters are written.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from qmpd.block.batch import Batch, WriteFlags
from qmpd.drivers._qcow2_image import Corruption, Image
from qmpd.drivers._qcow2_map import (
    UNALLOCATED,
    ZERO_ALLOC,
    ZERO_PLAIN,
    check_bitmap,
    elsewhere,
    host_of,
    map_range,
    subclusters,
)
from qmpd.drivers._qcow2_write import free_entry, writable_slice, write_batch
from qmpd.formats.qcow2 import ALL_ZERO, COMPRESSED, OFFSET_MASK, SUBCLUSTERS, ZERO, hex0
from qmpd.units import align_down, align_up

if TYPE_CHECKING:
    from qmpd.block.child import Child

Change = Callable[[int], tuple[int, bool]]
"""Old L2 entry -> new entry, and whether what the old one referred to is given up."""

Kept = list[tuple[int, int]]
"""Runs of host bytes (start, end) that keep their place, in the order of the guest disk."""


async def zero_range(
    image: Image, offset: int, length: int, flags: WriteFlags, backing: Child | None, size: int
) -> None:
    """Make [offset, offset + length) read as zeroes. Raises OSError.

    size   bytes of the guest disk; a last cluster that reaches beyond it counts as whole
    With NO_FALLBACK nothing is written as data: ENOTSUP instead, before anything has changed.
    """
    unit = 1 << image.sub_bits
    end = offset + length
    start, stop = align_up(offset, unit), align_down(end, unit)
    if end == size:
        stop = align_up(end, image.cluster_size)
    parts = [(offset, end)] if start > stop else [(offset, start), (min(stop, end), end)]
    if start < stop and image.header.version < 3 and backing is not None:
        raise OSError(errno.ENOTSUP, "version 2 cannot zero clusters over a backing file")
    data = [(a, b) for a, b in parts if a < b and not await _reads_zero(image, a, b - a, backing)]
    if data and flags & WriteFlags.NO_FALLBACK:
        raise OSError(errno.ENOTSUP, "parts of clusters can only be written")
    for a, b in data:
        await _write_zeroes(image, a, b, backing, size)
    if start >= stop:
        return
    if image.raw:
        await image.data.pwrite_zeroes(start, min(stop, size) - start, flags)
    if image.extended:
        start, stop = await _zero_ends(image, start, stop, backing, size)
        if start >= stop:
            return
    if image.header.version < 3:
        await _change(image, start, stop, _forget)
        return
    unmap = bool(flags & WriteFlags.MAY_UNMAP)
    keep = image.settings.discard_no_unref

    def zero(entry: int) -> tuple[int, bool]:
        if entry & COMPRESSED or (unmap and host_of(image, entry) >= 0 and not keep):
            return ZERO, True
        return entry | ZERO, False

    await _change(image, start, stop, zero, pass_on=unmap and (keep or image.external))


async def _write_zeroes(image: Image, start: int, end: int, backing: Child | None, size: int) -> None:
    batch = Batch.single(start, memoryview(bytes(end - start)))
    await write_batch(image, batch, backing, size)
    batch.raise_first()


async def _zero_ends(image: Image, start: int, stop: int, backing: Child | None, size: int) -> tuple[int, int]:
    """Zero the subclusters of [start, stop) that make no whole cluster; return the range that is left."""
    first, last = align_up(start, image.cluster_size), align_down(stop, image.cluster_size)
    ends = [(start, stop)] if first > last else [(start, first), (last, stop)]
    for a, b in ends:
        if a < b and not await _zero_subclusters(image, a, b):
            await _write_zeroes(image, a, min(b, size), backing, size)
    return first, last


async def _zero_subclusters(image: Image, start: int, stop: int) -> bool:
    """Mark subclusters of one cluster as zero; False if it is compressed and has none. Raises OSError."""
    if image.bitmaps_fresh:
        await image.outdate_bitmaps()
    mask = image.cluster_size - 1
    mine = await image.owned.acquire([(start & ~mask, (start | mask) + 1, True)])
    try:
        generation = image.enter()
        try:
            async with image.lock:
                await image.before_change()
                place = await writable_slice(image, start)
                at = image.bitmaps_at + place.index
                entry, bitmap = place.slice.table[place.index], place.slice.table[at]
                if entry & COMPRESSED:
                    return False
                check_bitmap(image, place, entry, bitmap)
                wanted = subclusters(image, start & mask, stop - start)
                place.slice.table[at] = (bitmap | wanted << SUBCLUSTERS) & ~wanted
                image.l2.mark(place.slice)
        except Corruption as found:
            raise OSError(await image.fail(found), found.text) from found
        finally:
            image.leave(generation)
    finally:
        image.owned.release(mine)
    if image.crowded and not image.dead:
        await image.write_metadata()
    return True


async def _reads_zero(image: Image, offset: int, length: int, backing: Child | None) -> bool:
    """Say whether a range reads as zeroes by what the tables say."""
    try:
        runs = await map_range(image, offset, length)
    except Corruption as found:
        raise OSError(await image.fail(found), found.text) from found
    return all(
        run.kind in (ZERO_PLAIN, ZERO_ALLOC)
        or (run.kind is UNALLOCATED and (backing is None or run.offset >= backing.size))
        for run in runs
    )


async def discard_range(image: Image, offset: int, length: int, backing: Child | None, size: int) -> None:
    """Forget the whole clusters of a range. Raises OSError.

    They read as zeroes afterwards in version 3; version 2 keeps clusters over a backing file,
    whose old contents would show.
    """
    cluster = image.cluster_size
    end = offset + length
    start, stop = align_up(offset, cluster), align_down(end, cluster)
    if end == size:
        stop = align_up(end, cluster)
    if start >= stop or (image.header.version < 3 and backing is not None):
        return
    if image.header.version < 3:
        await _change(image, start, stop, _forget, make_tables=False)
        return
    keep = image.settings.discard_no_unref
    covered = backing is not None

    def discard(entry: int) -> tuple[int, bool]:
        if not entry and not covered:
            return entry, False
        if keep and not entry & COMPRESSED and host_of(image, entry) >= 0:
            return entry | ZERO, False
        return ZERO, True

    if image.raw:
        await image.data.pwrite_zeroes(start, min(stop, size) - start, WriteFlags.MAY_UNMAP)
    await _change(image, start, stop, discard, make_tables=covered, pass_on=keep or image.external)


def _keep(image: Image, kept: Kept, entry: int) -> None:
    """Add the cluster of an L2 entry to `kept`."""
    start = entry & OFFSET_MASK
    if kept and kept[-1][1] == start:
        start = kept.pop()[0]
    kept.append((start, (entry & OFFSET_MASK) + image.cluster_size))


def _forget(_entry: int) -> tuple[int, bool]:
    return 0, True


async def _discard_kept(image: Image, kept: Kept, reason: str) -> None:
    """Pass the discard of clusters that keep their place on to the file, if the options want it.

    The guest range is still owned, so nobody writes to them; requests that looked them up before
    may still be on their way, and then the discard, being advice, is left out.
    """
    if reason in image.settings.pass_discard and image.alone:
        for start, end in kept:
            await image.empty_host(start, end - start)


async def _change(
    image: Image,
    start: int,
    stop: int,
    change: Change,
    *,
    make_tables: bool = True,
    pass_on: bool = False,
    reason: str = "request",
) -> None:
    """Apply `change` to the L2 entries of whole clusters [start, stop).

    make_tables  False: where there is no L2 table there is nothing to change
    pass_on      discard the host clusters that keep their place and become zero, if discards for `reason` are
                 passed on; in an external data file every cluster keeps its place
    Raises OSError.
    """
    if image.bitmaps_fresh:
        await image.outdate_bitmaps()
    mine = await image.owned.acquire([(start, stop, True)])
    kept: Kept = []
    try:
        generation = image.enter()
        try:
            async with image.lock:
                await image.before_change()
                offset = start
                while offset < stop:
                    span = image.cluster_bits + image.slice_bits
                    slice_end = min(stop, (offset >> span) + 1 << span)
                    if make_tables or _has_table(image, offset):
                        await _change_slice(image, offset, slice_end, change, kept)
                    offset = slice_end
            if pass_on:
                await _discard_kept(image, kept, reason)
        except Corruption as found:
            raise OSError(await image.fail(found), found.text) from found
        finally:
            image.leave(generation)
    finally:
        image.owned.release(mine)
    if image.crowded and not image.dead:
        await image.write_metadata()


def _has_table(image: Image, guest: int) -> bool:
    index = guest >> image.cluster_bits + image.l2_bits
    return index < len(image.l1) and bool(image.l1[index] & OFFSET_MASK)


async def _change_slice(image: Image, start: int, stop: int, change: Change, kept: Kept) -> None:
    place = await writable_slice(image, start)
    table = place.slice.table
    changed = False
    for index in range(place.index, place.index + (stop - start >> image.cluster_bits)):
        old = table[index]
        new, given_up = change(old)
        if image.extended:
            at = image.bitmaps_at + index
            bitmap = ALL_ZERO if new & ZERO else 0 if given_up else table[at]
            new &= ~ZERO
            changed = changed or bitmap != table[at]
            table[at] = bitmap
            if bitmap and new and new == old:
                _keep(image, kept, new)
        if new == old:
            continue
        if old & image.cluster_size - 1 & OFFSET_MASK and not old & COMPRESSED:
            guest = start + (index - place.index << image.cluster_bits)
            raise Corruption(f"Cannot free unaligned cluster {hex0(old & OFFSET_MASK)} (guest offset: {hex0(guest)})")
        if image.external and not old & COMPRESSED:
            guest = start + (index - place.index << image.cluster_bits)
            if host_of(image, old) not in (-1, guest):
                raise elsewhere(old & OFFSET_MASK, guest, index)
        table[index] = new
        changed = True
        if given_up:
            free_entry(image, old, "request")
            if image.external and not old & COMPRESSED and host_of(image, old) >= 0:
                _keep(image, kept, old)
        elif old & OFFSET_MASK and new & ZERO:
            _keep(image, kept, old)
    if changed:
        image.l2.mark(place.slice)
