"""BlockBackend: the root of a piece of graph, owned by a device, an export, a job or a tool.

All I/O of users enters here, from any loop: requests are checked against the size, wait while the
backend is drained, are counted, and run on the data loop.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from qmpd.block import dirty_bitmap
from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.child import Child
from qmpd.block.direct import DirectRead, DirectWrite, direct_write
from qmpd.block.node import MAX_REQUEST, BlockNode, Extent
from qmpd.block.opening import MAX_LENGTH
from qmpd.block.perm import ChildRole, Perm
from qmpd.block.stats import AccountedStats
from qmpd.block.throttle_group import BackendGroup, ThrottleState
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.block.graph import Graph

T = TypeVar("T")

MAX_OFFSET = (1 << 63) - 1


class BlockBackend:
    """A parent of one node at most (none: no medium).

    describe  how it appears in a permission conflict
    perm, shared  what its edge takes and shares, now or when a node is inserted
    name      id of a -drive; "" for all others
    label     how x-debug-query-block-graph names it ("" for unnamed ones)
    """

    stays_at_node: ClassVar[bool] = False

    def __init__(
        self, graph: Graph, describe: Callable[[], str], perm: Perm, shared: Perm, name: str = "", label: str = ""
    ) -> None:
        self.graph = graph
        self.describe_parent = describe
        self.perm, self.shared = perm, shared
        self.name, self.label = name, label
        self.root: Child | None = None
        self.stats = AccountedStats()
        self.throttle: BackendGroup | None = None
        self.on_error: Callable[[bool, int], None] | None = None
        """Told of each request that a client sees fail (was it a read, its errno), on the data loop."""
        self.on_resize: Callable[[], None] | None = None
        """Told on the data loop that the node has another size."""
        self.internal = False
        """A job reads a filter of its own through it, which does not count as use by others."""
        self.may_grow = False
        """Writes may end beyond the node's size: for who makes images and holds the resize permission."""
        self._direct: DirectRead | None = None
        self._direct_write: DirectWrite | None = None
        self._direct_generation = self._direct_write_generation = -1
        self._in_flight = 0
        self._quiesced = 0
        self._admission: list[asyncio.Future[None]] = []
        self._idle: list[asyncio.Future[None]] = []
        graph.backends.append(self)

    # --- graph --------------------------------------------------------------------------------

    @property
    def node(self) -> BlockNode | None:
        """The node below, None without medium."""
        return self.root.node if self.root else None

    @property
    def size(self) -> int:
        """Bytes; 0 without medium."""
        return self.root.node.size if self.root else 0

    @property
    def in_flight(self) -> int:
        """Requests that were admitted and have not ended."""
        return self._in_flight

    def insert(self, node: BlockNode) -> None:
        """Attach to `node`. Raises PermissionConflict or what a driver vetoes with; then nothing changed."""
        with self.graph.change() as tran:
            child = tran.attach(self, "root", ChildRole.FILTERED | ChildRole.PRIMARY, node, self.perm, self.shared)
        self.root = child

    def eject(self) -> BlockNode | None:
        """Detach from the node and return it; the caller has drained the backend."""
        if self.root is None:
            return None
        child, self.root = self.root, None
        with self.graph.change() as tran:
            tran.detach(child)
        return child.node

    def set_perm(self, perm: Perm, shared: Perm) -> None:
        """Change what the edge takes and shares. Raises PermissionConflict; then nothing changed."""
        if self.root is not None:
            with self.graph.change() as tran:
                tran.set_perm(self.root, perm, shared)
        self.perm, self.shared = perm, shared

    async def remove(self) -> None:
        """End the backend: wait for its requests, detach, and delete nodes that nobody holds."""
        await self.graph.runner.run(self._quiesce())
        try:
            node = self.eject()
        finally:
            await self.graph.runner.run(self._wake())
        if self in self.graph.backends:
            self.graph.backends.remove(self)
        if node is not None:
            await self.graph.drop_unreferenced(node)

    # --- drain --------------------------------------------------------------------------------

    def drained_begin(self) -> None:
        """Admit nothing until `drained_end`; runs on the data loop."""
        self._quiesced += 1
        if self.throttle is not None:
            self.throttle.state.release_all()

    def drained_end(self) -> None:
        """Undo one `drained_begin`; runs on the data loop."""
        self._quiesced -= 1
        if not self._quiesced:
            waiting, self._admission = self._admission, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    async def wait_idle(self) -> None:
        """Wait until nothing is in flight; runs on the data loop."""
        while self._in_flight:
            future = asyncio.get_running_loop().create_future()
            self._idle.append(future)
            await future

    async def _quiesce(self) -> None:
        """Admit nothing more, and wait for what is under way."""
        self.drained_begin()
        await self.wait_idle()
        self._leave_group()

    async def _wake(self) -> None:
        """Let go what waited for admission: without a node it is told so."""
        self.drained_end()

    async def _enter(self, requests: int) -> Child:
        """Wait for admission and count `requests`, which `_leave` takes back."""
        while self._quiesced:
            future = asyncio.get_running_loop().create_future()
            self._admission.append(future)
            await future
        if self.root is None:
            raise OSError(errno.ENOMEDIUM, "no medium")
        self._in_flight += requests
        return self.root

    def _leave(self, requests: int) -> None:
        self._in_flight -= requests
        if not self._in_flight and self._idle:
            idle, self._idle = self._idle, []
            for waiter in idle:
                if not waiter.done():
                    waiter.set_result(None)

    @asynccontextmanager
    async def _admitted(self, requests: int) -> AsyncIterator[Child]:
        root = await self._enter(requests)
        try:
            yield root
        finally:
            self._leave(requests)

    # --- I/O, from any loop ---------------------------------------------------------------------

    async def _home(self, work: Coroutine[Any, Any, T]) -> T:
        return await self.graph.runner.run(work)

    async def preadv(self, batch: Batch) -> None:
        """Fill every view; failed requests carry their errno (EIO beyond the end). Raises
        OSError(ENOMEDIUM) without a node."""
        await self._home(self._transfer(batch, None))

    def direct_read(self) -> DirectRead | None:
        """Return how reads can be done without the nodes now, on the data loop; None if they cannot.

        Whoever uses it bounds requests by `size`, waits for nothing meanwhile, and counts in `stats`.
        """
        if self.root is None or self._quiesced or self.throttle is not None:
            return None
        if self._direct_generation != self.graph.generation:
            generation = self.graph.generation
            self._direct = self.root.node.direct_read()
            self._direct_generation = generation
        direct = self._direct
        return direct if direct is not None and direct.disk.nowait else None

    def direct_write(self) -> DirectWrite | None:
        """Return how writes can be done without the nodes now, on the data loop; None if they cannot.

        Whoever uses it bounds requests by `size` and by the size of the file, waits for nothing meanwhile, and
        counts in `stats`.
        """
        if self.root is None or self._quiesced or self.throttle is not None:
            return None
        if self._direct_write_generation != self.graph.generation:
            self._direct_write_generation = self.graph.generation
            self._direct_write = direct_write(self.root.node)
        found = self._direct_write
        return found if found is not None and found.possible() else None

    async def pwritev(self, batch: Batch, flags: WriteFlags = WriteFlags.NONE) -> None:
        """Write every view; failed requests carry their errno (EIO beyond the end, EPERM on a
        read-only node). Raises OSError(ENOMEDIUM) without a node."""
        await self._home(self._transfer(batch, flags))

    async def _transfer(self, batch: Batch, flags: WriteFlags | None) -> None:
        count = len(batch)
        root = await self._enter(count)
        try:
            inside = self._within(batch, root.node, writing=flags is not None)
            if not inside:
                return
            begun = time.monotonic_ns()
            try:
                if self.throttle is not None:
                    await self._throttled(root, inside, flags, self.throttle.state)
                elif flags is None:
                    await root.preadv(inside)
                else:
                    await root.pwritev(inside, flags)
            except OSError as error:
                inside.fail(error.errno or errno.EIO)
            self.stats.transferred(inside, time.monotonic_ns() - begun, writing=flags is not None)
        finally:
            self._leave(count)

    async def _throttled(self, root: Child, batch: Batch, flags: WriteFlags | None, state: ThrottleState) -> None:
        def free() -> bool:
            return bool(self._quiesced)

        async for part in state.in_time(batch, writing=flags is not None, free=free):
            if flags is None:
                await root.preadv(part)
            else:
                await root.pwritev(part, flags)

    def set_throttle(self, name: str, limits: Mapping[str, int] | None) -> None:
        """Join the group `name` and give it these limits; None leaves the group. Raises CommandError."""
        groups = self.graph.throttle_groups
        if limits is None:
            self._leave_group()
            return
        group = groups.get(name) or BackendGroup(name)
        group.change(limits)
        if group is not self.throttle:
            self._leave_group()
            groups[name] = self.throttle = group
            group.users += 1

    def _leave_group(self) -> None:
        group, self.throttle = self.throttle, None
        if group is not None:
            group.state.release_all()
            group.users -= 1
            if not group.users:
                self.graph.throttle_groups.pop(group.name, None)

    def _within(self, batch: Batch, node: BlockNode, *, writing: bool) -> Batch:
        """Return the requests that may go on; the others are marked."""
        size = MAX_OFFSET if writing and self.may_grow else node.size
        if writing and node.read_only:
            batch.fail(errno.EPERM)
            self.stats.invalid_wr_operations += len(batch)
            return Batch()
        for request in batch:
            if request.offset < 0 or request.end > size or len(request.view) > MAX_REQUEST:
                return Batch(one for one in batch if self._check(one, size, writing=writing))
        return batch

    def _check(self, request: Request, size: int, *, writing: bool) -> bool:
        if request.offset >= 0 and request.end <= size and len(request.view) <= MAX_REQUEST:
            return True
        request.fail(errno.EIO)
        if writing:
            self.stats.invalid_wr_operations += 1
        else:
            self.stats.invalid_rd_operations += 1
        return False

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        """Make the range read as zeroes. Raises OSError."""

        async def work(root: Child) -> None:
            await root.pwrite_zeroes(offset, length, flags)

        await self._home(self._ranged(offset, length, work, "wr"))

    async def pdiscard(self, offset: int, length: int) -> None:
        """Forget the range, as far as the nodes' options allow. Raises OSError."""

        async def work(root: Child) -> None:
            await root.pdiscard(offset, length)

        await self._home(self._ranged(offset, length, work, "unmap"))

    async def _ranged(
        self, offset: int, length: int, work: Callable[[Child], Coroutine[Any, Any, None]], kind: str
    ) -> None:
        async with self._admitted(1) as root:
            if root.node.read_only:
                self.stats.note_invalid(kind)
                raise OSError(errno.EPERM, "read-only node")
            size = MAX_OFFSET if self.may_grow else root.node.size
            if offset < 0 or length < 0 or offset + length > size:
                self.stats.note_invalid(kind)
                raise OSError(errno.EIO, "beyond the end")
            begun = time.monotonic_ns()
            try:
                await work(root)
            except OSError:
                self.stats.note_failed(kind)
                raise
            self.stats.note(kind, length, time.monotonic_ns() - begun)

    async def flush(self) -> None:
        """Make all completed writes durable. Raises OSError."""

        async def work() -> None:
            async with self._admitted(1) as root:
                begun = time.monotonic_ns()
                try:
                    await root.flush()
                except OSError:
                    self.stats.failed_flush_operations += 1
                    raise
                self.stats.note("flush", 0, time.monotonic_ns() - begun)

        await self._home(work())

    async def visit(self, work: Callable[[Child], Coroutine[Any, Any, T]]) -> T:
        """Run `work` on the edge to the node, admitted and counted as one request.

        For what asks more than one layer, such as allocation depth. Raises OSError.
        """

        async def admitted() -> T:
            async with self._admitted(1) as root:
                return await work(root)

        return await self._home(admitted())

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Return the extents that make up the range. Raises OSError."""

        async def work() -> Sequence[Extent]:
            async with self._admitted(1) as root:
                return await root.block_status(offset, length)

        return await self._home(work())

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Change the size of the node in bytes; the backend holds the resize permission.

        Raises CommandError, OSError.
        """
        check_length(size)

        async def work() -> None:
            async with self._admitted(1) as root:
                await root.node.truncate(size, exact=exact, preallocation=preallocation)
                _tell_parents(root.node)

        await self._home(work())

    async def pread(self, offset: int, length: int) -> bytearray:
        """Return `length` bytes from `offset`. Raises OSError."""
        data = bytearray(length)
        batch = Batch.single(offset, memoryview(data))
        await self.preadv(batch)
        batch.raise_first()
        return data

    async def pwrite(
        self, offset: int, data: bytes | bytearray | memoryview, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        """Write `data` at `offset`. Raises OSError."""
        batch = Batch.single(offset, memoryview(data))
        await self.pwritev(batch, flags)
        batch.raise_first()


def check_length(size: int) -> None:
    """Refuse a size in bytes that no node may be given. Raises CommandError."""
    if size > MAX_LENGTH:
        raise CommandError(f"offset({size}) exceeds maximum({MAX_LENGTH})")


def _tell_parents(node: BlockNode) -> None:
    """Let the bitmaps and the nodes above see that `node` has another size now."""
    dirty_bitmap.resized(node)
    for edge in node.parents:
        above = edge.parent
        if isinstance(above, BlockNode):
            before = above.size
            above.child_resized()
            if above.size != before:
                _tell_parents(above)
        elif isinstance(above, BlockBackend) and above.on_resize is not None:
            above.on_resize()
