"""One NBD client: its socket, from the greeting to the last reply.

Lives on the data loop. Requests are received into a buffer of our own, a whole receive at a time;
replies leave in one sendmsg per piece of work. A transport of asyncio would join what is written
(one copy of everything read), so the socket is watched here; TLS runs over the same calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Protocol

from qmpd import trace
from qmpd.aio import eager
from qmpd.aio.pool import PooledBuffer
from qmpd.exporting.nbd_direct import DirectReader, DirectWriter
from qmpd.exporting.nbd_limits import (
    HANDSHAKE_RECEIVE,
    IN_FLIGHT,
    LINGER,
    PAYLOAD_TURNS,
    READ_BATCH,
    RECEIVE,
    SEND_BUFFER,
    SEND_PARTS,
    SMALL_REQUEST,
    TLS_CHUNK,
    TURN,
    UNSENT,
)
from qmpd.exporting.nbd_target import NbdTarget
from qmpd.exporting.nbd_work import Lease, Work, Worker
from qmpd.protocols.nbd import Command, Directory, NbdError
from qmpd.protocols.nbd_handshake import Agreement, Handshake, Stage
from qmpd.protocols.nbd_transmission import Request, Requests

log = logging.getLogger(__name__)
_trace = trace.flag("nbd.request")


class Host(Directory, Protocol):
    """The server, as its connections see it."""

    def target(self, name: bytes) -> NbdTarget | None:
        """Return what the export `name` stands for."""

    def tls(self) -> ssl.SSLContext | None:
        """Return the context for TLS, None if clients are served in the clear."""

    def allowed(self, peer: ssl.SSLSocket) -> bool:
        """Say whether the client on the other end of a TLS session may go on."""

    def connection_closed(self, connection: Connection) -> None:
        """The connection is gone, and so is all that was in flight for it."""


class Connection:
    """A client of `host`, on the running loop."""

    def __init__(self, host: Host, sock: socket.socket, *, handshake_seconds: float | None) -> None:
        self._host = host
        self._sock = sock
        self._secure: ssl.SSLSocket | None = None
        self._loop = asyncio.get_running_loop()
        self._handshake: Handshake | None = Handshake(host, offer_tls=host.tls() is not None)
        self._target: NbdTarget | None = None
        self._worker: Worker | None = None
        self._requests: Requests | None = None
        self._direct: DirectReader | None = None
        self._direct_writer: DirectWriter | None = None
        self._buffer: PooledBuffer | None = None
        self._filled = 0
        self._partial: Request | None = None
        self._payload: PooledBuffer | None = None
        self._got = 0
        self._waiting: deque[Request] = deque()
        self._in_flight = 0
        self._working = 0
        self._out: deque[bytes | memoryview] = deque()
        self._queued = self._sent = 0
        self._to_release: deque[tuple[int, int, PooledBuffer | None]] = deque()
        self._pumping = False
        self._reader: Callable[[], None] | None = None
        self._writer: Callable[[], None] | None = None
        self._ending = self._closed = self._reported = False
        self.reason = ""
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._deadline = self._loop.call_later(handshake_seconds, self._too_slow) if handshake_seconds else None

    def start(self) -> None:
        """Greet the client."""
        self._send_handshake()
        self._watch(self._read_handshake)

    def __repr__(self) -> str:
        name = self._target.name.decode(errors="replace") if self._target else "handshake"
        return f"<nbd connection {name!r} in flight={self._in_flight} working={self._working} out={len(self._out)}>"

    # --- handshake --------------------------------------------------------------------------------

    def _too_slow(self) -> None:
        self._deadline = None
        self._close("the handshake took too long")

    def _read_handshake(self) -> None:
        handshake = self._handshake
        assert handshake is not None
        try:
            data = self._sock.recv(HANDSHAKE_RECEIVE)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError):
            return
        except OSError as error:
            self._close(str(error))
            return
        if not data:
            handshake.end_of_stream()
            self._close(handshake.reason)
            return
        handshake.feed(data)
        self._after_options(handshake)

    def _after_options(self, handshake: Handshake) -> None:
        agreement = handshake.agreement
        if handshake.stage is Stage.TRANSMISSION and agreement is not None:
            target = self._host.target(agreement.export.name)
            if target is None or not target.enter(self):
                self._close("the export went away")
                return
            self._target = target
        self._send_handshake()
        if self._closed:
            return
        if handshake.stage is Stage.CLOSED:
            self._end(handshake.reason)
        elif handshake.stage is Stage.STARTTLS:
            self._watch(self._shake_hands)
            self._start_tls()
        elif agreement is not None and self._target is not None:
            self._enter(agreement, self._target)
        elif self._secure is not None and self._secure.pending():
            self._loop.call_soon(self._again, self._read_handshake)

    def _send_handshake(self) -> None:
        assert self._handshake is not None
        self.reply(self._handshake.take_output())
        self._pump()

    def _start_tls(self) -> None:
        context = self._host.tls()
        if context is None:
            self._close("the TLS credentials went away")
            return
        try:
            self._secure = context.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:
            self._close(f"TLS: {error}")
            return
        self._sock = self._secure
        self._watch(self._shake_hands)
        self._shake_hands()

    def _shake_hands(self) -> None:
        secure, handshake = self._secure, self._handshake
        if secure is None or handshake is None or self._closed:
            return
        try:
            secure.do_handshake()
        except ssl.SSLWantReadError:
            self._watch_room(None)
            return
        except ssl.SSLWantWriteError:
            self._watch_room(self._shake_hands)
            return
        except (OSError, ValueError) as error:
            self._close(f"TLS handshake failed: {error}")
            return
        self._watch_room(None)
        if not self._host.allowed(secure):
            self._close("TLS x509 authz check denied the client")
            return
        handshake.tls_started()
        self._watch(self._read_handshake)
        self._read_handshake()

    def _enter(self, agreement: Agreement, target: NbdTarget) -> None:
        """Begin the transmission phase."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._handshake = None
        self._worker = Worker(target, agreement.style, agreement.contexts, self)
        contexts = [number for number, _ in agreement.contexts]
        size = agreement.export.size
        self._requests = Requests(agreement.style, size, read_only=target.read_only, contexts=contexts)
        if DirectReader.works():
            self._direct = DirectReader(target, agreement.style, size)
            self._direct_writer = DirectWriter(target, agreement.style)
        self._buffer = target.buffers.take(RECEIVE)
        rest = agreement.rest
        self._buffer.view[: len(rest)] = rest
        self._filled = len(rest)
        self._watch(self._read)
        if rest:
            self._decode()
            self._pump()
        elif self._secure is not None and self._secure.pending():
            self._loop.call_soon(self._again, self._read)

    # --- receiving --------------------------------------------------------------------------------

    def _watch(self, reader: Callable[[], None] | None) -> None:
        """Call `reader` when bytes arrive; None leaves them in the kernel."""
        if self._closed:
            return
        if reader is None:
            if self._reader is not None:
                self._loop.remove_reader(self._sock.fileno())
        elif reader != self._reader:
            self._loop.add_reader(self._sock.fileno(), reader)
        self._reader = reader

    def _again(self, reader: Callable[[], None]) -> None:
        """Read what TLS has decrypted already, of which the socket knows nothing."""
        if self._reader == reader:
            reader()

    def _read(self) -> None:
        """Receive once, or while a payload is under way as long as there is some of it."""
        for _ in range(PAYLOAD_TURNS):
            if not self._read_once() or self._payload is None or self._closed or self._reader is None:
                return

    def _read_once(self) -> bool:
        assert self._buffer is not None
        view = self._buffer.view[self._filled :] if self._filled else self._buffer.view
        try:
            if self._payload is None:
                count = self._sock.recv_into(view)
            elif self._secure is not None:
                count = self._sock.recv_into(self._payload.view[self._got :])
            else:
                count = self._sock.recvmsg_into((self._payload.view[self._got :], view))[0]
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError as error:
            self._close(str(error))
            return False
        if not count:
            self._end("" if not self._filled and self._payload is None else "client went away within a request")
            return False
        if self._payload is not None:
            count = self._take_payload(count)
        self._filled += count
        if count and not self._closed:
            self._decode()
        self._pump()
        if self._secure is not None and self._reader is not None and self._secure.pending():
            self._loop.call_soon(self._again, self._read)
        return True

    def _take_payload(self, count: int) -> int:
        """Count received bytes towards the payload that is awaited; return how many are beyond it."""
        payload, request = self._payload, self._partial
        assert payload is not None
        assert request is not None
        mine = min(count, request.length - self._got)
        self._got += mine
        if self._got == request.length:
            self._payload = self._partial = None
            request.payload, request.at = payload.view, 0
            if self._write_directly([request], payload.view):
                self._free(request.length, payload)
                return count - mine
            self._start(self._write([request], request.length, Lease(payload, given_up=True)))
        return count - mine

    def _decode(self) -> None:
        """Take every complete request out of the receive buffer; begin the writes, queue the rest."""
        buffer, requests, target = self._buffer, self._requests, self._target
        assert buffer is not None
        assert requests is not None
        assert target is not None
        filled, served = self._filled, 0
        self._filled = 0
        if self._direct is not None:
            served = self._serve_directly(self._direct, buffer.view[:filled])
            if served == filled or self._closed:
                return
        decoded = requests.decode(buffer.view[served:filled])
        rest = buffer.view[served + decoded.used : filled]
        if decoded.requests:
            writes = [one for one in decoded.requests if one.payload is not None]
            self._waiting.extend(one for one in decoded.requests if one.payload is None)
            if writes and not self._write_directly(writes, buffer.view[served:filled]):
                lease = Lease(buffer, given_up=False)
                self._in_flight += RECEIVE
                if self._start(self._write(writes, RECEIVE, lease)):
                    lease.given_up = True
                    self._buffer = target.buffers.take(RECEIVE)
        if self._closed:
            return
        if decoded.partial is not None:
            self._partial = decoded.partial
            self._in_flight += decoded.partial.length
            self._payload = target.buffers.take(decoded.partial.length)
            self._payload.view[: len(rest)] = rest
            self._got = len(rest)
        elif rest:
            self._filled = len(rest)
            (self._buffer or buffer).view[: len(rest)] = bytes(rest)
        if requests.finished:
            self._end(requests.violation)

    def _write_directly(self, requests: list[Request], received: memoryview) -> bool:
        """Carry out writes at once if that can be, their payload being in `received`."""
        if self._direct_writer is None:
            return False
        replies = self._direct_writer.write(requests, received)
        if replies is None:
            return False
        self.reply(*replies)
        return True

    def _serve_directly(self, direct: DirectReader, received: memoryview) -> int:
        """Answer the reads that `received` begins with, while the client takes them; returns the bytes used."""
        used, budget = 0, TURN
        while budget > 0 and not (self._out or self._waiting or self._ending or self._closed):
            served = direct.serve(received[used:] if used else received)
            if served is None:
                break
            count, buffer, replies = served
            used += count
            total = sum(map(len, replies))
            budget -= total
            self._in_flight += total
            self._out.extend(replies)
            self._queued += total
            self._to_release.append((self._queued, total, buffer))
            self._send()
        return used

    # --- work -------------------------------------------------------------------------------------

    async def _write(self, requests: list[Request], admitted: int, lease: Lease) -> None:
        assert self._worker is not None
        replies = await self._worker.write(requests)
        if lease.given_up:
            lease.buffer.release()
        self.replied(replies, admitted, None)

    def _start(self, work: Work) -> bool:
        """Run `work` until it waits; True if it has not ended."""
        self._working += 1
        try:
            task = eager.start(work, self._loop)
        except BaseException:
            self._working -= 1
            self._close("internal error, see log")
            raise
        if task is None:
            self._working -= 1
            return False
        task.add_done_callback(self._work_done)
        return True

    def _work_done(self, task: asyncio.Future[None]) -> None:
        self._working -= 1
        error = task.exception()
        if error is not None:
            log.error("a request of %r failed in a way that nobody expects", self, exc_info=error)
            self._close("internal error, see log")
        self._pump()

    def _start_some(self) -> int:
        """Start what waits, as far as one piece of reading goes; returns the bytes it asks for.

        0 if nothing may start now.
        """
        worker, waiting = self._worker, self._waiting
        if worker is None or not waiting or self._in_flight >= IN_FLIGHT or self._queued - self._sent >= UNSENT:
            return 0
        reads: list[Request] = []
        others: list[Request] = []
        wanted = 0
        while waiting and wanted < READ_BATCH:
            request = waiting.popleft()
            if request.refusal is not None:
                worker.refuse(request, *request.refusal)
            elif request.command == _READ and request.length:
                reads.append(request)
                wanted += request.length
            else:
                others.append(request)
        self._in_flight += wanted
        if reads:
            self._start(worker.read(reads, wanted))
        if others:
            cost = SMALL_REQUEST * len(others)
            self._in_flight += cost
            self._start(worker.others(others, cost))
        return wanted + SMALL_REQUEST

    # --- replies ----------------------------------------------------------------------------------

    def reply(self, *parts: bytes | memoryview) -> None:
        """Queue bytes; they leave together with whatever else is queued."""
        if self._closed:
            return
        for part in parts:
            if part:
                self._out.append(part)
                self._queued += len(part)

    def replied(self, parts: list[bytes | memoryview], admitted: int, buffer: PooledBuffer | None) -> None:
        """Queue the last replies of a piece of work; its buffer is free when they have left."""
        if self._closed:
            self._free(admitted, buffer)
            return
        self._out.extend(parts)
        self._queued += sum(map(len, parts))
        if buffer is None or self._sent == self._queued:
            self._free(admitted, buffer)
        else:
            self._to_release.append((self._queued, admitted, buffer))

    def _free(self, admitted: int, buffer: PooledBuffer | None) -> None:
        self._in_flight -= admitted
        if buffer is not None:
            buffer.release()

    def _pump(self) -> None:
        """Send what is ready and start what waits, until one of them has to wait."""
        if self._pumping:
            return
        self._pumping = True
        budget = TURN
        try:
            while not self._closed:
                if self._out:
                    self._send()
                if not self._waiting:
                    break
                started = self._start_some()
                if not started:
                    break
                budget -= started
                if budget <= 0:
                    self._loop.call_soon(self._pump)
                    break
        finally:
            self._pumping = False
        self._settle()

    def _send(self) -> None:
        out = self._out
        while out:
            try:
                count = self._send_secure(self._secure) if self._secure is not None else self._send_plain()
            except (BlockingIOError, InterruptedError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._watch_room(self._pump)
                return
            except OSError as error:
                self._close(str(error))
                return
            self._sent += count
            while count:
                length = len(out[0])
                if count < length:
                    out[0] = memoryview(out[0])[count:]
                    break
                count -= length
                out.popleft()
            while self._to_release and self._to_release[0][0] <= self._sent:
                _, admitted, buffer = self._to_release.popleft()
                self._free(admitted, buffer)
        if self._writer is not None:
            self._watch_room(None)

    def _send_plain(self) -> int:
        out = self._out
        return self._sock.sendmsg(out if len(out) <= SEND_PARTS else list(islice(out, SEND_PARTS)))

    def _send_secure(self, secure: ssl.SSLSocket) -> int:
        """Encrypt and send one chunk. Until it has left it stays the first part, as TLS demands."""
        out = self._out
        if len(out) > 1 and len(out[0]) < TLS_CHUNK:
            parts, total = [], 0
            while out and total < TLS_CHUNK:
                parts.append(out.popleft())
                total += len(parts[-1])
            out.appendleft(b"".join(parts))
        return secure.send(out[0])

    def _watch_room(self, writer: Callable[[], None] | None) -> None:
        """Call `writer` when the socket takes more; None for never."""
        if self._closed or writer == self._writer:
            return
        if writer is None:
            self._loop.remove_writer(self._sock.fileno())
        else:
            self._loop.add_writer(self._sock.fileno(), writer)
        self._writer = writer

    # --- end --------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Read or stop reading as the limits say, and finish what is to end."""
        if self._closed:
            if not self._working:
                self._report()
            return
        if self._requests is not None and not self._ending:
            full = self._in_flight >= IN_FLIGHT or bool(self._waiting)
            if full != (self._reader is None):
                self._watch(None if full else self._read)
                if not full and self._secure is not None:
                    self._loop.call_soon(self._again, self._read)
        if self._ending and not (self._working or self._waiting or self._out):
            self._close(self.reason)

    def _end(self, reason: str) -> None:
        """Take no more from the client; hang up when everything it asked for is answered."""
        if self._closed or self._ending:
            return
        self._ending, self.reason = True, reason
        self._watch(None)
        self._settle()

    def shut_down(self) -> None:
        """Take no more requests, finish those that were taken, and hang up."""
        if self._closed:
            return
        worker = self._worker
        while self._waiting and worker is not None:
            worker.refuse(self._waiting.popleft(), NbdError.ESHUTDOWN, "the export is being removed")
        self._loop.call_later(LINGER, self._close, "the export was removed")
        self._end("the export was removed")
        self._pump()

    def _close(self, reason: str) -> None:
        """Hang up now. Work in flight goes on, its replies are dropped."""
        if self._closed:
            return
        self._watch(None)
        self._watch_room(None)
        self._closed, self.reason = True, reason
        if _trace or reason:
            log.log(logging.INFO, "nbd client ended: %s", reason or "in order")
        if self._deadline is not None:
            self._deadline.cancel()
        if self._secure is not None:
            with contextlib.suppress(OSError, ValueError):
                self._secure.unwrap()  # says goodbye; the client's own goodbye is not waited for
        self._sock.close()
        self._out.clear()
        self._waiting.clear()
        for _, admitted, buffer in self._to_release:
            self._free(admitted, buffer)
        self._to_release.clear()
        if not self._working:
            self._report()

    def _report(self) -> None:
        """Give back what is left and tell the server; once, when nothing is in flight any more."""
        if self._reported:
            return
        self._reported = True
        for buffer in (self._buffer, self._payload):
            if buffer is not None:
                buffer.release()
        self._buffer = self._payload = None
        if self._target is not None:
            self._target.leave(self)
        self._host.connection_closed(self)


_READ = int(Command.READ)
