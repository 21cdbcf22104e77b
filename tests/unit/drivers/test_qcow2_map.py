"""Where the guest's clusters are: lookups that go over many entries at once agree with one entry at a time."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from qmpd.drivers._qcow2_map import end_of_empty

ENTRIES = st.sampled_from((0, 0, 0, 0, 0, 1, 0x100, 1 << 55, 1 << 63))


@given(st.lists(st.tuples(ENTRIES, st.integers(1, 200)), max_size=20), st.data())
def test_the_end_of_empty_entries_is_the_first_that_is_not_0(runs: list[tuple[int, int]], data: st.DataObject) -> None:
    table = array("Q", [entry for entry, count in runs for _ in range(count)])
    end = data.draw(st.integers(0, len(table)))
    index = data.draw(st.integers(0, end))
    expected = next((at for at in range(index, end) if table[at]), end)
    assert end_of_empty(table, index, end) == expected
