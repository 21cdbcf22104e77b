"""Repairing a qcow2 image: a new refcount structure, copied flags."""

from __future__ import annotations

import errno
import struct
from array import array
from typing import TYPE_CHECKING

from qmpd.drivers._qcow2_refcounts import Refcounts
from qmpd.formats.qcow2 import (
    ENTRY_SIZE,
    MAX_REFCOUNT_TABLE_BYTES,
    REFCOUNT_TABLE_MASK,
    pack_entries,
    zero_entries,
)
from qmpd.formats.qcow2_header import REFCOUNT_TABLE_OFFSET

if TYPE_CHECKING:
    from qmpd.drivers._qcow2_check import Counts
    from qmpd.drivers._qcow2_image import Image


def want_rebuild(image: Image) -> None:
    """Note that the refcount structure itself is damaged."""
    image.refcounts.damaged = True


def rebuild_wanted(image: Image) -> bool:
    """Say whether `want_rebuild` was called since the structure was read."""
    return image.refcounts.damaged


async def rebuild(image: Image, counts: Counts) -> None:
    """Write a new refcount table and blocks after all that is in use, and switch the header to them.

    counts   references to every cluster, those of the old structure included; the old one is
             not touched, so that a crash leaves the image as it was
    Raises OSError.
    """
    header = image.header
    codec = image.refcounts.codec
    _uncount_structure(image, counts)
    used = {cluster: references for cluster, references in counts.used() if references}
    if any(references > codec.maximum for references in used.values()):
        raise OSError(errno.EINVAL, "a cluster has more references than its refcount can hold")
    bits = header.refcount_block_bits
    start = max(counts.end, -(-image.file.size >> header.cluster_bits))
    start = max(
        [start, *((entry >> header.cluster_bits) + 1 for entry in image.refcounts.table if _inside(image, entry))]
    )
    blocks = {cluster >> bits for cluster in used}
    table_clusters = 1
    while True:
        needed = len(blocks) + table_clusters
        blocks |= set(range(start >> bits, (start + needed - 1 >> bits) + 1))
        wanted = -(-(max(blocks) + 1) * ENTRY_SIZE // header.cluster_size)
        if wanted <= table_clusters and len(blocks) + table_clusters == needed:
            break
        table_clusters = max(wanted, table_clusters)
    if table_clusters * header.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
        raise OSError(errno.EFBIG, "the refcount table would be too large")
    for cluster in range(start, start + needed):
        used[cluster] = 1
    by_block: dict[int, list[int]] = {block: [] for block in blocks}
    for cluster in used:
        by_block[cluster >> bits].append(cluster)
    table = zero_entries(table_clusters * header.cluster_size // ENTRY_SIZE)
    for number, block in enumerate(sorted(blocks)):
        values = codec.zeroes(header.cluster_size)
        for cluster in by_block[block]:
            values[cluster & (1 << bits) - 1] = used[cluster]
        offset = start + number << header.cluster_bits
        table[block] = offset
        await image.file.pwrite(offset, codec.pack(values))
    place = start + len(blocks) << header.cluster_bits
    await image.file.pwrite(place, pack_entries(table))
    await image.file.flush()
    await image.write_header_field(REFCOUNT_TABLE_OFFSET, struct.pack(">QI", place, table_clusters))
    header.refcount_table_offset, header.refcount_table_clusters = place, table_clusters
    image.refcounts = Refcounts(image, table)
    image.place_metadata()


def _inside(image: Image, entry: int) -> bool:
    return 0 < entry & REFCOUNT_TABLE_MASK < image.file.size


def _uncount_structure(image: Image, counts: Counts) -> None:
    """Take the references of the old table and blocks out of `counts`."""
    header = image.header
    clusters = range(
        header.refcount_table_offset >> header.cluster_bits,
        (header.refcount_table_offset >> header.cluster_bits) + header.refcount_table_clusters,
    )
    for cluster in clusters:
        if counts.get(cluster):
            counts.add(cluster, -1)
    for entry in image.refcounts.table:
        offset = entry & REFCOUNT_TABLE_MASK
        sound = entry == offset and not offset % header.cluster_size and 0 < offset < image.file.size
        if sound and counts.get(offset >> header.cluster_bits):
            counts.add(offset >> header.cluster_bits, -1)


async def write_table(image: Image, offset: int, table: array[int]) -> None:
    """Write an L2 table back whose flags were mended. Raises OSError."""
    await image.check_overlap(offset, image.cluster_size, "active-l2")
    image.l2.forget(offset, offset + image.cluster_size)
    await image.file.pwrite(offset, pack_entries(table))
