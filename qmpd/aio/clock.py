"""Time as the monitor sees it; tests put a clock of their own in its place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A call that is still to come."""

    def cancel(self) -> None:
        """Forget the call; nothing happens if it was made already."""


class Clock(Protocol):
    """Seconds that only go forward, and calls at a later time."""

    def now(self) -> float:
        """Return seconds since some fixed moment."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` on the running loop in `delay` seconds."""


class LoopClock:
    """The real one, by the running event loop."""

    def now(self) -> float:
        """Return the monotonic clock, in seconds."""
        return time.monotonic()

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` on the running loop in `delay` seconds."""
        return asyncio.get_running_loop().call_later(delay, callback)
