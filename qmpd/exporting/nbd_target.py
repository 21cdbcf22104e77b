"""What an NBD client can connect to: a backend, as one export of one server.

A target belongs to the data loop; the monitor reads its fields, and changes it only through
`Runner.run`. Devices' endpoints and block exports both end in a target.
"""

from __future__ import annotations

import asyncio
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from qmpd.aio.pool import BufferPool
from qmpd.block.backend import BlockBackend
from qmpd.protocols.nbd import ALLOCATION, BITMAP_PREFIX, DEPTH, ExportInfo, TransmissionFlag
from qmpd.units import is_power_of_two

if TYPE_CHECKING:
    from qmpd.block.dirty_bitmap import DirtyBitmap

_LARGEST_MINIMUM = 64 << 10
"""Bytes; the document allows no larger minimum block size."""

_COMMON = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
)
_WRITABLE = TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO

MAX_STRETCHES = 1024
"""Separate stretches of data that are remembered per export."""

CONTEXT_ALLOCATION, CONTEXT_DEPTH, CONTEXT_BITMAP = 0, 1, 2
"""Ids of metadata contexts on the wire, the same on every connection; bitmaps count on from theirs."""


_ENTRIES = itertools.count(1)


class Client(Protocol):
    """A connection that has entered this target."""

    def shut_down(self) -> None:
        """Take no more requests, finish those that were taken, and hang up."""


class NbdTarget:
    """One export as clients see it.

    name, description   as the client reads them, bytes
    writethrough        every write is made durable before it is answered
    depth               `qemu:allocation-depth` is offered
    bitmaps             offered as `qemu:dirty-bitmap:NAME`, in this order
    buffers             memory for what is read and received. It only ever holds data of this
                        export, and is unmapped with it: reuse shows a client nothing it could not
                        read anyway, so buffers are not wiped in between
    """

    def __init__(
        self,
        backend: BlockBackend,
        name: bytes,
        *,
        description: bytes | None = None,
        read_only: bool = True,
        writethrough: bool = False,
        depth: bool = False,
        bitmaps: Sequence[DirtyBitmap] = (),
    ) -> None:
        self.backend = backend
        self.bitmaps = tuple(bitmaps)
        self.name, self.description = name, description
        self.read_only, self.writethrough, self.depth = read_only, writethrough, depth
        self.buffers = BufferPool()
        self.clients: dict[Client, int] = {}
        """With the number of each, counted over all targets in the order in which clients came."""
        self.closing = False
        self.known_data = KnownData()
        self._emptied: list[asyncio.Future[None]] = []

    def info(self) -> ExportInfo:
        """Return what holds now; the size a client is told stays its size."""
        contexts = [(CONTEXT_ALLOCATION, ALLOCATION)]
        if self.depth:
            contexts.append((CONTEXT_DEPTH, DEPTH))
        for number, bitmap in enumerate(self.bitmaps, CONTEXT_BITMAP):
            contexts.append((number, BITMAP_PREFIX + (bitmap.name or "").encode("utf-8", "surrogateescape")))
        node = self.backend.node
        alignment = node.request_alignment if node is not None else 1
        if not is_power_of_two(alignment) or alignment > _LARGEST_MINIMUM:
            alignment = 1
        return ExportInfo(
            name=self.name,
            description=self.description,
            size=self.backend.size,
            flags=_COMMON | (TransmissionFlag.READ_ONLY if self.read_only else _WRITABLE),
            minimum_block=alignment,
            preferred_block=max(4096, alignment),
            contexts=tuple(contexts),
        )

    # --- clients, on the data loop ------------------------------------------------------------------

    def enter(self, client: Client) -> bool:
        """Count a client that was told it may use this target; False if the target is going away."""
        if self.closing:
            return False
        self.clients[client] = next(_ENTRIES)
        return True

    def leave(self, client: Client) -> None:
        """The client is gone, and nothing of it is in flight any more."""
        self.clients.pop(client, None)
        if not self.clients:
            emptied, self._emptied = self._emptied, []
            for future in emptied:
                if not future.done():
                    future.set_result(None)

    async def close(self, *, only_idle: bool) -> bool:
        """Admit no more clients; with `only_idle` refuse (False) if there are any."""
        if only_idle and self.clients:
            return False
        self.closing = True
        return True

    async def end_clients(self) -> None:
        """End every client after the requests it has in flight, and wait until they are gone."""
        for client in list(self.clients):
            client.shut_down()
        while self.clients:
            future = asyncio.get_running_loop().create_future()
            self._emptied.append(future)
            await future


class KnownData:
    """Stretches of the export that were seen to be stored data.

    Reads inside one need no block status. Data may turn into a hole behind our back: then zeroes
    are sent as data, which costs a little and is never wrong. So holes are not remembered.
    """

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def covers(self, start: int, end: int) -> bool:
        """Say whether [start, end) is known to be data."""
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and end <= self._ends[at]

    def learn(self, start: int, end: int) -> None:
        """Remember [start, end), joined with what it touches."""
        low = bisect_left(self._ends, start)
        high = bisect_right(self._starts, end)
        if low < high:
            start, end = min(start, self._starts[low]), max(end, self._ends[high - 1])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]
        if len(self._starts) > MAX_STRETCHES:  # so fragmented that asking each time is as well
            self.forget()

    def forget(self) -> None:
        """Something was discarded or zeroed."""
        self._starts.clear()
        self._ends.clear()
