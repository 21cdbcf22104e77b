"""Exports over nodes that a test controls, served on a data loop of their own."""

from __future__ import annotations

import asyncio
import errno
import importlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from qmpd.aio.loop import DataLoop
from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.graph import Graph
from qmpd.block.node import BlockNode, Extent
from qmpd.block.options import NodeOptions
from qmpd.events import Event, EventBus
from qmpd.exporting.exports import Exports
from qmpd.qapi.registry import registry
from qmpd.qom.tree import ObjectTree
from tests.support.nbd_wire import Client

T = TypeVar("T")


class ScriptedNode(BlockNode):
    """Bytes in memory that a test can make slow, sparse or broken, and that notes what it is asked.

    gate    requests wait here while it is closed        delays   random waits before each batch
    errors  (kind, errno): "read", "write", "flush", "discard", "zero", "status"
    holes   extents reported as zero, (offset, length)
    """

    driver_name = "scripted"
    is_protocol = True

    def __init__(self, graph: Graph, name: str, size: int, *, read_only: bool = False, discard: str = "unmap") -> None:
        super().__init__(graph, name, NodeOptions(node_name=name, read_only=read_only, discard=discard), {})
        self.data = bytearray(size)
        self.size = size
        self.supports_fua = True
        self.gate: asyncio.Event | None = None
        self.delays: random.Random | None = None
        self.errors: dict[str, int] = {}
        self.bad_offsets: dict[int, int] = {}
        self.holes: list[tuple[int, int]] = []
        self.log: list[tuple[Any, ...]] = []
        self.active = self.most_active = 0

    async def _work(self, kind: str) -> None:
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.delays is not None:
                for _ in range(self.delays.randrange(4)):
                    await asyncio.sleep(0)
        finally:
            self.active -= 1
        if kind in self.errors:
            raise OSError(self.errors[kind], kind)

    async def preadv(self, batch: Batch) -> None:
        self.log.append(("read", [(one.offset, len(one.view)) for one in batch]))
        await self._work("read")
        for request in batch:
            if request.offset in self.bad_offsets:
                request.fail(self.bad_offsets[request.offset])
            else:
                request.view[:] = self.data[request.offset : request.end]

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        self.log.append(("write", [(one.offset, len(one.view)) for one in batch], flags))
        await self._work("write")
        for request in batch:
            if request.offset in self.bad_offsets:
                request.fail(self.bad_offsets[request.offset])
            else:
                self.data[request.offset : request.end] = request.view

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        self.log.append(("zero", offset, length, flags))
        await self._work("zero")
        self.data[offset : offset + length] = bytes(length)

    async def pdiscard(self, offset: int, length: int) -> None:
        self.log.append(("discard", offset, length))
        await self._work("discard")

    async def flush(self) -> None:
        self.log.append(("flush",))
        await self._work("flush")

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        self.log.append(("status", offset, length))
        await self._work("status")
        found = []
        end = offset + length
        for start, size in [*sorted(self.holes), (self.size, 0)]:
            if offset < min(start, end):
                found.append(Extent(offset, min(start, end) - offset, data=True, zero=False))
                offset = min(start, end)
            if offset < min(start + size, end):
                found.append(Extent(offset, min(start + size, end) - offset, data=False, zero=True))
                offset = min(start + size, end)
        return found

    def kinds(self) -> list[str]:
        return [entry[0] for entry in self.log]


class Rig:
    """A graph with exports, a data loop, and the events that were sent."""

    def __init__(self, folder: Path) -> None:
        for module in ("qmpd.drivers.file", "qmpd.drivers.raw", "qmpd.drivers.null", "qmpd.exports.nbd"):
            importlib.import_module(module)
        self.loop = DataLoop("test")
        self.objects = ObjectTree(registry)
        bus = EventBus()
        bus.bind(asyncio.get_running_loop())
        self.events: list[Event] = []
        bus.subscribe(self.events.append)
        self.graph = Graph(self.objects, bus, self.loop, registry)
        self.exports = Exports(self.graph, self.objects, bus, registry)
        self.path = str(folder / "n.sock")
        self.clients: list[Client] = []

    def add_node(self, name: str, size: int = 1 << 20, **how: Any) -> ScriptedNode:
        node = ScriptedNode(self.graph, self.graph.reserve(name), size, **how)
        node.sequence = self.graph.next_sequence()
        self.graph.publish(node)
        node.monitor_owned = True
        return node

    async def serve(self, **how: Any) -> None:
        await self.exports.start_server({"type": "unix", "path": self.path}, **how)

    async def export(self, node: str, export_id: str = "e", **members: Any) -> None:
        wire = {key.replace("_", "-"): value for key, value in members.items()}
        await self.exports.add({"type": "nbd", "id": export_id, "node-name": node, **wire})

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run a client's blocking work beside the loop of the test."""
        return await asyncio.get_running_loop().run_in_executor(None, work)

    async def connect(self, name: bytes = b"n", style: str = "structured", contexts: tuple[bytes, ...] = ()) -> Client:
        def work() -> Client:
            return Client(self.path).go(name, style, contexts)

        client = await self.in_thread(work)
        self.clients.append(client)
        return client

    async def on_data_loop(self, work: Callable[[], T]) -> T:
        async def call() -> T:
            return work()

        return await self.loop.run(call())

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the data loop has made `condition` true."""
        for _ in range(2000):
            if await self.on_data_loop(condition):
                return
            await asyncio.sleep(0.005)
        raise AssertionError("it does not come true")

    def deleted(self) -> list[str]:
        return [event.data["id"] for event in self.events if event.name == "BLOCK_EXPORT_DELETED" and event.data]

    @property
    def connections(self) -> int:
        server = self.exports.nbd
        assert server is not None
        return len(server._connections)


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Rig]:
    """Run a rig; afterwards nothing of it may be left."""
    rig = Rig(folder)
    try:
        yield rig
    finally:
        for client in rig.clients:
            client.close()
        await rig.exports.close()
        assert rig.exports.query() == []
        await rig.graph.close_all()
        rig.loop.close()


ERRNO = errno
