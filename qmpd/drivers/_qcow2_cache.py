"""Slices of qcow2 tables in memory, and the mutex that orders changes of them.

Nothing here belongs to an event loop: a node may move between loops while it is drained.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType


class Mutex:
    """A lock for coroutines of one loop at a time; waiters go in order of arrival."""

    __slots__ = ("_locked", "_waiters")

    def __init__(self) -> None:
        self._locked = False
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def locked(self) -> bool:
        """True while somebody holds it."""
        return self._locked

    async def __aenter__(self) -> None:
        if not self._locked:
            self._locked = True
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        try:
            await future
        except BaseException:
            if future.done() and not future.cancelled():
                self._hand_on()
            else:
                self._waiters.remove(future)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hand_on()

    def _hand_on(self) -> None:
        """Give the lock to the first waiter, or free it."""
        while self._waiters:
            future = self._waiters.pop(0)
            if not future.done():
                future.set_result(None)
                return
        self._locked = False


class Slice:
    """A part of a table.

    offset   host bytes             table  its entries, native integers
    pins     > 0: on its way to disk, may not be evicted
    """

    __slots__ = ("dirty", "offset", "pins", "table", "used")

    def __init__(self, offset: int, table: array[int]) -> None:
        self.offset, self.table = offset, table
        self.dirty = False
        self.pins = 0
        self.used = 0


class SliceCache:
    """The slices of one kind of table, by host offset; least recently used clean ones go first.

    length     bytes of a slice on disk       capacity  slices; dirty ones may exceed it until the
               next write of the metadata, which the image starts when `crowded` says so
    A slice that `get` or `load` returned stays valid until the caller's next await.
    """

    def __init__(
        self,
        length: int,
        capacity: int,
        read: Callable[[int, int], Awaitable[bytearray]],
        unpack: Callable[[bytearray], array[int]],
        pack: Callable[[array[int]], bytes],
    ) -> None:
        self.length, self.capacity = length, max(capacity, 2)
        self._read, self._unpack, self._pack = read, unpack, pack
        self._slices: dict[int, Slice] = {}
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._tick = 0
        self.dirty: dict[int, Slice] = {}

    def __len__(self) -> int:
        return len(self._slices)

    def get(self, offset: int) -> Slice | None:
        """Return the slice at `offset` if it is in memory."""
        found = self._slices.get(offset)
        if found is not None:
            self._tick += 1
            found.used = self._tick
        return found

    async def load(self, offset: int) -> Slice:
        """Return the slice at `offset`, read if need be. Raises OSError."""
        while True:
            found = self.get(offset)
            if found is not None:
                return found
            loading = self._loading.get(offset)
            if loading is not None:
                await loading
                continue
            await self._fetch(offset)

    async def _fetch(self, offset: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loading[offset] = future
        try:
            data = await self._read(offset, self.length)
            if self._loading.get(offset) is future and offset not in self._slices:
                self.insert(offset, self._unpack(data))
        finally:
            if self._loading.get(offset) is future:
                del self._loading[offset]
            future.set_result(None)

    def insert(self, offset: int, table: array[int]) -> Slice:
        """Put a slice in, making room for it."""
        if len(self._slices) >= self.capacity:
            self._evict()
        self._tick += 1
        self._slices[offset] = found = Slice(offset, table)
        found.used = self._tick
        return found

    def _evict(self) -> None:
        idle = sorted(
            (one for one in self._slices.values() if not one.dirty and not one.pins), key=lambda one: one.used
        )
        for one in idle[: len(self._slices) - self.capacity + 1 + self.capacity // 8]:
            del self._slices[one.offset]

    def mark(self, found: Slice) -> None:
        """Note that `found` was changed."""
        assert self._slices.get(found.offset) is found
        if not found.dirty:
            found.dirty = True
            self.dirty[found.offset] = found

    def forget(self, start: int, end: int) -> None:
        """Drop what is known of [start, end): the clusters get a new use."""
        if (end - start) // self.length > len(self._slices):
            offsets = [offset for offset in self._slices if start <= offset < end]
        else:
            offsets = [offset for offset in range(start, end, self.length) if offset in self._slices]
        for offset in offsets:
            del self._slices[offset]
            self.dirty.pop(offset, None)
        for offset in [offset for offset in self._loading if start <= offset < end]:
            del self._loading[offset]

    @property
    def crowded(self) -> bool:
        """True when dirty slices take up so much that they should be written."""
        return len(self.dirty) * 2 > self.capacity

    def begin_write(self) -> list[tuple[Slice, bytes]]:
        """Return all dirty slices with their present bytes; they count as clean, and are pinned."""
        taken = []
        for one in self.dirty.values():
            one.dirty = False
            one.pins += 1
            taken.append((one, self._pack(one.table)))
        self.dirty = {}
        return taken

    def end_write(self, taken: list[tuple[Slice, bytes]], *, failed: bool) -> None:
        """Unpin what `begin_write` returned; after a failure it is dirty again."""
        for one, _ in taken:
            one.pins -= 1
            if failed and self._slices.get(one.offset) is one:
                self.mark(one)

    def drop_unused(self, since: int) -> int:
        """Drop clean slices last used before tick `since`; return the present tick."""
        for one in list(self._slices.values()):
            if one.used <= since and not one.dirty and not one.pins:
                del self._slices[one.offset]
        return self._tick

    def clear(self) -> None:
        """Forget everything, changes included."""
        self._slices.clear()
        self.dirty.clear()
        self._loading.clear()

    def offsets(self) -> Iterator[int]:
        """Yield the offsets in memory (tests)."""
        return iter(self._slices)
