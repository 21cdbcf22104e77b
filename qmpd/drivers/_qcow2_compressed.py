"""Compressed guest writes to a qcow2 image: whole clusters, packed one after the other into host clusters.

Clusters are compressed by worker threads, several at once; room is taken for all of them under the lock, in
the order of the disk, so that neighbours lie next to each other and are written by one request. What does not
get smaller is written as it is. What the new clusters replace is freed by the next write of the metadata.
Model: qcow2_co_pwritev_compressed_part (QEMU block/qcow2.c), qcow2_alloc_bytes (block/qcow2-refcount.c).
"""

from __future__ import annotations

import asyncio
import errno
from functools import partial
from typing import TYPE_CHECKING

from qmpd.aio.pool import in_work_thread
from qmpd.block.batch import Batch, Request
from qmpd.drivers._qcow2_image import Corruption, Image
from qmpd.drivers._qcow2_write import free_entry, owned_ranges, set_entry, writable_slice, write_batch
from qmpd.formats.qcow2 import compressed_entry
from qmpd.formats.qcow2_compress import compress
from qmpd.units import MiB

if TYPE_CHECKING:
    from qmpd.block.child import Child

AT_ONCE = 4 * MiB
"""Bytes of guest data compressed before what came out is written; at least one cluster."""


class Packed:
    """A guest cluster, compressed: `data` is what goes to `host`, None if it did not get smaller."""

    __slots__ = ("data", "guest", "host", "request", "view")

    def __init__(self, request: Request, guest: int, view: memoryview) -> None:
        self.request, self.guest, self.view = request, guest, view
        self.data: bytes | None = None
        self.host = 0


async def write_compressed(image: Image, batch: Batch, backing: Child | None, size: int) -> None:
    """Write every view of the batch compressed; errors are marked on the requests.

    size   bytes of the guest disk: only its last cluster may be written in part, and is filled with zeroes.
           A request that is not made of whole clusters fails with EINVAL
    """
    if image.encryption is not None or image.external:
        batch.fail(errno.ENOTSUP)
        return
    if image.bitmaps_fresh:
        await image.outdate_bitmaps()
    clusters: dict[int, Packed] = {}
    for request in batch:
        mask = image.cluster_size - 1
        if request.offset & mask or (request.end & mask and request.end != size):
            request.fail(errno.EINVAL)
            continue
        for at in range(0, len(request.view), image.cluster_size):
            guest = request.offset + at
            clusters[guest] = Packed(request, guest, request.view[at : at + image.cluster_size])
    todo = [clusters[guest] for guest in sorted(clusters)]
    step = max(AT_ONCE >> image.cluster_bits, 1)
    for first in range(0, len(todo), step):
        await _write_some(image, todo[first : first + step], backing, size)


async def _write_some(image: Image, clusters: list[Packed], backing: Child | None, size: int) -> None:
    kind, full = image.header.compression_type, image.cluster_size

    def work(view: memoryview) -> bytes | None:
        data = view if len(view) == full else bytes(view).ljust(full, b"\0")
        return compress(kind, data, full - 1)

    results = await asyncio.gather(*(in_work_thread(partial(work, one.view)) for one in clusters))
    for one, data in zip(clusters, results, strict=True):
        one.data = data
    plain = Batch(Request(one.guest, one.view, one.request) for one in clusters if one.data is None)
    packed = [one for one in clusters if one.data is not None]
    if packed:
        await _store(image, packed)
    if plain:
        await write_batch(image, plain, backing, size)
    elif image.crowded and not image.dead:
        await image.write_metadata()


async def _store(image: Image, clusters: list[Packed]) -> None:
    mine = await image.owned.acquire(owned_ranges([one.guest for one in clusters], image.cluster_size))
    try:
        generation = image.enter()
        try:
            placed = await _place(image, clusters)
            written = await _write(image, placed)
            await _link(image, written)
        finally:
            image.leave(generation)
    finally:
        image.owned.release(mine)


async def _place(image: Image, clusters: list[Packed]) -> list[Packed]:
    """Take room in the file; return those that got it."""
    placed: list[Packed] = []
    async with image.lock:
        for one in clusters:
            assert one.data is not None
            try:
                if image.dead:
                    raise OSError(errno.ENOMEDIUM, "the image is corrupt")
                await image.before_change()
                one.host = await image.refcounts.allocate_bytes(len(one.data))
            except OSError as error:
                one.request.fail(error.errno or errno.EIO)
            else:
                placed.append(one)
    return placed


async def _write(image: Image, clusters: list[Packed]) -> list[Packed]:
    """Write the compressed data, neighbours joined; return what is written."""
    runs: list[list[Packed]] = []
    for one in clusters:
        last = runs[-1][-1] if runs else None
        if last is not None and last.data is not None and last.host + len(last.data) == one.host:
            runs[-1].append(one)
        else:
            runs.append([one])
    batch = Batch()
    for run in runs:
        data = b"".join(one.data or b"" for one in run)
        request = Request(run[0].host, memoryview(data))
        try:
            await image.check_overlap(request.offset, len(data))
        except OSError as error:
            request.fail(error.errno or errno.EIO)
        batch.append(request)
    image.file.debug_event("write_compressed")
    good = Batch(request for request in batch if not request.error)
    if good:
        try:
            await image.file.pwritev(good)
        except OSError as error:
            good.fail(error.errno or errno.EIO)
    written: list[Packed] = []
    for run, request in zip(runs, batch, strict=True):
        if not request.error:
            written.extend(run)
            continue
        for one in run:
            one.request.fail(request.error)
        await _give_back(image, run)
    return written


async def _link(image: Image, clusters: list[Packed]) -> None:
    """Let the L2 entries name the compressed data, which is written."""
    lost: list[Packed] = []
    async with image.lock:
        for one in clusters:
            assert one.data is not None
            try:
                if image.dead:
                    raise OSError(errno.ENOMEDIUM, "the image is corrupt")
                place = await writable_slice(image, one.guest)
            except Corruption as found:
                one.request.fail(await image.fail(found))
                lost.append(one)
            except OSError as error:
                one.request.fail(error.errno or errno.EIO)
                lost.append(one)
            else:
                old = place.slice.table[place.index]
                set_entry(image, place, compressed_entry(one.host, len(one.data), image.cluster_bits), 0)
                free_entry(image, old, "other")
    if lost:
        await _give_back(image, lost)


async def _give_back(image: Image, clusters: list[Packed]) -> None:
    """Take back the references of data that will not be linked."""
    if image.dead:
        return
    async with image.lock:
        for one in clusters:
            assert one.data is not None
            first = one.host >> image.cluster_bits
            last = one.host + len(one.data) - 1 >> image.cluster_bits
            await image.refcounts.give_back([(first, last - first + 1)])
