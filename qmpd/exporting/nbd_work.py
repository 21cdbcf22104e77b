"""Carrying out NBD requests on a backend: one coroutine for the reads of a receive buffer, one for
its writes, one for the rest; each ends by handing its replies to the connection.

Sparse reads: with structured replies a stretch that reads as zeroes is neither read nor sent.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

from qmpd.aio.pool import PooledBuffer
from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.batch import Request as Piece
from qmpd.exporting.nbd_status import Stretch, chain_status
from qmpd.exporting.nbd_target import CONTEXT_ALLOCATION, CONTEXT_BITMAP, NbdTarget
from qmpd.protocols.nbd import MAX_EXTENTS, STATE_ZERO, Command, CommandFlag, NbdError, Style, to_nbd_error
from qmpd.protocols.nbd_transmission import Replies, Request, merged_extents
from qmpd.units import GiB, KiB, MiB

Work = Coroutine[Any, Any, None]

SPARSE_FROM = 32 * KiB
"""Bytes: a shorter read is not split, a header costs as much as the zeroes it saves."""

STATUS_AHEAD = 16 * MiB
"""Bytes whose block status is asked for at once when a read needs to know."""

RANGE_STEP = 1 * GiB
"""Bytes that are zeroed or discarded per call to the backend."""

CACHE_STEP = 2 * MiB
"""Bytes read at a time to bring them into the cache."""

_READING = (Command.READ, Command.CACHE, Command.BLOCK_STATUS)
_FUA, _REQ_ONE, _DF = int(CommandFlag.FUA), int(CommandFlag.REQ_ONE), int(CommandFlag.DF)


class Outlet(Protocol):
    """Where replies go: the connection."""

    def reply(self, *parts: bytes | memoryview) -> None:
        """Queue bytes; they leave together with whatever else is queued."""

    def replied(self, parts: list[bytes | memoryview], admitted: int, buffer: PooledBuffer | None) -> None:
        """Queue the last replies of a piece of work that was admitted with `admitted` bytes.

        Once they have left, `buffer` goes back to its pool.
        """


class Lease:
    """The buffer of a write: `given_up` when the work that uses it is to give it back."""

    __slots__ = ("buffer", "given_up")

    def __init__(self, buffer: PooledBuffer, *, given_up: bool) -> None:
        self.buffer, self.given_up = buffer, given_up


class Worker:
    """Carries out the requests of one connection."""

    def __init__(self, target: NbdTarget, style: Style, contexts: Sequence[tuple[int, bytes]], outlet: Outlet) -> None:
        self._target, self._backend = target, target.backend
        self._replies = Replies(style)
        self._style = style
        self._sparse = style is not Style.SIMPLE
        self._contexts = tuple(number for number, _ in contexts)
        self._outlet = outlet

    # --- reads ----------------------------------------------------------------------------------

    async def read(self, requests: list[Request], admitted: int) -> None:
        """Carry out read requests, which together ask for `admitted` bytes."""
        buffer = self._target.buffers.take(admitted)
        if self._sparse:
            for request in requests:
                if not self._is_data(request):
                    await self._read_sparse(requests, admitted, buffer)
                    return
        view, at = buffer.view, 0
        batch = Batch()
        for request in requests:
            end = at + request.length
            batch.append(Piece(request.offset, view[at:end]))
            at = end
        error = 0
        try:
            await self._backend.preadv(batch)
        except OSError as failure:
            error = failure.errno or errno.EIO
        parts: list[bytes | memoryview] = []
        header = self._replies.all_data
        for request, piece in zip(requests, batch, strict=True):
            if error or piece.error:
                parts.append(self._error(request, error or piece.error, "reading from file failed"))
            else:
                parts.append(header(request, request.offset, request.length))
                parts.append(piece.view)
        self._outlet.replied(parts, admitted, buffer)

    async def _read_sparse(self, requests: list[Request], admitted: int, buffer: PooledBuffer) -> None:
        """Read like `read`, but look for holes first."""
        batch = Batch()
        split: list[list[Piece | tuple[int, int]]] = []
        view, at = buffer.view, 0
        error = 0
        try:
            for request in requests:
                part = view[at : at + request.length]
                at += request.length
                split.append(
                    [Piece(request.offset, part)] if self._is_data(request) else await self._split(request, part)
                )
                batch.extend(piece for piece in split[-1] if isinstance(piece, Piece))
            if batch:
                await self._backend.preadv(batch)
        except OSError as failure:
            error = failure.errno or errno.EIO
        parts: list[bytes | memoryview] = []
        for position, request in enumerate(requests):
            if error:
                parts.append(self._error(request, error, "reading from file failed"))
            else:
                parts += self._read_reply(request, split[position])
        self._outlet.replied(parts, admitted, buffer)

    def _is_data(self, request: Request) -> bool:
        """Say whether a read is not worth a look for holes, or known to meet none."""
        if request.length < SPARSE_FROM or request.flags & _DF:
            return True
        return self._target.known_data.covers(request.offset, request.offset + request.length)

    async def _split(self, request: Request, view: memoryview) -> list[Piece | tuple[int, int]]:
        """Return the parts of a read in order: what is to be read, and (offset, length) of holes."""
        start, end = request.offset, request.offset + request.length
        ahead = min(max(request.length, STATUS_AHEAD), self._backend.size - start)
        if ahead < request.length:  # it has shrunk: let the read find out
            return [Piece(start, view)]
        parts: list[Piece | tuple[int, int]] = []
        data = start
        for stretch in await chain_status(self._backend, start, ahead):
            if not stretch.state:
                self._target.known_data.learn(stretch.offset, stretch.offset + stretch.length)
            low, high = stretch.offset, min(stretch.offset + stretch.length, end)
            if low < high and stretch.state & STATE_ZERO and high - low >= 4 * KiB:
                if low > data:
                    parts.append(Piece(data, view[data - start : low - start]))
                before = parts[-1] if parts and low == data else None
                if isinstance(before, tuple):
                    parts[-1] = (before[0], before[1] + high - low)
                else:
                    parts.append((low, high - low))
                data = high
        if data < end:
            parts.append(Piece(data, view[data - start : end - start]))
        return parts

    def _read_reply(self, request: Request, split: Sequence[Piece | tuple[int, int]]) -> Iterator[bytes | memoryview]:
        for part in split:
            if isinstance(part, Piece) and part.error:
                yield self._error(request, part.error, "reading from file failed")
                return
        last = split[-1]
        for part in split:
            if isinstance(part, Piece):
                yield self._replies.data(request, part.offset, len(part.view), last=part is last)
                yield part.view
            else:
                yield self._replies.hole(request, *part, last=part is last)

    # --- writes ---------------------------------------------------------------------------------

    async def write(self, requests: list[Request]) -> list[bytes | memoryview]:
        """Carry out write requests and return the replies; until then their payload stays as it is."""
        plain, durable = Batch(), Batch()
        pieces: list[Piece] = []
        through = self._target.writethrough
        for request in requests:
            assert request.payload is not None
            piece = Piece(request.offset, request.payload)
            pieces.append(piece)
            if request.length:
                (durable if through or request.flags & _FUA else plain).append(piece)
        for batch, flags in ((plain, WriteFlags.NONE), (durable, WriteFlags.FUA)):
            if batch:
                try:
                    await self._backend.pwritev(batch, flags)
                except OSError as error:
                    batch.fail(error.errno or errno.EIO)
        success = self._replies.success
        return [
            self._error(request, piece.error, "writing to file failed") if piece.error else success(request)
            for request, piece in zip(requests, pieces, strict=True)
        ]

    # --- the rest -------------------------------------------------------------------------------

    async def others(self, requests: list[Request], admitted: int) -> None:
        """Carry out requests that are neither reads nor writes, one after the other."""
        for request in requests:
            work, text = self._OTHERS[request.command]
            try:
                await work(self, request)
            except OSError as error:
                self._outlet.reply(self._error(request, error.errno or errno.EIO, text))
        self._outlet.replied([], admitted, None)

    async def _flush(self, request: Request) -> None:
        await self._backend.flush()
        self._outlet.reply(self._replies.success(request))

    async def _trim(self, request: Request) -> None:
        self._target.known_data.forget()
        for offset, length in _steps(request):
            await self._backend.pdiscard(offset, length)
        if request.flags & _FUA or self._target.writethrough:
            await self._backend.flush()
        self._outlet.reply(self._replies.success(request))

    async def _write_zeroes(self, request: Request) -> None:
        self._target.known_data.forget()
        flags = WriteFlags.NONE
        if request.flags & _FUA or self._target.writethrough:
            flags |= WriteFlags.FUA
        if not request.flags & CommandFlag.NO_HOLE:
            flags |= WriteFlags.MAY_UNMAP
        if request.flags & CommandFlag.FAST_ZERO:
            flags |= WriteFlags.NO_FALLBACK
        for offset, length in _steps(request):
            await self._backend.pwrite_zeroes(offset, length, flags)
        self._outlet.reply(self._replies.success(request))

    async def _cache(self, request: Request) -> None:
        buffer = self._target.buffers.take(min(max(request.length, 1), CACHE_STEP))
        try:
            for offset in range(request.offset, request.offset + request.length, CACHE_STEP):
                length = min(CACHE_STEP, request.offset + request.length - offset)
                batch = Batch.single(offset, buffer.view[:length])
                await self._backend.preadv(batch)
                batch.raise_first()
        finally:
            buffer.release()
        self._outlet.reply(self._replies.success(request))

    async def _block_status(self, request: Request) -> None:
        wanted = self._contexts if request.contexts is None else request.contexts
        one = bool(request.flags & _REQ_ONE)
        chunks = []
        found: list[Stretch] = []
        if any(number < CONTEXT_BITMAP for number in wanted):
            found = await chain_status(self._backend, request.offset, request.length)
        for number in wanted:
            if number >= CONTEXT_BITMAP:
                runs = self._target.bitmaps[number - CONTEXT_BITMAP].runs(
                    request.offset, request.offset + request.length
                )
                kinds: Iterable[tuple[int, int]] = ((length, int(dirty)) for _, length, dirty in runs)
            else:
                kinds = [(part.length, part.state if number == CONTEXT_ALLOCATION else part.depth) for part in found]
            extents = merged_extents(kinds, 1 if one else MAX_EXTENTS, wide=self._style is Style.EXTENDED)
            chunks.append((number, extents))
        for position, (number, extents) in enumerate(chunks):
            last = position == len(chunks) - 1
            self._outlet.reply(self._replies.status(request, number, extents, last=last))

    async def _nothing(self, request: Request) -> None:
        self._outlet.reply(self._replies.success(request))

    _OTHERS: ClassVar[dict[int, tuple[Callable[[Worker, Request], Work], str]]] = {
        int(Command.READ): (_nothing, ""),  # of no bytes; others go to `read`
        int(Command.FLUSH): (_flush, "flush failed"),
        int(Command.TRIM): (_trim, "discard failed"),
        int(Command.CACHE): (_cache, "caching data failed"),
        int(Command.WRITE_ZEROES): (_write_zeroes, "writing to file failed"),
        int(Command.BLOCK_STATUS): (_block_status, "can't get block status"),
    }

    # --- refusals -------------------------------------------------------------------------------

    def refuse(self, request: Request, error: NbdError, text: str) -> None:
        """Answer a request without carrying it out."""
        self._outlet.reply(self._replies.error(request, error, text))

    def _error(self, request: Request, error: int, text: str) -> bytes:
        told = self._backend.on_error
        if told is not None and error != errno.ENOTSUP:  # a fast zero write that would not be fast is no failure
            told(request.command in _READING, error)
        return self._replies.error(request, to_nbd_error(error), text)


def _steps(request: Request) -> Iterable[tuple[int, int]]:
    """Yield (offset, length) of the parts in which a long range is worked on."""
    end = request.offset + request.length
    for offset in range(request.offset, end, RANGE_STEP):
        yield offset, min(RANGE_STEP, end - offset)
