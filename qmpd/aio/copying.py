"""Copies between files in several threads at once, each reading, looking for zeroes and writing on its own.

`_copying` (compiled at install) has the loop. A copy that Python would do in thousands of requests, each with its
way to a thread and back, is one call per thread here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpd.aio.pool import BufferPool, in_disk_thread
from qmpd.native import compiled
from qmpd.units import MiB, align_up

if TYPE_CHECKING:
    from qmpd.aio.disk import DiskFile

WINDOW = 1 * MiB
"""Bytes that a thread reads before it writes: few enough to stay in the cache of its processor."""

THREADS = min(max(os.cpu_count() or 1, 2), 4)
"""Threads of one copy. More would wait for each other: the kernel lets one at a time write to a file."""


_native = compiled("qmpd.aio._copying")


def available() -> bool:
    """Say whether the loop is built."""
    return _native is not None


class Part(NamedTuple):
    """Data to copy: `length` bytes at `source` of `disk` are the bytes at `at` of the target's disk."""

    at: int
    length: int
    source: int
    disk: DiskFile


class Put(NamedTuple):
    """What was written: `length` bytes at `at` of the target's disk are at `place` of the file."""

    at: int
    length: int
    place: int


async def copy(
    parts: Sequence[Part],
    target: DiskFile,
    *,
    grain: int,
    end: int,
    unit: int = 1,
    shift: int = 0,
    rooms: Sequence[tuple[int, int]] | None = None,
    in_order: bool = True,
    pool: BufferPool | None = None,
) -> list[Put]:
    """Copy `parts`, in order and apart, without the grains that are zero; return what was written, in any order.

    grain      bytes, a multiple of unit; counted from the start of the disk
    end        bytes of the target's disk
    unit       bytes that are written as a whole, zeroes around the parts included
    shift      what to add to an offset of the disk for one of the file, unless there are
    rooms      (offset, length) in whole units, of the file: filled one after the other.
               There must be enough for every unit that the parts touch
    in_order   rooms are filled in the order of the disk
    pool       where the buffers come from, for who copies more than once

    Cancelling waits for the threads. Raises OSError; then an unknown part is written.
    """
    assert _native is not None
    ffi, lib = _native.ffi, _native.lib
    pieces = ffi.new("qmpd_part[]", [(part.at, part.length, part.source, part.disk.fd) for part in parts])
    places = ffi.NULL if rooms is None else ffi.new("qmpd_room[]", list(rooms))
    window = align_up(max(WINDOW, grain), grain)
    count = len(rooms or ())
    job = lib.qmpd_copy_new(target.fd, pieces, len(parts), window, unit, grain, end, shift, places, count, in_order)
    if job == ffi.NULL:
        raise ValueError("parts of a copy that are not in order, or beyond the end")
    longest = end + shift if rooms is None else max((place + length for place, length in rooms), default=0)
    try:
        with target.reaching(longest):
            await _work(job, window, pool or BufferPool(0))
        found = ffi.new("const qmpd_put **")
        count = lib.qmpd_copy_puts(job, found)
        return [Put(put.at, put.length, put.place) for put in ffi.unpack(found[0], count)] if count else []
    finally:
        lib.qmpd_copy_free(job)


async def _work(job: Any, window: int, pool: BufferPool) -> None:
    """Run a copy in threads; returns when all have ended. Raises OSError."""
    assert _native is not None
    work, memory = _native.lib.qmpd_copy_work, _native.ffi.from_buffer
    buffers = [pool.take(window) for _ in range(THREADS)]
    working = [asyncio.ensure_future(in_disk_thread(partial(work, job, memory(one.view)))) for one in buffers]
    ended = asyncio.gather(*working, return_exceptions=True)
    cancelled = None
    while not ended.done():
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError as error:
            _native.lib.qmpd_copy_stop(job)
            cancelled = error
    for one in buffers:
        one.release()
    if cancelled is not None:
        raise cancelled
    code = max(one.result() for one in working)
    if code:
        raise OSError(code, os.strerror(code))
