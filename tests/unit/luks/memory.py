"""Nodes in memory and luks nodes over them, without a graph."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.child import Child
from qmpd.block.node import BlockNode
from qmpd.block.options import NodeOptions
from qmpd.block.perm import ChildRole
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.drivers.luks import LuksNode, LuksOptions
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.block.graph import Graph


class MemoryNode(BlockNode):
    """Bytes; with `delays` every request waits a little first, in random order."""

    driver_name = "memory"
    is_protocol = True

    def __init__(self, data: bytes, *, discard: str | None = None, delays: random.Random | None = None) -> None:
        super().__init__(cast("Graph", None), "memory", NodeOptions(discard=discard), {})
        self.data = bytearray(data)
        self.size = len(data)
        self.delays = delays
        self.fail_at: dict[int, int] = {}
        self.flushes = 0
        self.flags: list[WriteFlags] = []
        self.discarded: list[tuple[int, int]] = []
        self.reads = 0

    async def _pause(self) -> None:
        if self.delays is not None:
            for _ in range(self.delays.randrange(4)):
                await asyncio.sleep(0)

    async def preadv(self, batch: Batch) -> None:
        await self._pause()
        for request in batch:
            self.reads += len(request.view)
            if request.offset in self.fail_at:
                request.fail(self.fail_at[request.offset])
            else:
                request.view[:] = self.data[request.offset : request.end]

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        await self._pause()
        self.flags.append(flags)
        for request in batch:
            if request.offset in self.fail_at:
                request.fail(self.fail_at[request.offset])
            else:
                self.data[request.offset : request.end] = request.view

    async def pdiscard(self, offset: int, length: int) -> None:
        self.discarded.append((offset, length))

    async def flush(self) -> None:
        self.flushes += 1

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        self.data = self.data[:size] + bytes(size - len(self.data))
        self.size = size


class Root:
    """A parent without behaviour."""

    def describe_parent(self) -> str:
        return "the test"

    def drained_begin(self) -> None:
        pass

    def drained_end(self) -> None:
        pass


def edge(node: BlockNode, name: str = "root") -> Child:
    return Child(name, ChildRole.IMAGE, Root(), node)


class Secrets:
    """Stands for the object tree."""

    def __init__(self, **secrets: bytes) -> None:
        self._secrets = secrets
        self.given: list[SecretBytes] = []

    def passphrase(self, name: str) -> SecretBytes:
        if name not in self._secrets:
            raise CommandError(f"No secret with id '{name}'")
        self.given.append(SecretBytes(self._secrets[name]))
        return self.given[-1]


def luks_node(
    payload: BlockNode, header: BlockNode | None = None, *, secret: str | None = "s", discard: str | None = None
) -> tuple[LuksNode, LuksOptions, Secrets]:
    """Return an unopened node, its options, and the secrets it sees: s and wrong."""
    secrets = Secrets(s=b"abc123", wrong=b"abc1234", empty=b"")
    given: dict[str, Any] = {} if secret is None else {"key-secret": secret}
    node = LuksNode(
        cast("Graph", SimpleNamespace(objects=secrets, open_flags=frozenset())),
        "l",
        NodeOptions(discard=discard),
        given,
    )
    node.children["file"] = Child("file", LuksNode.child_roles["file"], node, payload)
    if header is not None:
        node.children["header"] = Child("header", LuksNode.child_roles["header"], node, header)
    return node, LuksOptions(node.children["file"], node.children.get("header"), secret), secrets


async def opened(
    payload: BlockNode, header: BlockNode | None = None, *, secret: str | None = "s", discard: str | None = None
) -> LuksNode:
    """Return an open node; closed again if it does not unlock, as the graph does."""
    node, options, _ = luks_node(payload, header, secret=secret, discard=discard)
    await node.open(options)
    try:
        await node.unlock()
    except BaseException:
        await node.close()
        raise
    return node
