"""Dirty bitmaps against a list of booleans, and what writes, zero writes and discards mark."""

from __future__ import annotations

import asyncio
import hashlib
import random

import pytest

from qmpd.block import dirty_bitmap
from qmpd.block.batch import WriteFlags
from qmpd.block.dirty_bitmap import CHUNK_BITS, DirtyBitmap
from qmpd.errors import CommandError
from tests.gen.qcow2 import MemoryNode, edge


class Model:
    """A bitmap as a list of booleans, one for each unit."""

    def __init__(self, size: int, granularity: int) -> None:
        self.size, self.granularity = size, granularity
        self.bits = [False] * -(-size // granularity)

    def fill(self, offset: int, length: int, dirty: bool) -> None:
        end = min(offset + length, self.size)
        if offset < end:
            first, stop = offset // self.granularity, (end - 1) // self.granularity + 1
            self.bits[first:stop] = [dirty] * (stop - first)

    def truncate(self, size: int) -> None:
        count = -(-size // self.granularity)
        self.bits = (self.bits + [False] * count)[:count]
        self.size = size

    def serialized(self) -> bytes:
        data = bytearray(max(-(-len(self.bits) // 64), 1) * 8)
        for at, dirty in enumerate(self.bits):
            data[at >> 3] |= dirty << (at & 7)
        return bytes(data)

    def areas(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for at, dirty in enumerate(self.bits):
            start = at * self.granularity
            end = min(start + self.granularity, self.size)
            if dirty and found and sum(found[-1]) == start:
                found[-1] = (found[-1][0], end - found[-1][0])
            elif dirty:
                found.append((start, end - start))
        return found


def compare(bitmap: DirtyBitmap, model: Model) -> None:
    data = model.serialized()
    assert bitmap.count == sum(model.bits) * model.granularity
    assert bitmap.serialized_length == len(data)
    assert bitmap.serialize(0, len(data)) == data
    assert bitmap.sha256() == hashlib.sha256(data).hexdigest()
    assert list(bitmap.dirty_areas()) == model.areas()


@pytest.mark.parametrize("seed", range(12))
def test_random_work_leaves_what_a_plain_list_has(seed: int) -> None:
    rng = random.Random(seed)
    granularity = rng.choice((512, 4096, 65536))
    size = rng.choice((1, 40, CHUNK_BITS // 8, CHUNK_BITS, CHUNK_BITS * 3)) * granularity + rng.choice((0, 0, 512))
    bitmap, model = DirtyBitmap("b", size, granularity), Model(size, granularity)
    for _ in range(60):
        offset = rng.randrange(size)
        length = rng.choice((1, 512, granularity, granularity * 9, rng.randint(1, size), size * 2))
        kind = rng.choice(("set", "set", "set", "reset", "truncate", "clear", "load", "merge", "restore"))
        if kind == "set":
            bitmap.set(offset, length)
            model.fill(offset, length, True)
        elif kind == "reset":
            bitmap.reset(offset, length)
            model.fill(offset, length, False)
        elif kind == "truncate":
            size = max(512, rng.choice((size // 2, size + granularity * 7, size)))
            bitmap.truncate(size)
            model.truncate(size)
        elif kind == "clear" and rng.random() < 0.3:
            bitmap.clear()
            model.fill(0, size, False)
        elif kind == "load":
            other = DirtyBitmap("c", size, granularity)
            other.load(0, model.serialized() + b"\xff" * 8)
            compare(other, model)
        elif kind == "merge":
            other = DirtyBitmap("c", size, rng.choice((granularity, granularity * 2, 512)))
            other.set(offset, length)
            bitmap.merge(other)
            for at, count in other.dirty_areas():
                model.fill(at, count, True)
        elif kind == "restore":
            copy = bitmap.snapshot()
            bitmap.set(0, size)
            bitmap.restore(copy)
        compare(bitmap, model)


def test_runs_within_a_range_begin_and_end_where_asked() -> None:
    bitmap = DirtyBitmap("b", 10 << 16, 1 << 16)
    bitmap.set(3 << 16, 2 << 16)
    assert list(bitmap.runs(100, 4 << 16)) == [(100, (3 << 16) - 100, False), (3 << 16, 1 << 16, True)]
    assert list(bitmap.runs((3 << 16) + 5, (3 << 16) + 6)) == [((3 << 16) + 5, 1, True)]
    assert list(bitmap.runs(5, 5)) == []


def test_a_petabyte_that_is_marked_whole_takes_little_memory_and_time() -> None:
    bitmap = DirtyBitmap("b", 1 << 47, 1 << 16)
    bitmap.set(0, 1 << 47)
    assert bitmap.count == 1 << 47
    assert list(bitmap.dirty_areas()) == [(0, 1 << 47)]


def test_writes_zero_writes_and_discards_mark_enabled_bitmaps_only() -> None:
    async def work() -> None:
        node = MemoryNode(bytes(1 << 20))
        on = dirty_bitmap.add(node, "on", 512, persistent=False, disabled=False)
        off = dirty_bitmap.add(node, "off", None, persistent=False, disabled=True)
        disk = edge(node)
        await disk.pwrite(1000, b"x" * 100)
        await disk.pwrite_zeroes(4096, 1024)
        await disk.pdiscard(8192, 512)
        await disk.pread(0, 4096)
        assert list(on.dirty_areas()) == [(512, 1024), (4096, 1024), (8192, 512)]
        assert off.count == 0
        assert [bitmap.name for bitmap in node.dirty_bitmaps] == ["off", "on"]

    asyncio.run(work())


def test_a_failed_write_marks_and_an_unchanged_one_does_not() -> None:
    async def work() -> None:
        node = MemoryNode(bytes(1 << 20))
        bitmap = dirty_bitmap.add(node, "b", 512, persistent=False, disabled=False)
        node.error = lambda kind, *_: 5 if kind == "write" else 0
        with pytest.raises(OSError, match="failed"):
            await edge(node).pwrite(512, bytes(512))
        assert bitmap.count == 512
        node.error = lambda *_: 0
        from qmpd.block.batch import Batch

        await edge(node).pwritev(Batch.single(4096, memoryview(bytes(512))), WriteFlags.UNCHANGED)
        assert bitmap.count == 512

    asyncio.run(work())


def test_a_grown_node_has_a_grown_bitmap() -> None:
    async def work() -> None:
        node = MemoryNode(bytes(1 << 20))
        bitmap = dirty_bitmap.add(node, "b", 512, persistent=False, disabled=False)
        await edge(node).pwrite(1 << 20, bytes(1024))
        assert list(bitmap.dirty_areas()) == [(1 << 20, 1024)]

    asyncio.run(work())


def test_names_and_states_are_refused_as_the_reference_does() -> None:
    node = MemoryNode(bytes(1 << 20))
    bitmap = dirty_bitmap.add(node, "b", None, persistent=False, disabled=False)
    assert bitmap.granularity == 65536
    for name, granularity, text in (
        ("", 512, "Bitmap name cannot be empty"),
        ("b", 512, "Bitmap already exists: b"),
        ("x" * 1024, 512, "Bitmap name too long: xxx"),
        ("c", 768, "Granularity must be power of 2 and at least 512"),
    ):
        with pytest.raises(CommandError, match=text):
            dirty_bitmap.add(node, name, granularity, persistent=False, disabled=False)
    with pytest.raises(CommandError, match="Can't store persistent bitmaps to file: Operation not supported"):
        dirty_bitmap.add(node, "p", 512, persistent=True, disabled=False)
    bitmap.readonly = True
    bitmap.check(readonly=True)
    with pytest.raises(CommandError, match="readonly and cannot be modified"):
        bitmap.check()
    bitmap.busy = True
    with pytest.raises(CommandError, match="currently in use by another operation"):
        bitmap.check(readonly=True, inconsistent=True)
