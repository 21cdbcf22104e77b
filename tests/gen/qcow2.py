"""A qcow2 node over a file in memory, for tests: slow, failing, recorded, whatever they need."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.child import Child
from qmpd.block.graph import Graph
from qmpd.block.node import BlockNode
from qmpd.block.options import NodeOptions, OpenFlags
from qmpd.block.perm import ChildRole, Perm
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.drivers._qcow2_create import create_qcow2
from qmpd.drivers._qcow2_create_crypto import NewEncryption
from qmpd.drivers._qcow2_options import Qcow2Options
from qmpd.drivers.qcow2 import Qcow2Node
from qmpd.events import Event, EventBus
from qmpd.units import SECTOR, align_up


class Recorder:
    """Is told what a file does, when it begins and when it ends; see tests/faults."""

    def begin(self, offset: int, data: bytes) -> int:
        """A write begins; returns its number."""
        raise NotImplementedError

    def end(self, number: int) -> None:
        """The write of that number is done."""
        raise NotImplementedError

    def begin_flush(self) -> int:
        """A flush begins; returns its number."""
        raise NotImplementedError

    def end_flush(self, number: int) -> None:
        """The flush of that number is done."""
        raise NotImplementedError


PASSPHRASE = b"abc123"
"""What opens every encrypted image of the tests."""

GARBAGE = b"\xd5"
"""What a discarded byte of a file in memory holds: nothing may depend on it."""


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
        self.recorder: Recorder | None = None
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
        bad = [request for request in batch if self._failing("write", request.offset, len(request.view))]
        for request in bad:
            request.fail(self.error("write", request.offset, len(request.view)))
        await self._change([(one.offset, bytes(one.view)) for one in batch if one not in bad])

    def _failing(self, kind: str, offset: int, length: int) -> bool:
        return self.error(kind, offset, length) != 0

    async def _change(self, parts: list[tuple[int, bytes]]) -> None:
        numbers = [] if self.recorder is None else [self.recorder.begin(*part) for part in parts]
        await self._wait()
        for offset, data in parts:
            end = offset + len(data)
            if end > len(self.content):
                self.content.extend(bytes(align_up(end, SECTOR) - len(self.content)))
            self.content[offset:end] = data
        self.size = len(self.content)
        for number in numbers:
            assert self.recorder is not None
            self.recorder.end(number)

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        self.writes += 1
        number = self.error("write", offset, length)
        if number:
            raise OSError(number, "injected")
        await self._change([(offset, bytes(length))])

    async def pdiscard(self, offset: int, length: int) -> None:
        end = min(offset + length, self.size)
        await self._change([(offset, GARBAGE * (end - offset))])

    async def flush(self) -> None:
        self.flushes += 1
        number = 0 if self.recorder is None else self.recorder.begin_flush()
        await self._wait()
        error = self.error("flush", 0, 0)
        if error:
            raise OSError(error, "injected")
        if self.recorder is not None:
            self.recorder.end_flush(number)

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        del self.content[size:]
        self.content.extend(bytes(align_up(size, SECTOR) - len(self.content)))
        self.size = len(self.content)


class FakeGraph:
    """As much of a graph as a node asks for."""

    def __init__(self) -> None:
        self.open_flags = OpenFlags.NONE
        self.events = EventBus()
        self.seen: list[Event] = []
        self.events.subscribe(self.seen.append)
        self.objects = Secrets()


class Secrets:
    """Where every id means the passphrase of the tests."""

    def passphrase(self, object_id: str) -> SecretBytes:
        return SecretBytes(PASSPHRASE)


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
    data: BlockNode | None = None,
    read_only: bool = False,
    discard: str = "unmap",
    flags: OpenFlags = OpenFlags.NONE,
    **options: Any,
) -> Qcow2Node:
    """Return an open qcow2 node on `file`, with `data` as its data file; `options` are fields of Qcow2Options."""
    graph = FakeGraph()
    graph.open_flags = flags
    node = Qcow2Node(cast(Graph, graph), "q", NodeOptions(read_only=read_only, discard=discard), {})
    node.children["file"] = edge(file, parent=node)
    await node.open(Qcow2Options(file=node.children["file"], **options))
    if data is not None:
        node.children["data-file"] = edge(data, "data-file", node)
    if OpenFlags.NO_IO not in flags:
        node.late_children_attached()
    if node.locked:
        await node.unlock()
    if backing is not None:
        node.children["backing"] = edge(backing, "backing", node)
    return node


def events_of(node: Qcow2Node) -> list[Event]:
    """Return the events a node sent."""
    return cast(FakeGraph, node.graph).seen


async def make(*, data: BlockNode | None = None, **options: Any) -> MemoryNode:
    """Return a file in memory with a new image; `options` as for `create_qcow2`, `encrypt` as on the wire.

    data   becomes its data file, whose name is among the options
    """
    file = MemoryNode()
    encrypt = options.pop("encrypt", None)
    if encrypt is not None:
        options["encryption"] = NewEncryption({"key-secret": "s", **encrypt}, Secrets(), OpenFlags.NONE)
    await create_qcow2(edge(file), data=None if data is None else edge(data), **options)
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
