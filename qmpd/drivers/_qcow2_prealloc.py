"""Clusters for a part of the guest disk before anything is written to it: growing a qcow2 image with preallocation.

The clusters are zeroed before they are linked, so the part reads as zeroes whatever was in the file there.
Model: preallocate_co (QEMU block/qcow2.c).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from qmpd.drivers._qcow2_image import Corruption, Image
from qmpd.drivers._qcow2_map import host_of
from qmpd.drivers._qcow2_write import set_entry, writable_slice
from qmpd.formats.qcow2 import ALL_ALLOCATED, COMPRESSED, COPIED, OFFSET_MASK, ZERO
from qmpd.units import MiB, align_down, align_up

if TYPE_CHECKING:
    from qmpd.drivers._qcow2_map import Place

_CHUNK = 1 * MiB


async def preallocate(image: Image, start: int, end: int, mode: str) -> None:
    """Give every cluster of [start, end) that has none a place in the file. No request uses the node.

    mode   metadata: the place may be a hole; falloc: it has its space; full: zeroes are written
    Whether an external data file has its space is for the caller to see to.
    Raises OSError, CommandError; what has been given a place keeps it.
    """
    span = 1 << image.cluster_bits + image.slice_bits
    at = align_down(start, image.cluster_size)
    try:
        while at < end:
            stop = min(align_up(end, image.cluster_size), align_down(at, span) + span)
            async with image.lock:
                await image.before_change()
                await _fill_slice(image, at, stop, mode)
            at = stop
            if image.crowded:
                await image.write_metadata()
    except Corruption as found:
        raise OSError(await image.fail(found), found.text) from found


async def _fill_slice(image: Image, start: int, stop: int, mode: str) -> None:
    place = await writable_slice(image, start)
    first, count = place.index, stop - start >> image.cluster_bits
    if image.external:
        for number in range(count):
            entry = place.slice.table[first + number]
            if not entry & COMPRESSED and host_of(image, entry) < 0:
                _set(image, place, first + number, start + (number << image.cluster_bits))
        return
    wanted = [at for at in range(first, first + count) if not place.slice.table[at] & (COMPRESSED | OFFSET_MASK)]
    runs = await image.refcounts.allocate(len(wanted)) if wanted else []
    try:
        for cluster, length in runs:
            await _zero(image, cluster << image.cluster_bits, length << image.cluster_bits, mode)
        place = await writable_slice(image, start)
    except BaseException:
        if not image.dead:
            await image.refcounts.give_back(runs)
        raise
    hosts = (cluster for first, length in runs for cluster in range(first, first + length))
    for at, cluster in zip(wanted, hosts, strict=True):
        _set(image, place, at, cluster << image.cluster_bits)


def _set(image: Image, place: Place, index: int, host: int) -> None:
    place.index = index
    table = place.slice.table
    bitmap = table[image.bitmaps_at + index] if image.extended else 0
    if image.raw:
        bitmap = ALL_ALLOCATED
    set_entry(image, place, host | COPIED | table[index] & ZERO, bitmap)


async def _zero(image: Image, offset: int, length: int, mode: str) -> None:
    await image.check_overlap(offset, length)
    end = offset + length
    if mode == "full":
        zeroes = memoryview(bytes(min(_CHUNK, length)))
        while offset < end:
            await image.file.pwrite(offset, zeroes[: end - offset])
            offset += _CHUNK
        return
    inside = min(end, image.file.size)
    if offset < inside:
        await image.file.pwrite_zeroes(offset, inside - offset)
    if end > image.file.size:
        try:
            await image.file.node.truncate(end, preallocation="falloc" if mode == "falloc" else "off")
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            if mode == "falloc":
                await image.file.pwrite_zeroes(offset, length)
            else:
                await image.file.pwrite_zeroes(end - 512, 512)
