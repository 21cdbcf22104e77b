"""Split rings: what the driver offers comes out in order, and no driver gets more out of one than an error."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.protocols.virtqueue import MAX_SIZE, RingError, SplitRing, sizes
from tests.support.vhost_driver import INDIRECT, NEXT, WRITE

NUM, BASE = 8, 0x1000
MEMORY = 64 << 10


class Flat:
    """Guest memory in two regions side by side, and a hole after them."""

    def __init__(self) -> None:
        self.data = bytearray(MEMORY)

    def guest(self, address: int, length: int) -> list[memoryview]:
        start, half = address - BASE, MEMORY // 2
        if start < 0 or start + length > MEMORY:
            raise RingError(f"there is no memory at {address:#x}")
        view = memoryview(self.data)
        cut = min(max(half - start, 0), length)
        return [part for part in (view[start : start + cut], view[start + cut : start + length]) if len(part)]


class Made:
    """A ring of NUM descriptors beside its memory."""

    def __init__(self, *, base: int = 0, event_idx: bool = False, indirect: bool = True) -> None:
        self.memory = Flat()
        self.parts = [bytearray(size) for size in sizes(NUM)]
        self.fences = 0
        struct.pack_into("<H", self.parts[1], 2, base)
        struct.pack_into("<H", self.parts[2], 2, base)
        self.ring = SplitRing(
            self.memory,
            NUM,
            *(memoryview(part) for part in self.parts),
            base=base,
            event_idx=event_idx,
            indirect=indirect,
            fence=self._fence,
        )
        self.offered = base

    def _fence(self) -> None:
        self.fences += 1

    def offer(self, head: int, table: Mapping[int, tuple[int, int, int, int]]) -> None:
        for number, values in table.items():
            struct.pack_into("<QIHH", self.parts[0], 16 * number, *values)
        struct.pack_into("<H", self.parts[1], 4 + 2 * (self.offered % NUM), head)
        self.offered = (self.offered + 1) & 0xFFFF
        struct.pack_into("<H", self.parts[1], 2, self.offered)

    def used(self) -> tuple[int, list[tuple[int, int]]]:
        (index,) = struct.unpack_from("<H", self.parts[2], 2)
        return index, [struct.unpack_from("<II", self.parts[2], 4 + 8 * at) for at in range(NUM)]


def lengths(views: list[memoryview]) -> list[int]:
    return [len(view) for view in views]


def test_a_chain_is_its_buffers_in_order() -> None:
    made = Made()
    made.offer(3, {3: (BASE, 16, NEXT, 1), 1: (BASE + 64, 4, NEXT | WRITE, 7), 7: (BASE + 128, 1, WRITE, 0)})
    chain = made.ring.pop()
    assert chain is not None
    assert (chain.head, lengths(chain.readable), lengths(chain.writable)) == (3, [16], [4, 1])
    assert made.ring.pop() is None


def test_a_buffer_across_two_regions_is_two_pieces() -> None:
    made = Made()
    made.offer(0, {0: (BASE + MEMORY // 2 - 10, 16, 0, 0)})
    chain = made.ring.pop()
    assert chain is not None
    assert lengths(chain.readable) == [10, 6]


def test_an_indirect_table_stands_for_its_descriptors() -> None:
    made = Made()
    table = struct.pack("<QIHHQIHH", BASE + 512, 16, NEXT, 1, BASE + 1024, 1, WRITE, 0)
    made.memory.data[: len(table)] = table
    made.offer(2, {2: (BASE, len(table), INDIRECT, 0)})
    chain = made.ring.pop()
    assert chain is not None
    assert (chain.head, lengths(chain.readable), lengths(chain.writable)) == (2, [16], [1])


def test_indexes_go_round() -> None:
    """16 bits, and not a multiple of the size of the ring."""
    made = Made(base=0xFFFE)
    for number in range(5):
        made.offer(number, {number: (BASE, 1, WRITE, 0)})
        chain = made.ring.pop()
        assert chain is not None
        made.ring.push(chain.head, number)
    assert made.ring.next == 3
    index, elements = made.used()
    assert index == 3
    assert [elements[at % NUM] for at in range(0xFFFE, 0x10003)] == [(number, number) for number in range(5)]


@pytest.mark.parametrize(
    ("head", "table", "text"),
    [
        (NUM, {}, f"begins with descriptor {NUM}"),
        (0, {0: (BASE, 1, NEXT, NUM)}, f"goes on with descriptor {NUM}"),
        (0, {0: (BASE, 1, NEXT, 1), 1: (BASE, 1, NEXT, 0)}, "goes round"),
        (0, {0: (BASE, 1, NEXT, 0)}, "goes round"),
        (0, {0: (BASE, 0, 0, 0)}, "no bytes"),
        (0, {0: (0, 1, 0, 0)}, "no memory at 0x0"),
        (0, {0: (BASE + MEMORY, 1, 0, 0)}, "no memory"),
        (0, {0: (BASE + MEMORY - 1, 2, 0, 0)}, "no memory"),
        (0, {0: ((1 << 64) - 1, 2, 0, 0)}, "no memory"),
        (0, {0: (BASE, 0xFFFFFFFF, WRITE, 0)}, "no memory"),
        (0, {0: (BASE, 1, WRITE | NEXT, 1), 1: (BASE, 1, 0, 0)}, "to read follows"),
        (0, {0: (BASE, 0, INDIRECT, 0)}, "table has 0 bytes"),
        (0, {0: (BASE, 17, INDIRECT, 0)}, "table has 17 bytes"),
        (0, {0: (BASE, 16 * MAX_SIZE + 16, INDIRECT, 0)}, "table has"),
        (0, {0: (BASE, 16, INDIRECT | NEXT, 0)}, "where none may be"),
    ],
)
def test_a_broken_chain_is_an_error(head: int, table: dict[int, tuple[int, int, int, int]], text: str) -> None:
    made = Made()
    made.offer(head, table)
    with pytest.raises(RingError, match=text):
        made.ring.pop()


def test_a_table_in_a_table_is_an_error() -> None:
    made = Made()
    made.memory.data[:16] = struct.pack("<QIHH", BASE, 16, INDIRECT, 0)
    made.offer(0, {0: (BASE, 16, INDIRECT, 0)})
    with pytest.raises(RingError, match="where none may be"):
        made.ring.pop()


def test_a_table_is_an_error_where_none_was_agreed_on() -> None:
    made = Made(indirect=False)
    made.offer(0, {0: (BASE, 16, INDIRECT, 0)})
    with pytest.raises(RingError, match="where none may be"):
        made.ring.pop()


def test_more_chains_than_the_ring_has_room_for_are_an_error() -> None:
    made = Made()
    struct.pack_into("<H", made.parts[1], 2, NUM + 1)
    with pytest.raises(RingError, match=f"{NUM + 1} chains"):
        made.ring.pop()


def test_the_driver_is_told_as_its_flag_says() -> None:
    made = Made()
    made.ring.push(0, 1)
    assert made.ring.must_notify()
    struct.pack_into("<H", made.parts[1], 0, 1)
    made.ring.push(0, 1)
    assert not made.ring.must_notify()


def test_the_driver_is_told_when_the_index_it_waits_for_is_passed() -> None:
    made = Made(event_idx=True)
    told = []
    for wanted in (0, 2, 2, 2):
        struct.pack_into("<H", made.parts[1], 4 + 2 * NUM, wanted)
        made.ring.push(0, 1)
        told.append(made.ring.must_notify())
    assert told == [True, False, True, False]


def test_an_empty_ring_says_which_chain_it_wants_to_be_kicked_for() -> None:
    """And looks once more after that, behind a fence."""
    made = Made(base=5, event_idx=True)
    assert made.ring.pop() is None
    assert struct.unpack_from("<H", made.parts[2], 4 + 8 * NUM) == (5,)
    assert made.fences == 1


@given(
    descriptors=st.binary(min_size=16 * NUM, max_size=16 * NUM),
    available=st.binary(min_size=6 + 2 * NUM, max_size=6 + 2 * NUM),
    near=st.booleans(),
    event_idx=st.booleans(),
)
def test_any_bytes_in_a_ring_give_chains_or_an_error(
    descriptors: bytes, available: bytes, near: bool, event_idx: bool
) -> None:
    """With addresses as they come, and with ones that are mostly there."""
    made = Made(event_idx=event_idx)
    made.parts[0][:] = descriptors
    made.parts[1][:] = available
    if near:
        for at in range(NUM):
            address, length, flags, following = struct.unpack_from("<QIHH", descriptors, 16 * at)
            values = (BASE + address % MEMORY, length % 64, flags & 7, following % NUM)
            struct.pack_into("<QIHH", made.parts[0], 16 * at, *values)
        struct.pack_into("<H", made.parts[1], 2, available[2] % (NUM + 1))
    try:
        for _ in range(NUM + 1):
            chain = made.ring.pop()
            if chain is None:
                break
            assert sum(lengths(chain.readable + chain.writable)) <= MAX_SIZE * MEMORY
            made.ring.push(chain.head, 0)
    except RingError:
        pass
