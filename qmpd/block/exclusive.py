"""Keeping other processes from a file for a while: image locks that nobody in this process is held to.

`Perm` is about the nodes of this process; what a file's `outside` names is unshared in the file's locks
only. For formats that others lock as a whole (LUKS2: cryptsetup), flock comes on top.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from qmpd.block.perm import Perm
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.block.graph import Graph
    from qmpd.block.node import BlockNode

UNSHARED = Perm.WRITE | Perm.CONSISTENT_READ
FLOCK_SECONDS = 5.0
"""How long to wait for another program's lock; cryptsetup holds it while it derives keys, and no longer."""
_FLOCK_PAUSE = 0.05


@runtime_checkable
class HostFile(Protocol):
    """A node that is a file of this host.

    outside   what other processes must not do, whatever the nodes above share
    path      its name, for errors
    """

    outside: Perm
    path: str

    def flock_descriptor(self) -> int | None:
        """Return a new descriptor of the file, None if it is not to be locked. Raises CommandError."""


_turns: WeakKeyDictionary[BlockNode, asyncio.Lock] = WeakKeyDictionary()
"""Who wants to be alone with a file of this process waits for whoever is."""


@contextlib.asynccontextmanager
async def alone(graph: Graph, node: BlockNode, touch: Iterable[BlockNode], *, flock: bool) -> AsyncIterator[None]:
    """Let no other process read or write the files under `node`, to which this process may write.

    touch   nodes whose permissions the caller has changed; they are computed anew as well
    flock   hold an exclusive lock on whole files, too
    Runs on the loop of the monitor. Raises CommandError in QEMU's words if another process uses a file.
    """
    files = [one for one in sorted(_below(node), key=id) if isinstance(one, HostFile)]
    async with contextlib.AsyncExitStack() as stack:
        for file in files:
            await stack.enter_async_context(_turns.setdefault(file, asyncio.Lock()))
        try:
            for file in files:
                file.outside = UNSHARED
            with graph.change() as tran:
                for one in (*touch, node):
                    tran.touch(one)
            for file in files if flock else ():
                fd = file.flock_descriptor()
                if fd is not None:
                    stack.callback(os.close, fd)
                    await _flock(fd, file.path)
            yield
        finally:
            for file in files:
                file.outside = Perm.NONE
            with graph.change() as tran:
                tran.touch(node)


async def _flock(fd: int, path: str) -> None:
    deadline = asyncio.get_running_loop().time() + FLOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise CommandError(f"Could not lock '{path}': {error.strerror}") from error
            if asyncio.get_running_loop().time() > deadline:
                raise CommandError(f"'{path}' is locked by another program") from error
        await asyncio.sleep(_FLOCK_PAUSE)


def _below(node: BlockNode) -> list[BlockNode]:
    """Return the nodes without children at the ends below `node`, backing files left out."""
    if not node.children:
        return [node]
    found: dict[int, BlockNode] = {}
    for child in node.children.values():
        if child.name != "backing":
            found.update({id(one): one for one in _below(child.node)})
    return list(found.values())
