"""The memory of what is data, against a set of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qmpd.exporting.nbd_target import KnownData

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=30)


@given(RANGES, st.tuples(st.integers(0, 70), st.integers(0, 20)))
def test_it_knows_exactly_what_it_was_told(told: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    known, model = KnownData(), set()
    for start, length in told:
        known.learn(start, start + length)
        model.update(range(start, start + length))
    start, length = asked
    if length:
        assert known.covers(start, start + length) == model.issuperset(range(start, start + length))
    known.forget()
    assert not known.covers(0, 1)
