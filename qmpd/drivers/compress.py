"""compress: a filter whose writes are stored compressed by the image below, cluster by cluster.

Options: BlockdevOptionsGenericFormat (qapi/block-drivers.json). What a client writes in part, is read
first and written as a whole, so a cluster is compressed anew each time.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.child import Child
from qmpd.block.filter import FilterNode
from qmpd.errors import CommandError
from qmpd.qapi.registry import driver


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """BlockdevOptionsGenericFormat: nothing but the child."""

    file: Child


@driver("compress", schema="BlockdevOptionsGenericFormat", options=CompressOptions)
class CompressNode(FilterNode):
    """Makes every write a compressed one."""

    async def open(self, options: CompressOptions) -> None:
        """Refuse a child that does not compress; take whole clusters of one that does."""
        below = options.file.node
        if not below.supports_compressed:
            raise CommandError(f"Compression is not supported for underlying format: {below.driver_name}")
        self.attach_file(options.file)
        self.request_alignment = int(below.image_info().get("cluster-size", self.request_alignment))

    async def preadv(self, batch: Batch) -> None:
        """Read from the child; the last cluster ends with zeroes where the disk ends within it."""
        end = self.file.size
        inside = Batch()
        for request in batch:
            there = min(len(request.view), max(end - request.offset, 0))
            if there < len(request.view):
                request.view[there:] = bytes(len(request.view) - there)
            if there:
                inside.append(request if there == len(request.view) else request.part(request.offset, 0, there))
        if inside:
            await self.file.preadv(inside)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write to the child, compressed, up to the end of the disk."""
        end = self.file.size
        inside = Batch(
            one if one.end <= end else Request(one.offset, one.view[: end - one.offset], one)
            for one in batch
            if one.offset < end
        )
        await self.file.pwritev(inside, flags | WriteFlags.COMPRESSED)
