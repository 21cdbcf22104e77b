"""From guest offsets to runs: what each stretch of a qcow2 image is, and where.

A slice of an L2 table that is in memory is looked up without a suspension; neighbouring clusters
of one kind become one run.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

from qmpd.drivers._qcow2_image import Corruption, Image
from qmpd.formats.qcow2 import (
    ALL_ALLOCATED,
    ALL_ZERO,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
    ZERO,
    ClusterType,
    hex0,
)

if TYPE_CHECKING:
    from qmpd.drivers._qcow2_cache import Slice

UNALLOCATED = ClusterType.UNALLOCATED
ZERO_PLAIN = ClusterType.ZERO_PLAIN
ZERO_ALLOC = ClusterType.ZERO_ALLOC
NORMAL = ClusterType.NORMAL


class Run(NamedTuple):
    """A stretch of guest bytes of one kind.

    host   NORMAL, ZERO_ALLOC, UNALLOCATED in a cluster that has a place: offset of its first byte in `Image.data`
           COMPRESSED: the L2 entry; such a run lies within one cluster.  -1: there is no place
    """

    kind: ClusterType
    offset: int
    length: int
    host: int


class Place:
    """Where an L2 entry is: the slice as loaded, the index in it, the offset of the whole table."""

    __slots__ = ("index", "slice", "table_offset")

    def __init__(self, found: Slice, index: int, table_offset: int) -> None:
        self.slice, self.index, self.table_offset = found, index, table_offset


async def find_slice(image: Image, offset: int) -> Place | None:
    """Return the place of the L2 entry of guest `offset`, None if there is no L2 table.

    Valid until the caller's next await. Raises OSError, Corruption.
    """
    bits = image.cluster_bits
    l1_index = offset >> bits + image.l2_bits
    entry = image.l1[l1_index] & OFFSET_MASK if l1_index < len(image.l1) else 0
    if not entry:
        return None
    if entry & image.cluster_size - 1:
        raise Corruption(f"L2 table offset {hex0(entry)} unaligned (L1 index: {hex0(l1_index)})")
    index = offset >> bits & (1 << image.l2_bits) - 1
    slice_offset = entry + (index >> image.slice_bits) * image.l2.length
    found = image.l2.get(slice_offset)
    if found is None:
        image.file.debug_event("l2_load")
        found = await image.l2.load(slice_offset)
        if image.l1[l1_index] & OFFSET_MASK != entry:
            return await find_slice(image, offset)
    return Place(found, index & (1 << image.slice_bits) - 1, entry)


def host_of(image: Image, entry: int) -> int:
    """Return the offset of the cluster that an entry names, which is not compressed; -1 if it names none.

    In an external data file the first cluster lies at 0, and then the copied flag says that it has its place.
    """
    host = entry & OFFSET_MASK
    if host:
        return host
    return 0 if image.external and entry & COPIED and (image.extended or not entry & ZERO) else -1


def plain_host(image: Image, offset: int, length: int, flags: int) -> int:
    """Return the host offset of a range that lies in one plain cluster, without reading anything.

    flags   bits of the L2 entry that must be set (COPIED for writes). -1: look it up properly,
            by `map_range`; that also holds for every entry that is in any way unusual
    """
    mask = image.cluster_size - 1
    if (offset & mask) + length > mask + 1:
        return -1
    l1_index = offset >> image.cluster_bits + image.l2_bits
    if l1_index >= len(image.l1):
        return -1
    table = image.l1[l1_index] & OFFSET_MASK
    index = offset >> image.cluster_bits & (1 << image.l2_bits) - 1
    found = image.l2.get(table + (index >> image.slice_bits) * image.l2.length)
    if found is None or not table or table & mask:
        return -1
    entry = found.table[index & (1 << image.slice_bits) - 1]
    host = entry & OFFSET_MASK
    if entry & (COMPRESSED | ZERO | flags) != flags or not host or host & mask:
        return -1
    if image.external and host != offset & ~mask:
        return -1
    if image.extended:
        bitmap = found.table[image.bitmaps_at + (index & (1 << image.slice_bits) - 1)]
        if bitmap != ALL_ALLOCATED:
            wanted = subclusters(image, offset & mask, length)
            if bitmap & wanted != wanted or bitmap >> SUBCLUSTERS & bitmap:
                return -1
    return host + (offset & mask)


def subclusters(image: Image, within: int, length: int) -> int:
    """Return the mask of the subclusters that bytes [within, within + length) of a cluster touch."""
    first, last = within >> image.sub_bits, within + length - 1 >> image.sub_bits
    return (2 << last) - (1 << first)


def check_bitmap(image: Image, place: Place, entry: int, bitmap: int) -> None:
    """Refuse a bitmap that does not go with its entry. Raises Corruption."""
    invalid = bitmap >> SUBCLUSTERS & bitmap if host_of(image, entry) >= 0 else bitmap & ALL_ALLOCATED
    if invalid and not entry & COMPRESSED:
        raise Corruption(
            f"Invalid cluster entry found  (L2 offset: {hex0(place.table_offset)}, L2 index: {hex0(place.index)})"
        )


def subcluster_kind(image: Image, entry: int, bitmap: int, number: int) -> ClusterType:
    """Classify subcluster `number` of a valid extended L2 entry."""
    if entry & COMPRESSED:
        return ClusterType.COMPRESSED
    if bitmap >> number & 1:
        return NORMAL
    if bitmap >> SUBCLUSTERS + number & 1:
        return ZERO_ALLOC if host_of(image, entry) >= 0 else ZERO_PLAIN
    return UNALLOCATED


def plain_run(image: Image, offset: int, length: int, flags: int = 0) -> int:
    """Return the host offset of a range of plain clusters that follow one another in the file, else -1.

    Reads nothing, see `plain_host`.
    """
    room = image.cluster_size - (offset & image.cluster_size - 1)
    host = plain_host(image, offset, min(room, length), flags)
    if host < 0 or length <= room:
        return host
    done = room
    while done < length:
        step = min(image.cluster_size, length - done)
        if plain_host(image, offset + done, step, flags) != host + done:
            return -1
        done += step
    return host


def plain_target(image: Image, offset: int, length: int) -> int:
    """Like `plain_run`, for a write that changes nothing but data: the clusters are this image's alone."""
    if image.dead or image.bitmaps_fresh or not image.writable:
        return -1
    host = plain_run(image, offset, length, COPIED)
    return host if host < 0 or image.external or image.overlaps.clear(host, length) else -1


async def map_range(image: Image, offset: int, length: int) -> list[Run]:
    """Return the runs of guest bytes [offset, offset + length), in order.

    Raises OSError if a table cannot be read, Corruption if an entry breaks the format.
    """
    runs: list[Run] = []
    end = offset + length
    span = image.cluster_bits + image.slice_bits
    table_span = image.cluster_bits + image.l2_bits
    while offset < end:
        place = await find_slice(image, offset)
        if place is None:
            stop = min(end, (offset >> table_span) + 1 << table_span)
            runs.append(Run(UNALLOCATED, offset, stop - offset, -1))
        else:
            stop = min(end, (offset >> span) + 1 << span)
            if image.extended:
                _map_extended(image, place, offset, stop, runs)
            else:
                _map_slice(image, place, offset, stop, runs)
        offset = stop
    return _joined(runs) if len(runs) > 1 else runs


def end_of_empty(table: array[int], index: int, end: int) -> int:
    """Return the first index from `index` on whose entry is not 0; `end` if there is none before."""
    step = 16
    while index < end:
        piece = table[index : min(index + step, end)].tobytes()
        rest = len(piece.lstrip(b"\0"))
        if rest:
            return index + (len(piece) - rest) // table.itemsize
        index += len(piece) // table.itemsize
        step *= 4
    return end


def _map_slice(image: Image, place: Place, offset: int, stop: int, runs: list[Run]) -> None:
    """Append the runs of [offset, stop), which one slice describes."""
    table, index = place.slice.table, place.index
    bits = image.cluster_bits
    cluster = image.cluster_size
    mask = cluster - 1
    modern = image.header.version >= 3
    external = image.external
    within = offset & mask
    while offset < stop:
        entry = table[index]
        length = cluster - within
        if length > stop - offset:
            length = stop - offset
        if not entry:
            following = end_of_empty(table, index + 1, index + (within + stop - offset - 1 >> bits) + 1)
            length = min((following - index << bits) - within, stop - offset)
            index = following - 1
            runs.append(Run(UNALLOCATED, offset, length, -1))
        elif entry & COMPRESSED:
            if external:
                raise compressed_outside(place, index)
            runs.append(Run(ClusterType.COMPRESSED, offset, length, entry))
        else:
            host = entry & OFFSET_MASK
            if external and host != offset - within and not host & mask and (host or entry & (COPIED | ZERO) == COPIED):
                raise elsewhere(host, offset - within, index)
            if entry & ZERO:
                if not modern:
                    raise Corruption(
                        "Zero cluster entry found in pre-v3 image"
                        f" (L2 offset: {hex0(place.table_offset)}, L2 index: {hex0(index)})"
                    )
                if host & mask:
                    raise _unaligned(host, place, index)
                kind = ZERO_ALLOC if host else ZERO_PLAIN
            elif host or (external and entry & COPIED):
                if host & mask:
                    raise _unaligned(host, place, index)
                kind = NORMAL
                following = index + 1
                if length + within == cluster and offset + length < stop and table[following] & OFFSET_MASK:
                    most = index + 1 + (stop - offset - length - 1 >> bits) + 1
                    expected = entry + cluster
                    while following < most and table[following] == expected:
                        following += 1
                        expected += cluster
                    length += (following - index - 1) << bits
                    if length > stop - offset:
                        length = stop - offset
                    index = following - 1
            else:
                kind = UNALLOCATED
            runs.append(Run(kind, offset, length, host + within if host or kind is NORMAL else -1))
        offset += length
        within = 0
        index += 1


def _map_extended(image: Image, place: Place, offset: int, stop: int, runs: list[Run]) -> None:
    """Append the runs of [offset, stop), which one slice of extended entries describes."""
    table = place.slice.table
    mask = image.cluster_size - 1
    for index in range(
        place.index, place.index + (stop - 1 >> image.cluster_bits) - (offset >> image.cluster_bits) + 1
    ):
        entry, bitmap = table[index], table[image.bitmaps_at + index]
        host = host_of(image, entry)
        end = min(stop, (offset | mask) + 1)
        if not entry & COMPRESSED and host >= 0 and host & mask:
            raise _unaligned(host, place, index)
        if image.external and entry & COMPRESSED:
            raise compressed_outside(place, index)
        if image.external and host >= 0 and host != offset & ~mask:
            raise elsewhere(host, offset & ~mask, index)
        check_bitmap(image, Place(place.slice, index, place.table_offset), entry, bitmap)
        whole = entry & COMPRESSED or bitmap in (0, ALL_ALLOCATED, ALL_ZERO)
        while offset < end:
            within = offset & mask
            number = within >> image.sub_bits
            upto = end if whole else min(end, offset - within + (number + 1 << image.sub_bits))
            kind = subcluster_kind(image, entry, bitmap, number)
            there = entry if kind is ClusterType.COMPRESSED else host + within if host >= 0 else -1
            runs.append(Run(kind, offset, upto - offset, there))
            offset = upto


def _unaligned(host: int, place: Place, index: int) -> Corruption:
    return Corruption(
        f"Cluster allocation offset {hex0(host)} unaligned"
        f" (L2 offset: {hex0(place.table_offset)}, L2 index: {hex0(index)})"
    )


def elsewhere(host: int, guest: int, index: int) -> Corruption:
    """Return the error for a cluster of an external data file that is not where the guest sees it."""
    return Corruption(
        f"External data file host cluster offset {hex0(host)} does not match guest cluster offset: {hex0(guest)},"
        f" L2 index: {hex0(index)})"
    )


def compressed_outside(place: Place, index: int) -> Corruption:
    """Return the error for a compressed cluster in an image with an external data file."""
    return Corruption(
        "Compressed cluster entry found in image with external data file"
        f" (L2 offset: {hex0(place.table_offset)}, L2 index: {hex0(index)})"
    )


def _joined(runs: list[Run]) -> list[Run]:
    """Join neighbours that continue each other."""
    joined = [runs[0]]
    for run in runs[1:]:
        last = joined[-1]
        if run.kind is last.kind and (
            (run.host < 0 and last.host < 0)
            or (run.kind is not ClusterType.COMPRESSED and last.host >= 0 and run.host == last.host + last.length)
        ):
            joined[-1] = Run(last.kind, last.offset, last.length + run.length, last.host)
        else:
            joined.append(run)
    return joined
