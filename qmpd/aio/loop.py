"""Data loops: event loops for I/O, apart from the monitor's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from qmpd.aio.polling import PollingSelector

T = TypeVar("T")


class Runner(Protocol):
    """Where the I/O of a graph runs."""

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and return its result; cancelling the caller does not stop it."""


class InlineLoop:
    """The caller's own loop: for programs without a monitor, and for tests."""

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end as a task of the running loop."""
        return await asyncio.shield(asyncio.ensure_future(work))


class DataLoop:
    """An asyncio loop in a thread of its own.

    Work crosses over once per call (`run`), which for a batch means once per batch. `close`
    returns when the thread has ended; nothing may be running then.
    """

    def __init__(self, name: str = "data") -> None:
        self.loop = asyncio.SelectorEventLoop(PollingSelector())
        self._thread = threading.Thread(target=self._main, name=f"qmpd-{name}", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    @property
    def is_current(self) -> bool:
        """True in code that this loop runs."""
        return threading.current_thread() is self._thread

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on this loop, from any loop, and return its result or raise its exception.

        Work that has begun runs to its end: cancelling the caller only drops the result.
        """
        if self.is_current:
            return await work
        done = asyncio.run_coroutine_threadsafe(work, self.loop)
        return await asyncio.shield(asyncio.wrap_future(done))

    def close(self) -> None:
        """Stop the loop and wait for its thread."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
