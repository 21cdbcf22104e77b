"""What every filter driver does: pass each request to its `file` child as it is.

A filter shows the data of its child unchanged; a driver overrides the one thing it is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.child import Child
from qmpd.block.node import BlockNode, Extent
from qmpd.block.perm import ChildRole


class FilterNode(BlockNode):
    """A node that sees requests go by; `attach_file` comes first in `open`."""

    child_roles: ClassVar[Mapping[str, ChildRole]] = {"file": ChildRole.FILTERED | ChildRole.PRIMARY}
    is_filter: ClassVar[bool] = True

    def attach_file(self, file: Child) -> None:
        """Take size and alignment from the child."""
        self.file = file
        self.size = file.size
        self.request_alignment = file.node.request_alignment
        self.supports_fua = True

    async def preadv(self, batch: Batch) -> None:
        """Read from the child."""
        await self.file.preadv(batch)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write to the child."""
        await self.file.pwritev(batch, flags)
        self.size = self.file.size

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero in the child."""
        await self.file.pwrite_zeroes(offset, length, flags)
        self.size = self.file.size

    async def pdiscard(self, offset: int, length: int) -> None:
        """Discard in the child."""
        await self.file.pdiscard(offset, length)

    async def flush(self) -> None:
        """Flush the child."""
        await self.file.flush()

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Say what the child says."""
        return await self.file.block_status(offset, length)

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Resize the child."""
        await self.file.node.truncate(size, exact=exact, preallocation=preallocation)
        self.size = self.file.size

    @property
    def supports_compressed(self) -> bool:
        """True if this filter passes compressed writes on to a node that takes them."""
        return self.can_compress and self.file.node.supports_compressed

    def child_resized(self) -> None:
        """Follow the child."""
        self.size = self.file.size

    def image_info(self) -> dict[str, Any]:
        """What the child says of its clusters."""
        below = self.file.node.image_info()
        return {name: below[name] for name in ("cluster-size", "dirty-flag") if name in below}
