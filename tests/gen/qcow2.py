"""A qcow2 node over a file in memory, for tests: slow, failing, recorded, whatever they need."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.child import Child
from qmpd.block.graph import Graph
from qmpd.block.node import BlockNode
from qmpd.block.options import NodeOptions
from qmpd.block.perm import ChildRole, Perm
from qmpd.drivers._qcow2_create import create_qcow2
from qmpd.drivers._qcow2_options import Qcow2Options
from qmpd.drivers.qcow2 import Qcow2Node
from qmpd.events import Event, EventBus
from qmpd.units import SECTOR, align_up


@dataclass
class Record:
    """What reached a file: ("write", offset, bytes), ("zero", offset, length) or ("flush",)."""

    log: list[tuple[Any, ...]] = field(default_factory=list)


class MemoryNode(BlockNode):
    """A file in memory.

    delay    called before each request: seconds to wait, 0 for a bare switch of tasks, None for none
    error    called with ("read" | "write" | "flush", offset, length); an errno fails the request
    """

    is_protocol = True

    def __init__(self, content: bytes = b"", name: str = "file", *, discard: str | None = "unmap") -> None:
        super().__init__(cast(Graph, FakeGraph()), name, NodeOptions(discard=discard), {})
        self.content = bytearray(content.ljust(align_up(len(content), SECTOR), b"\0"))
        self.size = len(self.content)
        self.delay: Callable[[], float | None] = lambda: None
        self.error: Callable[[str, int, int], int] = lambda *_: 0
        self.record: Record | None = None
        self.reads = self.writes = self.flushes = 0

    async def _wait(self) -> None:
        seconds = self.delay()
        if seconds is not None:
            await asyncio.sleep(seconds)

    async def preadv(self, batch: Batch) -> None:
        self.reads += 1
        await self._wait()
        for request in batch:
            assert request.end <= self.size, f"read to {request.end} of {self.size} bytes"
            number = self.error("read", request.offset, len(request.view))
            if number:
                request.fail(number)
            else:
                request.view[:] = self.content[request.offset : request.end]

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        self.writes += 1
        await self._wait()
        for request in batch:
            number = self.error("write", request.offset, len(request.view))
            if number:
                request.fail(number)
                continue
            if self.record is not None:
                self.record.log.append(("write", request.offset, bytes(request.view)))
            self._store(request.offset, request.view)

    def _store(self, offset: int, data: bytes | memoryview) -> None:
        end = offset + len(data)
        if end > len(self.content):
            self.content.extend(bytes(align_up(end, SECTOR) - len(self.content)))
        self.content[offset:end] = data
        self.size = len(self.content)

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        self.writes += 1
        await self._wait()
        number = self.error("write", offset, length)
        if number:
            raise OSError(number, "injected")
        if self.record is not None:
            self.record.log.append(("write", offset, bytes(length)))
        self._store(offset, bytes(length))

    async def pdiscard(self, offset: int, length: int) -> None:
        await self._wait()
        end = min(offset + length, self.size)
        if self.record is not None:
            self.record.log.append(("write", offset, b"\xd5" * (end - offset)))
        self.content[offset:end] = b"\xd5" * (end - offset)

    async def flush(self) -> None:
        self.flushes += 1
        await self._wait()
        number = self.error("flush", 0, 0)
        if number:
            raise OSError(number, "injected")
        if self.record is not None:
            self.record.log.append(("flush",))

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        del self.content[size:]
        self.content.extend(bytes(align_up(size, SECTOR) - len(self.content)))
        self.size = len(self.content)


class FakeGraph:
    """As much of a graph as a node asks for."""

    def __init__(self) -> None:
        self.events = EventBus()
        self.seen: list[Event] = []
        self.events.subscribe(self.seen.append)


class _Root:
    def describe_parent(self) -> str:
        return "a test"

    def drained_begin(self) -> None:
        pass

    def drained_end(self) -> None:
        pass


def edge(node: BlockNode, name: str = "file", parent: Any = None) -> Child:
    """Return an edge to `node` that may do everything."""
    child = Child(name, ChildRole.IMAGE, parent or _Root(), node)
    child.perm = Perm.ALL
    return child


async def open_qcow2(
    file: BlockNode,
    *,
    backing: BlockNode | None = None,
    read_only: bool = False,
    discard: str = "unmap",
    **options: Any,
) -> Qcow2Node:
    """Return an open qcow2 node on `file`; `options` are fields of Qcow2Options."""
    graph = FakeGraph()
    node = Qcow2Node(cast(Graph, graph), "q", NodeOptions(read_only=read_only, discard=discard), {})
    node.children["file"] = edge(file, parent=node)
    await node.open(Qcow2Options(file=node.children["file"], **options))
    if backing is not None:
        node.children["backing"] = edge(backing, "backing", node)
    return node


def events_of(node: Qcow2Node) -> list[Event]:
    """Return the events a node sent."""
    return cast(FakeGraph, node.graph).seen


async def make(**options: Any) -> MemoryNode:
    """Return a file in memory with a new image; `options` as for `create_qcow2`."""
    file = MemoryNode()
    await create_qcow2(edge(file), **options)
    return file


def save(file: MemoryNode, path: Path) -> Path:
    """Write a file of memory to a real one, for real programs."""
    path.write_bytes(file.content)
    return path


def random_delay(seed: int, share: float = 0.7) -> Callable[[], float | None]:
    """Return a `delay` that switches tasks at some requests, and sleeps a moment at a few."""
    rng = random.Random(seed)

    def delay() -> float | None:
        value = rng.random()
        if value > share:
            return None
        return rng.random() / 2000 if value < share / 20 else 0

    return delay
