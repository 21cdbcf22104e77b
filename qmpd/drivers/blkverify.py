"""blkverify: a filter that does everything twice, on a raw node and on the one under test, and compares.

Options: BlockdevOptionsBlkverify (qapi/block-drivers.json). Where the two differ the request fails
with EIO and the log says where; the reference ends the program.
Model: QEMU block/blkverify.c.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.child import Child
from qmpd.block.filename import MAX_FILENAME, exact_filename
from qmpd.block.filter import FilterNode
from qmpd.block.node import Extent
from qmpd.block.perm import ChildRole
from qmpd.errors import CommandError
from qmpd.qapi.registry import driver

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BlkverifyOptions:
    """BlockdevOptionsBlkverify: the node under test, and the raw one that is taken to be right."""

    test: Child
    raw: Child


@driver("blkverify", schema="BlockdevOptionsBlkverify", options=BlkverifyOptions)
class BlkverifyNode(FilterNode):
    """Compares two nodes."""

    child_roles: ClassVar[Mapping[str, ChildRole]] = {
        "raw": ChildRole.FILTERED | ChildRole.PRIMARY,
        "test": ChildRole.DATA,
    }
    has_protocol_name = True

    async def open(self, options: BlkverifyOptions) -> None:
        """Take the size of the node under test."""
        self.attach_file(options.raw)
        self.test = options.test
        self.size = self.test.size
        self.request_alignment = max(self.file.node.request_alignment, self.test.node.request_alignment)
        self.supports_fua = False

    async def preadv(self, batch: Batch) -> None:
        """Read both and compare; what the node under test says is the result."""
        copy = Batch(Request(r.offset, memoryview(bytearray(len(r.view)))) for r in batch)
        await asyncio.gather(_all_marked(self.test.preadv, batch), _all_marked(self.file.preadv, copy))
        for request, right in zip(batch, copy, strict=True):
            self._compare("read", request, right)
            if not request.error and request.view != right.view:
                at = next(i for i, (a, b) in enumerate(zip(request.view, right.view, strict=True)) if a != b)
                log.error(
                    "blkverify: read offset=%d bytes=%d contents mismatch at offset %d",
                    request.offset,
                    len(request.view),
                    request.offset + at,
                )
                request.fail(errno.EIO)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write to both."""
        copy = Batch(Request(r.offset, r.view) for r in batch)

        async def test(batch: Batch) -> None:
            await self.test.pwritev(batch, flags)

        async def raw(batch: Batch) -> None:
            await self.file.pwritev(batch, flags)

        await asyncio.gather(_all_marked(test, batch), _all_marked(raw, copy))
        for request, right in zip(batch, copy, strict=True):
            self._compare("write", request, right)
        self.size = self.test.size

    def _compare(self, what: str, request: Request, right: Request) -> None:
        """Fail a request whose twin ended otherwise."""
        if request.error != right.error:
            log.error(
                "blkverify: %s offset=%d bytes=%d return value mismatch %d != %d",
                what,
                request.offset,
                len(request.view),
                -request.error,
                -right.error,
            )
            request.fail(errno.EIO)

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zeroes are written as data, to both."""
        raise OSError(errno.ENOTSUP, "blkverify compares data only")

    async def pdiscard(self, offset: int, length: int) -> None:
        """Not passed on: the two nodes may differ in what they forget."""

    async def flush(self) -> None:
        """Flush the node under test only; the raw one is not important."""
        await self.test.flush()

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Say that all is data: reading it is the comparison."""
        return (Extent(offset, length, data=True, zero=False),)

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Not possible."""
        raise CommandError("Image format driver does not support resize")

    def child_resized(self) -> None:
        """Follow the node under test."""
        self.size = self.test.size

    def exact_filename(self) -> str:
        """blkverify:RAW:TEST, if both have plain names."""
        raw, test = exact_filename(self.file.node), exact_filename(self.test.node)
        name = f"blkverify:{raw}:{test}"
        return name if raw and test and len(name.encode("utf-8", "surrogateescape")) <= MAX_FILENAME else ""

    def allocated_size(self) -> int | None:
        """Not known, as the reference has it."""
        return None


async def _all_marked(work: Callable[[Batch], Coroutine[Any, Any, None]], batch: Batch) -> None:
    """Do `work` with the batch; an error that leaves it marks every request."""
    try:
        await work(batch)
    except OSError as error:
        batch.fail(error.errno or errno.EIO)
