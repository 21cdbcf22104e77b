"""Persistent dirty bitmaps of a qcow2 image: loaded when it is opened, stored when it is closed.

While the image is open for writing, its directory says of every bitmap that it is in use: what is
stored then is old. Storing writes new data, tables and directory into fresh clusters, makes them
durable, and only then lets the header name them; what they replace is freed after that. So a
crash leaves the old directory, whose bitmaps count as inconsistent, or the new one, and leaked
clusters at most. Model: block/qcow2-bitmap.c of QEMU.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

from qmpd.block import dirty_bitmap
from qmpd.errors import CommandError
from qmpd.formats.qcow2 import ENTRY_SIZE, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, pack_entries, zero_entries
from qmpd.formats.qcow2_header import AUTOCLEAR_OFFSET, BITMAPS, BitmapsExtension
from qmpd.formats.qcow2_snapshot import (
    BITMAP_ALL_ONES,
    BITMAP_AUTO,
    BITMAP_ENTRY_OFFSET,
    BITMAP_IN_USE,
    MAX_BITMAP_BYTES,
    StoredBitmap,
    bitmap_entry_valid,
    pack_bitmap_directory,
)
from qmpd.units import KiB, align_up

if TYPE_CHECKING:
    from qmpd.block.dirty_bitmap import DirtyBitmap
    from qmpd.block.node import BlockNode
    from qmpd.drivers._qcow2_image import Image

MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31
BACKING_OFFSET = 8
"""Where the header says at which byte the name of the backing file is."""

HEADER_ROOM = 64 * KiB
"""Bytes of the first cluster that are written with a new header."""

Run = tuple[int, int]
"""First host cluster, clusters."""


# --- loading --------------------------------------------------------------------------------------


async def load_bitmaps(image: Image, node: BlockNode) -> None:
    """Give `node` the bitmaps of the image; in a writable one they count as in use from now on.

    Raises CommandError, OSError; the node then has none.
    """
    seen: set[int] = set()
    try:
        for entry in image.bitmaps:
            bitmap = dirty_bitmap.create(node, entry.name, 1 << entry.granularity_bits)
            bitmap.persistent = True
            bitmap.enabled = bool(entry.flags & BITMAP_AUTO) and not entry.flags & BITMAP_IN_USE
            bitmap.inconsistent = bool(entry.flags & BITMAP_IN_USE)
            bitmap.readonly = not image.writable
            if not bitmap.inconsistent:
                await _load_bits(image, entry, bitmap, seen)
        await image.outdate_bitmaps()
    except BaseException:
        node.dirty_bitmaps.clear()
        raise


async def _load_bits(image: Image, entry: StoredBitmap, bitmap: DirtyBitmap, seen: set[int]) -> None:
    """Read the bits of one bitmap; `seen` holds the clusters that others have, so that none is read twice."""
    try:
        table = await _read_table(image, entry)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        text = f"Could not read bitmap_table table from image for bitmap '{entry.name}': {reason}"
        raise CommandError(text) from error
    try:
        if entry.table_size != _table_size(image, bitmap.size, bitmap.granularity):
            raise OSError(errno.EINVAL, "the table has the wrong size")
        covered = image.cluster_size * 8 * bitmap.granularity
        for index, value in enumerate(table):
            if value == BITMAP_ALL_ONES:
                bitmap.set(index * covered, covered)
            elif value:
                if value in seen:
                    raise OSError(errno.EINVAL, "a cluster is used twice")
                seen.add(value)
                length = min(image.cluster_size, bitmap.serialized_length - index * image.cluster_size)
                bitmap.load(index * covered, await image.read_metadata(value, length))
    except OSError as error:
        raise CommandError(
            f"Could not read bitmap '{entry.name}' from image: {os.strerror(error.errno or errno.EIO)}"
        ) from error


async def _read_table(image: Image, entry: StoredBitmap) -> list[int]:
    """Return the table of a stored bitmap. Raises OSError(EINVAL) if it breaks the format."""
    if entry.table_offset >= 1 << 63:
        raise OSError(errno.EIO, "no file reaches that far")
    table = await image.read_table(entry.table_offset, entry.table_size)
    if not all(bitmap_entry_valid(value, image.cluster_size) for value in table):
        raise OSError(errno.EINVAL, "an entry of the table is invalid")
    return list(table)


def _table_size(image: Image, size: int, granularity: int) -> int:
    """Return the entries that the table of a bitmap needs for `size` bytes of disk."""
    return -(-(-(-size // granularity) + 7 >> 3) // image.cluster_size)


# --- storing --------------------------------------------------------------------------------------


async def store_bitmaps(image: Image, node: BlockNode) -> None:
    """Write the persistent bitmaps of `node`, which no request uses. Raises CommandError, OSError."""
    wanted = [
        one for one in node.dirty_bitmaps if one.persistent and not one.inconsistent and not one.readonly and one.name
    ]
    if not wanted or not image.writable or image.dead:
        return
    entries = list(image.bitmaps)
    replaced: list[StoredBitmap] = []
    taken: list[Run] = []
    async with image.lock:
        await image.before_change()
        try:
            for bitmap in wanted:
                assert bitmap.name is not None
                entry = await _store_bits(image, bitmap, taken)
                at = next((at for at, one in enumerate(entries) if one.name == bitmap.name), None)
                if at is None:
                    entries.append(entry)
                else:
                    replaced.append(entries[at])
                    entries[at] = entry._replace(encoded=entries[at].encoded)
            await _write_directory(image, entries)
        except BaseException:
            if not image.dead:
                await image.refcounts.give_back(taken)
            raise
        for one in replaced:
            await _free_bitmap(image, one)


async def _store_bits(image: Image, bitmap: DirtyBitmap, taken: list[Run]) -> StoredBitmap:
    """Write the data and the table of a bitmap into new clusters, noted in `taken`; return its entry."""
    assert bitmap.name is not None
    covered = image.cluster_size * 8 * bitmap.granularity
    table = zero_entries(_table_size(image, bitmap.size, bitmap.granularity))
    for offset, length in bitmap.dirty_areas():
        for index in range(offset // covered, (offset + length - 1) // covered + 1):
            if not table[index]:
                host = await _take(image, 1, "bitmap data", taken)
                await image.file.pwrite(host, bitmap.serialize(index * covered, image.cluster_size))
                table[index] = host
    clusters = max(-(-len(table) * ENTRY_SIZE // image.cluster_size), 1)
    place = await _take(image, clusters, "bitmap table", taken)
    await image.file.pwrite(place, pack_entries(table))
    flags = BITMAP_AUTO if bitmap.enabled else 0
    bits = bitmap.granularity.bit_length() - 1
    encoded = bitmap.name.encode("utf-8", "surrogateescape")
    return StoredBitmap(0, place, len(table), flags, bits, bitmap.name, encoded)


async def _take(image: Image, clusters: int, what: str, taken: list[Run]) -> int:
    """Take neighbouring clusters; return the host offset of the first. Raises OSError."""
    first = await image.refcounts.allocate_run(clusters, what)
    taken.append((first, clusters))
    await image.check_overlap(first << image.cluster_bits, clusters << image.cluster_bits)
    return first << image.cluster_bits


async def _write_directory(image: Image, entries: list[StoredBitmap]) -> None:
    """Make `entries` the bitmaps of the image, durably. Called under the lock. Raises CommandError, OSError."""
    header = image.header
    before = header.bitmaps, list(header.extensions), header.autoclear
    data, placed = pack_bitmap_directory(entries)
    taken: list[Run] = []
    try:
        place = None
        if entries:
            clusters = -(-len(data) // image.cluster_size)
            offset = await _take(image, clusters, "bitmap directory", taken)
            await image.file.pwrite(offset, data)
            place = BitmapsExtension(len(entries), len(data), offset)
        header.place_bitmaps(place)
        await image.write_metadata(durable=True, everything=True)
        await _write_header(image, valid=bool(entries))
    except BaseException:
        header.bitmaps, header.extensions, header.autoclear = before
        if not image.dead:
            await image.refcounts.give_back(taken)
        raise
    image.bitmaps = placed
    image.overlaps.set_area("bitmap-directory")
    if place is not None:
        image.overlaps.set_area("bitmap-directory", (place.directory_offset, place.directory_size))
    if before[0] is not None:
        _free_bytes(image, before[0].directory_offset, before[0].directory_size)


async def _write_header(image: Image, *, valid: bool) -> None:
    """Write the header with its bitmaps extension, so that each sector may come before or after the others.

    While it is written, the feature bit says that the extension is not to be believed, and the name
    of the backing file lies, once more, where neither the old nor the new extensions reach.
    valid   there are bitmaps: the bit is set at the end
    Raises CommandError, OSError.
    """
    header = image.header
    room = min(header.cluster_size, HEADER_ROOM)
    name, old_place = header.backing_file, header.backing_file_offset
    header.autoclear &= ~BITMAPS
    data = header.pack()
    await image.write_header_field(AUTOCLEAR_OFFSET, struct.pack(">Q", header.autoclear))
    if name and header.backing_file_offset != old_place:
        place = align_up(max(old_place + len(name), len(data)), 8)
        if place + len(name) <= room:
            await image.write_header_field(place, name)
            await image.write_header_field(BACKING_OFFSET, struct.pack(">Q", place))
            extensions = data[BACKING_OFFSET + 8 : header.backing_file_offset]
            data = data[:BACKING_OFFSET] + struct.pack(">Q", place) + extensions
            data = data.ljust(place, b"\0") + name
            header.backing_file_offset = place
    await image.write_header_field(0, data.ljust(room, b"\0"))
    if valid:
        await image.write_header_field(AUTOCLEAR_OFFSET, struct.pack(">Q", header.autoclear | BITMAPS))
        header.autoclear |= BITMAPS


def _free_bytes(image: Image, offset: int, length: int) -> None:
    first = offset >> image.cluster_bits
    if length:
        image.free(first, (offset + length - 1 >> image.cluster_bits) - first + 1, "other")


async def _free_bitmap(image: Image, entry: StoredBitmap) -> None:
    """Give up the clusters of a bitmap that the directory names no more; an unreadable table leaks its data."""
    try:
        table = await _read_table(image, entry)
    except OSError:
        table = []
    for value in table:
        if value & BITMAP_ENTRY_OFFSET:
            image.free(value >> image.cluster_bits, 1, "other")
    _free_bytes(image, entry.table_offset, entry.table_size * ENTRY_SIZE)


async def remove_bitmap(image: Image, name: str) -> None:
    """Take the bitmap `name` out of the image, if it is there. Raises CommandError."""
    found = next((one for one in image.bitmaps if one.name == name), None)
    if found is None:
        return
    try:
        async with image.lock:
            await image.before_change()
            await _write_directory(image, [one for one in image.bitmaps if one is not found])
            await _free_bitmap(image, found)
        await image.write_metadata(durable=True)
    except OSError as error:
        raise CommandError(
            f"Failed to remove bitmap '{name}' from the image: {os.strerror(error.errno or errno.EIO)}"
        ) from error


# --- checks ---------------------------------------------------------------------------------------


def check_storing(image: Image, node: BlockNode, name: str, granularity: int) -> None:
    """Refuse a further persistent bitmap that the format has no place for. Raises CommandError."""
    try:
        if image.header.version < 3:
            raise CommandError("Cannot store dirty bitmaps in qcow2 v2 files")
        bits = granularity.bit_length() - 1
        if bits > MAX_GRANULARITY_BITS:
            raise CommandError(f"Granularity exceeds maximum ({1 << MAX_GRANULARITY_BITS} bytes)")
        length = len(name.encode("utf-8", "surrogateescape"))
        if length > dirty_bitmap.MAX_NAME:
            raise CommandError(f"Name length exceeds maximum ({dirty_bitmap.MAX_NAME} characters)")
        if _table_size(image, node.size, granularity) * image.cluster_size > MAX_BITMAP_BYTES:
            raise CommandError("Too much space will be occupied by the bitmap. Use larger granularity")
        kept = [one.name for one in node.dirty_bitmaps if one.persistent and one.name] + [name]
        if len(kept) > MAX_BITMAPS:
            raise CommandError("Maximum number of persistent bitmaps is already reached")
        if sum(32 + len(one.encode("utf-8", "surrogateescape")) for one in kept) > MAX_BITMAP_DIRECTORY_BYTES:
            raise CommandError("Not enough space in the bitmap directory")
    except CommandError as error:
        raise CommandError(f"Can't make bitmap '{name}' persistent in '{node.name}': {error}") from error


def check_resizable(image: Image, node: BlockNode) -> None:
    """Refuse a new size where stored bitmaps cannot follow. Raises CommandError."""
    for entry in image.bitmaps:
        bitmap = next((one for one in node.dirty_bitmaps if one.name == entry.name), None)
        if bitmap is None:
            raise CommandError("Cannot resize qcow2 with persistent bitmaps that were not loaded into memory")
        bitmap.check()
