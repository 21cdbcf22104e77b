"""Changing the version of a qcow2 image and the width of its reference counts, while nobody uses it.

Model: qcow2_amend_options, qcow2_downgrade (QEMU block/qcow2.c), qcow2_change_refcount_order
(block/qcow2-refcount.c); texts as the reference.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from qmpd.block.batch import Batch
from qmpd.drivers._qcow2_backing import HEADER_ROOM
from qmpd.drivers._qcow2_bitmaps import remove_bitmap
from qmpd.drivers._qcow2_image import Image
from qmpd.drivers._qcow2_map import ZERO_ALLOC, ZERO_PLAIN, map_range
from qmpd.drivers._qcow2_placed import Placed
from qmpd.drivers._qcow2_refcounts import Refcounts
from qmpd.drivers._qcow2_repair import write_table
from qmpd.drivers._qcow2_write import write_batch
from qmpd.drivers._qcow2_zero import _change, _forget
from qmpd.errors import CommandError
from qmpd.formats.qcow2 import (
    COMPRESSED,
    ENTRY_SIZE,
    MAX_REFCOUNT_TABLE_BYTES,
    OFFSET_MASK,
    REFCOUNT_TABLE_MASK,
    ZERO,
    RefcountCodec,
    hex0,
    pack_entries,
    unpack_entries,
    zero_entries,
)
from qmpd.formats.qcow2_header import AUTOCLEAR_OFFSET, DATA_FILE, DATA_FILE_RAW, DIRTY, REFCOUNT_TABLE_OFFSET
from qmpd.units import MiB, align_up, is_power_of_two

if TYPE_CHECKING:
    from qmpd.block.child import Child

REFCOUNT_ORDER_OFFSET = 96
"""Where the width lies in the header (qcow2 specification, "Header"); in one sector with the table's place."""

SECTOR_OF_HEADER = 512
STEP = 1 * MiB
"""Bytes of guest data that are looked at, or zeroed, at a time."""

_UINT32_MAX = (1 << 32) - 1


async def upgrade(image: Image) -> None:
    """Make a version 2 image one of version 3. Raises CommandError, OSError; it is then as it was."""
    await image.flush()
    await _write_version(image, 3)


async def downgrade(image: Image, backing: Child | None, size: int) -> None:
    """Make a version 3 image one of version 2, `size` the bytes of its guest disk.

    What it has no place for, and nothing of the guest's depends on, goes: persistent bitmaps. The caller forgets them.
    Raises CommandError for what version 2 cannot express, OSError.
    """
    header = image.header
    if header.refcount_order != 4:
        raise CommandError("compat=0.10 requires refcount_bits=16")
    if header.incompatible & DATA_FILE:
        raise CommandError("Cannot downgrade an image with a data file")
    for one in image.snapshots:
        if one.vm_state_size > _UINT32_MAX or one.disk_size not in (None, header.size):
            raise CommandError("Internal snapshots prevent downgrade of image")
    left = header.incompatible & ~DIRTY
    if left:
        raise CommandError(f"Cannot downgrade an image with incompatible features {hex0(left)} set")
    for bitmap in list(image.bitmaps):
        await remove_bitmap(image, bitmap.name)
    image.settings.lazy_refcounts = False
    async for start, end in _zeroes(image, size):
        if backing is None:
            await _change(image, start, align_up(end, image.cluster_size), _forget)
        else:
            batch = Batch.single(start, memoryview(bytes(end - start)))
            await write_batch(image, batch, backing, size)
            batch.raise_first()
    async with image.lock:
        await image.write_metadata(everything=True, durable=True)
        await _expand_snapshots(image, backing is not None)
        for _ in range(2):  # what the first one gives back, the second one writes
            await image.write_metadata(everything=True, durable=True)
    if header.incompatible & DIRTY:
        await image.set_incompatible(0)
    await _write_version(image, 2)


async def _zeroes(image: Image, size: int) -> AsyncIterator[tuple[int, int]]:
    """Yield the guest ranges (start, end) of zero clusters."""
    for at in range(0, size, STEP):
        for run in await map_range(image, at, min(STEP, size - at)):
            if run.kind in (ZERO_PLAIN, ZERO_ALLOC):
                yield run.offset, run.offset + run.length


async def _expand_snapshots(image: Image, covered: bool) -> None:
    """Take the zero clusters out of the tables of all snapshots; `covered`: there is a backing file.

    A table that several snapshots share is done once, what it refers to counting once for each of them.
    Raises OSError.
    """
    seen: set[int] = set()
    for one in image.snapshots:
        for number, entry in enumerate(await image.read_table(one.l1_table_offset, one.l1_size)):
            offset = entry & OFFSET_MASK
            if offset and offset not in seen:
                seen.add(offset)
                await _expand_table(image, offset, number << image.l2_bits + image.cluster_bits, covered)


async def _expand_table(image: Image, offset: int, guest: int, covered: bool) -> None:
    """Do the table at `offset`, whose first entry stands for guest offset `guest`: zeroes first, then the entries."""
    table = unpack_entries(await image.read_metadata(offset, image.cluster_size))
    references = await image.refcounts.get(offset >> image.cluster_bits)
    zero = [index for index, entry in enumerate(table) if entry & ZERO and not entry & COMPRESSED]
    if not zero:
        return
    freed = [table[index] & OFFSET_MASK for index in zero if table[index] & OFFSET_MASK]
    for index in zero:
        table[index] = 0
        if covered:
            host = await image.refcounts.allocate_run(1, "data cluster")
            await image.refcounts.add(host, 1, references - 1)
            table[index] = host << image.cluster_bits
            await _write_zeroes(image, table[index], guest + (index << image.cluster_bits))
    await image.write_metadata(everything=True, durable=True)
    await write_table(image, offset, table)
    await image.file.flush()
    for host in freed:
        for _ in range(references):
            image.free(host >> image.cluster_bits, 1, "snapshot")


async def _write_zeroes(image: Image, host: int, guest: int) -> None:
    """Make a host cluster read as zeroes to the guest. Raises OSError."""
    await image.check_overlap(host, image.cluster_size)
    if image.encryption is None:
        await image.file.pwrite_zeroes(host, image.cluster_size)
        return
    batch = Batch((Placed(host, guest, memoryview(bytes(image.cluster_size))),))
    await image.encryption.write(image.file, batch)
    batch.raise_first()


async def _write_version(image: Image, version: int) -> None:
    """Write the header anew in that version, without optional features."""
    header = image.header
    before = header.version, header.compatible, header.autoclear, header.unknown_fields
    header.version, header.compatible, header.autoclear = version, 0, 0
    if version == 2:
        header.unknown_fields = b""
    try:
        data = header.pack()
        await image.file.pwrite(0, data.ljust(min(header.cluster_size, HEADER_ROOM), b"\0"))
        await image.file.flush()
    except BaseException:
        header.version, header.compatible, header.autoclear, header.unknown_fields = before
        raise


async def forget_raw(image: Image) -> None:
    """Give up that an external data file is valid as a raw image. Raises OSError."""
    header = image.header
    if header.version >= 3 and header.autoclear & DATA_FILE_RAW:
        bits = header.autoclear & ~DATA_FILE_RAW
        await image.write_header_field(AUTOCLEAR_OFFSET, struct.pack(">Q", bits))
        header.autoclear = bits


# --- reference counts -------------------------------------------------------------------------------


async def change_refcount_bits(image: Image, bits: int) -> None:
    """Give the reference counts another width: new blocks and a new table behind all that is there.

    The header is switched to them by the write of one sector; before it a crash leaves what was
    written as garbage behind the end. Raises CommandError, OSError.
    """
    if not is_power_of_two(bits) or bits > 64:
        raise CommandError("Refcount width must be a power of two and may not exceed 64 bits")
    header = image.header
    if bits == 1 << header.refcount_order:
        return
    if header.version < 3:
        raise CommandError(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
        )
    async with image.lock:
        for _ in range(2):  # what the first one gives back, the second one writes
            await image.write_metadata(everything=True, durable=True)
        order = bits.bit_length() - 1
        place, clusters, table = await _write_structure(image, order)
        await image.file.flush()
        sector = await image.file.pread(0, SECTOR_OF_HEADER)
        struct.pack_into(">QI", sector, REFCOUNT_TABLE_OFFSET, place, clusters)
        struct.pack_into(">I", sector, REFCOUNT_ORDER_OFFSET, order)
        await image.write_header_field(0, bytes(sector))
        header.refcount_order = order
        header.refcount_table_offset, header.refcount_table_clusters = place, clusters
        image.refcounts = Refcounts(image, table)
        image.place_metadata()


def _structure(image: Image) -> set[int]:
    """Return the clusters of the refcount table and of the blocks: they are not taken over."""
    bits, header = image.cluster_bits, image.header
    first = header.refcount_table_offset >> bits
    found = set(range(first, first + header.refcount_table_clusters))
    found |= {(entry & REFCOUNT_TABLE_MASK) >> bits for entry in image.refcounts.table if entry & REFCOUNT_TABLE_MASK}
    return found


async def _write_structure(image: Image, order: int) -> tuple[int, int, array[int]]:
    """Write blocks and table of the new width; return the table's offset, its clusters, and its entries."""
    codec = RefcountCodec(order)
    block_bits = image.cluster_bits + 3 - order
    structure = _structure(image)
    blocks: set[int] = set()
    end = max(structure, default=0) + 1
    async for cluster, value in image.refcounts.stored():
        if cluster in structure:
            continue
        if value > codec.maximum:
            raise CommandError(
                f"Cannot decrease refcount entry width to {1 << order} bits: Cluster at offset"
                f" {hex0(cluster << image.cluster_bits)} has a refcount of {value}"
            )
        blocks.add(cluster >> block_bits)
        end = max(end, cluster + 1)
    start = max(end, -(-image.file.size >> image.cluster_bits))
    clusters = 1
    while True:
        needed = len(blocks) + clusters
        blocks |= set(range(start >> block_bits, (start + needed - 1 >> block_bits) + 1))
        wanted = -(-(max(blocks) + 1) * ENTRY_SIZE // image.cluster_size)
        if wanted <= clusters and len(blocks) + clusters == needed:
            break
        clusters = max(wanted, clusters)
    if clusters * image.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
        raise CommandError("Could not change the refcount width: the refcount table would be too large")
    table = zero_entries(clusters * image.cluster_size // ENTRY_SIZE)
    offsets = {block: start + number << image.cluster_bits for number, block in enumerate(sorted(blocks))}
    for block, offset in offsets.items():
        table[block] = offset
    current, values = -1, codec.zeroes(image.cluster_size)
    done: set[int] = set()
    async for cluster, value in _with_new(image, structure, start, needed):
        if cluster >> block_bits != current:
            if current >= 0:
                await image.file.pwrite(offsets[current], codec.pack(values))
            current, values = cluster >> block_bits, codec.zeroes(image.cluster_size)
            done.add(current)
        values[cluster & (1 << block_bits) - 1] = value
    await image.file.pwrite(offsets[current], codec.pack(values))
    assert done == blocks, "every block holds a reference"
    place = start + len(blocks) << image.cluster_bits
    await image.file.pwrite(place, pack_entries(table))
    return place, clusters, table


async def _with_new(image: Image, structure: set[int], start: int, count: int) -> AsyncIterator[tuple[int, int]]:
    """Yield (cluster, references) of what stays, in order, then of the new structure behind it."""
    async for cluster, value in image.refcounts.stored():
        if cluster not in structure:
            yield cluster, value
    for cluster in range(start, start + count):
        yield cluster, 1
