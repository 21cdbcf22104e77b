"""Events: emitted by cores and plug-ins, heard by the monitors.

Names and members are those of the schema; `emit` may be called from any thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple


class Event(NamedTuple):
    """One event as it goes to every negotiated client.

    data       wire members, None if the event has none
    timestamp  seconds since the epoch
    """

    name: str
    data: dict[str, Any] | None
    timestamp: float

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object of the event, timestamp first as the reference sends it."""
        seconds, fraction = divmod(self.timestamp, 1)
        message: dict[str, Any] = {
            "timestamp": {"seconds": int(seconds), "microseconds": int(fraction * 1_000_000)},
            "event": self.name,
        }
        if self.data is not None:
            message["data"] = self.data
        return message


Listener = Callable[[Event], None]


class EventBus:
    """Hands each event to every subscriber, on the loop of the monitor, in order of emission.

    known   names in the schema root of this program; an event that is not in it is not sent.
            None means all (tests).
    """

    def __init__(self, known: Collection[str] | None = None) -> None:
        self._known = None if known is None else frozenset(known)
        self._listeners: list[Listener] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop on which listeners are called; other threads' events are sent there."""
        self._loop = loop

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with every event from now on; returns the function that ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def emit(self, name: str, /, **data: Any) -> None:
        """Send the event `name`; keyword arguments are its members, `_` standing for `-`.

        A member whose value is None is left out.
        """
        if self._known is not None and name not in self._known:
            return
        members = {key.replace("_", "-"): value for key, value in data.items() if value is not None}
        event = Event(name, members if data else None, time.time())
        if self._loop is None or self._loop is _running_loop():
            self._deliver(event)
        else:
            self._loop.call_soon_threadsafe(self._deliver, event)

    def _deliver(self, event: Event) -> None:
        for listener in list(self._listeners):
            listener(event)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
