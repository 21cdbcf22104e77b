"""UNIX stream sockets of the monitor: listeners, and connections that can carry descriptors.

A transport of asyncio cannot receive descriptors, so a connection here watches its socket itself
and reads with `recvmsg`. Descriptors that arrive are close-on-exec and belong to the receiver.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol

_log = logging.getLogger("qmpd.aio.unix")

RECEIVE = 16 << 10
"""Bytes taken per read: what other clients have to wait for while they are parsed."""

MAX_FDS = 16
"""Descriptors taken per read; the kernel closes what exceeds it."""

BACKLOG = 128
"""Clients that may wait to be accepted."""

_ZEROES = memoryview(bytes(RECEIVE))
_CONTROL_SIZE = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class Receiver(Protocol):
    """Whoever owns a connection."""

    def data_received(self, data: bytearray, fds: list[int]) -> None:
        """Take the next bytes, zeroed afterwards as they may hold a passphrase, and the descriptors that came with
        them, which the receiver closes."""

    def room_made(self) -> None:
        """Some of what was to be sent has left."""

    def connection_lost(self, reason: str) -> None:
        """The connection is closed, for `reason` ("" if the peer ended it); called once."""


class Connection:
    """One connected stream socket on the running loop."""

    def __init__(self, sock: socket.socket, receiver: Receiver) -> None:
        self._sock = sock
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._received = bytearray(RECEIVE)
        self._pending: deque[memoryview] = deque()
        self._flush_due = False
        self._writing = False
        self._reading = False
        self._closed = False
        self.unsent = 0
        """Bytes handed to `send` and not yet taken by the kernel."""
        sock.setblocking(False)
        self.resume_reading()

    @property
    def closed(self) -> bool:
        """True once nothing can be sent or received any more."""
        return self._closed

    def pause_reading(self) -> None:
        """Leave the peer's bytes in the kernel until `resume_reading`."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock)

    def resume_reading(self) -> None:
        """Read again."""
        if not self._reading and not self._closed:
            self._reading = True
            self._loop.add_reader(self._sock, self._read)

    def send(self, data: bytes) -> None:
        """Queue `data`; what is sent in one turn of the loop leaves together."""
        if self._closed or not data:
            return
        self._pending.append(memoryview(data))
        self.unsent += len(data)
        if not self._flush_due and not self._writing:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Hand the kernel what it takes now."""
        self._flush_due = False
        before = self.unsent
        while self._pending and not self._closed:
            head = [self._pending.popleft() for _ in range(min(len(self._pending), 64))]
            try:
                sent = self._sock.sendmsg(head)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self.close("" if error.errno in (errno.EPIPE, errno.ECONNRESET) else os.strerror(error.errno or 0))
                return
            self.unsent -= sent
            for position, view in enumerate(head):
                if sent < len(view):
                    rest = [view[sent:], *head[position + 1 :]]
                    self._pending.extendleft(reversed(rest))
                    break
                sent -= len(view)
            else:
                continue
            break
        if self._closed:
            return
        if bool(self._pending) != self._writing:
            self._writing = bool(self._pending)
            if self._writing:
                self._loop.add_writer(self._sock, self.flush)
            else:
                self._loop.remove_writer(self._sock)
        if self.unsent < before:
            self._receiver.room_made()

    def _read(self) -> None:
        try:
            length, ancillary, _, _ = self._sock.recvmsg_into([self._received], _CONTROL_SIZE, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close("" if error.errno == errno.ECONNRESET else os.strerror(error.errno or 0))
            return
        fds = descriptors(ancillary) if ancillary else []
        if not length:
            for fd in fds:
                os.close(fd)
            self.close("")
            return
        data = self._received[:length]
        try:
            self._receiver.data_received(data, fds)
        finally:
            data[:] = self._received[:length] = _ZEROES[:length]

    def close(self, reason: str) -> None:
        """End the connection at once and tell the receiver why."""
        if self._closed:
            return
        self.pause_reading()
        if self._writing:
            self._loop.remove_writer(self._sock)
        self._closed = True
        self._pending.clear()
        self._sock.close()
        self._receiver.connection_lost(reason)

    async def drain(self, patience: float) -> None:
        """Wait until all is sent or the peer is gone, for `patience` seconds without progress at most."""
        while not self._closed:
            before = self.unsent
            self.flush()
            if not self.unsent:
                return
            if self.unsent == before:
                if patience <= 0:
                    return
                patience -= 0.01
            await asyncio.sleep(0.01)


def descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors that came with a `recvmsg`; they belong to the caller."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def peer_uid(sock: socket.socket) -> int:
    """Return the user id of the process that connected."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", packed)
    return int(uid)


def bind_listener(path: str) -> socket.socket:
    """Return a socket that listens at `path`, which only this user (and root) can open.

    A socket that nobody serves any more is replaced. Raises OSError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), 0o600)  # before bind, so that the name never exists with another mode
        _remove_stale(path)
        sock.bind(path)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    """Remove a socket file at `path`; anything else there makes the following bind fail."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


class Listener:
    """Accepts clients of one listening socket, as many as come."""

    def __init__(
        self, sock: socket.socket, accepted: Callable[[socket.socket], None], *, allowed_uids: frozenset[int] | None
    ) -> None:
        """`allowed_uids` None leaves the question who may connect to whoever made the socket."""
        self._sock = sock
        self._accepted = accepted
        self._allowed = allowed_uids
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(sock, self._accept)

    def _accept(self) -> None:
        try:
            client, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            _log.error("cannot accept a client: %s", os.strerror(error.errno))
            self._loop.remove_reader(self._sock)
            self._loop.call_later(1.0, self._resume)
            return
        if self._allowed is not None and (uid := peer_uid(client)) not in self._allowed:
            _log.warning("refused a client with user id %d", uid)
            client.close()
            return
        self._accepted(client)

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """Accept no more."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()
