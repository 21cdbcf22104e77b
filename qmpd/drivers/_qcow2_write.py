"""Guest writes to a qcow2 image: in place where a cluster is ours alone, else into new clusters.

A batch takes these steps: look up all clusters; own the guest ranges that need new clusters;
under the lock look up again and take host clusters; without the lock read what is copied around
the data, then write everything with one child call; under the lock link the new clusters. What
the new clusters replace is freed by the next write of the metadata.
"""

from __future__ import annotations

import errno
from array import array
from itertools import pairwise
from typing import TYPE_CHECKING

from qmpd.block.batch import Batch, Request
from qmpd.drivers._qcow2_image import Corruption, Image
from qmpd.drivers._qcow2_map import (
    Place,
    check_bitmap,
    compressed_outside,
    elsewhere,
    end_of_empty,
    find_slice,
    host_of,
    plain_host,
    subcluster_kind,
    subclusters,
)
from qmpd.drivers._qcow2_placed import Placed
from qmpd.drivers._qcow2_plan import Piece, Plan
from qmpd.drivers._qcow2_read import read_backing, read_compressed
from qmpd.formats.qcow2 import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
    ZERO,
    ClusterType,
    cluster_type,
    compressed_extent,
    hex0,
)
from qmpd.units import KiB

if TYPE_CHECKING:
    from qmpd.block.child import Child

ZERO_BY_FILE = 128 * KiB
"""Bytes around the data from which on a new cluster is zeroed by the file's own zero write."""

_ZEROES = memoryview(bytes(ZERO_BY_FILE))


async def write_batch(image: Image, batch: Batch, backing: Child | None, size: int) -> None:
    """Write every view of the batch; errors are marked on the requests.

    size   bytes of the guest disk: what a new cluster holds after it is zeroed
    """
    if image.bitmaps_fresh:
        await image.outdate_bitmaps()
    generation = image.enter()
    try:
        ready = Batch()
        plans: dict[int, Plan] = {}
        rows = not image.extended and _ascending(batch)
        for request in batch:
            host = plain_host(image, request.offset, len(request.view), COPIED)
            if host >= 0:
                ready.append(Placed(host, request.offset, request.view, request))
                continue
            try:
                await _classify(image, request, request.offset, request.view, ready, plans, rows)
            except Corruption as found:
                request.fail(await image.fail(found))
            except OSError as error:
                request.fail(error.errno or errno.EIO)
        if plans:
            await _allocating(image, ready, plans, backing, size)
        else:
            await _write_file(image, ready)
    finally:
        image.leave(generation)
    if image.crowded and not image.dead:
        await image.write_metadata()


def _ascending(batch: Batch) -> bool:
    """Say whether no request of the batch overlaps another one, as far as a short look can tell."""
    return len(batch) == 1 or all(one.end <= other.offset for one, other in pairwise(batch))


async def _classify(
    image: Image, request: Request, offset: int, view: memoryview, ready: Batch, plans: dict[int, Plan], rows: bool
) -> None:
    """Sort the clusters of `view` into those that can be written in place and those that cannot.

    rows   plan for several clusters at once: no other request has data in a cluster that this one covers
    """
    cluster = image.cluster_size
    done = 0
    place: Place | None = None
    table_end = -1
    run_end = -1
    span = image.cluster_bits + image.slice_bits
    mask = (1 << image.slice_bits) - 1
    while done < len(view):
        within = offset & cluster - 1
        length = min(cluster - within, len(view) - done)
        if offset >= table_end:
            place = await find_slice(image, offset)
            table_end = (offset >> span) + 1 << span
        index = offset >> image.cluster_bits & mask
        entry = place.slice.table[index] if place is not None else 0
        if entry & COPIED and not entry & (COMPRESSED | ZERO) and _allocated(image, place, index, within, length):
            host = _checked_host(image, entry, offset) + within
            if place is not None and length + within == cluster and not image.extended:
                length += _following(place, index, entry, cluster, min(len(view) - done, table_end - offset) - length)
            if run_end == done and ready[-1].end == host:
                last = ready[-1]
                before = len(last.view)
                ready[-1] = Placed(last.offset, offset - before, view[done - before : done + length], request)
            else:
                ready.append(Placed(host, offset, view[done : done + length], request))
            run_end = done + length
        else:
            if entry & ZERO and image.header.version < 3:
                assert place is not None
                raise Corruption(
                    "Zero cluster entry found in pre-v3 image"
                    f" (L2 offset: {hex0(place.table_offset)}, L2 index: {hex0(index)})"
                )
            if entry & COMPRESSED and image.external:
                assert place is not None
                raise compressed_outside(place, index)
            plan = plans.get(offset - within)
            if plan is None:
                count = 1
                if rows and not entry and length == cluster:
                    count = _empty_row(image, place, index, min(len(view) - done, table_end - offset))
                    length = count * cluster
                plan = plans[offset - within] = Plan(offset - within, count)
            plan.pieces.append(Piece(request, within, view[done : done + length]))
        offset += length
        done += length


def _allocated(image: Image, place: Place | None, index: int, within: int, length: int) -> bool:
    """Say whether all subclusters that a part of a cluster touches are allocated, so that it is written in place."""
    if not image.extended or place is None:
        return True
    wanted = subclusters(image, within, length)
    bitmap = place.slice.table[image.bitmaps_at + index]
    return bitmap & wanted == wanted and not bitmap >> SUBCLUSTERS & bitmap


def _empty_row(image: Image, place: Place | None, index: int, room: int) -> int:
    """Return how many clusters from `index` on have an empty L2 entry; at most what fits into `room` bytes."""
    most = room >> image.cluster_bits
    if place is None:
        return most
    return end_of_empty(place.slice.table, index + 1, index + most) - index


def _following(place: Place, index: int, entry: int, cluster: int, room: int) -> int:
    """Return how many bytes, up to `room`, go on in the host clusters right after that of `entry`."""
    table = place.slice.table
    found = 0
    while found < room:
        index += 1
        entry += cluster
        if table[index] != entry:
            return found
        found += cluster
    return room


def _checked_host(image: Image, entry: int, offset: int) -> int:
    host = entry & OFFSET_MASK
    if image.external and not host & image.cluster_size - 1:
        guest = offset & ~(image.cluster_size - 1)
        if host != guest:
            raise elsewhere(host, guest, guest >> image.cluster_bits & (1 << image.l2_bits) - 1)
        return host
    if host & image.cluster_size - 1 or not host:
        kind = "Preallocated zero" if entry & ZERO else "Data"
        raise Corruption(f"{kind} cluster offset {hex0(host)} unaligned (guest offset: {hex0(offset)})")
    return host


async def _write_file(image: Image, batch: Batch) -> None:
    """Write guest data to the file, no metadata being in the way. Errors are marked."""
    checked = batch
    if not image.external and not all(image.overlaps.clear(request.offset, len(request.view)) for request in batch):
        checked = await _without_overlaps(image, batch)
    if not checked:
        return
    if image.dead:
        checked.fail(errno.ENOMEDIUM)
        return
    try:
        image.data.debug_event("write_aio")
        if image.encryption is None:
            await image.data.pwritev(checked)
        else:
            await image.encryption.write(image.data, checked)
    except OSError as error:
        checked.fail(error.errno or errno.EIO)


async def _without_overlaps(image: Image, batch: Batch) -> Batch:
    """Return the requests that destroy no metadata; the others fail, and so does the image."""
    checked = Batch()
    for request in batch:
        try:
            await image.check_overlap(request.offset, len(request.view))
        except OSError as error:
            request.fail(error.errno or errno.EIO)
        else:
            checked.append(request)
    return checked


def owned_ranges(guests: list[int], cluster_size: int) -> list[tuple[int, int, bool]]:
    """Return the exclusive ranges (for RangeTable) of guest clusters, neighbours joined."""
    ranges: list[tuple[int, int, bool]] = []
    for guest in sorted(guests):
        if ranges and ranges[-1][1] == guest:
            ranges[-1] = (ranges[-1][0], guest + cluster_size, True)
        else:
            ranges.append((guest, guest + cluster_size, True))
    return ranges


async def _allocating(image: Image, ready: Batch, plans: dict[int, Plan], backing: Child | None, size: int) -> None:
    guests = [plan.guest + number * image.cluster_size for plan in plans.values() for number in range(plan.count)]
    mine = await image.owned.acquire(owned_ranges(guests, image.cluster_size))
    try:
        todo = await _plan(image, ready, [plans[guest] for guest in sorted(plans)])
        if todo:
            await _read_around(image, todo, backing, size)
            todo = await _with_data(image, ready, todo)
        else:
            await _write_file(image, ready)
        if todo:
            await link_all(image, todo)
    finally:
        image.owned.release(mine)


async def _plan(image: Image, ready: Batch, plans: list[Plan]) -> list[Plan]:
    """Look up the clusters again, now that nobody else changes them, and take host clusters."""
    todo: list[Plan] = []
    queue = plans[::-1]
    async with image.lock:
        while queue:
            plan = queue.pop()
            try:
                place = await find_slice(image, plan.guest)
                if plan.count > 1:
                    if place is None or not any(place.slice.table[place.index : place.index + plan.count]):
                        todo.append(plan)
                    else:
                        queue += (plan.split(1, image.cluster_size), plan)
                    continue
                plan.entry = place.slice.table[place.index] if place is not None else 0
                if image.extended:
                    _look_at_subclusters(image, plan, place)
                placed = not image.external or host_of(image, plan.entry) >= 0
                if plan.entry & COPIED and not plan.entry & COMPRESSED and placed:
                    plan.host = _checked_host(image, plan.entry, plan.guest)
            except Corruption as found:
                plan.fail(await image.fail(found))
                continue
            except OSError as error:
                plan.fail(error.errno or errno.EIO)
                continue
            if plan.host >= 0 and not plan.entry & ZERO and plan.bitmap & plan.filled == plan.filled:
                for piece in plan.pieces:
                    at = plan.host + piece.start
                    ready.append(Placed(at, plan.guest + piece.start, piece.view, piece.request))
            else:
                todo.append(plan)
        wanting = [plan for plan in todo if plan.host < 0]
        if wanting:
            todo = [plan for plan in todo if plan.host >= 0] + await _take_clusters(image, wanting)
    return [plan for plan in todo if not plan.failed]


def _look_at_subclusters(image: Image, plan: Plan, place: Place | None) -> None:
    """Note what the bitmap says, and which subclusters the data touches. Raises Corruption."""
    if not plan.entry & COMPRESSED:
        plan.entry &= ~ZERO
    if place is not None:
        plan.bitmap = place.slice.table[image.bitmaps_at + place.index]
        check_bitmap(image, place, plan.entry, plan.bitmap)
    for piece in plan.pieces:
        plan.filled |= subclusters(image, piece.start, len(piece.view))


def _gaps(image: Image, plan: Plan) -> list[tuple[int, int, ClusterType]]:
    """Return the parts (start, end, kind before) of a new cluster that are to be filled around the data.

    With extended L2 entries those are the rest of the subclusters that the data touches, and in a cluster that
    is copied those that were allocated; `plan.filled` becomes all that is allocated afterwards.
    """
    holes = plan.holes(image.cluster_size)
    if not image.extended:
        kind = cluster_type(plan.entry)
        return [(start, end, kind) for start, end in holes]
    allocated = plan.bitmap & ALL_ALLOCATED
    if plan.entry & COMPRESSED:
        wanted = plan.filled = ALL_ALLOCATED
    elif plan.fresh:
        wanted = plan.filled = plan.filled | allocated
    else:
        wanted = plan.filled & ~allocated
        plan.filled |= allocated
    found: list[tuple[int, int, ClusterType]] = []
    for start, end in holes:
        for number in range(start >> image.sub_bits, (end - 1 >> image.sub_bits) + 1):
            if not wanted >> number & 1:
                continue
            kind = subcluster_kind(image, plan.entry, plan.bitmap, number)
            low, high = max(start, number << image.sub_bits), min(end, number + 1 << image.sub_bits)
            if found and found[-1][1] == low and found[-1][2] is kind:
                found[-1] = (found[-1][0], high, kind)
            else:
                found.append((low, high, kind))
    return found


async def _take_clusters(image: Image, wanting: list[Plan]) -> list[Plan]:
    """Give each plan its host clusters, or fail it; return the plans, rows split where the file has no such room."""
    if image.external:
        for plan in wanting:
            if plan.guest + (plan.count - 1) * image.cluster_size > OFFSET_MASK or image.dead:
                plan.fail(errno.ENOMEDIUM if image.dead else errno.EFBIG)
            plan.host = plan.guest
        return wanting
    try:
        if image.dead:
            raise OSError(errno.ENOMEDIUM, "the image is corrupt")
        await image.before_change()
        runs = await image.refcounts.allocate(sum(plan.count for plan in wanting))
    except OSError as error:
        for plan in wanting:
            plan.fail(error.errno or errno.EIO)
        return wanting
    placed: list[Plan] = []
    queue = wanting[::-1]
    for first, count in runs:
        while count:
            plan = queue.pop()
            if plan.count > count:
                queue.append(plan.split(count, image.cluster_size))
            plan.host = first << image.cluster_bits
            plan.fresh = True
            placed.append(plan)
            first, count = first + plan.count, count - plan.count
    return placed


async def _read_around(image: Image, plans: list[Plan], backing: Child | None, size: int) -> None:
    """Fill `gaps` of each plan with what the rest of its cluster holds now."""
    stored, below = Batch(), Batch()
    owners: list[tuple[Request, Plan]] = []
    for plan in plans:
        if plan.count > 1:
            continue
        unpacked: bytes | None = None
        for start, end, kind in _gaps(image, plan):
            inside = max(min(end, size - plan.guest), start)
            zero = kind in (ClusterType.ZERO_PLAIN, ClusterType.ZERO_ALLOC) or (
                kind is ClusterType.UNALLOCATED and (backing is None or plan.guest + start >= backing.size)
            )
            if zero or inside == start:
                await _zero_gap(image, plan, start, end)
                continue
            view = memoryview(bytearray(end - start))
            plan.gaps.append((start, view))
            part: Request = Placed(0, plan.guest + start, view[: inside - start])
            if kind is ClusterType.COMPRESSED:
                try:
                    unpacked = unpacked or await read_compressed(image, plan.entry)
                except OSError as error:
                    plan.fail(error.errno or errno.EIO)
                    break
                part.view[:] = unpacked[start:inside]
                continue
            if kind is ClusterType.NORMAL:
                part.offset = (plan.entry & OFFSET_MASK) + start
                stored.append(part)
            else:
                part.offset = plan.guest + start
                below.append(part)
            owners.append((part, plan))
    if stored or below:
        image.file.debug_event("cow_read")
    if stored:
        await image.read_file(stored)
    if below:
        assert backing is not None
        await read_backing(backing, below)
    for part, plan in owners:
        if part.error:
            plan.fail(part.error)


async def _zero_gap(image: Image, plan: Plan, start: int, end: int) -> None:
    """Have [start, end) of the new cluster zeroed: with the data, or now if it is large and not encrypted."""
    if end - start <= ZERO_BY_FILE:
        plan.gaps.append((start, _ZEROES[: end - start]))
        return
    if image.encryption is not None:
        plan.gaps.append((start, memoryview(bytes(end - start))))
        return
    try:
        if not image.external:
            await image.check_overlap(plan.host + start, end - start)
        await image.data.pwrite_zeroes(plan.host + start, end - start)
    except OSError as error:
        plan.fail(error.errno or errno.EIO)


async def _with_data(image: Image, ready: Batch, plans: list[Plan]) -> list[Plan]:
    """Write the data and what surrounds it; return the plans that may be linked."""
    writes: list[tuple[Request, Plan]] = []
    for plan in plans:
        if plan.failed:
            continue
        host, guest = plan.host, plan.guest
        parts = [(start, Placed(host + start, guest + start, view)) for start, view in plan.gaps]
        parts.extend(
            (one.start, Placed(host + one.start, guest + one.start, one.view, one.request)) for one in plan.pieces
        )
        parts.sort(key=lambda pair: pair[0])
        writes.extend((request, plan) for _, request in parts)
    await _write_file(image, Batch([*ready, *(request for request, _ in writes)]))
    for request, plan in writes:
        if request.error:
            plan.fail(request.error)
    lost = [plan for plan in plans if plan.failed]
    if lost:
        await give_back(image, lost)
    return [plan for plan in plans if not plan.failed]


async def give_back(image: Image, plans: list[Plan]) -> None:
    """Free the clusters of plans that will not be linked."""
    async with image.lock:
        for plan in plans:
            if plan.fresh:
                await image.refcounts.give_back([(plan.host >> image.cluster_bits, plan.count)])


async def link_all(image: Image, plans: list[Plan]) -> None:
    """Let the L2 entries name the new clusters, which are written."""
    lost: list[Plan] = []
    async with image.lock:
        for plan in plans:
            try:
                if image.dead:
                    raise OSError(errno.ENOMEDIUM, "the image is corrupt")
                place = await writable_slice(image, plan.guest)
            except Corruption as found:
                plan.fail(await image.fail(found))
                lost.append(plan)
            except OSError as error:
                plan.fail(error.errno or errno.EIO)
                lost.append(plan)
            else:
                if plan.count > 1:
                    _set_row(image, place, plan.host | COPIED, plan.count)
                    continue
                bitmap = plan.bitmap & ~(plan.filled << SUBCLUSTERS) | plan.filled
                set_entry(image, place, plan.host | COPIED, bitmap)
                if plan.fresh:
                    free_entry(image, plan.entry, "never")
    if lost and not image.dead:
        await give_back(image, lost)


def _set_row(image: Image, place: Place, entry: int, count: int) -> None:
    """Let `count` L2 entries from `place` on name clusters in a row; the same rule as for `set_entry`."""
    end = entry + count * image.cluster_size
    place.slice.table[place.index : place.index + count] = array("Q", range(entry, end, image.cluster_size))
    image.l2.mark(place.slice)


def set_entry(image: Image, place: Place, entry: int, bitmap: int) -> None:
    """Change an L2 entry, and its bitmap if it has one, in memory.

    No await may lie between finding the place and this.
    """
    place.slice.table[place.index] = entry
    if image.extended:
        place.slice.table[image.bitmaps_at + place.index] = bitmap
    image.l2.mark(place.slice)


def free_entry(image: Image, entry: int, reason: str) -> None:
    """Give up the clusters that an L2 entry referred to; those of an external data file have no references."""
    if image.external:
        return
    if entry & COMPRESSED:
        offset, length = compressed_extent(entry, image.cluster_bits)
        first = offset >> image.cluster_bits
        image.free(first, (offset + length - 1 >> image.cluster_bits) - first + 1, reason)
    elif entry & OFFSET_MASK:
        image.free((entry & OFFSET_MASK) >> image.cluster_bits, 1, reason)


async def writable_slice(image: Image, guest: int) -> Place:
    """Return the place of a guest cluster's L2 entry, in a table that is ours alone.

    Called under the lock. A missing table is made, a shared one copied.
    Raises OSError, Corruption.
    """
    index = guest >> image.cluster_bits + image.l2_bits
    entry = image.l1[index] if index < len(image.l1) else 0
    if not entry & COPIED or not entry & OFFSET_MASK:
        await _own_table(image, index, entry & OFFSET_MASK)
    place = await find_slice(image, guest)
    assert place is not None
    return place


async def _own_table(image: Image, index: int, old: int) -> None:
    """Give L1 entry `index` a table of its own: empty, or a copy of the shared one at `old`."""
    if old & image.cluster_size - 1:
        raise Corruption(f"L2 table offset {hex0(old)} unaligned (L1 index: {hex0(index)})")
    await image.before_change()
    cluster = await image.refcounts.allocate_run(1, "L2 table")
    offset = cluster << image.cluster_bits
    try:
        await image.check_overlap(offset, image.cluster_size)
        image.file.debug_event("l2_alloc_write")
        await image.zero_cluster(offset)
        if old:
            image.file.debug_event("l2_alloc_cow_read")
            await image.file.pwrite(offset, await image.read_metadata(old, image.cluster_size))
    except BaseException:
        if not image.dead:
            await image.refcounts.give_back([(cluster, 1)])
        raise
    image.set_l1(index, offset | COPIED)
    if old:
        image.free(old >> image.cluster_bits, 1, "other")
