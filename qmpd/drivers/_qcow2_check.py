"""Checking a qcow2 image: count what refers to each cluster, compare with the refcounts.

Used when a dirty image is opened for writing, and by `check`. The counting of one reference
more or less is what leaks and corruptions are; what they are called is as the reference does.
Model: qcow2_check_refcounts (QEMU block/qcow2-refcount.c).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from qmpd.drivers import _qcow2_repair as repair
from qmpd.drivers._qcow2_image import Image
from qmpd.drivers._qcow2_map import host_of
from qmpd.drivers._qcow2_snapshots import write_list
from qmpd.formats.qcow2 import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    ENTRY_SIZE,
    L1_RESERVED,
    L2_RESERVED,
    MAX_L1_BYTES,
    OFFSET_MASK,
    REFCOUNT_TABLE_MASK,
    SUBCLUSTERS,
    ZERO,
    compressed_extent,
    hex0,
    unpack_entries,
)
from qmpd.formats.qcow2_header import CORRUPT, DIRTY

_CHUNK_BITS = 12
MAX_MESSAGES = 10_000
"""Lines kept in a result at most: a destroyed image has as many faults as clusters."""


class Counts:
    """References per host cluster, in chunks so that memory follows what is counted."""

    def __init__(self) -> None:
        self._chunks: dict[int, array[int]] = {}

    def add(self, cluster: int, delta: int = 1) -> None:
        """Count one more reference to `cluster`."""
        chunk = self._chunks.get(cluster >> _CHUNK_BITS)
        if chunk is None:
            chunk = self._chunks[cluster >> _CHUNK_BITS] = array("Q", bytes(8 << _CHUNK_BITS))
        chunk[cluster & (1 << _CHUNK_BITS) - 1] += delta

    def get(self, cluster: int) -> int:
        """Return the references to `cluster`."""
        chunk = self._chunks.get(cluster >> _CHUNK_BITS)
        return 0 if chunk is None else chunk[cluster & (1 << _CHUNK_BITS) - 1]

    def used(self) -> Iterator[tuple[int, int]]:
        """Yield (cluster, references) in order, where there are any."""
        for number in sorted(self._chunks):
            base = number << _CHUNK_BITS
            for index, count in enumerate(self._chunks[number]):
                if count:
                    yield base + index, count

    @property
    def end(self) -> int:
        """The cluster after the last one referred to."""
        last = -1
        for cluster, _ in self.used():
            last = cluster
        return last + 1


@dataclass(slots=True, eq=False, repr=False)
class CheckResult:
    """What a check found and mended; the members of ImageCheck. Offsets in bytes."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    image_end_offset: int = 0
    messages: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Keep a line for people."""
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(text)


async def check_image(image: Image, *, fix_leaks: bool = False, fix_errors: bool = False) -> CheckResult:
    """Check an image that no request uses, and mend what the arguments allow.

    When nothing is left to mend, the dirty and the corrupt bit are cleared. Raises OSError if
    the image cannot be read or written.
    """
    result = CheckResult()
    async with image.lock:
        if image.writable:
            await image.write_metadata(everything=True, durable=True)
        counts = await count_references(image, result, fix=fix_errors)
        rebuild = await _compare(image, counts, result, fix_leaks=False, fix_errors=False)
        if rebuild and fix_errors:
            result.say("Rebuilding refcount structure")
            found = result.corruptions + result.leaks
            await repair.rebuild(image, counts)
            result.corruptions = result.leaks = 0
            counts = await count_references(image, CheckResult())
            rest = CheckResult()
            await _compare(image, counts, rest, fix_leaks=True, fix_errors=True)
            result.corruptions_fixed += max(found - rest.corruptions, 0)
            result.corruptions = rest.corruptions
        elif fix_leaks or fix_errors:
            if rebuild:
                result.say("ERROR need to rebuild refcount structures")
                result.check_errors += 1
            elif result.leaks or result.corruptions:
                before = result.corruptions
                result.leaks = 0
                result.corruptions = 0
                await _compare(image, counts, result, fix_leaks=fix_leaks, fix_errors=fix_errors)
                result.corruptions = max(before - result.corruptions_fixed, result.corruptions)
        await _check_copied(image, result, fix=fix_errors)
        await _check_snapshots(image, result, fix=fix_errors and not result.check_errors)
        if image.writable and (fix_leaks or fix_errors):
            await image.write_metadata(everything=True, durable=True)
            bits = image.header.incompatible & (DIRTY | CORRUPT)
            if not result.check_errors and not result.corruptions and bits:
                await image.set_incompatible(image.header.incompatible & ~bits)
    result.image_end_offset = counts.end << image.cluster_bits
    result.total_clusters = -(-image.header.size >> image.cluster_bits)
    return result


def _refer(image: Image, counts: Counts, result: CheckResult, offset: int, length: int) -> None:
    """Count a reference to every cluster of [offset, offset + length)."""
    if length <= 0:
        return
    if offset + length - image.file.size >= image.cluster_size:
        result.say(
            "ERROR: counting reference for region exceeding the end of the file by one cluster or more:"
            f" offset {hex0(offset)} size {hex0(length)}"
        )
        result.corruptions += 1
        return
    for cluster in range(offset >> image.cluster_bits, (offset + length - 1 >> image.cluster_bits) + 1):
        counts.add(cluster)


async def _check_snapshots(image: Image, result: CheckResult, *, fix: bool) -> None:
    """Complete the entries of the snapshot table that version 3 wants more of than they have."""
    short = [at for at, one in enumerate(image.snapshots) if one.disk_size is None and image.header.version >= 3]
    for at in short:
        result.say(f"{'Repairing' if fix else 'ERROR'} snapshot table entry {at} is incomplete")
    if fix and short:
        await write_list(image, [one._replace(disk_size=one.disk_size or image.header.size) for one in image.snapshots])
        result.corruptions_fixed += len(short)
    else:
        result.corruptions += len(short)


async def count_references(image: Image, result: CheckResult, *, fix: bool = False) -> Counts:
    """Return how often each cluster is referred to. Raises OSError.

    fix   entries that name no place for the zeroes they stand for, are mended on the way
    """
    header = image.header
    counts = Counts()
    _refer(image, counts, result, 0, header.cluster_size)
    await _count_l1(image, counts, result, header.l1_table_offset, header.l1_size, active=True, fix=fix)
    for snapshot in image.snapshots:
        where = f"ERROR snapshot {snapshot.identifier} ({snapshot.name})"
        if snapshot.l1_table_offset % header.cluster_size:
            result.say(
                f"{where} l1_offset={hex0(snapshot.l1_table_offset)}: L1 table is not cluster aligned;"
                " snapshot table entry corrupted"
            )
            result.corruptions += 1
        elif snapshot.l1_size > MAX_L1_BYTES // ENTRY_SIZE:
            result.say(
                f"{where} l1_size={hex0(snapshot.l1_size)}: L1 table is too large; snapshot table entry corrupted"
            )
            result.corruptions += 1
        else:
            await _count_l1(image, counts, result, snapshot.l1_table_offset, snapshot.l1_size, active=False, fix=False)
    for offset, length in image.overlaps.areas.get("snapshot-table", ()):
        _refer(image, counts, result, offset, length)
    await _count_bitmaps(image, counts, result)
    if image.encryption is not None:
        _refer(image, counts, result, *image.encryption.place)
    _refer(image, counts, result, header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits)
    for index, entry in enumerate(image.refcounts.table):
        if entry:
            _count_block(image, counts, result, index, entry)
    return counts


def _count_block(image: Image, counts: Counts, result: CheckResult, index: int, entry: int) -> None:
    offset = entry & REFCOUNT_TABLE_MASK
    if entry & ~REFCOUNT_TABLE_MASK:
        result.say(f"ERROR refcount table entry {index} has reserved bits set")
        result.corruptions += 1
        repair.want_rebuild(image)
    elif offset % image.cluster_size:
        result.say(f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted")
        result.corruptions += 1
        repair.want_rebuild(image)
    elif offset >= image.file.size:
        result.say(f"ERROR refcount block {index} is outside image")
        result.corruptions += 1
        repair.want_rebuild(image)
    else:
        _refer(image, counts, result, offset, image.cluster_size)
        if counts.get(offset >> image.cluster_bits) != 1:
            result.say(f"ERROR refcount block {index} refcount={counts.get(offset >> image.cluster_bits)}")
            result.corruptions += 1
            repair.want_rebuild(image)


async def _count_l1(
    image: Image, counts: Counts, result: CheckResult, offset: int, entries: int, *, active: bool, fix: bool
) -> None:
    _refer(image, counts, result, offset, entries * ENTRY_SIZE)
    table = await image.read_table(offset, entries)
    for entry in table:
        if not entry:
            continue
        if entry & L1_RESERVED:
            result.say(f"ERROR found L1 entry with reserved bits set: {entry:x}")
            result.corruptions += 1
        place = entry & OFFSET_MASK
        _refer(image, counts, result, place, image.cluster_size)
        if place % image.cluster_size:
            result.say(f"ERROR l2_offset={place:x}: Table is not cluster aligned; L1 entry corrupted")
            result.corruptions += 1
            if active and image.writable:
                continue
        await _count_l2(image, counts, result, place, active=active, fix=fix)


async def _count_l2(image: Image, counts: Counts, result: CheckResult, offset: int, *, active: bool, fix: bool) -> None:
    table = unpack_entries(await image.read_metadata(offset, image.cluster_size))
    expected, mended = 0, False
    for index, entry in enumerate(table[:: _stride(image)]):
        if image.extended:
            _check_bitmap(image, result, index, entry, table[2 * index + 1])
        if not entry:
            continue
        if entry & COMPRESSED:
            if entry & COPIED:
                result.say(
                    f"ERROR: coffset={hex0(entry & OFFSET_MASK)}: copied flag must never be set for compressed clusters"
                )
                result.corruptions += 1
            if image.external:
                result.say(f"ERROR compressed cluster {index} with data file, entry={hex0(entry & ~COPIED)}")
                result.corruptions += 1
                continue
            place, length = compressed_extent(entry, image.cluster_bits)
            _refer(image, counts, result, place, length)
            if active:
                result.allocated_clusters += 1
                result.compressed_clusters += 1
                result.fragmented_clusters += 1
            continue
        if entry & L2_RESERVED:
            result.say(f"ERROR found l2 entry with reserved bits set: {entry:x}")
            result.corruptions += 1
        place = host_of(image, entry)
        if place < 0:
            continue
        if place % image.cluster_size:
            zero = not table[2 * index + 1] & ALL_ALLOCATED if image.extended else bool(entry & ZERO)
            what = "Preallocated cluster" if zero else "Data cluster"
            verb = "Repairing" if fix and zero else "ERROR"
            result.say(f"{verb} offset={place:x}: {what} is not properly aligned; L2 entry corrupted.")
            result.corruptions += 1
            if fix and zero:
                table[index * _stride(image)] = 0 if image.extended else ZERO
                mended = True
                result.corruptions_fixed += 1
            continue
        if active:
            result.allocated_clusters += 1
            if expected and place != expected:
                result.fragmented_clusters += 1
            expected = place + image.cluster_size
        if not image.external:
            _refer(image, counts, result, place, image.cluster_size)
    if mended:
        await repair.write_table(image, offset, table)


def _stride(image: Image) -> int:
    """Return the integers of an L2 entry."""
    return 2 if image.extended else 1


def _check_bitmap(image: Image, result: CheckResult, index: int, entry: int, bitmap: int) -> None:
    """Say what is wrong with the subclusters of an extended L2 entry."""
    offset = entry & OFFSET_MASK
    if entry & COMPRESSED:
        if not bitmap:
            return
        text = f"compressed cluster {index} with non-zero subcluster allocation bitmap, entry={hex0(entry)}"
    elif host_of(image, entry) < 0 and bitmap & ALL_ALLOCATED:
        text = "Unallocated cluster has non-zero subcluster allocation map"
    elif host_of(image, entry) >= 0 and bitmap >> SUBCLUSTERS & bitmap:
        text = f"offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
    else:
        return
    result.say(f"ERROR {text}")
    result.corruptions += 1


async def _count_bitmaps(image: Image, counts: Counts, result: CheckResult) -> None:
    place = image.header.bitmaps
    if place is None:
        return
    _refer(image, counts, result, place.directory_offset, place.directory_size)
    for bitmap in image.bitmaps:
        _refer(image, counts, result, bitmap.table_offset, bitmap.table_size * ENTRY_SIZE)
        for entry in await image.read_table(bitmap.table_offset, bitmap.table_size):
            offset = entry & OFFSET_MASK
            if offset:
                _refer(image, counts, result, offset, image.cluster_size)


async def _compare(image: Image, counts: Counts, result: CheckResult, *, fix_leaks: bool, fix_errors: bool) -> bool:
    """Compare refcounts with `counts`; say whether the refcount structure must be rebuilt."""
    rebuild = repair.rebuild_wanted(image)
    wrong: list[tuple[int, int, int]] = []
    for cluster, references in counts.used():
        try:
            found = await image.refcounts.peek(cluster)
        except OSError:
            rebuild, found = True, 0
        if found != references:
            wrong.append((cluster, found, references))
    async for cluster, found in image.refcounts.stored():
        if not counts.get(cluster):
            wrong.append((cluster, found, 0))
    for cluster, found, references in sorted(wrong):
        if found == 0:
            rebuild = True
        fixing = fix_leaks if found > references else fix_errors
        if found > references:
            result.leaks += 1
        else:
            result.corruptions += 1
        if fixing and found:
            await image.refcounts.put(cluster, references)
            if found > references:
                result.leaks_fixed += 1
                result.leaks -= 1
            else:
                result.corruptions_fixed += 1
                result.corruptions -= 1
        verb = "Repairing" if fixing else "Leaked" if found > references else "ERROR"
        result.say(f"{verb} cluster {cluster} refcount={found} reference={references}")
    return rebuild


async def _check_copied(image: Image, result: CheckResult, *, fix: bool) -> None:
    """Compare the copied flags of the active tables with the refcounts."""
    verb = "Repairing" if fix else "ERROR"
    for index, entry in enumerate(image.l1):
        offset = entry & OFFSET_MASK
        if not offset or offset % image.cluster_size:
            continue
        refcount = await _refcount(image, offset)
        if (refcount == 1) != bool(entry & COPIED):
            result.say(f"{verb} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}")
            if fix:
                image.set_l1(index, offset | (COPIED if refcount == 1 else 0))
                result.corruptions_fixed += 1
            else:
                result.corruptions += 1
        table = unpack_entries(await image.read_metadata(offset, image.cluster_size))
        changed = False
        for at in range(0, len(table), _stride(image)):
            value = table[at]
            place = value & OFFSET_MASK
            if not place or value & COMPRESSED or place % image.cluster_size:
                continue
            refcount = 1 if image.external else await _refcount(image, place)
            if (refcount == 1) != bool(value & COPIED):
                result.say(f"{verb} OFLAG_COPIED data cluster: l2_entry={value:x} refcount={refcount}")
                if fix:
                    table[at] = value & ~COPIED | (COPIED if refcount == 1 else 0)
                    changed = True
                    result.corruptions_fixed += 1
                else:
                    result.corruptions += 1
        if changed:
            await repair.write_table(image, offset, table)


async def _refcount(image: Image, offset: int) -> int:
    try:
        return await image.refcounts.peek(offset >> image.cluster_bits)
    except OSError:
        return 0
