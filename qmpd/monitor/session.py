"""One client of the monitor: greeting, negotiation, requests in, replies out."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qmpd.aio.clock import Clock
from qmpd.aio.unix import MAX_FDS, Connection
from qmpd.errors import CommandNotFound
from qmpd.events import Event
from qmpd.monitor.outbox import Outbox
from qmpd.protocols.qmp import CommandFramer, to_wire

if TYPE_CHECKING:
    from qmpd.monitor.dispatch import Dispatcher

QUEUE_FULL = 512
"""Requests waiting from which on no more is read from the client."""

QUEUE_LOW = 64
"""Requests waiting at which reading goes on."""


class ClientSession:
    """A connection from its greeting to its end.

    chardev     id of the character device the client is connected to
    negotiated  True after qmp_capabilities: commands and events may pass
    oob         True if exec-oob was enabled
    requests    what the client asked for and is still to be done, in order
    """

    def __init__(
        self, sock: socket.socket, chardev: str, dispatcher: Dispatcher, greeting: bytes, clock: Clock
    ) -> None:
        self._chardev = chardev
        self._dispatcher = dispatcher
        self._framer = CommandFramer()
        self._fds: deque[int] = deque()
        self._slow = False
        self._full = False
        self.negotiated = False
        self.oob = False
        self.requests: deque[Any] = deque()
        self._connection = Connection(sock, self)
        self._outbox = Outbox(self._connection, clock, chardev, self._pressure)
        self._outbox.send(greeting)
        dispatcher.joined(self)

    @property
    def chardev(self) -> str:
        """Id of the character device the client is connected to."""
        return self._chardev

    @property
    def gone(self) -> bool:
        """True once the client can receive nothing more."""
        return self._connection.closed

    def negotiate(self, enable: Iterable[str]) -> None:
        """End the negotiation with these capabilities enabled. Raises CommandNotFound the second time."""
        if self.negotiated:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        self.oob = "oob" in enable
        self.negotiated = True

    def take_fd(self) -> int | None:
        """Return the oldest descriptor the client passed and nobody took yet; the caller closes it."""
        return self._fds.popleft() if self._fds else None

    def reply(self, data: bytes) -> None:
        """Send one reply; it is dropped if the client is gone."""
        self._outbox.send(data)

    def send_event(self, event: Event, wire: bytes) -> None:
        """Send an event, unless the client has not negotiated yet."""
        if self.negotiated:
            self._outbox.send_event(event, wire)

    def request_done(self) -> None:
        """Called by the dispatcher after each of the client's requests."""
        if self._full and len(self.requests) <= QUEUE_LOW:
            self._full = False
            self._read_if_wanted()

    def close(self, reason: str) -> None:
        """End the connection."""
        self._connection.close(reason)

    async def finish(self, patience: float) -> None:
        """Send what is queued, if the client reads it within `patience` seconds, and end the connection."""
        self._connection.pause_reading()
        await self._connection.drain(patience)
        self._connection.close("")

    def data_received(self, data: bytearray, fds: list[int]) -> None:
        """Take bytes of the client, and descriptors, of which the newest few are kept."""
        self._fds.extend(fds)
        while len(self._fds) > MAX_FDS:
            os.close(self._fds.popleft())
        dispatcher = self._dispatcher
        for request in self._framer.feed(data):
            if type(request) is dict and "exec-oob" in request and "execute" not in request:
                dispatcher.run_oob(self, request)
            else:
                self.requests.append(request)
        if self.requests:
            dispatcher.submit(self)
            if len(self.requests) >= QUEUE_FULL:
                self._full = True
                self._connection.pause_reading()

    def room_made(self) -> None:
        """The client has read something."""
        self._outbox.room_made()

    def connection_lost(self, reason: str) -> None:
        """The client is gone; the command it waits for runs on, those not begun are dropped."""
        self._outbox.close()
        self.requests.clear()
        while self._fds:
            os.close(self._fds.popleft())
        self._dispatcher.left(self)

    def _pressure(self, slow: bool) -> None:
        self._slow = slow
        self._read_if_wanted()

    def _read_if_wanted(self) -> None:
        if self._slow or self._full:
            self._connection.pause_reading()
        else:
            self._connection.resume_reading()


def greeting_line(version: dict[str, Any]) -> bytes:
    """Return the greeting, given the answer of query-version."""
    return to_wire({"QMP": {"version": version, "capabilities": ["oob"]}})
