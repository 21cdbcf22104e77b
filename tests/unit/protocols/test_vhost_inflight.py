"""Notes of what is under way: whenever the back end stops, the next one takes again what was not given back."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.protocols.vhost_inflight import Inflight, region_size

NUM = 8


def made() -> tuple[bytearray, Inflight]:
    memory = bytearray(region_size(NUM))
    notes = Inflight(memoryview(memory), NUM)
    assert notes.resume(0) == []
    return memory, notes


def next_one(memory: bytearray, used: int) -> list[int]:
    return Inflight(memoryview(memory), NUM).resume(used)


def test_sizes_are_those_of_the_document() -> None:
    """2112 bytes for a queue of 128, as QEMU's own have it."""
    assert region_size(128) == 2112


def test_what_was_taken_and_not_given_back_is_taken_again_in_its_order() -> None:
    memory, notes = made()
    for head in (5, 1, 7, 3):
        notes.taken(head)
    notes.giving(7)
    notes.given(7, 1)
    assert next_one(memory, 1) == [5, 1, 3]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_stop_between_any_two_steps_of_giving_back_counts_it_once(steps: int) -> None:
    """Before the used ring has it, it is taken again; after that it is not."""
    memory, notes = made()
    notes.taken(2)
    notes.taken(4)
    if steps >= 1:
        notes.giving(4)
    used = 1 if steps >= 2 else 0
    assert next_one(memory, used) == ([2] if used else [2, 4])
    assert next_one(memory, used) == ([2] if used else [2, 4])


def test_an_index_that_goes_round_is_no_matter() -> None:
    memory = bytearray(region_size(NUM))
    notes = Inflight(memoryview(memory), NUM)
    notes.resume(0xFFFF)
    notes.taken(0)
    notes.taken(1)
    notes.giving(0)
    assert next_one(memory, 0) == [1]


@given(st.binary(min_size=region_size(NUM), max_size=region_size(NUM)), st.integers(0, 0xFFFF))
def test_any_notes_give_heads_of_the_ring(content: bytes, used: int) -> None:
    """Each once; and what is noted after that is no error either."""
    memory = bytearray(content)
    notes = Inflight(memoryview(memory), NUM)
    heads = notes.resume(used)
    assert sorted(set(heads)) == sorted(heads)
    assert all(0 <= head < NUM for head in heads)
    for head in (0, NUM - 1, NUM, 0xFFFF):
        notes.taken(head)
        notes.giving(head)
        notes.given(head, used)


def test_version_and_size_are_noted_for_whoever_looks() -> None:
    memory, _ = made()
    assert struct.unpack_from("<QHH", memory) == (0, 1, NUM)
