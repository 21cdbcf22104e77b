"""Internal snapshots of a qcow2 image: made, applied, deleted.

A snapshot has a copy of the L1 table; everything the copy refers to has one more reference. The
caller has drained the node. Each change sets the dirty bit (version 3) while references and copied
flags disagree, so that a crash there is mended by whoever opens the image next; what the disk and
its snapshots show is right at every moment: references are added, durably, before anything refers
to a cluster in a new way, and taken away after nothing does. The switch itself is one write of the
header. Model: block/qcow2-snapshot.c of QEMU.
"""

from __future__ import annotations

import errno
import struct
import time
from array import array
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qmpd.drivers._qcow2_image import Corruption, Image
from qmpd.drivers._qcow2_open import place_inactive
from qmpd.errors import CommandError
from qmpd.formats.qcow2 import (
    COMPRESSED,
    COPIED,
    ENTRY_SIZE,
    MAX_L1_BYTES,
    MAX_SNAPSHOTS,
    OFFSET_MASK,
    ZERO,
    compressed_extent,
    hex0,
    pack_entries,
    unpack_entries,
    zero_entries,
)
from qmpd.formats.qcow2_header import DATA_FILE, DIRTY, EXTENDED_L2, SIZE_OFFSET
from qmpd.formats.qcow2_snapshot import MAX_TABLE, Snapshot, pack_snapshots

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode

SNAPSHOTS_OFFSET = 60
"""Where the header says how many snapshots there are, and where their table lies."""

MAX_NAME = 255
"""Bytes of a name that the reference keeps; what is longer is cut."""

Run = tuple[int, int]
"""First host cluster, clusters."""


def find_snapshot(image: Image, identifier: str | None, name: str | None) -> Snapshot | None:
    """Return the first snapshot with that id and that name, None standing for any."""
    for one in image.snapshots:
        if identifier in (None, one.identifier) and name in (None, one.name):
            return one
    return None


def _refuse_data_file(image: Image) -> None:
    if image.header.incompatible & DATA_FILE:
        raise OSError(errno.ENOTSUP, "no snapshots with an external data file")
    if image.dead:
        raise OSError(errno.ENOMEDIUM, "the image is corrupt")


@asynccontextmanager
async def _changing(image: Image) -> AsyncIterator[None]:
    """Own the metadata, all of it on disk; while the block runs, references and flags may disagree there."""
    header = image.header
    async with image.lock:
        await image.write_metadata(durable=True, everything=True)
        await image.write_metadata(durable=True, everything=True)
        mark = header.version >= 3 and not header.incompatible & DIRTY
        if mark:
            await image.set_incompatible(header.incompatible | DIRTY)
        try:
            yield
        except Corruption as found:
            raise OSError(await image.fail(found), found.text) from found
        await image.write_metadata(durable=True, everything=True)
        if mark and image.accurate:
            await image.set_incompatible(header.incompatible & ~DIRTY)


# --- what a table refers to -----------------------------------------------------------------------


def _stride(image: Image) -> int:
    """Return the integers of an L2 entry."""
    return 2 if image.header.incompatible & EXTENDED_L2 else 1


async def _tables(image: Image, l1: Iterable[int]) -> AsyncIterator[tuple[int, int, array[int]]]:
    """Yield (L1 index, host offset, table) of the L2 tables that an L1 table names, as they are on disk."""
    for index, entry in enumerate(l1):
        offset = entry & OFFSET_MASK
        if not offset:
            continue
        if offset & image.cluster_size - 1:
            raise Corruption(f"L2 table offset {hex0(offset)} unaligned (L1 index: {hex0(index)})")
        yield index, offset, unpack_entries(await image.read_metadata(offset, image.cluster_size))


def _runs(image: Image, offset: int, table: array[int]) -> list[Run]:
    """Return the host clusters that an L2 table refers to, and those of the table itself, neighbours joined."""
    found = [(offset >> image.cluster_bits, 1)]
    for index, entry in enumerate(table[:: _stride(image)]):
        if entry & COMPRESSED:
            start, length = compressed_extent(entry, image.cluster_bits)
            first = start >> image.cluster_bits
            found.append((first, (start + length - 1 >> image.cluster_bits) - first + 1))
            continue
        host = entry & OFFSET_MASK
        if not host:
            continue
        if host & image.cluster_size - 1:
            kind = "Preallocated zero" if entry & ZERO and _stride(image) == 1 else "Data"
            raise Corruption(
                f"{kind} cluster offset {hex0(host)} unaligned (L2 offset: {hex0(offset)}, L2 index: {hex0(index)})"
            )
        first = host >> image.cluster_bits
        if sum(found[-1]) == first:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((first, 1))
    return found


async def _refer(image: Image, l1: Iterable[int], done: list[Run]) -> None:
    """Add a reference to all that an L1 table names; `done` grows with it. Raises OSError, Corruption."""
    per_slice = image.refcounts.per_slice
    async for _, offset, table in _tables(image, l1):
        for first, count in _runs(image, offset, table):
            while count:
                step = min(count, per_slice - first % per_slice)
                await image.refcounts.add(first, step, 1)
                done.append((first, step))
                first += step
                count -= step


async def _unrefer(image: Image, l1: Iterable[int]) -> None:
    """Take a reference from all that an L1 table names, which nothing on disk refers to any more by it."""
    async for _, offset, table in _tables(image, l1):
        for first, count in _runs(image, offset, table):
            image.free(first, count, "snapshot")
        if image.crowded:
            await image.write_metadata(durable=True, everything=True)
    await image.write_metadata(durable=True, everything=True)
    await image.write_metadata(durable=True, everything=True)


async def _refresh_copied(image: Image) -> None:
    """Give the entries of the active tables the copied flags that the references ask for."""
    await image.write_metadata(durable=True, everything=True)
    stride = _stride(image)

    async def flagged(entry: int) -> int:
        if entry & COMPRESSED or not entry & OFFSET_MASK:
            return entry & ~COPIED
        alone = await image.refcounts.get((entry & OFFSET_MASK) >> image.cluster_bits) == 1
        return entry | COPIED if alone else entry & ~COPIED

    async for index, offset, table in _tables(image, list(image.l1)):
        changed = False
        for at in range(0, len(table), stride):
            entry = table[at]
            if entry and (new := await flagged(entry)) != entry:
                table[at] = new
                changed = True
        if changed:
            await image.check_overlap(offset, image.cluster_size, "active-l2")
            await image.file.pwrite(offset, pack_entries(table))
            image.l2.forget(offset, offset + image.cluster_size)
        entry = image.l1[index]
        if (new := await flagged(entry)) != entry:
            image.set_l1(index, new)
    await image.write_metadata(durable=True, everything=True)


# --- the snapshot table ---------------------------------------------------------------------------


async def write_list(image: Image, snapshots: list[Snapshot]) -> None:
    """Make `snapshots` those of the image, durably. Raises OSError; then nothing has changed."""
    header = image.header
    data = pack_snapshots(snapshots, header.size)
    if len(data) > MAX_TABLE:
        raise OSError(errno.EFBIG, "the snapshot table would be too large")
    clusters = -(-len(data) // image.cluster_size)
    first = 0
    old = list(image.overlaps.areas.get("snapshot-table", ()))
    try:
        if clusters:
            first = await image.refcounts.allocate_run(clusters, "snapshot table")
            offset = first << image.cluster_bits
            await image.check_overlap(offset, clusters << image.cluster_bits)
            await image.file.pwrite(offset, data)
        place = first << image.cluster_bits
        await image.write_metadata(durable=True, everything=True)
        await image.write_header_field(SNAPSHOTS_OFFSET, struct.pack(">IQ", len(snapshots), place))
    except BaseException:
        if first and not image.dead:
            await image.refcounts.give_back([(first, clusters)])
        raise
    header.nb_snapshots, header.snapshots_offset = len(snapshots), place
    image.snapshots = snapshots
    image.overlaps.set_area("snapshot-table", (place, len(data)))
    for start, length in old:
        _free_bytes(image, start, length)
    await place_inactive(image)


def _free_bytes(image: Image, offset: int, length: int) -> None:
    first = offset >> image.cluster_bits
    if length:
        image.free(first, (offset + length - 1 >> image.cluster_bits) - first + 1, "snapshot")


async def _write_l1(image: Image, entries: Iterable[int], size: int) -> Run:
    """Write an L1 table of `size` entries, its copied flags cleared, to new clusters. Raises OSError."""
    table = zero_entries(size)
    for index, entry in enumerate(entries):
        table[index] = entry & ~COPIED
    clusters = max(-(-size * ENTRY_SIZE // image.cluster_size), 1)
    first = await image.refcounts.allocate_run(clusters, "L1 table")
    try:
        offset = first << image.cluster_bits
        await image.check_overlap(offset, clusters << image.cluster_bits)
        await image.file.pwrite(offset, pack_entries(table))
    except BaseException:
        if not image.dead:
            await image.refcounts.give_back([(first, clusters)])
        raise
    return first, clusters


async def _snapshot_l1(image: Image, snapshot: Snapshot) -> array[int]:
    """Return the L1 table of a snapshot. Raises OSError if its place or size cannot be."""
    if snapshot.l1_size > MAX_L1_BYTES // ENTRY_SIZE:
        raise OSError(errno.EFBIG, "the snapshot's L1 table is too large")
    if snapshot.l1_table_offset & image.cluster_size - 1:
        raise OSError(errno.EINVAL, "the snapshot's L1 table has no proper place")
    return await image.read_table(snapshot.l1_table_offset, snapshot.l1_size)


# --- the three changes ----------------------------------------------------------------------------


async def create_snapshot(image: Image, name: str, *, vm_clock: int = 0, icount: int | None = 0) -> Snapshot:
    """Add a snapshot of what the disk shows now, under the next free number. Raises OSError.

    vm_clock   nanoseconds the machine had run     icount  instructions it had executed
    """
    _refuse_data_file(image)
    header = image.header
    if header.nb_snapshots >= MAX_SNAPSHOTS:
        raise OSError(errno.EFBIG, "there are too many snapshots")
    numbers = [int(one.identifier) for one in image.snapshots if one.identifier.isdecimal()]
    identifier = str(max(numbers, default=0) + 1)
    encoded = name.encode("utf-8", "surrogateescape")[:MAX_NAME]
    now = time.time_ns()
    taken: list[Run] = []
    async with _changing(image):
        try:
            taken.append(await _write_l1(image, image.l1[: header.l1_size], header.l1_size))
            await _refer(image, image.l1, taken)
            await _refresh_copied(image)
            snapshot = Snapshot(
                l1_table_offset=taken[0][0] << image.cluster_bits,
                l1_size=header.l1_size,
                identifier=identifier,
                name=encoded.decode("utf-8", "replace"),
                date_sec=now // 1_000_000_000 & 0xFFFF_FFFF,
                date_nsec=now // 1000 % 1_000_000 * 1000,
                vm_clock_nsec=vm_clock,
                vm_state_size=0,
                disk_size=header.size,
                icount=icount,
                encoded=(identifier.encode(), encoded),
            )
            await write_list(image, [*image.snapshots, snapshot])
        except BaseException:
            if not image.dead:
                await image.refcounts.give_back(taken)
                await _refresh_copied(image)
            raise
    return snapshot


async def delete_snapshot(image: Image, snapshot: Snapshot) -> None:
    """Forget a snapshot. Raises OSError; after the list is written, a failure only leaves clusters in use."""
    _refuse_data_file(image)
    async with _changing(image):
        l1 = await _snapshot_l1(image, snapshot)
        await write_list(image, [one for one in image.snapshots if one is not snapshot])
        _free_bytes(image, snapshot.l1_table_offset, snapshot.l1_size * ENTRY_SIZE)
        await _unrefer(image, l1)
        await _refresh_copied(image)


async def apply_snapshot(image: Image, snapshot: Snapshot) -> int:
    """Make the disk show what it did when the snapshot was made; return its size in bytes.

    Raises CommandError, OSError; then the disk shows what it did before.
    """
    _refuse_data_file(image)
    header = image.header
    size = header.size if snapshot.disk_size is None else snapshot.disk_size
    if size != header.size and header.version < 3:
        raise CommandError("Can't resize a v2 image which has snapshots")
    entries = max(snapshot.l1_size, header.l1_entries_for(size))
    if entries * ENTRY_SIZE > MAX_L1_BYTES:
        raise OSError(errno.EFBIG, "the L1 table would be too large")
    taken: list[Run] = []
    async with _changing(image):
        old_l1, old_place, old_size = list(image.l1), header.l1_table_offset, header.l1_size
        try:
            l1 = await _snapshot_l1(image, snapshot)
            await _refer(image, l1, taken)
            run = await _write_l1(image, l1, entries)
            taken.append(run)
            await image.write_metadata(durable=True, everything=True)
            place = run[0] << image.cluster_bits
            fields = struct.pack(">QIIQ", size, header.crypt_method, entries, place)
            await image.write_header_field(SIZE_OFFSET, fields)
        except BaseException:
            if not image.dead:
                await image.refcounts.give_back(taken)
            raise
        header.size, header.l1_size, header.l1_table_offset = size, entries, place
        table = zero_entries(entries)
        for index, entry in enumerate(l1):
            table[index] = entry & ~COPIED
        image.l1 = table
        image.l2.clear()
        image.place_metadata()
        _free_bytes(image, old_place, old_size * ENTRY_SIZE)
        await _unrefer(image, old_l1)
        await _refresh_copied(image)
    return size


# --- by the words of the tools --------------------------------------------------------------------


async def apply_named(image: Image, node: BlockNode, tag: str) -> int:
    """Apply the snapshot that `tag` is the id or the name of; return the size. Raises CommandError."""
    if node.dirty_bitmaps:
        raise CommandError("Device has active dirty bitmaps")
    if image.external:
        raise CommandError("Failed to load snapshot: Operation not supported")
    found = find_snapshot(image, tag, None) or find_snapshot(image, None, tag)
    if found is None:
        raise CommandError("Failed to load snapshot: No such file or directory")
    return await apply_snapshot(image, found)


async def show_snapshot(image: Image, identifier: str, name: str) -> None:
    """Have an image that is open to be read show a snapshot in place of the disk. Raises OSError."""
    assert not image.writable
    found = find_snapshot(image, identifier, name)
    if found is None:
        raise OSError(errno.ENOENT, "no such snapshot")
    image.l1 = await _snapshot_l1(image, found)
    image.l2.clear()


async def delete_named(image: Image, name: str, identifier: str | None) -> None:
    """Delete the first snapshot of that name, and id unless it is None. Raises CommandError, OSError."""
    found = find_snapshot(image, identifier, name)
    if found is None:
        raise CommandError("snapshot not found")
    await delete_snapshot(image, found)
