"""The server's side of NBD transmission: requests out of a receive buffer, headers of replies.

`Requests.decode` takes a whole receive buffer and returns every request that is complete in it.
A write's payload is a view of that buffer; the last one, if only part of it has arrived, is handed
to the owner, who receives the rest in place.
Source: proto.md, "Transmission"; order of checks and texts are QEMU's, error values the document's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qmpd.protocols.nbd import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
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

_COMPACT = struct.Struct(">IHHQQI")
_EXTENDED = struct.Struct(">IHHQQQ")
_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_EXTENDED_CHUNK = struct.Struct(">IHHQQQ")
_DATA_CHUNK = struct.Struct(">IHHQIQ")
_EXTENDED_DATA_CHUNK = struct.Struct(">IHHQQQQ")

_READ, _WRITE, _DISC, _FLUSH = int(Command.READ), int(Command.WRITE), int(Command.DISC), int(Command.FLUSH)
_BLOCK_STATUS = int(Command.BLOCK_STATUS)
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)
_OFFSET_DATA = int(ChunkType.OFFSET_DATA)
_DONE = 1
"""NBD_REPLY_FLAG_DONE: the last chunk of a reply."""

_WIDEST = 0xFFFF0000
"""Bytes in one 32-bit extent: all that fits, and still aligned."""

_FLAGS: dict[int, int] = {
    Command.READ: CommandFlag.FUA,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.CACHE: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.FUA | CommandFlag.REQ_ONE,
}
"""Flags that each command knows, whatever was negotiated."""

_NAMES: dict[int, str] = {
    Command.READ: "read",
    Command.WRITE: "write",
    Command.FLUSH: "flush",
    Command.TRIM: "trim",
    Command.CACHE: "cache",
    Command.WRITE_ZEROES: "write zeroes",
    Command.BLOCK_STATUS: "block status",
}
_CHANGING = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
_GROWING = frozenset((Command.WRITE, Command.WRITE_ZEROES))
_BOUNDED = frozenset((Command.READ, Command.WRITE, Command.CACHE))


class Request:
    """One request as it came over the wire.

    offset, length   bytes; the length of a block status query with payload is that in the payload
    payload          what a write brings, None for other commands; filled when the request is complete
    at               where the payload begins in what was received
    refusal          (error, text) if it must not be carried out, else None
    contexts         ids that a block status query is limited to, None for all
    """

    __slots__ = ("at", "command", "contexts", "cookie", "flags", "length", "offset", "payload", "refusal")

    def __init__(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        self.command, self.flags, self.cookie = command, flags, cookie
        self.offset, self.length = offset, length
        self.payload: memoryview | None = None
        self.at = 0
        self.refusal: tuple[NbdError, str] | None = None
        self.contexts: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        name = _NAMES.get(self.command, str(self.command))
        return f"<Request {name} {self.offset}+{self.length} flags={self.flags:#x} cookie={self.cookie:#x}>"


@dataclass(slots=True)
class Decoded:
    """What `Requests.decode` found.

    used      bytes of the view that are dealt with
    partial   a write of which only the header is dealt with: its payload begins at `used`, has
              `partial.length` bytes, and the rest of it is still to come
    """

    requests: list[Request]
    used: int
    partial: Request | None = None


class Requests:
    """Takes a client's byte stream apart.

    size        bytes of the export      contexts  ids the client selected
    finished    True when the stream is at its end: the client said DISC, or broke a rule
    violation   what rule it broke, after which its bytes cannot be understood; "" for DISC
    """

    def __init__(self, style: Style, size: int, *, read_only: bool, contexts: Sequence[int] = ()) -> None:
        self._extended = style is Style.EXTENDED
        self._header = _EXTENDED if self._extended else _COMPACT
        self._magic = EXTENDED_REQUEST_MAGIC if self._extended else REQUEST_MAGIC
        self._size, self._read_only = size, read_only
        self._contexts = frozenset(contexts)
        self._flags = {command: int(flags) for command, flags in _FLAGS.items()}  # IntFlag's ~ loses unknown bits
        if style is not Style.SIMPLE:
            self._flags[_READ] |= int(CommandFlag.DF)
        if self._extended:
            self._flags[_WRITE] |= _PAYLOAD_LEN
            self._flags[_BLOCK_STATUS] |= _PAYLOAD_LEN
        self._skip = 0
        self._skipping: Request | None = None
        self.finished = False
        self.violation = ""

    def decode(self, view: memoryview) -> Decoded:
        """Return every request that is complete in `view`, which begins where the last call ended."""
        requests: list[Request] = []
        at, end = 0, len(view)
        unpack, size, magic_wanted = self._header.unpack_from, self._header.size, self._magic
        total = self._size
        no_read, no_write = ~self._flags[_READ], ~self._flags[_WRITE]
        writable = not self._read_only
        while not self.finished:
            if self._skipping is not None:
                at += self._skipped(end - at, requests)
                if self._skipping is not None:
                    break
            if end - at < size:
                break
            magic, flags, command, cookie, offset, length = unpack(view, at)
            if magic != magic_wanted:
                self._violated(f"invalid magic (got 0x{magic:x}, expected 0x{magic_wanted:x})")
                break
            fits = length <= MAX_PAYLOAD and offset + length <= total
            if fits and command == _READ and not flags & no_read:
                requests.append(Request(_READ, flags, cookie, offset, length))
                at += size
            elif fits and command == _WRITE and writable and not flags & no_write:
                request = Request(_WRITE, flags, cookie, offset, length)
                at += size
                if end - at < length:
                    return Decoded(requests, at, request)
                request.payload, request.at = view[at : at + length], at
                requests.append(request)
                at += length
            else:
                used = self._other(Request(command, flags, cookie, offset, length), view[at + size :], requests)
                if used is None:
                    break
                at += size + used
        return Decoded(requests, at)

    def _violated(self, text: str) -> None:
        self.finished, self.violation = True, text

    def _skipped(self, available: int, requests: list[Request]) -> int:
        """Pass over payload that nobody wants; the request it belongs to is then complete."""
        count = min(self._skip, available)
        self._skip -= count
        if not self._skip and self._skipping is not None:
            requests.append(self._skipping)
            self._skipping = None
        return count

    def _other(self, request: Request, rest: memoryview, requests: list[Request]) -> int | None:
        """Deal with a request that is neither a valid read nor a valid write.

        rest      what follows its header
        Returns the bytes of `rest` that are used, None if it must be seen again with more of them.
        """
        if request.command == _DISC:
            self.finished = True
            return 0
        payload = request.length if self._has_payload(request) else 0
        if request.command == _BLOCK_STATUS and payload and payload <= 8 + 4 * len(self._contexts):
            if len(rest) < payload:
                return None
            self._read_filter(request, rest[:payload])
            requests.append(request)
            return payload
        request.refusal = self._refusal(request)
        if payload and request.refusal is None:
            request.refusal = (NbdError.EINVAL, "CMD_BLOCK_STATUS payload not valid")
        if payload > MAX_PAYLOAD:
            requests.append(request)
            self._violated(f"len ({payload}) is larger than max len ({MAX_PAYLOAD})")
            return 0
        self._skip, self._skipping = payload, request
        return 0

    def _has_payload(self, request: Request) -> bool:
        """Say whether bytes follow the header: a write's do even if an extended header does not say so.

        QEMU's client forgets the flag, and QEMU's server goes on; so do we.
        """
        return request.command == _WRITE or (self._extended and bool(request.flags & _PAYLOAD_LEN))

    def _read_filter(self, request: Request, payload: memoryview) -> None:
        """Take the effect length and the context ids that a block status query brings."""
        count, rest = divmod(len(payload) - 8, 4)
        if count > 0 and not rest:
            request.length, *ids = struct.unpack(f">Q{count}I", payload)
            if len(set(ids)) == len(ids) and self._contexts.issuperset(ids):
                request.contexts = tuple(ids)
                request.refusal = self._refusal(request)
                return
        request.refusal = (NbdError.EINVAL, "CMD_BLOCK_STATUS payload not valid")

    def _refusal(self, request: Request) -> tuple[NbdError, str] | None:
        """Return why a request must not be carried out, None if it may."""
        command, flags, offset, length = request.command, request.flags, request.offset, request.length
        if command not in _NAMES:
            return NbdError.EINVAL, f"invalid request type ({command}) received"
        if self._read_only and command in _CHANGING:
            return NbdError.EPERM, "Export is read-only"
        if command in _BOUNDED and length > MAX_PAYLOAD:
            return NbdError.EINVAL, f"len ({length}) is larger than max len ({MAX_PAYLOAD})"
        if command == _BLOCK_STATUS and not length:
            return NbdError.EINVAL, "need non-zero length"
        if command != _FLUSH and offset + length > self._size:
            beyond = NbdError.ENOSPC if command in _GROWING else NbdError.EINVAL
            return beyond, f"operation past EOF; From: {offset}, Len: {length}, Size: {self._size}"
        if flags & ~self._flags[command]:
            return NbdError.EINVAL, f"unsupported flags for command {_NAMES[command]} (got 0x{flags:x})"
        if command == _BLOCK_STATUS and not self._contexts:
            return NbdError.EINVAL, "CMD_BLOCK_STATUS not negotiated"
        return None


def _simple_data(request: Request, offset: int, length: int) -> bytes:
    return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)


def _structured_data(request: Request, offset: int, length: int) -> bytes:
    return _DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, _DONE, _OFFSET_DATA, request.cookie, length + 8, offset)


def _extended_data(request: Request, offset: int, length: int) -> bytes:
    return _EXTENDED_DATA_CHUNK.pack(
        EXTENDED_REPLY_MAGIC, _DONE, _OFFSET_DATA, request.cookie, request.offset, length + 8, offset
    )


def _pack_simple(into: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
    _SIMPLE.pack_into(into, at, SIMPLE_REPLY_MAGIC, 0, cookie)


def _pack_structured(into: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
    _DATA_CHUNK.pack_into(into, at, STRUCTURED_REPLY_MAGIC, _DONE, _OFFSET_DATA, cookie, length + 8, offset)


def _pack_extended(into: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
    _EXTENDED_DATA_CHUNK.pack_into(
        into, at, EXTENDED_REPLY_MAGIC, _DONE, _OFFSET_DATA, cookie, offset, length + 8, offset
    )


class PlainReads:
    """Takes reads without flags off the front of a client's byte stream, as many as there are.

    header_size  bytes of one request     reply_size  bytes before the data of its reply
    pack         (into, at, cookie, offset, length) writes those bytes; the data follows them
    """

    def __init__(self, style: Style) -> None:
        self._header = struct.Struct(">QQQQ" if style is Style.EXTENDED else ">QQQI")
        self.header_size = self._header.size
        self.unpack_from = self._header.unpack_from
        """Returns (word, cookie, offset, length); only a plain read begins with `word`."""
        self.word = (EXTENDED_REQUEST_MAGIC if style is Style.EXTENDED else REQUEST_MAGIC) << 32 | _READ
        self.pack = (_pack_simple, _pack_structured, _pack_extended)[style]
        self.reply_size = (_SIMPLE, _DATA_CHUNK, _EXTENDED_DATA_CHUNK)[style].size


class Replies:
    """Makes the headers of replies in the style that was agreed; data is sent beside them.

    all_data   (request, offset, length) -> what precedes the last or only data of a read
    """

    def __init__(self, style: Style) -> None:
        self._style = style
        self.all_data = (_simple_data, _structured_data, _extended_data)[style]

    def success(self, request: Request) -> bytes:
        """Return the whole reply to a request that asked for no data, or for none of it."""
        if self._style is Style.EXTENDED:
            return self._chunk(request, _DONE, ChunkType.NONE, 0)
        if self._style is Style.STRUCTURED and request.command == _READ:
            return self._chunk(request, _DONE, ChunkType.NONE, 0)
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def error(self, request: Request, error: NbdError, text: str = "") -> bytes:
        """Return the whole reply to a request that failed; old clients get no text."""
        if self._style is Style.SIMPLE:
            return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, error, request.cookie)
        message = text.encode()[:MAX_STRING]
        header = self._chunk(request, _DONE, ChunkType.ERROR, 6 + len(message))
        return header + struct.pack(">IH", error, len(message)) + message

    def data(self, request: Request, offset: int, length: int, *, last: bool = True) -> bytes:
        """Return what precedes `length` bytes of data read at `offset`.

        With simple replies the data must be all of the request.
        """
        if last:
            return self.all_data(request, offset, length)
        if self._style is Style.STRUCTURED:
            return _DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, 0, _OFFSET_DATA, request.cookie, length + 8, offset)
        return _EXTENDED_DATA_CHUNK.pack(
            EXTENDED_REPLY_MAGIC, 0, _OFFSET_DATA, request.cookie, request.offset, length + 8, offset
        )

    def hole(self, request: Request, offset: int, length: int, *, last: bool) -> bytes:
        """Return the chunk that says that `length` bytes at `offset` read as zeroes."""
        header = self._chunk(request, _DONE if last else 0, ChunkType.OFFSET_HOLE, 12)
        return header + struct.pack(">QI", offset, length)

    def status(self, request: Request, context: int, extents: Sequence[tuple[int, int]], *, last: bool) -> bytes:
        """Return the block status chunk of one context.

        extents   (length in bytes, status), at least one, neighbours with different status
        """
        done = _DONE if last else 0
        flat = [number for extent in extents for number in extent]
        if self._style is Style.EXTENDED:
            header = self._chunk(request, done, ChunkType.BLOCK_STATUS_EXT, 8 + 8 * len(flat))
            return header + struct.pack(f">II{len(flat)}Q", context, len(extents), *flat)
        header = self._chunk(request, done, ChunkType.BLOCK_STATUS, 4 + 4 * len(flat))
        return header + struct.pack(f">I{len(flat)}I", context, *flat)

    def _chunk(self, request: Request, flags: int, kind: ChunkType, length: int) -> bytes:
        if self._style is Style.EXTENDED:
            return _EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, length)
        return _CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length)


def merged_extents(extents: Iterable[tuple[int, int]], limit: int, *, wide: bool) -> list[tuple[int, int]]:
    """Join neighbours of equal status, and cut off after `limit` of them.

    wide   lengths may exceed 32 bits; else a longer one ends the list, cut to a multiple of 64 KiB
    """
    merged: list[tuple[int, int]] = []
    for length, status in extents:
        if merged and merged[-1][1] == status:
            length += merged.pop()[0]
        elif len(merged) == limit:
            break
        if not wide and length > _WIDEST:
            merged.append((_WIDEST, status))
            break
        merged.append((length, status))
    return merged
