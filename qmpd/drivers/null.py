"""null-co, null-aio: a disk that stores nothing; the template of a driver.

Options: BlockdevOptionsNull (qapi/block-drivers.json). Reads leave the buffer as it is unless
`read-zeroes` is set: here they are zeroed all the same, so that no memory of ours is shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.node import BlockNode, Extent
from qmpd.errors import CommandError
from qmpd.qapi.registry import driver
from qmpd.units import SECTOR, GiB, align_up


@dataclass(frozen=True, slots=True)
class NullOptions:
    """BlockdevOptionsNull.

    size  bytes             latency_ns  nanoseconds that each request takes
    """

    size: int = 1 * GiB
    latency_ns: int = 0
    read_zeroes: bool = False


@driver("null-co", schema="BlockdevOptionsNull", options=NullOptions)
class NullNode(BlockNode):
    """Takes every write and forgets it."""

    is_protocol = True
    opens_alone = True
    reopens = True
    strong_options = ("size", "read-zeroes")

    async def open(self, options: NullOptions) -> None:
        """Take the size; the reference aborts on a negative one."""
        if options.latency_ns < 0 or options.latency_ns >= 1 << 63:
            raise CommandError("latency-ns is invalid")
        if options.size < 0:
            raise CommandError(f"Value '{options.size}' is out of range for parameter 'size'")
        self.options = options
        self.size = align_up(options.size, SECTOR)
        self.supports_fua = True

    async def _wait(self) -> None:
        if self.options.latency_ns:
            await asyncio.sleep(self.options.latency_ns / 1e9)

    async def preadv(self, batch: Batch) -> None:
        """Return zeroes."""
        await self._wait()
        for request in batch:
            request.view[:] = bytes(len(request.view))

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Forget the data."""
        await self._wait()

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Forget that as well."""
        await self._wait()

    async def flush(self) -> None:
        """Nothing to keep."""
        await self._wait()

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """All one extent, zero if it was asked to be."""
        zero = self.options.read_zeroes
        return (Extent(offset, length, data=not zero, zero=zero, host=offset, file=self),)

    def exact_filename(self) -> str:
        """A plain name only without options."""
        return "" if any(name in self.given for name in self.strong_options) else f"{self.driver_name}://"

    def allocated_size(self) -> int:
        """Nothing is stored."""
        return 0

    def image_info(self) -> dict[str, Any]:
        """No format, no info."""
        return {}


@driver("null-aio", schema="BlockdevOptionsNull", options=NullOptions)
class NullAioNode(NullNode):
    """The same, for clients that ask for it by this name."""
