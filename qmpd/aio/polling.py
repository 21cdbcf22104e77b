"""A selector that looks a little longer before it sleeps.

A client that waits for each reply sends its next request some ten microseconds after it; to put a
processor to sleep and wake it costs more than that. So after a short wait the next one begins with looking
again and again, as the event loops of QEMU's iothreads do (their poll-max-ns). A loop that is left alone
for longer than LOOK sleeps at once.
"""

from __future__ import annotations

import os
import select
import selectors
import time

LOOK = 60_000
"""Nanoseconds of looking before a sleep; the reply of a client that is awake comes within that."""

EVENTS = 64
"""Descriptors told at a time; the others are told by the next call."""


class PollingSelector(selectors.EpollSelector):
    """An epoll selector for a loop whose descriptors are answered quickly."""

    def __init__(self) -> None:
        super().__init__()
        self._look = select.epoll.fromfd(os.dup(self.fileno()))  # a second handle of the same set
        self._looking = False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See `selectors.BaseSelector.select`."""
        found = self._look.poll(0, EVENTS)
        if not found and (timeout is None or timeout > 0):
            began = now = time.perf_counter_ns()
            if self._looking:
                end = began + (LOOK if timeout is None else min(LOOK, int(timeout * 1e9)))
                while now < end and not found:
                    os.sched_yield()
                    found = self._look.poll(0, EVENTS)
                    now = time.perf_counter_ns()
            if not found:
                ready = super().select(timeout)
                self._looking = time.perf_counter_ns() - now < LOOK
                return ready
        ready = []
        for descriptor, event in found:
            mask = (event & ~select.EPOLLIN and selectors.EVENT_WRITE) | (
                event & ~select.EPOLLOUT and selectors.EVENT_READ
            )
            try:
                key = self.get_key(descriptor)
            except KeyError:
                continue
            ready.append((key, mask & key.events))
        return ready

    def close(self) -> None:
        """See `selectors.BaseSelector.close`."""
        self._look.close()
        super().close()
