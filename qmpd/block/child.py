"""An edge of the graph: from a parent (a node or a backend) down to a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from qmpd.block import ranges
from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.perm import ChildRole, Perm

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode, Extent


class Parent(Protocol):
    """What stands at the upper end of an edge.

    stays_at_node   its edges do not follow when another node takes the place of theirs (jobs)
    """

    stays_at_node: ClassVar[bool]

    def describe_parent(self) -> str:
        """Name it for error texts: "node 'q'", "block device '/machine/...'"."""

    def drained_begin(self) -> None:
        """Admit no new requests until `drained_end`; calls nest."""

    def drained_end(self) -> None:
        """Undo one `drained_begin`."""


class Child:
    """An edge named `name`; all I/O of the parent goes through it.

    perm, shared   what the parent takes and what it lets the node's other parents take
    inherits       True if the node was made by this parent's own options (inline or implicit),
                   so that it goes when the parent goes
    frozen         True while somebody relies on the edge leading where it leads (`chain.freeze`)
    The I/O methods take any alignment: what the node cannot do itself is widened here
    (`ranges.read`, `ranges.write`), serialised per node.
    """

    __slots__ = ("frozen", "inherits", "name", "node", "parent", "perm", "role", "shared")

    def __init__(self, name: str, role: ChildRole, parent: Parent, node: BlockNode) -> None:
        self.name, self.role, self.parent, self.node = name, role, parent, node
        self.perm, self.shared = Perm.NONE, Perm.ALL
        self.inherits = False
        self.frozen = False

    def describe(self) -> str:
        """Return the text used for this edge in a permission conflict."""
        return f"{self.parent.describe_parent()} (uses node '{self.node.name}' as '{self.name}' child)"

    @property
    def size(self) -> int:
        """Bytes of the node below."""
        return self.node.size

    async def preadv(self, batch: Batch) -> None:
        """Fill every view of the batch; see `BlockNode.preadv` for errors."""
        await ranges.read(self.node, batch)

    async def pwritev(self, batch: Batch, flags: WriteFlags = WriteFlags.NONE) -> None:
        """Write every view of the batch; see `BlockNode.pwritev` for errors."""
        await ranges.write(self.node, batch, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        """Make [offset, offset + length) read as zeroes. Raises OSError."""
        await ranges.write_zeroes(self.node, offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        """Tell the node that the range is no longer needed. Raises OSError."""
        await ranges.discard(self.node, offset, length)

    async def flush(self) -> None:
        """Make everything written so far durable. Raises OSError."""
        if self.role & ChildRole.PRIMARY and self.name != "root":
            self.node.debug_event("flush_to_disk")
        primary = self.node.primary()
        if primary is not None:
            primary.node.debug_event("flush_to_os")
        await self.node.flush()

    def debug_event(self, event: str) -> None:
        """Tell the node, in case it injects errors, what its parent is about to do (BlkdebugEvent)."""
        self.node.debug_event(event)

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Return the extents that make up the range, in order. Raises OSError."""
        return await self.node.block_status(offset, length)

    async def pread(self, offset: int, length: int) -> bytearray:
        """Return `length` bytes from `offset`: for metadata, where a copy does not matter.

        The caller has bounded `length`. Raises OSError.
        """
        data = bytearray(length)
        batch = Batch.single(offset, memoryview(data))
        await self.preadv(batch)
        batch.raise_first()
        return data

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at `offset`: for metadata. Raises OSError."""
        batch = Batch.single(offset, memoryview(data))
        await self.pwritev(batch)
        batch.raise_first()
