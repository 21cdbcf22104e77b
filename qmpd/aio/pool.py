"""Threads and buffers that the data path shares.

The executor takes what would block a loop: reads that miss the page cache, large writes, syncs,
key derivation. Buffers are page-aligned slices of anonymous memory, in power-of-two classes.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qmpd.units import KiB, MiB

T = TypeVar("T")

DISK_THREADS = 16
"""Threads for disk requests: enough to keep a fast disk busy, few enough to stay cheap."""

POOL_CAP = 64 * MiB
"""Bytes of idle buffers that are kept, all classes together."""

LARGEST_CLASS = 2 * MiB
_SMALLEST_CLASS = 4 * KiB

_disk: ThreadPoolExecutor | None = None
_work: ThreadPoolExecutor | None = None


def disk_executor() -> ThreadPoolExecutor:
    """Return the threads that block on disks."""
    global _disk
    if _disk is None:
        _disk = ThreadPoolExecutor(DISK_THREADS, "qmpd-disk")
    return _disk


def work_executor() -> ThreadPoolExecutor:
    """Return the threads that compute: one per core, for ciphers and key derivation."""
    global _work
    if _work is None:
        _work = ThreadPoolExecutor(max(2, os.cpu_count() or 1), "qmpd-work")
    return _work


async def in_disk_thread(function: Callable[[], T]) -> T:
    """Run a function that blocks on a disk, and return its result."""
    return await asyncio.get_running_loop().run_in_executor(disk_executor(), function)


async def in_work_thread(function: Callable[[], T]) -> T:
    """Run a function that computes for long with the GIL released, and return its result."""
    return await asyncio.get_running_loop().run_in_executor(work_executor(), function)


class BufferPool:
    """Page-aligned buffers of one event loop; not thread-safe.

    A buffer that held plaintext of an encrypted node is given back with `wipe=True`.
    """

    def __init__(self, cap: int = POOL_CAP) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}
        self._cap = cap
        self._idle = 0

    def take(self, length: int) -> PooledBuffer:
        """Return a buffer of at least `length` bytes; its `view` is exactly `length` long."""
        size = _SMALLEST_CLASS
        while size < length:
            size *= 2
        stock = self._free.get(size)
        if stock:
            self._idle -= size
            return PooledBuffer(self, stock.pop(), size, length)
        return PooledBuffer(self, mmap.mmap(-1, size), size, length)

    def _give(self, region: mmap.mmap, size: int) -> None:
        if size <= LARGEST_CLASS and self._idle + size <= self._cap:
            self._free.setdefault(size, []).append(region)
            self._idle += size


class PooledBuffer:
    """A buffer on loan; `release` it once, after which `view` must not be used."""

    __slots__ = ("_pool", "_region", "_size", "view")

    def __init__(self, pool: BufferPool, region: mmap.mmap, size: int, length: int) -> None:
        self._pool, self._region, self._size = pool, region, size
        self.view = memoryview(region)[:length]

    def release(self, *, wipe: bool = False) -> None:
        """Give the memory back to the pool, zeroed first if it held plaintext."""
        if wipe:
            self.view[:] = bytes(len(self.view))
        self._pool._give(self._region, self._size)
