"""Clusters of a qcow2 image that are holes in its file: after preallocation of the tables alone, most are.

The tables call such clusters data. Who asks what lies where wants to know that they read as zeroes, so the file is
looked into, but only if the image looks as if it had been preallocated: one look costs a system call per stretch.
Rule: QEMU block/qcow2-refcount.c, qcow2_detect_metadata_preallocation; block/io.c, BDRV_BLOCK_RECURSE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpd.block.node import Extent

if TYPE_CHECKING:
    from qmpd.drivers._qcow2_image import Image


async def looks_preallocated(image: Image) -> bool:
    """Say whether clearly more clusters are in use than the file has room for on the host.

    Clearly: by a ninth of those there is room for, and by two. False where the host does not tell, or where the
    refcounts cannot be read.
    """
    taken = image.file.node.allocated_size()
    if taken is None:
        return False
    real = taken // image.cluster_size
    threshold = max(real * 10 // 9, real + 2)
    clusters = -(-image.file.size // image.cluster_size)
    if clusters < threshold:
        return False
    try:
        return await image.refcounts.count_used(clusters, threshold) >= threshold
    except OSError:
        return False


async def with_holes(image: Image, offset: int, length: int, host: int) -> list[Extent]:
    """Return what guest bytes [offset, offset + length) are, data that lies at `host` in one piece.

    What the file cannot tell counts as data that is no hole.
    """
    file = image.data.node
    there = max(min(length, image.data.size - host), 0)
    found: list[Extent] = []
    try:
        below = await image.data.block_status(host, there) if there else ()
    except OSError:
        return [Extent(offset, length, data=True, zero=False, host=host, file=file)]
    for one in below:
        at = offset + one.offset - host
        found.append(Extent(at, one.length, data=True, zero=one.zero, host=one.offset, file=file))
    if there < length:
        found.append(Extent(offset + there, length - there, data=True, zero=True, host=host + there, file=file))
    return found
