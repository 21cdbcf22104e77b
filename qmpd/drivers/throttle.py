"""throttle: a filter that holds requests back so that the limits of a throttle group hold.

Options: BlockdevOptionsThrottle (qapi/block-drivers.json).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.change import Transaction
from qmpd.block.child import Child
from qmpd.block.filter import FilterNode
from qmpd.block.node import ReopenStep
from qmpd.block.options import NodeOptions
from qmpd.block.throttle_group import find_group
from qmpd.qapi.registry import driver


@dataclass(frozen=True, slots=True)
class ThrottleOptions:
    """BlockdevOptionsThrottle.

    throttle_group  id of the throttle-group object
    """

    file: Child
    throttle_group: str


@driver("throttle", schema="BlockdevOptionsThrottle", options=ThrottleOptions)
class ThrottleNode(FilterNode):
    """A member of a throttle group."""

    strong_options = ("throttle-group",)
    can_compress = True
    reopens = True
    reopen_takes = ("throttle-group",)

    async def open(self, options: ThrottleOptions) -> None:
        """Join the group."""
        self.group, self.state = find_group(self.graph.objects, options.throttle_group)
        self.attach_file(options.file)
        self._drains = 0
        self._changing: set[asyncio.Task[None]] = set()
        self.group.join(self)

    async def prepare_reopen(self, options: ThrottleOptions, generic: NodeOptions) -> ReopenStep:
        """Find the other group, which the node joins in place of this one."""
        group, state = find_group(self.graph.objects, options.throttle_group)

        def step(tran: Transaction) -> None:
            old = self.group, self.state

            def restore() -> None:
                group.leave(self)
                self.group, self.state = old
                self.group.join(self)

            self.group.leave(self)
            self.group, self.state = group, state
            group.join(self)
            tran.on_undo(restore)

        return step

    async def close(self) -> None:
        """Leave the group."""
        self.group.leave(self)

    def limits_changed(self) -> None:
        """(ThrottleMember) Take the group's new limits."""
        work = self.graph.runner.run(self.state.limits_changed(self.group.wire_limits()))
        task = asyncio.get_running_loop().create_task(work)
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)

    def drained_begin(self) -> None:
        """Let everything go at once, and hold nothing back until the drain ends."""
        self._drains += 1
        self.state.release_all()

    def drained_end(self) -> None:
        """Hold requests back again."""
        self._drains -= 1

    async def preadv(self, batch: Batch) -> None:
        """Read, as fast as the group may."""
        async for part in self.state.in_time(batch, writing=False, free=self._free):
            await self.file.preadv(part)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write, as fast as the group may."""
        async for part in self.state.in_time(batch, writing=True, free=self._free):
            await self.file.pwritev(part, flags)
        self.size = self.file.size

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero; counted like a write of that length."""
        await self._admit(True, length)
        await super().pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        """Discard; counted like a write of that length."""
        await self._admit(True, length)
        await super().pdiscard(offset, length)

    def _free(self) -> bool:
        return bool(self._drains)

    async def _admit(self, writing: bool, length: int) -> None:
        if not self._drains:
            await self.state.admit(writing, length)
