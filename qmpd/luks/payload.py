"""Writing through a cipher: what is encrypted goes out by way of bounce buffers, a piece at a time.

Shared by the luks driver and by encrypted qcow2 images.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

from qmpd.aio.pool import BufferPool
from qmpd.block.batch import Batch, Request
from qmpd.crypto.block import BlockCrypto
from qmpd.luks.work import transform
from qmpd.units import MiB

WRITE_CHUNK = 1 * MiB
"""Bytes that are encrypted before they are handed down together."""

POOL_CAP = 8 * MiB
"""Bytes of idle bounce buffers a node keeps."""


async def write_encrypted(
    crypto: BlockCrypto,
    buffers: BufferPool,
    batch: Batch,
    write: Callable[[Batch], Awaitable[None]],
    *,
    shift: int = 0,
    numbered: Callable[[Batch], Batch] | None = None,
) -> None:
    """Encrypt the requests of a batch, about WRITE_CHUNK at a time, and hand the ciphertext to `write`.

    shift     bytes added to the offsets that `write` sees, after they have numbered the sectors
    numbered  returns a batch of the same views at the offsets that number the sectors, where that
              are not the requests' own
    Errors are marked on the requests.
    """
    for group in chunks(batch):
        buffer = buffers.take(group.total)
        try:
            spans = crypto.onto(group if numbered is None else numbered(group), buffer.view)
            await transform(crypto.encrypt, spans)
            lower = Batch(
                Request(request.offset + shift, memoryview(target), request)
                for request, (_, _, target) in zip(group, spans, strict=True)
            )
            try:
                await write(lower)
            except OSError as error:
                lower.fail(error.errno or errno.EIO)
        finally:
            buffer.release()


def chunks(batch: Batch) -> list[Batch]:
    """Cut a batch into parts of at most WRITE_CHUNK bytes; a cut request becomes several."""
    if batch.total <= WRITE_CHUNK:
        return [batch]
    groups: list[Batch] = []
    current, room = Batch(), WRITE_CHUNK
    for request in batch:
        at, length = 0, len(request.view)
        while at < length:
            now = min(room, length - at)
            whole = now == length
            current.append(request if whole else request.part(request.offset + at, at, now))
            at += now
            room -= now
            if not room:
                groups.append(current)
                current, room = Batch(), WRITE_CHUNK
    if current:
        groups.append(current)
    return groups
