"""Requests in flight: widened writes lose nothing to their neighbours."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.block import ranges
from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.node import BlockNode
from qmpd.block.options import NodeOptions
from qmpd.block.ranges import RangeTable

SIZE = 16 * 512


class SlowMemory(BlockNode):
    """A node that takes aligned requests only, each after a random pause."""

    def __init__(self, alignment: int, seed: int) -> None:
        super().__init__(None, "memory", NodeOptions(), {})  # type: ignore[arg-type]
        self.size, self.request_alignment = SIZE, alignment
        self.data = bytearray(SIZE)
        self.random = random.Random(seed)

    async def _pause(self, batch: Batch) -> None:
        for request in batch:
            assert request.offset % self.request_alignment == 0
            assert len(request.view) % self.request_alignment == 0
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)

    async def preadv(self, batch: Batch) -> None:
        await self._pause(batch)
        for request in batch:
            request.view[:] = self.data[request.offset : request.end]

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        await self._pause(batch)
        for request in batch:
            self.data[request.offset : request.end] = request.view


@st.composite
def pieces(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Disjoint unaligned pieces, so that any order of the writes gives one result."""
    cuts = sorted(set(draw(st.lists(st.integers(0, SIZE), min_size=2, max_size=33))))
    return [(a, b) for a, b in pairwise(cuts) if draw(st.booleans())]


@given(pieces(), st.sampled_from([512, 4096]), st.integers(0, 1 << 16), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_concurrent_unaligned_neighbours_all_arrive(
    todo: list[tuple[int, int]], alignment: int, seed: int, per_batch: int
) -> None:
    node = SlowMemory(alignment, seed)
    model = bytearray(SIZE)
    rng = random.Random(seed)
    rng.shuffle(todo)
    requests = []
    for start, end in todo:
        data = rng.randbytes(end - start)
        model[start:end] = data
        requests.append(Request(start, memoryview(data)))
    batches = [Batch(requests[i : i + per_batch]) for i in range(0, len(requests), per_batch)]

    async def main() -> None:
        await asyncio.gather(*(ranges.write(node, batch) for batch in batches))
        got = bytearray(SIZE - 3)
        await ranges.read(node, Batch.single(3, memoryview(got)))
        assert got == model[3:]

    asyncio.run(main())
    assert node.data == model
    assert not node.ranges.busy


async def test_an_exclusive_range_waits_for_what_came_before_and_holds_up_what_comes_after() -> None:
    table, order = RangeTable(), []

    async def use(name: str, start: int, end: int, exclusive: bool) -> None:
        async with table.own(start, end, exclusive=exclusive):
            order.append(name)
            await asyncio.sleep(0.001)
            order.append(name.upper())

    await asyncio.gather(use("a", 0, 10, False), use("b", 5, 15, True), use("c", 0, 20, False), use("d", 30, 40, True))
    assert order.index("A") < order.index("b") < order.index("B") < order.index("c")
    assert order.index("d") < order.index("A")


async def test_an_error_of_a_widened_request_reaches_the_one_that_asked() -> None:
    class Broken(SlowMemory):
        async def preadv(self, batch: Batch) -> None:
            batch.fail(5)

    node = Broken(512, 0)
    request = Request(10, memoryview(b"xyz"))
    await ranges.write(node, Batch([request]))
    assert request.error == 5
    with pytest.raises(OSError, match="10 failed"):
        Batch([request]).raise_first()
