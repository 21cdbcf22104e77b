"""A node as a virtio disk: what each request of a driver does to its backend.

The driver can change its memory at any time, so data goes through buffers of our own: what is written is read
once, and ciphertext that is being decrypted is never where the driver sees it. Runs on the data loop.
Model: QEMU block/export/virtio-blk-handler.c.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from qmpd.aio.pool import BufferPool
from qmpd.block.backend import BlockBackend
from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.batch import Request as Piece
from qmpd.protocols.virtio_blk import (
    HEADER,
    ID_SIZE,
    MAX_DISCARD_SECTORS,
    SECTOR,
    SEGMENT,
    UNMAP,
    WCE_OFFSET,
    Feature,
    Segment,
    Status,
    Type,
    config_space,
)
from qmpd.protocols.virtqueue import Chain, RingError
from qmpd.units import MiB

LARGEST = 32 * MiB
"""Bytes of the largest read or write; a driver of Linux stays far below."""

BATCH = 1 * MiB
"""Bytes of reads or writes that go to the backend together."""

_BARRIER = 1 << 31
"""Of the type of old drivers' requests; it means nothing any more."""

Work = Coroutine[Any, Any, None]


class VirtioRequest:
    """A chain taken apart.

    views    its buffers for data, without header and status byte
    length   bytes of them
    done     takes the chain back
    """

    __slots__ = ("_status", "done", "head", "length", "sector", "type", "views", "written")

    def __init__(self, chain: Chain, done: Callable[[VirtioRequest], None]) -> None:
        header, readable = _split(chain.readable, HEADER.size)
        if not chain.writable:
            raise RingError("a request has no room for its status")
        last = chain.writable[-1]
        kind, _priority, self.sector = HEADER.unpack(header)
        self.type = kind & ~_BARRIER
        self._status = last[len(last) - 1 :]
        writable = chain.writable[:-1]
        if len(last) > 1:
            writable.append(last[: len(last) - 1])
        self.views = writable if self.type in (Type.IN, Type.GET_ID) else readable
        self.length = sum(map(len, self.views))
        self.written = sum(map(len, writable)) + 1
        self.head, self.done = chain.head, done

    def finish(self, status: Status) -> None:
        """Tell the driver what came of it."""
        self._status[0] = status
        self.views.clear()
        del self._status  # a view of memory that may be unmapped next
        self.done(self)

    def put(self, data: memoryview) -> None:
        """Copy what was read to where the driver wants it, as far as there is room."""
        at = 0
        for view in self.views:
            part = data[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)

    def take(self, target: memoryview) -> None:
        """Copy what is to be written; the driver may change its own copy from now on."""
        at = 0
        for view in self.views:
            target[at : at + len(view)] = view
            at += len(view)


def _split(views: Sequence[memoryview], size: int) -> tuple[bytes, list[memoryview]]:
    """Return a copy of the first `size` bytes, and the rest. Raises RingError if there are fewer."""
    if views and len(views[0]) == size:
        return bytes(views[0]), list(views[1:])
    first, rest = bytearray(), list(views)
    while len(first) < size:
        if not rest:
            raise RingError(f"a request of {len(first)} bytes has no header")
        view = rest.pop(0)
        missing = size - len(first)
        first += view[:missing]
        if len(view) > missing:
            rest.insert(0, view[missing:])
    return bytes(first), rest


class VirtioDisk:
    """Carries out requests on a backend.

    block_size     bytes, as the driver is told
    queues         rings that it may use
    serial         what the driver reads as the disk's id, 20 bytes at most
    write_cache    writes are durable only after a flush; the driver may change it
    """

    def __init__(
        self, backend: BlockBackend, *, read_only: bool, block_size: int, queues: int, write_cache: bool, serial: bytes
    ) -> None:
        self._backend = backend
        self.read_only, self.block_size, self.queues = read_only, block_size, queues
        self.write_cache = self._write_cache = write_cache
        self._serial = serial
        self._buffers = BufferPool()

    def features(self) -> int:
        """Return the feature bits of device and rings that a driver may choose from."""
        offered = (
            Feature.SEG_MAX
            | Feature.BLK_SIZE
            | Feature.FLUSH
            | Feature.TOPOLOGY
            | Feature.CONFIG_WCE
            | Feature.MQ
            | Feature.DISCARD
            | Feature.WRITE_ZEROES
            | Feature.INDIRECT_DESC
            | Feature.EVENT_IDX
            | Feature.VERSION_1
        )
        return int(offered | Feature.RO if self.read_only else offered)

    def config(self) -> bytes:
        """Return the config space as it is now."""
        return config_space(
            size=self._backend.size, block_size=self.block_size, queues=self.queues, write_cache=self.write_cache
        )

    def set_config(self, offset: int, contents: bytes) -> bool:
        """Change the config space; False if this part of it cannot be changed."""
        if offset != WCE_OFFSET or len(contents) != 1:
            return False
        self.write_cache = bool(contents[0])
        return True

    def reset(self) -> None:
        """Be as at first: another driver comes."""
        self.write_cache = self._write_cache

    def works(self, requests: Sequence[VirtioRequest]) -> list[Work]:
        """Return what has to be run so that every request is finished; nothing of it raises."""
        works: list[Work] = []
        for kind, work in ((Type.IN, self._read), (Type.OUT, self._write)):
            gathered: list[VirtioRequest] = []
            total = 0
            for request in requests:
                if request.type == kind:
                    gathered.append(request)
                    total += request.length
                    if total >= BATCH:
                        works.append(work(gathered))
                        gathered, total = [], 0
            if gathered:
                works.append(work(gathered))
        works.extend(self._other(request) for request in requests if request.type not in (Type.IN, Type.OUT))
        return works

    def _in_range(self, sector: int, length: int) -> bool:
        start = sector * SECTOR
        return (
            not length % SECTOR
            and not start % self.block_size
            and length <= LARGEST
            and start + length <= self._backend.size // SECTOR * SECTOR
        )

    def _admit(self, requests: list[VirtioRequest], *, writing: bool) -> list[VirtioRequest]:
        """Finish what cannot be done or is nothing to do, and return the others."""
        good = []
        for request in requests:
            if (writing and self.read_only) or not self._in_range(request.sector, request.length):
                request.finish(Status.IOERR)
            elif not request.length:
                request.finish(Status.OK)
            else:
                good.append(request)
        return good

    async def _read(self, requests: list[VirtioRequest]) -> None:
        requests = self._admit(requests, writing=False)
        if not requests:
            return
        buffer = self._buffers.take(sum(one.length for one in requests))
        batch = _pieces(requests, buffer.view)
        try:
            await self._backend.preadv(batch)
        except OSError as error:
            batch.fail(error.errno or errno.EIO)
        for request, piece in zip(requests, batch, strict=True):
            if not piece.error:
                request.put(piece.view)
            request.finish(Status.IOERR if piece.error else Status.OK)
        buffer.release()

    async def _write(self, requests: list[VirtioRequest]) -> None:
        requests = self._admit(requests, writing=True)
        if not requests:
            return
        buffer = self._buffers.take(sum(one.length for one in requests))
        batch = _pieces(requests, buffer.view)
        for request, piece in zip(requests, batch, strict=True):
            request.take(piece.view)
        try:
            await self._backend.pwritev(batch, WriteFlags.NONE if self.write_cache else WriteFlags.FUA)
        except OSError as error:
            batch.fail(error.errno or errno.EIO)
        for request, piece in zip(requests, batch, strict=True):
            request.finish(Status.IOERR if piece.error else Status.OK)
        buffer.release()

    async def _other(self, request: VirtioRequest) -> None:
        try:
            if request.type == Type.FLUSH:
                await self._backend.flush()
                status = Status.OK
            elif request.type == Type.GET_ID:
                request.put(memoryview(self._serial[:ID_SIZE].ljust(ID_SIZE, b"\0")))
                status = Status.OK
            elif request.type in (Type.DISCARD, Type.WRITE_ZEROES):
                status = await self._range(request)
            else:
                status = Status.UNSUPP
        except OSError:
            status = Status.IOERR
        request.finish(status)

    async def _range(self, request: VirtioRequest) -> Status:
        """Discard or write zeroes. Raises OSError."""
        if self.read_only or request.length < SEGMENT.size:
            return Status.IOERR
        if request.length > SEGMENT.size:  # one segment was offered
            return Status.UNSUPP
        copied = bytearray(SEGMENT.size)
        request.take(memoryview(copied))
        segment = Segment(*SEGMENT.unpack(copied))
        zeroes = request.type == Type.WRITE_ZEROES
        if segment.flags & ~UNMAP or (segment.flags and not zeroes):
            return Status.UNSUPP
        length = segment.sectors * SECTOR
        if segment.sectors > MAX_DISCARD_SECTORS or not self._in_range(segment.sector, length):
            return Status.IOERR
        if not length:
            return Status.OK
        flags = WriteFlags.NONE if self.write_cache else WriteFlags.FUA
        if zeroes:
            if segment.flags & UNMAP:
                flags |= WriteFlags.MAY_UNMAP
            await self._backend.pwrite_zeroes(segment.sector * SECTOR, length, flags)
        else:
            await self._backend.pdiscard(segment.sector * SECTOR, length)
        return Status.OK


def _pieces(requests: Sequence[VirtioRequest], view: memoryview) -> Batch:
    batch, at = Batch(), 0
    for request in requests:
        batch.append(Piece(request.sector * SECTOR, view[at : at + request.length]))
        at += request.length
    return batch
