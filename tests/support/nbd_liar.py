"""An NBD server made of bytes: it keeps the protocol but where a test says otherwise."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.nbd_wire import (
    ABORT,
    ACK,
    DISC,
    EXPORT_NAME,
    GO,
    LIST,
    OPTION_MAGIC,
    READ,
    REPLY_MAGIC,
    SET_META,
    STATUS,
    STRUCTURED,
    WRITE,
    ZERO,
)

NEWSTYLE = b"NBDMAGIC" + OPTION_MAGIC + struct.pack(">H", 3)
OLDSTYLE = b"NBDMAGIC" + bytes.fromhex("0000420281861253")
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG = (
    0x80000000 + code for code in range(1, 10)
)
SERVER, INFO_REPLY, META_REPLY = 2, 3, 4
SIZE = 1 << 20


def reply(option: int, code: int, data: bytes = b"", length: int | None = None) -> bytes:
    return REPLY_MAGIC + struct.pack(">III", option, code, len(data) if length is None else length) + data


def info_export(size: int = SIZE, flags: int = 0x4D) -> bytes:
    return reply(GO, INFO_REPLY, struct.pack(">HQH", 0, size, flags))


def info_sizes(minimum: int = 1, preferred: int = 4096, largest: int = 32 << 20) -> bytes:
    return reply(GO, INFO_REPLY, struct.pack(">HIII", 3, minimum, preferred, largest))


def context(name: bytes = b"base:allocation", number: int = 1) -> bytes:
    return reply(SET_META, META_REPLY, struct.pack(">I", number) + name)


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def chunk(cookie: int, kind: int, data: bytes = b"", *, flags: int = 1, length: int | None = None) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(data) if length is None else length) + data


def data_chunk(cookie: int, offset: int, data: bytes, *, flags: int = 1) -> bytes:
    return chunk(cookie, 1, struct.pack(">Q", offset) + data, flags=flags)


@dataclass(frozen=True)
class Asked:
    """A request: its numbers, and the data of a write."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes


Answer = Callable[[Asked], "bytes | None"]
"""What is sent for a request; None: what an honest server would send. `HANG_UP` ends the connection."""

HANG_UP = b"\0hang up"


@dataclass
class Script:
    """One kind of server.

    greeting   the first bytes                     options   answers by option number, HANG_UP to end
    answer     see `Answer`                        size      bytes of the export
    flags      transmission flags of the polite GO
    """

    greeting: bytes = NEWSTYLE
    options: Mapping[int, bytes] = field(default_factory=dict)
    answer: Answer = lambda asked: None
    size: int = SIZE
    flags: int = 0x4D

    def polite(self, option: int) -> bytes:
        if option == STRUCTURED:
            return reply(option, ACK)
        if option == SET_META:
            return context() + reply(option, ACK)
        if option == GO:
            return info_sizes() + info_export(self.size, self.flags) + reply(option, ACK)
        if option == LIST:
            return reply(option, SERVER, struct.pack(">I", 0)) + reply(option, ACK)
        if option == EXPORT_NAME:
            return struct.pack(">QH", self.size, self.flags)
        return reply(option, UNSUP)


class _Gone(Exception):
    """The client, or the script, ended the connection."""


class Liar:
    """A server on a UNIX socket; every connection runs the same script on the same memory."""

    def __init__(self, path: Path, script: Script) -> None:
        self.script = script
        self.memory = bytearray(script.size if script.size <= SIZE else 0)
        self.connections = 0
        self.farewells = 0
        self.asked: list[Asked] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def drop(self) -> None:
        """Cut every connection."""
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._open = []

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(10)
            self.connections += 1
            self._open.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(_Gone, OSError):
            sock.sendall(self.script.greeting.removesuffix(HANG_UP))
            if self.script.greeting.endswith(HANG_UP):
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1)
                return
            if self.script.greeting.startswith(NEWSTYLE[:16]) and len(self.script.greeting) == 18:
                structured = self._haggle(sock)
            elif self.script.greeting.startswith(OLDSTYLE):
                structured = False
            else:
                sock.recv(1)
                return
            self._transmit(sock, structured)

    def _haggle(self, sock: socket.socket) -> bool:
        zeroes = b"" if take(sock, 4)[3] & 2 else bytes(124)
        structured = False
        while True:
            option, length = struct.unpack(">8xII", take(sock, 16))
            take(sock, length)
            if option == ABORT:
                self.farewells += 1
                raise _Gone
            answer = self.script.options.get(option, self.script.polite(option))
            if answer.endswith(HANG_UP):
                sock.sendall(answer.removesuffix(HANG_UP))
                raise _Gone
            sock.sendall(answer + zeroes if option == EXPORT_NAME else answer)
            structured = structured or (option == STRUCTURED and answer == reply(STRUCTURED, ACK))
            if option == EXPORT_NAME or (option == GO and answer.endswith(reply(GO, ACK))):
                return structured

    def _transmit(self, sock: socket.socket, structured: bool) -> None:
        while True:
            flags, command, cookie, offset, length = struct.unpack(">4xHHQQI", take(sock, 28))
            if command == DISC:
                self.farewells += 1
                raise _Gone
            asked = Asked(command, flags, cookie, offset, length, take(sock, length) if command == WRITE else b"")
            self.asked.append(asked)
            answer = self.script.answer(asked)
            if answer is None:
                answer = self._honest(asked, structured)
            if answer.endswith(HANG_UP):
                sock.sendall(answer.removesuffix(HANG_UP))
                raise _Gone
            sock.sendall(answer)

    def _honest(self, asked: Asked, structured: bool) -> bytes:
        if asked.command == WRITE:
            self.memory[asked.offset : asked.offset + asked.length] = asked.data
        if asked.command == ZERO:
            self.memory[asked.offset : asked.offset + asked.length] = bytes(asked.length)
        if asked.command == READ:
            data = bytes(self.memory[asked.offset : asked.offset + asked.length])
            return data_chunk(asked.cookie, asked.offset, data) if structured else simple(asked.cookie, 0, data)
        if asked.command == STATUS:
            return chunk(asked.cookie, 5, struct.pack(">III", 1, asked.length, 0))
        return simple(asked.cookie)


def take(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise _Gone
        data += piece
    return data


@contextlib.contextmanager
def lying(path: Path, script: Script) -> Iterator[Liar]:
    """Serve `script` at `path`."""
    liar = Liar(path, script)
    try:
        yield liar
    finally:
        liar.close()
        path.unlink()
