"""What goes out: the queue of one client, and the events on their way to all of them.

The reference limits some events to one per second and sends the newest of those held back; slow
readers are this daemon's own concern (ARCHITECTURE, How one QMP command travels).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from qmpd.aio.clock import Clock, Timer
from qmpd.aio.unix import Connection
from qmpd.events import Event
from qmpd.protocols.qmp import to_wire

_log = logging.getLogger("qmpd.monitor")

SOFT_LIMIT = 10 << 20
"""Unsent bytes from which on a client's commands wait and its rate-limited events are merged."""

HARD_LIMIT = 64 << 20
"""Unsent bytes beyond which a client is closed."""

PATIENCE = 60.0
"""Seconds without progress above the soft limit after which a client is closed."""

_RATE = 1.0
_RATE_LIMITED = {
    "BALLOON_CHANGE": None,
    "BLOCK_IO_ERROR": "qom-path",
    "HV_BALLOON_STATUS_REPORT": None,
    "MEMORY_DEVICE_SIZE_CHANGE": "qom-path",
    "QUORUM_FAILURE": None,
    "QUORUM_REPORT_BAD": "node-name",
    "RTC_CHANGE": None,
    "VSERPORT_CHANGE": "id",
    "WATCHDOG": None,
}
"""Events of which one goes out per second; those with different values of the member named count apart."""

EventKey = tuple[str, Any]


def rate_key(event: Event) -> EventKey | None:
    """Return what events this one may be merged with, None if it is never held back."""
    if event.name not in _RATE_LIMITED:
        return None
    member = _RATE_LIMITED[event.name]
    return event.name, None if member is None else (event.data or {}).get(member)


class RateLimiter:
    """Passes events on, of the rate-limited ones the first and then the newest of each second."""

    def __init__(self, deliver: Callable[[Event], None], clock: Clock) -> None:
        self._deliver = deliver
        self._clock = clock
        self._held: dict[EventKey, Event | None] = {}
        self._timers: dict[EventKey, Timer] = {}

    def __call__(self, event: Event) -> None:
        """Take one event."""
        key = rate_key(event)
        if key is None:
            self._deliver(event)
        elif key in self._held:
            self._held[key] = event
        else:
            self._deliver(event)
            self._start(key)

    def _start(self, key: EventKey) -> None:
        self._held[key] = None
        self._timers[key] = self._clock.call_later(_RATE, lambda: self._expired(key))

    def _expired(self, key: EventKey) -> None:
        event = self._held.pop(key)
        del self._timers[key]
        if event is not None:
            self._deliver(event)
            self._start(key)

    def close(self) -> None:
        """Forget what is held back."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._held.clear()


class Outbox:
    """The bytes that one client has still to read."""

    def __init__(self, connection: Connection, clock: Clock, label: str, pressure: Callable[[bool], None]) -> None:
        """`pressure(True)` is called when the soft limit is passed, `pressure(False)` when it no longer is."""
        self._connection = connection
        self._clock = clock
        self._label = label
        self._pressure = pressure
        self._slow = False
        self._merged: dict[EventKey, Event] = {}
        self._watch: Timer | None = None
        self._progress = 0.0

    def send(self, data: bytes) -> None:
        """Queue one message."""
        connection = self._connection
        connection.send(data)
        if connection.unsent <= SOFT_LIMIT:
            return
        connection.flush()
        if connection.unsent > HARD_LIMIT:
            self._give_up(f"{connection.unsent} bytes unread")
        elif connection.unsent > SOFT_LIMIT and not self._slow:
            self._slow = True
            self._progress = self._clock.now()
            self._watch = self._clock.call_later(PATIENCE, self._check)
            self._pressure(True)

    def send_event(self, event: Event, wire: bytes) -> None:
        """Queue an event, whose bytes are `wire`; merge it with its like if the client is slow."""
        key = rate_key(event) if self._slow else None
        if key is None:
            self.send(wire)
        else:
            self._merged[key] = event

    def room_made(self) -> None:
        """The client has read something."""
        if not self._slow:
            return
        self._progress = self._clock.now()
        if self._connection.unsent > SOFT_LIMIT:
            return
        self._slow = False
        self._stop_watch()
        merged, self._merged = list(self._merged.values()), {}
        for event in merged:
            self.send(to_wire(event.to_wire()))
        if not self._slow:
            self._pressure(False)

    def close(self) -> None:
        """Stop watching; the connection is gone."""
        self._stop_watch()
        self._merged.clear()

    def _stop_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _check(self) -> None:
        idle = self._clock.now() - self._progress
        if idle >= PATIENCE:
            self._give_up(f"nothing read for {idle:.0f} s")
        else:
            self._watch = self._clock.call_later(PATIENCE - idle, self._check)

    def _give_up(self, why: str) -> None:
        _log.warning("client of '%s' closed: it does not read (%s)", self._label, why)
        self._connection.close(why)
