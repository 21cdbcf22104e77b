"""The client's side of NBD transmission: requests as bytes, replies taken apart; no socket.

Replies come in any order, reads in chunks. What a server says is believed only where it fits the request: data
outside it, twice, or missing, ends the session.
Source: proto.md, "Transmission", and its extension-ext-header branch.
"""

from __future__ import annotations

import bisect
import errno
import struct
from collections.abc import Callable

from qmpd.protocols.nbd import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_STRING,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    Command,
    CommandFlag,
    NbdError,
    Style,
)
from qmpd.protocols.nbd_client import Negotiated, ProtocolError

MAX_STATUS_PAYLOAD = 8 + 16 * (1 << 20)
"""Bytes of a block status chunk: the document allows 2^20 descriptors."""

MAX_KEPT_EXTENTS = 1 << 17
"""Descriptors of one reply that are looked at; the rest is asked for again."""

MAX_ERROR_PAYLOAD = 6 + MAX_STRING + 8 + 1024
"""Bytes of an error chunk: code, text, offset, and some room for error types to come."""

MAX_PIECES = 1 << 16
"""Separate stretches of one read that may be filled while others are missing."""

_REQUEST = struct.Struct(">IHHQQI")
_EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_EXTENDED_CHUNK = struct.Struct(">IHHQQQ")
_DONE = 1
_ERROR_TYPE = 1 << 15

_ERRNO: dict[int, int] = {
    NbdError.EPERM: errno.EPERM,
    NbdError.EIO: errno.EIO,
    NbdError.ENOMEM: errno.ENOMEM,
    NbdError.EINVAL: errno.EINVAL,
    NbdError.ENOSPC: errno.ENOSPC,
    NbdError.EOVERFLOW: errno.EOVERFLOW,
    NbdError.ENOTSUP: errno.ENOTSUP,
    NbdError.ESHUTDOWN: errno.ESHUTDOWN,
}


def from_nbd_error(value: int) -> int:
    """Return the errno for a wire value; what NBD has no word for counts as an invalid request."""
    return _ERRNO.get(value, errno.EINVAL)


class Pending:
    """A request on its way.

    offset, length  bytes                view   reads: filled; writes: sent; else None
    error           errno, once `done` was called
    extents         block status: (length in bytes, flags), from `offset` on
    done            called once, when the reply is complete or the request is given up
    """

    __slots__ = (
        "command", "cookie", "done", "edges", "error", "extents", "flags", "length", "missing", "offset", "view",
    )  # fmt: skip

    def __init__(
        self, command: Command, offset: int, length: int, view: memoryview | None, done: Callable[[Pending], None]
    ) -> None:
        self.command, self.flags = command, CommandFlag(0)
        self.offset, self.length, self.view, self.done = offset, length, view, done
        self.cookie = 0
        self.reset()

    def reset(self) -> None:
        """Forget what arrived: the request is to be sent again."""
        self.error = 0
        self.extents: list[tuple[int, int]] = []
        self.missing = self.length if self.command is Command.READ else 0
        self.edges: list[int] = []
        """(Reads) Where what arrived starts and ends, in turn; neighbours are joined."""

    def fill(self, offset: int, length: int) -> int:
        """Note that a chunk covers [offset, offset + length) of a read; return where in the view it goes.

        Raises ProtocolError for what lies outside or was there already.
        """
        start, end = offset - self.offset, offset - self.offset + length
        if start < 0 or end > self.length or not length:
            request = f"a read of {self.length} bytes at {self.offset}"
            raise ProtocolError(f"server sent {length} bytes at {offset} for {request}")
        self.missing -= length
        if self.missing == 0 and not self.edges:
            return start
        edges = self.edges
        at = bisect.bisect_left(edges, start)
        joins_left = at % 2 == 1 and edges[at] == start
        following = at + joins_left
        overlaps = following < len(edges) and edges[following] < end
        if self.missing < 0 or overlaps or following % 2:
            raise ProtocolError(f"server sent bytes at {offset} of a read twice")
        joins_right = following < len(edges) and edges[following] == end
        edges[at : following + joins_right] = ([] if joins_left else [start]) + ([] if joins_right else [end])
        if len(edges) > 2 * MAX_PIECES:
            raise ProtocolError(f"server sent a read of {self.length} bytes in more than {MAX_PIECES} pieces")
        return start


class Transmission:
    """Requests and replies of one connection.

    `consume` takes replies apart; while `direct` gives a view, the next bytes of the stream belong there, and
    whoever receives them says so with `received`.
    """

    def __init__(self, agreed: Negotiated) -> None:
        self.agreed = agreed
        self.style = agreed.style
        self.pending: dict[int, Pending] = {}
        self._cookie = 0
        self._target: memoryview | None = None
        self._filled = 0
        self._reading: Pending | None = None
        self._last = False
        self._payload = bytearray()
        self._payload_wanted = self._data_length = 0
        self._chunk: tuple[Pending, int, bool] | None = None

    def request(self, pending: Pending) -> bytes:
        """Give the request its cookie, expect its reply, and return the header to send (a write's data follows)."""
        self._cookie += 1
        pending.cookie = self._cookie
        self.pending[pending.cookie] = pending
        flags = pending.flags
        if self.style is Style.EXTENDED:
            if pending.command is Command.WRITE:
                flags |= CommandFlag.PAYLOAD_LEN
            return _EXTENDED_REQUEST.pack(
                EXTENDED_REQUEST_MAGIC, flags, pending.command, pending.cookie, pending.offset, pending.length
            )
        return _REQUEST.pack(REQUEST_MAGIC, flags, pending.command, pending.cookie, pending.offset, pending.length)

    def farewell(self) -> bytes:
        """Return the request that ends the session; it has no reply."""
        header = _EXTENDED_REQUEST if self.style is Style.EXTENDED else _REQUEST
        magic = EXTENDED_REQUEST_MAGIC if self.style is Style.EXTENDED else REQUEST_MAGIC
        return header.pack(magic, 0, Command.DISC, 0, 0, 0)

    @property
    def direct(self) -> memoryview | None:
        """Where the next bytes of the stream go, None if they are not data of a read."""
        return None if self._target is None else self._target[self._filled :]

    def received(self, count: int) -> Pending | None:
        """Note that `count` bytes went to `direct`; return the request if that completes it."""
        assert self._target is not None
        assert self._reading is not None
        self._filled += count
        if self._filled < len(self._target):
            return None
        self._target, pending = None, self._reading
        self._reading = None
        return self._complete(pending) if self._last else None

    def consume(self, data: memoryview, done: list[Pending]) -> int:
        """Take replies from `data`; add completed requests to `done`; return how many bytes were used up.

        The rest is the beginning of something and comes again. Raises ProtocolError.
        """
        at, end = 0, len(data)
        while at < end:
            if self._target is not None:
                room = self._target[self._filled : self._filled + end - at]
                room[:] = data[at : at + len(room)]
                at += len(room)
                finished = self.received(len(room))
            elif self._chunk is not None:
                piece = data[at : at + self._payload_wanted - len(self._payload)]
                self._payload += piece
                at += len(piece)
                if len(self._payload) < self._payload_wanted:
                    break
                finished = self._end_of_payload()
            else:
                used, finished = self._header(data[at:])
                if not used:
                    break
                at += used
            if finished is not None:
                done.append(finished)
        return at

    # --- headers --------------------------------------------------------------------------------------

    def _header(self, data: memoryview) -> tuple[int, Pending | None]:
        """Take one reply header. Returns its length, 0 if it is not complete, and what it completes."""
        if len(data) < 4:
            return 0, None
        (magic,) = struct.unpack_from(">I", data)
        if magic == SIMPLE_REPLY_MAGIC and self.style is not Style.EXTENDED:
            if len(data) < _SIMPLE.size:
                return 0, None
            _, error, cookie = _SIMPLE.unpack_from(data)
            return _SIMPLE.size, self._simple(self._find(cookie), error)
        if magic == STRUCTURED_REPLY_MAGIC and self.style is Style.STRUCTURED:
            if len(data) < _CHUNK.size:
                return 0, None
            _, flags, kind, cookie, length = _CHUNK.unpack_from(data)
            return _CHUNK.size, self._structured(self._find(cookie), flags, kind, length)
        if magic == EXTENDED_REPLY_MAGIC and self.style is Style.EXTENDED:
            if len(data) < _EXTENDED_CHUNK.size:
                return 0, None
            _, flags, kind, cookie, offset, length = _EXTENDED_CHUNK.unpack_from(data)
            pending = self._find(cookie)
            if offset != pending.offset:
                raise ProtocolError(f"reply carries offset {offset}, the request had {pending.offset}")
            return _EXTENDED_CHUNK.size, self._structured(pending, flags, kind, length)
        raise ProtocolError(f"invalid reply magic 0x{magic:08x} with {self.style.name.lower()} replies agreed")

    def _find(self, cookie: int) -> Pending:
        pending = self.pending.get(cookie)
        if pending is None:
            raise ProtocolError(f"reply to request {cookie}, which is not under way")
        return pending

    def _simple(self, pending: Pending, error: int) -> Pending | None:
        if error:
            pending.error = from_nbd_error(error)
            return self._complete(pending)
        if pending.command is Command.READ:
            if self.style is not Style.SIMPLE:
                raise ProtocolError("simple reply to a read with structured replies agreed")
            assert pending.view is not None
            pending.missing = 0
            self._expect_data(pending, 0, pending.length, last=True)
            return None
        if pending.command is Command.BLOCK_STATUS:
            raise ProtocolError("simple reply to a block status request")
        return self._complete(pending)

    def _structured(self, pending: Pending, flags: int, kind: int, length: int) -> Pending | None:
        last = bool(flags & _DONE)
        if kind == ChunkType.NONE:
            if not last or length:
                raise ProtocolError(f"empty chunk with flags 0x{flags:x} and {length} bytes")
            return self._complete(pending)
        if kind == ChunkType.OFFSET_DATA:
            if pending.command is not Command.READ or not 8 < length <= 8 + pending.length:
                raise ProtocolError(f"data chunk of {length} bytes for {_described(pending)}")
        elif kind == ChunkType.OFFSET_HOLE:
            if pending.command is not Command.READ or length != 12:
                raise ProtocolError(f"hole chunk of {length} bytes for {_described(pending)}")
        elif kind in (ChunkType.BLOCK_STATUS, ChunkType.BLOCK_STATUS_EXT):
            self._check_status_chunk(pending, kind, length)
        elif kind & _ERROR_TYPE:
            if not 6 <= length <= MAX_ERROR_PAYLOAD:
                raise ProtocolError(f"error chunk of {length} bytes, expected 6 to {MAX_ERROR_PAYLOAD}")
        else:
            raise ProtocolError(f"chunk of unknown type {kind} for {_described(pending)}")
        self._payload.clear()
        self._payload_wanted = 8 if kind == ChunkType.OFFSET_DATA else length
        self._data_length = length - 8
        self._chunk = pending, kind, last
        return None

    def _check_status_chunk(self, pending: Pending, kind: int, length: int) -> None:
        wide = kind == ChunkType.BLOCK_STATUS_EXT
        if wide != (self.style is Style.EXTENDED):
            raise ProtocolError(f"block status chunk of type {kind} with {self.style.name.lower()} headers agreed")
        smallest, step, head = (24, 16, 8) if wide else (12, 8, 4)
        if pending.command is not Command.BLOCK_STATUS or pending.extents:
            raise ProtocolError(f"block status chunk for {_described(pending)}")
        if not smallest <= length <= MAX_STATUS_PAYLOAD or (length - head) % step:
            raise ProtocolError(f"block status chunk of {length} bytes")

    # --- payloads -------------------------------------------------------------------------------------

    def _end_of_payload(self) -> Pending | None:
        assert self._chunk is not None
        (pending, kind, last), self._chunk = self._chunk, None
        payload = self._payload
        if kind == ChunkType.OFFSET_DATA:
            (offset,) = struct.unpack(">Q", payload)
            self._expect_data(pending, pending.fill(offset, self._data_length), self._data_length, last=last)
            return None
        if kind == ChunkType.OFFSET_HOLE:
            offset, length = struct.unpack(">QI", payload)
            start = pending.fill(offset, length)
            assert pending.view is not None
            pending.view[start : start + length] = bytes(length)
        elif kind & _ERROR_TYPE:
            error, text = struct.unpack_from(">IH", payload)
            if not error or 6 + text > len(payload):
                raise ProtocolError(f"error chunk with error {error} and a text of {text} bytes in {len(payload)}")
            pending.error = pending.error or from_nbd_error(error)
        else:
            self._status(pending, kind, payload)
        return self._complete(pending) if last else None

    def _status(self, pending: Pending, kind: int, payload: bytearray) -> None:
        (context,) = struct.unpack_from(">I", payload)
        expected = self.agreed.context[0] if self.agreed.context else None
        if context != expected:
            raise ProtocolError(f"block status for context {context}, expected {expected}")
        head, form, step = (8, ">QQ", 16) if kind == ChunkType.BLOCK_STATUS_EXT else (4, ">II", 8)
        if head == 8:
            (count,) = struct.unpack_from(">I", payload, 4)
            if count != (len(payload) - head) // step:
                raise ProtocolError(f"block status chunk of {len(payload)} bytes with a count of {count}")
        view = memoryview(payload)[head : head + step * MAX_KEPT_EXTENTS]
        for length, flags in struct.iter_unpack(form, view):
            if not length:
                raise ProtocolError("block status extent of 0 bytes")
            pending.extents.append((length, flags))

    def _expect_data(self, pending: Pending, start: int, length: int, *, last: bool) -> None:
        assert pending.view is not None
        self._target = pending.view[start : start + length]
        self._filled = 0
        self._reading, self._last = pending, last

    def _complete(self, pending: Pending) -> Pending:
        if not pending.error:
            if pending.missing:
                raise ProtocolError(f"{pending.missing} bytes are missing from {_described(pending)}")
            if pending.command is Command.BLOCK_STATUS and not pending.extents:
                raise ProtocolError("block status reply without extents")
        del self.pending[pending.cookie]
        return pending


def _described(pending: Pending) -> str:
    command = pending.command.name.lower().replace("_", " ")
    return f"a {command} request of {pending.length} bytes at {pending.offset}"
