"""One object per header node: what the luks nodes of this process that use the same header share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet

from qmpd.luks.detect import read_header
from qmpd.luks.volume import HeaderIO, Volume

if TYPE_CHECKING:
    from qmpd.block.child import Child
    from qmpd.block.node import BlockNode


T = TypeVar("T")


class HeaderUser(Protocol):
    """A luks node that is open on a header, which it has read as `volume`."""

    volume: Volume

    async def header_changed(self) -> None:
        """Read the header again."""


@runtime_checkable
class HeaderNode(Protocol):
    """A node whose header is looked after by commands, on the loop of the monitor."""

    @property
    def header(self) -> Child:
        """The edge to the node that the header lies on."""

    async def change_header(self, work: Callable[[Child], Awaitable[None]]) -> None:
        """Run `work` on the header, alone, on the loop of the data. Raises CommandError, OSError."""


class SharedHeader:
    """The header on one node, as last read.

    lock        held by whoever changes the header, and by whoever reads more of it than one piece
    users       how many luks nodes are open on it, and `nodes` which
    generation  counts changes made through this process; a user that remembers a lower one reads again
    admitted    name of the one node that may open a volume that is being encrypted in place
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0
        self.nodes: WeakSet[HeaderUser] = WeakSet()
        self.generation = 0
        self.admitted: str | None = None

    async def read(self, source: HeaderIO, *, detached: bool, image: str = "header") -> Volume:
        """Read the header anew, between changes; see `read_header`. Raises CommandError, ImageError, OSError."""
        async with self.lock:
            return await read_header(source, detached=detached, image=image)

    async def locked(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work`, which reads more of the header than one piece, between changes."""
        async with self.lock:
            return await work()

    async def change(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work`, which changes the header; then every luks node on it reads it again."""
        async with self.lock:
            try:
                await work()
            finally:
                self.generation += 1
                for node in list(self.nodes):
                    await node.header_changed()


_shared: WeakKeyDictionary[BlockNode, SharedHeader] = WeakKeyDictionary()


def header_of(node: BlockNode) -> SharedHeader:
    """Return the one object for the header on `node`."""
    if node not in _shared:
        _shared[node] = SharedHeader()
    return _shared[node]
