"""Jobs that work on block nodes: listed by query-block-jobs, announced by BLOCK_JOB_* events.

Model: blockjob.c of QEMU.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, ClassVar, TypeVar

from qmpd.block import insertion
from qmpd.block.backend import BlockBackend
from qmpd.block.child import Child
from qmpd.block.node import BlockNode
from qmpd.block.perm import ChildRole, Perm
from qmpd.errors import CommandError
from qmpd.jobs.job import Job, Status

T = TypeVar("T")

NAP = 0.1
"""Seconds at most between two looks at whether a job that is ahead of its speed was paused or cancelled."""


class BlockJob(Job):
    """A job with a device name, a speed limit and block job events.

    speed      bytes per second at most, 0 without limit
    io_status  how its requests go ("ok", "failed", "nospace"): what made it pause
    """

    is_block: ClassVar[bool] = True
    stays_at_node: ClassVar[bool] = True

    def __init__(self, *args: Any, speed: int = 0, **named: Any) -> None:
        super().__init__(*args, **named)
        self.speed = speed
        self.io_status = "ok"
        self.ignored: OSError | None = None
        """The first error that was ignored: something was left out."""
        self.held: list[Child] = []
        """The edges to the nodes it relies on."""
        self._backends: list[BlockBackend] = []
        self._paced = (0.0, 0)

    # --- backends -----------------------------------------------------------------------------------

    def new_backend(self, node: BlockNode, perm: Perm, shared: Perm, *, internal: bool = False) -> BlockBackend:
        """Return a backend on a node, which goes with the job at the latest. Raises PermissionConflict.

        internal   it is on a filter of the job's own, and does not count as a use of that node
        """
        backend = BlockBackend(node.graph, self.describe_parent, perm, shared)
        backend.internal = internal
        self._backends.append(backend)
        backend.insert(node)
        return backend

    async def drop_backends(self) -> None:
        """End all backends of the job."""
        while self._backends:
            await self._backends.pop().remove()

    # --- nodes ------------------------------------------------------------------------------------

    def hold(self, name: str, node: BlockNode, shared: Perm = Perm.ALL) -> None:
        """Keep a node from going, and commands from changing it, until the job has ended. Raises PermissionConflict.

        shared   what others may do to it meanwhile
        """
        with node.graph.change() as tran:
            edge = tran.attach(self, name, ChildRole.NONE, node, Perm.NONE, shared)
        node.blockers.insert(0, self._blocker)
        self.held.append(edge)

    async def let_go(self) -> None:
        """Undo every `hold`."""
        while self.held:
            node = self.held[-1].node
            self.release(node)
            await node.graph.drop_unreferenced(node)

    def release(self, node: BlockNode) -> None:
        """Undo the `hold` on one node; it stays, even if nobody needs it any more."""
        for edge in [one for one in self.held if one.node is node]:
            self.held.remove(edge)
            node.blockers.remove(self._blocker)
            with node.graph.change() as tran:
                tran.detach(edge)

    async def take_out(self, above: BlockNode) -> None:
        """Take away a filter of the job's, if it is still there. Raises QmpdError."""
        self.release(above)
        if above.graph.get(above.name) is above:
            await insertion.take_out(above.graph, above)

    @property
    def _blocker(self) -> str:
        return f"block device is in use by block job: {self.job_type}"

    def describe_parent(self) -> str:
        """(Parent) Name the job in a permission conflict."""
        return f"{self.job_type} job '{self.id}'"

    def drained_begin(self) -> None:
        """(Parent) What a job does to a node it does through backends."""

    def drained_end(self) -> None:
        """(Parent) See `drained_begin`."""

    def validate(self) -> None:
        """Refuse a limit that is none. Raises CommandError."""
        if self.speed < 0:
            raise CommandError("Parameter 'speed' expects a non-negative value")

    # --- speed and errors -------------------------------------------------------------------------

    def set_speed(self, speed: int) -> None:
        """Change the limit. Raises CommandError."""
        self.check_verb("set-speed")
        if speed < 0:
            raise CommandError("Parameter 'speed' expects a non-negative value")
        self.speed, self._paced = speed, (time.monotonic(), 0)

    async def pace(self, done: int) -> None:
        """Wait until `done` bytes more may have been worked on. Raises Cancelled."""
        begun, before = self._paced
        if not begun:
            begun = time.monotonic()
        self._paced = begun, before + done
        while self.speed:
            begun, total = self._paced
            ahead = total / self.speed - (time.monotonic() - begun)
            if ahead <= 0:
                return
            await asyncio.sleep(min(NAP, ahead))
            await self.pause_point()

    async def in_parallel(
        self, works: Iterable[tuple[int, Callable[[], Coroutine[Any, Any, T]]]], at_once: int
    ) -> list[T]:
        """Return the results of works, each with the bytes it is about, in any order; so many are under way at a time.

        Raises what the first that fails raises, when the others that were begun have ended.
        """
        running: set[asyncio.Task[T]] = set()
        results: list[T] = []

        async def wait(until: str) -> None:
            nonlocal running
            ended, running = await asyncio.wait(running, return_when=until)
            failures = [failure for one in ended if (failure := one.exception()) is not None]
            if failures:
                raise failures[0]
            results.extend(one.result() for one in ended)

        try:
            for size, work in works:
                await self.pause_point()
                if len(running) >= at_once:
                    await wait(asyncio.FIRST_COMPLETED)
                running.add(asyncio.create_task(work()))
                await self.pace(size)
            if running:
                await wait(asyncio.ALL_COMPLETED)
        except BaseException:
            await asyncio.gather(*running, return_exceptions=True)
            raise
        return results

    async def attempt(self, work: Callable[[], Awaitable[T]], on_error: str, *, reading: bool) -> T | None:
        """Return what `work` returns; None if it failed and that is to be ignored. Raises OSError, Cancelled."""
        while True:
            try:
                return await work()
            except OSError as error:
                if not await self.failed(error, on_error, reading=reading):
                    return None

    async def failed(self, error: OSError, on_error: str, *, reading: bool) -> bool:
        """Do what the job is to do about a failed request: raise the error, or say whether to try again."""
        action = on_error
        if on_error in ("enospc", "auto"):
            action = "stop" if error.errno == errno.ENOSPC else "report"
        operation = "read" if reading else "write"
        self.manager.events.emit("BLOCK_JOB_ERROR", device=self.id, operation=operation, action=action)
        if action == "report":
            raise error
        if action == "ignore":
            self.ignored = self.ignored or error
            return False
        self.io_status = "nospace" if error.errno == errno.ENOSPC else "failed"
        if not self.user_paused:
            self.pause()
        await self.pause_point()
        return True

    def resume(self) -> None:
        """Go on after `pause`, or after an error."""
        super().resume()
        self.io_status = "ok"

    def stop_following(self) -> None:
        """End a job that is ready without the change of the graph it would end with."""
        self.cancel()

    # --- events -----------------------------------------------------------------------------------

    def become_ready(self) -> None:
        """Say that the job can be completed."""
        self.move(Status.READY)
        self.manager.events.emit("BLOCK_JOB_READY", **self._progress())

    def waits_for_finalize(self) -> None:
        """Tell that nothing happens before job-finalize."""
        self.manager.events.emit("BLOCK_JOB_PENDING", type=self.job_type, id=self.id)

    def ended(self) -> None:
        """Tell how it went."""
        if self.status is Status.ABORTING and self.cancelled:
            self.manager.events.emit("BLOCK_JOB_CANCELLED", **self._progress())
        elif self.error is not None:
            self.manager.events.emit("BLOCK_JOB_COMPLETED", **self._progress(), error=self.error)
        else:
            self.manager.events.emit("BLOCK_JOB_COMPLETED", **self._progress())

    def _progress(self) -> dict[str, Any]:
        names = {"type": self.job_type, "device": self.id}
        return {**names, "len": self.total, "offset": self.current, "speed": self.speed}

    def to_block_wire(self) -> dict[str, Any]:
        """Return BlockJobInfo."""
        reply: dict[str, Any] = {
            "type": self.job_type,
            "device": self.id,
            "len": self.total,
            "offset": self.current,
            "busy": self.status is Status.RUNNING and not self.user_paused,
            "paused": self.user_paused,
            "speed": self.speed,
            "io-status": self.io_status,
            "ready": self.status in (Status.READY, Status.STANDBY),
            "status": self.status.value,
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
        }
        if self.error is not None:
            reply["error"] = self.error
        return reply


def pieces(areas: Iterable[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of pieces of `most` bytes at most that make up the areas (offset, length)."""
    for offset, length in areas:
        for at in range(offset, offset + length, most):
            yield at, min(at + most, offset + length)
