"""snapshot-access: shows what a copy-before-write node below keeps of the past; read-only in effect.

Options: BlockdevOptionsGenericFormat (qapi/block-drivers.json). Over a node that keeps nothing every
request fails. Model: QEMU block/snapshot-access.c.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.child import Child
from qmpd.block.filename import node_filename
from qmpd.block.node import BlockNode, Extent
from qmpd.block.perm import ChildRole, Perm
from qmpd.qapi.registry import driver
from qmpd.units import SECTOR, align_up


@dataclass(frozen=True, slots=True)
class SnapshotAccessOptions:
    """BlockdevOptionsSnapshotAccess."""

    file: Child


@driver("snapshot-access", schema="BlockdevOptionsGenericFormat", options=SnapshotAccessOptions)
class SnapshotAccessNode(BlockNode):
    """Reads the past."""

    child_roles: ClassVar[Mapping[str, ChildRole]] = {"file": ChildRole.DATA | ChildRole.PRIMARY}

    async def open(self, options: SnapshotAccessOptions) -> None:
        """Take the size of the node below."""
        self.file = options.file
        self.size = align_up(self.file.size, SECTOR)

    def child_perm(self, name: str, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Nothing is needed of the node, and nothing forbidden to others: it keeps the snapshot itself."""
        return Perm.NONE, Perm.ALL

    async def preadv(self, batch: Batch) -> None:
        """Read the past."""
        await self.file.node.snapshot_preadv(batch)

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Say what was where."""
        return await self.file.node.snapshot_status(offset, length)

    async def pdiscard(self, offset: int, length: int) -> None:
        """Give up a part of the past."""
        await self.file.node.snapshot_discard(offset, length)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """The past cannot be changed."""
        raise OSError(errno.ENOTSUP, "a snapshot is not written to")

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """The past cannot be changed."""
        raise OSError(errno.ENOTSUP, "a snapshot is not written to")

    async def flush(self) -> None:
        """There is nothing to write."""

    def exact_filename(self) -> str:
        """That of the node below, whatever it is."""
        return node_filename(self.file.node)
