"""Looking after headers of nodes: backups made and compared, restored, verified; for commands and tools.

The node is a luks node, or any node that a header lies on: also one so damaged that nothing opens it.
Everything here runs on the loop of the monitor. While it lasts, the node cannot be deleted.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from qmpd.aio.pool import in_work_thread
from qmpd.block.backend import BlockBackend
from qmpd.block.child import Child
from qmpd.block.exclusive import alone
from qmpd.block.graph import Graph
from qmpd.block.node import BlockNode
from qmpd.block.perm import Perm
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.luks import identity
from qmpd.luks.backup import Bytes, header_image, read_backup, write_new
from qmpd.luks.restore import restore_header
from qmpd.luks.shared import HeaderNode, header_of
from qmpd.luks.verify import Report, verify_header

T = TypeVar("T")


@contextlib.asynccontextmanager
async def _held(graph: Graph, node: BlockNode, perm: Perm) -> AsyncIterator[BlockBackend]:
    backend = BlockBackend(graph, lambda: "the care of a LUKS header", perm, Perm.ALL)
    try:
        backend.insert(node)
        yield backend
    finally:
        await backend.remove()


async def _reading(graph: Graph, node: BlockNode, work: Callable[[Child], Awaitable[T]]) -> T:
    """Run `work` on the header of `node`, on the loop of the data, between changes."""
    if isinstance(node, HeaderNode):
        edge: Child = node.header
        async with _held(graph, node, Perm.NONE):
            return await graph.runner.run(header_of(edge.node).locked(partial(work, edge)))
    async with _held(graph, node, Perm.CONSISTENT_READ) as backend:
        return await backend.visit(lambda child: header_of(node).locked(partial(work, child)))


async def change(graph: Graph, node: BlockNode, work: Callable[[Child], Awaitable[None]]) -> None:
    """Run `work`, which changes the header of `node`, with nobody else at it. Raises CommandError, OSError."""
    if isinstance(node, HeaderNode):
        async with _held(graph, node, Perm.NONE):
            await node.change_header(work)
        return
    async with (
        _held(graph, node, Perm.CONSISTENT_READ | Perm.WRITE) as backend,
        alone(graph, node, [], flock=True),
    ):
        await backend.visit(lambda child: header_of(node).change(partial(work, child)))


async def backup(graph: Graph, node: BlockNode, filename: str) -> int:
    """Copy the header of `node` to a new file and return its bytes. Raises CommandError, ImageError, OSError."""
    image = await _reading(graph, node, partial(header_image, detached=True))
    await in_work_thread(lambda: write_new(filename, image))
    return len(image)


async def restore(graph: Graph, node: BlockNode, filename: str, *, force: bool = False) -> None:
    """Put a backup in place of the header of `node`; see `restore_header`."""
    image = await in_work_thread(lambda: read_backup(filename))

    async def work(header: Child) -> None:
        users = list(header_of(header.node).nodes)
        known = identity.of_volume(users[0].volume) if users else None
        await restore_header(header, image, force=force, known=known)

    await change(graph, node, work)


async def compare(graph: Graph, node: BlockNode, filename: str) -> list[str]:
    """Return how the header of `node` differs from a backup. Raises CommandError, ImageError, OSError."""
    image = await in_work_thread(lambda: read_backup(filename))
    return await _reading(graph, node, lambda header: identity.compare(header, Bytes(image)))


async def verify(graph: Graph, node: BlockNode, passphrase: SecretBytes | None = None) -> Report:
    """Look at the header of `node`; see `verify_header`."""
    return await _reading(graph, node, lambda header: verify_header(header, passphrase))
