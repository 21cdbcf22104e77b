"""One connection of the NBD driver: the socket, plain or TLS, from connecting to the last reply.

Lives on the data loop. What is read goes from the socket straight to where the request wants it; what is written is
taken from where it lies. TLS runs over the same calls.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qmpd import trace
from qmpd.aio.connect import connect
from qmpd.errors import CommandError
from qmpd.protocols.nbd import Command
from qmpd.protocols.nbd_client import ClientHandshake, ClientStage, Negotiated, ProtocolError
from qmpd.protocols.nbd_replies import Pending, Transmission
from qmpd.units import KiB, MiB

log = logging.getLogger(__name__)
_trace = trace.flag("nbd.client")

RECEIVE = 64 * KiB
"""Bytes of the buffer that replies are received into; data of long reads goes past it."""

DIRECT = 16 * KiB
"""Bytes that a read must still lack for them to be received where they belong."""

TURN = 8 * MiB
"""Bytes received in one turn before the loop sees to the others."""

SEND_PARTS = 256
"""Pieces handed to one sendmsg."""

TLS_CHUNK = 64 * KiB
"""Bytes joined before they are encrypted: a record of its own for each header would be waste."""

HANDSHAKE_SECONDS = 60.0
"""How long a server may take for the handshake: there is no end to it in the protocol."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an export is, and how to get there.

    server    a validated SocketAddress          context   the metadata context to ask for
    tls       makes the context for TLS, None for a connection in the clear
    hostname  what the server's certificate must be for, None if nothing is expected
    """

    server: Mapping[str, Any]
    export: bytes
    context: bytes
    tls: Callable[[], ssl.SSLContext] | None = None
    hostname: str | None = None


async def negotiate(place: Place) -> tuple[socket.socket, Negotiated]:
    """Connect and agree with the server. Raises CommandError."""
    sock = await connect(place.server)
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            return await _negotiate(sock, place)
    except TimeoutError as error:
        sock.close()
        raise CommandError(f"NBD server did not finish the handshake within {HANDSHAKE_SECONDS:.0f} seconds") from error


async def _negotiate(sock: socket.socket, place: Place) -> tuple[socket.socket, Negotiated]:
    """Hold the conversation. The socket is closed if anything goes wrong."""
    handshake = ClientHandshake(place.export, place.context, tls=place.tls is not None)
    try:
        while handshake.stage is not ClientStage.READY:
            await _send(sock, handshake.take_output())
            data = await _receive(sock)
            if not data:
                raise handshake.end_of_stream()
            handshake.feed(data)
            if handshake.stage is ClientStage.STARTTLS:
                assert place.tls is not None
                sock = await _start_tls(sock, place.tls(), place.hostname)
                handshake.tls_started()
        assert handshake.result is not None
        return sock, handshake.result
    except ProtocolError as error:
        try:
            sock.send(handshake.take_output())
        except OSError:
            pass  # the farewell is a courtesy
        sock.close()
        raise CommandError(str(error), hint=error.hint) from error
    except ssl.SSLError as error:
        sock.close()
        raise CommandError(f"Unable to negotiate TLS with the NBD server: {error.reason or error}") from error
    except OSError as error:
        sock.close()
        what = "Unable to write to socket" if isinstance(error, BrokenPipeError) else "Unable to read from socket"
        raise CommandError(f"{what}: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise


async def _start_tls(sock: socket.socket, context: ssl.SSLContext, hostname: str | None) -> ssl.SSLSocket:
    secure = context.wrap_socket(sock, server_hostname=hostname, do_handshake_on_connect=False)
    try:
        await _when_ready(secure, secure.do_handshake)
    except BaseException:
        secure.close()
        raise
    return secure


async def _when_ready(sock: socket.socket, call: Callable[[], Any]) -> Any:
    """Call what may not be able to go on yet, as soon and as often as it takes."""
    while True:
        try:
            return call()
        except (ssl.SSLWantReadError, BlockingIOError):
            await _ready(sock, writing=False)
        except ssl.SSLWantWriteError:
            await _ready(sock, writing=True)


async def _ready(sock: socket.socket, *, writing: bool) -> None:
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    add(sock.fileno(), wake)
    try:
        await future
    finally:
        remove(sock.fileno())


async def _receive(sock: socket.socket) -> bytes:
    data = await _when_ready(sock, lambda: sock.recv(4 * KiB))
    assert isinstance(data, bytes)
    return data


async def _send(sock: socket.socket, data: bytes) -> None:
    """Send what is a few kilobytes at most; a server that does not even take that is waited for."""
    while data:
        try:
            data = data[sock.send(data) :]
        except (ssl.SSLWantWriteError, BlockingIOError):
            await _ready(sock, writing=True)
        except ssl.SSLWantReadError:
            await _ready(sock, writing=False)


class Link:
    """The transmission phase of one connection, on the running loop.

    lost   called once, with the reason, when the connection is of no more use; not after `close`
    """

    def __init__(self, sock: socket.socket, agreed: Negotiated, lost: Callable[[Exception], None]) -> None:
        self._sock, self._lost = sock, lost
        self._secure = isinstance(sock, ssl.SSLSocket)
        self._loop = asyncio.get_running_loop()
        self.transmission = Transmission(agreed)
        self._buffer = memoryview(bytearray(RECEIVE))
        self._filled = 0
        self._out: deque[memoryview | bytes] = deque()
        self._writing = self._closed = False
        self._loop.add_reader(sock.fileno(), self._readable)
        self._later = self._loop.call_soon(self._readable)

    # --- sending --------------------------------------------------------------------------------------

    def submit(self, pending: Pending) -> None:
        """Queue a request; `push` sends what is queued."""
        self._out.append(self.transmission.request(pending))
        if pending.command is Command.WRITE:
            assert pending.view is not None
            self._out.append(pending.view)
        if _trace:
            _trace.log("%s %d+%d cookie %d", pending.command.name, pending.offset, pending.length, pending.cookie)

    def push(self) -> None:
        """Send as much as the socket takes now, the rest as soon as it takes more."""
        if self._writing or self._closed:
            return
        try:
            while self._out:
                if self._secure:
                    self._send_secure()
                else:
                    self._sent(self._sock.sendmsg(list(islice(self._out, SEND_PARTS))))
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            self._writing = True
            self._loop.add_writer(self._sock.fileno(), self._writable)
        except OSError as error:
            self._end(error)

    def _writable(self) -> None:
        self._stop_writing()
        self.push()

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._sock.fileno())

    def _send_secure(self) -> None:
        """Encrypt and send one chunk. Until it has left it stays the first part, as TLS demands."""
        out = self._out
        if len(out) > 1 and len(out[0]) < TLS_CHUNK:
            parts: list[memoryview | bytes] = []
            total = 0
            while out and total < TLS_CHUNK:
                piece = out.popleft()
                if len(piece) > TLS_CHUNK - total:
                    out.appendleft(piece[TLS_CHUNK - total :])
                    piece = piece[: TLS_CHUNK - total]
                parts.append(piece)
                total += len(piece)
            out.appendleft(b"".join(parts))
        elif len(out[0]) > TLS_CHUNK:
            piece = out.popleft()
            out.appendleft(piece[TLS_CHUNK:])
            out.appendleft(piece[:TLS_CHUNK])
        self._sent(self._sock.send(out[0]))

    def _sent(self, count: int) -> None:
        out = self._out
        while count:
            piece = out[0]
            if len(piece) > count:
                out[0] = memoryview(piece)[count:]
                return
            count -= len(piece)
            out.popleft()

    # --- receiving ------------------------------------------------------------------------------------

    def _readable(self) -> None:
        done: list[Pending] = []
        try:
            self._receive(done)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except (OSError, ProtocolError) as error:
            self._answer(done)
            self._end(error)
            return
        self._answer(done)

    def _receive(self, done: list[Pending]) -> None:
        """Receive until there is no more or it is others' turn. Raises BlockingIOError, OSError, ProtocolError."""
        total = 0
        while not self._closed:
            if total >= TURN:
                # What TLS has decrypted already makes no socket readable.
                self._later = self._loop.call_soon(self._readable)
                return
            direct = self.transmission.direct
            if direct is not None and len(direct) >= DIRECT:
                count = self._sock.recv_into(direct)
                finished = self.transmission.received(count) if count else None
                if finished is not None:
                    done.append(finished)
            else:
                count = self._sock.recv_into(self._buffer[self._filled :])
                self._take(self._filled + count, done)
            if not count:
                raise ConnectionResetError("the server closed the connection")
            total += count

    def _take(self, filled: int, done: list[Pending]) -> None:
        used = self.transmission.consume(self._buffer[:filled], done)
        self._filled = filled - used
        if used and self._filled:
            self._buffer[: self._filled] = bytes(self._buffer[used:filled])

    @staticmethod
    def _answer(done: list[Pending]) -> None:
        for pending in done:
            pending.done(pending)

    # --- the end --------------------------------------------------------------------------------------

    def _end(self, error: Exception) -> None:
        if not self._closed:
            self._release()
            self._lost(error)

    def close(self) -> None:
        """Take leave of the server and close the socket; nothing may be under way."""
        if not self._closed:
            try:
                if not self._out:
                    self._sock.send(self.transmission.farewell())
            except OSError:
                pass  # a courtesy
            self._release()

    def _release(self) -> None:
        self._closed = True
        self._later.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._stop_writing()
        self._sock.close()
        self._out.clear()
