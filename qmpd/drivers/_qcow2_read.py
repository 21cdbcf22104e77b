"""Guest reads of a qcow2 image: one child call per kind for a whole batch."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from qmpd.block.batch import Batch, Request
from qmpd.drivers._qcow2_image import Corruption, Image
from qmpd.drivers._qcow2_map import NORMAL, UNALLOCATED, map_range, plain_host
from qmpd.drivers._qcow2_placed import Placed
from qmpd.formats.qcow2 import ClusterType, compressed_extent
from qmpd.formats.qcow2_compress import decompress

if TYPE_CHECKING:
    from qmpd.block.child import Child

_ZEROES = bytes(1 << 16)


def fill_zero(view: memoryview) -> None:
    """Make a view all zeroes."""
    length = len(view)
    if length <= len(_ZEROES):
        view[:] = _ZEROES[:length]
        return
    for at in range(0, length, len(_ZEROES)):
        part = view[at : at + len(_ZEROES)]
        part[:] = _ZEROES[: len(part)]


async def read_batch(image: Image, batch: Batch, backing: Child | None) -> None:
    """Fill every view of the batch; errors are marked on the requests."""
    generation = image.enter()
    try:
        stored = Batch()
        below = Batch()
        packed: list[tuple[Request, int, int, int, int]] = []
        for request in batch:
            host = plain_host(image, request.offset, len(request.view), 0)
            if host >= 0:
                stored.append(Placed(host, request.offset, request.view, request))
                continue
            try:
                runs = await map_range(image, request.offset, len(request.view))
            except Corruption as found:
                request.fail(await image.fail(found))
                continue
            except OSError as error:
                request.fail(error.errno or errno.EIO)
                continue
            for kind, offset, length, host in runs:
                start = offset - request.offset
                if kind is NORMAL:
                    stored.append(Placed(host, offset, request.view[start : start + length], request))
                elif kind is UNALLOCATED and backing is not None:
                    below.append(request.part(offset, start, length))
                elif kind is ClusterType.COMPRESSED:
                    packed.append((request, host, offset & image.cluster_size - 1, start, length))
                else:
                    fill_zero(request.view[start : start + length])
        if stored:
            await image.read_file(stored)
        if below:
            assert backing is not None
            image.file.debug_event("read_backing_aio")
            await read_backing(backing, below)
        if packed:
            await _read_compressed(image, packed)
    finally:
        image.leave(generation)


async def read_backing(backing: Child, batch: Batch) -> None:
    """Read from the backing node; bytes after its end are zero. Errors are marked."""
    end = backing.size
    inside = Batch()
    for request in batch:
        if request.end <= end:
            inside.append(request)
            continue
        there = max(end - request.offset, 0)
        fill_zero(request.view[there:])
        if there:
            inside.append(request.part(request.offset, 0, there))
    if not inside:
        return
    try:
        await backing.preadv(inside)
    except OSError as error:
        inside.fail(error.errno or errno.EIO)


async def _read_compressed(image: Image, packed: list[tuple[Request, int, int, int, int]]) -> None:
    """Fill parts of requests from compressed clusters: (request, entry, from, to, length)."""
    clusters: dict[int, bytes] = {}
    for request, entry, within, start, length in packed:
        try:
            if entry not in clusters:
                clusters[entry] = await read_compressed(image, entry)
        except OSError as error:
            request.fail(error.errno or errno.EIO)
            continue
        request.view[start : start + length] = clusters[entry][within : within + length]


async def read_compressed(image: Image, entry: int) -> bytes:
    """Return the bytes of the compressed cluster that an L2 entry names. Raises OSError."""
    offset, length = compressed_extent(entry, image.cluster_bits)
    if offset >= image.file.size:
        raise OSError(errno.EIO, "compressed cluster lies after the end of the file")
    image.file.debug_event("read_compressed")
    data = await image.read_metadata(offset, length)
    try:
        return decompress(image.header.compression_type, data, image.cluster_size)
    except ValueError as error:
        raise OSError(errno.EIO, str(error)) from error
