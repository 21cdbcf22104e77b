"""NBD as a client writes it, byte by byte, so that a test can also write it wrong."""

from __future__ import annotations

import itertools
import socket
import struct
from dataclasses import dataclass

OPTION_MAGIC = b"IHAVEOPT"
REPLY_MAGIC = bytes.fromhex("0003e889045565a9")
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = 1, 2, 3, 5, 6, 7, 8, 9, 10, 11
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZERO, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD = 1, 2, 4, 8, 16, 32
ACK = 1
SIMPLE_STYLE, STRUCTURED_STYLE, EXTENDED_STYLE = "simple", "structured", "extended"
STYLES = (SIMPLE_STYLE, STRUCTURED_STYLE, EXTENDED_STYLE)


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return OPTION_MAGIC + struct.pack(">II", number, len(data) if length is None else length) + data


def info_data(name: bytes, *wanted: int) -> bytes:
    return struct.pack(f">I{len(name)}sH{len(wanted)}H", len(name), name, len(wanted), *wanted)


def meta_data(name: bytes, *queries: bytes, count: int | None = None) -> bytes:
    head = struct.pack(f">I{len(name)}sI", len(name), name, len(queries) if count is None else count)
    return head + b"".join(struct.pack(">I", len(query)) + query for query in queries)


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    flags: int = 0,
    cookie: int = 1,
    payload: bytes = b"",
    *,
    extended: bool = False,
) -> bytes:
    if not extended:
        return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + payload
    if payload or command == WRITE:
        flags |= PAYLOAD
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length) + payload


@dataclass
class Chunk:
    """One reply or reply chunk; `kind` None is a simple reply."""

    cookie: int
    error: int = 0
    kind: int | None = None
    done: bool = True
    data: bytes = b""

    @property
    def text(self) -> str:
        """The message of an error chunk."""
        return self.data[6:].decode()


@dataclass
class Result:
    """What a command ended with."""

    error: int
    data: bytes
    chunks: list[Chunk]


class Client:
    """A blocking client on a connected socket."""

    def __init__(self, path: str, *, flags: int = 3, timeout: float = 20.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.socket.settimeout(timeout)
        self.greeting = self.receive(18)
        self.socket.sendall(struct.pack(">I", flags))
        self.style = SIMPLE_STYLE
        self.size = self.flags = 0
        self._lengths: dict[int, int] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise EOFError(bytes(data))
            data += piece
        return bytes(data)

    def ask(self, number: int, data: bytes = b"", length: int | None = None) -> list[tuple[int, bytes]]:
        """Send an option; return (type, data) of its replies, the final one last."""
        self.socket.sendall(option(number, data, length))
        replies = []
        while True:
            magic, echoed, kind, size = struct.unpack(">8sIII", self.receive(20))
            assert magic == REPLY_MAGIC
            assert echoed == number
            replies.append((kind, self.receive(size)))
            if kind == ACK or kind & 0x80000000:
                return replies

    def go(self, name: bytes, style: str = STRUCTURED_STYLE, contexts: tuple[bytes, ...] = ()) -> Client:
        """Enter the transmission phase."""
        if style != SIMPLE_STYLE:
            assert self.ask(EXTENDED if style == EXTENDED_STYLE else STRUCTURED)[-1][0] == ACK
        if contexts:
            assert self.ask(SET_META, meta_data(name, *contexts))[-1][0] == ACK
        replies = self.ask(GO, info_data(name, 3))
        assert replies[-1][0] == ACK, replies
        for kind, data in replies:
            if kind == 3 and data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:])
        self.style = style
        return self

    def send(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 1, payload: bytes = b""
    ) -> None:
        if command == READ:
            self._lengths[cookie] = length
        extended = self.style == EXTENDED_STYLE
        self.socket.sendall(request(command, offset, length, flags, cookie, payload, extended=extended))

    def chunk(self) -> Chunk:
        """Return the next reply or chunk, whatever request it belongs to."""
        magic = self.receive(4)
        if magic == bytes.fromhex("67446698"):
            error, cookie = struct.unpack(">IQ", self.receive(12))
            length = self._lengths.pop(cookie, 0)
            return Chunk(cookie, error, data=b"" if error or self.style != SIMPLE_STYLE else self.receive(length))
        if magic == bytes.fromhex("668e33ef"):
            flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        else:
            assert magic == bytes.fromhex("6e8a278c"), magic
            flags, kind, cookie, _, length = struct.unpack(">HHQQQ", self.receive(28))
        data = self.receive(length)
        error = struct.unpack(">I", data[:4])[0] if kind & 0x8000 else 0
        return Chunk(cookie, error, kind, bool(flags & 1), data)

    def results(self, count: int) -> dict[int, Result]:
        """Return the results of `count` commands by cookie; reads are put together."""
        wanted: dict[int, list[Chunk]] = {}
        done: dict[int, Result] = {}
        while len(done) < count:
            chunk = self.chunk()
            wanted.setdefault(chunk.cookie, []).append(chunk)
            if chunk.done:
                chunks = wanted.pop(chunk.cookie)
                error = next((one.error for one in chunks if one.error), 0)
                assert chunk.cookie not in done, "two replies to one request"
                done[chunk.cookie] = Result(error, _data(chunks), chunks)
        return done

    def call(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 1, payload: bytes = b""
    ) -> Result:
        """Send one command and return its result."""
        self.send(command, offset, length, flags, cookie, payload)
        return self.results(1)[cookie]

    def read(self, offset: int, length: int) -> bytes:
        result = self.call(READ, offset, length)
        assert not result.error, result
        assert len(result.data) == length
        return result.data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        assert not self.call(WRITE, offset, len(data), flags, payload=data).error


def _data(chunks: list[Chunk]) -> bytes:
    """Put the data and holes of a read together; they must not overlap nor leave a gap."""
    pieces = []
    for chunk in chunks:
        if chunk.kind is None:
            return chunk.data
        if chunk.kind == 1:
            pieces.append((struct.unpack(">Q", chunk.data[:8])[0], chunk.data[8:]))
        elif chunk.kind == 2:
            offset, length = struct.unpack(">QI", chunk.data)
            pieces.append((offset, bytes(length)))
    pieces.sort()
    for (offset, data), (following, _) in itertools.pairwise(pieces):
        assert offset + len(data) == following, "chunks overlap or leave a gap"
    return b"".join(data for _, data in pieces)
