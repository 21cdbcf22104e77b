"""Leaky buckets: how long a request has to wait so that the limits of its group hold.

Model: throttle_compute_wait and throttle_account (QEMU util/throttle.c). Every limit is a bucket that
fills with each request and leaks at the allowed rate. All members of a group share one state; its
queue is first come, first served. It is used on one data loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from qmpd.block.batch import Batch
from qmpd.block.throttle_limits import BUCKETS, merge, no_limits
from qmpd.errors import CommandError
from qmpd.qom.protocols import Throttler
from qmpd.qom.tree import ObjectTree


@dataclass(slots=True, eq=False, repr=False)
class Bucket:
    """One limit.

    rate    units a second that leak, 0 without limit      burst   units a second while it lasts, 0: none
    length  seconds that a burst may last                  level   units now in the bucket
    """

    rate: float = 0
    burst: float = 0
    length: float = 1
    level: float = 0
    burst_level: float = 0

    def leak(self, elapsed: float) -> None:
        """Let `elapsed` seconds pass."""
        self.level = max(0.0, self.level - self.rate * elapsed)
        if self.length > 1:
            self.burst_level = max(0.0, self.burst_level - self.burst * elapsed)

    def wait(self) -> float:
        """Return the seconds until there is room for a request."""
        if not self.rate:
            return 0.0
        # Without burst a tenth of a second's worth may be in the bucket, or every other request would wait.
        room = self.burst * self.length if self.burst else self.rate / 10
        if self.level > room:
            return (self.level - room) / self.rate
        if self.length > 1 and self.burst_level > self.burst / 10:
            return (self.burst_level - self.burst / 10) / self.burst
        return 0.0

    def fill(self, units: float) -> None:
        """Put one request in."""
        self.level += units
        if self.length > 1:
            self.burst_level += units


class ThrottleState:
    """The buckets and the queue of one group."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._then = clock()
        self.buckets = {name: Bucket() for name in BUCKETS}
        self.op_size = 0
        self._queue: deque[tuple[asyncio.Future[None], bool, int]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def configure(self, limits: Mapping[str, int]) -> None:
        """Take new limits; what is in the buckets stays."""
        for name, bucket in self.buckets.items():
            bucket.rate, bucket.burst = limits[name], limits[f"{name}-max"]
            bucket.length = limits[f"{name}-max-length"]
        self.op_size = limits["iops-size"]

    def _affected(self, writing: bool) -> list[Bucket]:
        kind = "write" if writing else "read"
        return [self.buckets[f"{unit}-{what}"] for unit in ("bps", "iops") for what in ("total", kind)]

    def delay(self, writing: bool) -> float:
        """Return the seconds that the next request has to wait."""
        now = self._clock()
        elapsed, self._then = now - self._then, now
        for bucket in self.buckets.values():
            bucket.leak(elapsed)
        return max(bucket.wait() for bucket in self._affected(writing))

    def account(self, writing: bool, length: int) -> None:
        """Count a request of `length` bytes that goes on now."""
        operations = max(1.0, length / self.op_size) if self.op_size else 1.0
        total_bytes, kind_bytes, total_operations, kind_operations = self._affected(writing)
        total_bytes.fill(length)
        kind_bytes.fill(length)
        total_operations.fill(operations)
        kind_operations.fill(operations)

    def may_pass(self, writing: bool, length: int) -> bool:
        """Count the request and return True if it need not wait."""
        if self._queue or self.delay(writing) > 0:
            return False
        self.account(writing, length)
        return True

    async def limits_changed(self, limits: Mapping[str, int]) -> None:
        """Take new limits and look again at what waits under the old ones; on the data loop."""
        self.configure(limits)
        if self._timer is not None:
            self._timer.cancel()
            self._expired()

    async def in_time(self, batch: Batch, *, writing: bool, free: Callable[[], bool]) -> AsyncIterator[Batch]:
        """Yield the requests when they may go: those that need not wait for one another together.

        free  asked before each request: True lets it go at once (a drain)
        """
        ready = Batch()
        for request in batch:
            length = len(request.view)
            if not free() and not self.may_pass(writing, length):
                if ready:
                    yield ready
                    ready = Batch()
                if not free():
                    await self.admit(writing, length)
            ready.append(request)
        if ready:
            yield ready

    async def admit(self, writing: bool, length: int) -> None:
        """Wait until the request may go on, and count it."""
        if self.may_pass(writing, length):
            return
        future = asyncio.get_running_loop().create_future()
        self._queue.append((future, writing, length))
        self._arm()
        await future

    def _arm(self) -> None:
        if self._timer is None and self._queue:
            delay = self.delay(self._queue[0][1])
            self._timer = asyncio.get_running_loop().call_later(delay, self._expired)

    def _expired(self) -> None:
        self._timer = None
        while self._queue:
            future, writing, length = self._queue[0]
            if self.delay(writing) > 0:
                break
            self._queue.popleft()
            if not future.done():
                self.account(writing, length)
                future.set_result(None)
        self._arm()

    def release_all(self) -> None:
        """Let everything that waits go on at once: for a drain, or new limits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue:
            future, writing, length = self._queue.popleft()
            if not future.done():
                self.account(writing, length)
                future.set_result(None)


_states: WeakKeyDictionary[Throttler, ThrottleState] = WeakKeyDictionary()


def find_group(objects: ObjectTree, name: str) -> tuple[Throttler, ThrottleState]:
    """Return the group object `name` and the state that its members share. Raises CommandError."""
    group: object = objects.get(name)
    if not isinstance(group, Throttler):
        raise CommandError(f"Throttle group '{name}' does not exist")
    state = _states.get(group)
    if state is None:
        state = _states[group] = ThrottleState()
        state.configure(group.wire_limits())
    return group, state


class BackendGroup:
    """A throttle group that `block_set_io_throttle` made, with the backends in it.

    name    as shown in query-block        limits  members of ThrottleLimits
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.limits = no_limits()
        self.state = ThrottleState()
        self.users = 0

    def change(self, limits: Mapping[str, int]) -> None:
        """Take new limits. Raises CommandError if they contradict each other."""
        self.limits = merge(no_limits(), limits)
        self.state.configure(self.limits)
        self.state.release_all()
