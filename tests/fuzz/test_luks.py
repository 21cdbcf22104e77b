"""Headers with anything in them: refused or read, in bounded time and memory, never a traceback."""

from __future__ import annotations

import json
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import FULL, Proof
from tests.fuzz.luks_headers import damaged, damaged_json, judge, judge_bounded, sealed, seeds
from tests.gen import luks2

EXAMPLES = 1000 if FULL else 100

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3),
    max_leaves=12,
)


def test_the_seeds_are_good_and_a_changed_one_is_noticed() -> None:
    assert [judge(seed) for seed in seeds()] == [""] * 3
    assert judge(sealed(json.dumps(luks2.tree()).encode())) == ""
    assert judge(sealed(b"{}"))
    assert judge(bytes(4096)) == "Volume is not in LUKS format"


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_bytes_changed_anywhere(proof: Proof) -> None:
    count, refused = proof.count(10_000), 0
    chance = random.Random(1)
    for _ in range(count):
        refused += bool(judge(damaged(chance, chance.choice(seeds()))))
    assert 0 < refused < count
    proof.record("fuzz-luks-bytes", count=count, seed=1, refused=refused)


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_json_changed_anywhere_under_good_checksums(proof: Proof) -> None:
    count, refused = proof.count(10_000), 0
    chance = random.Random(2)
    for _ in range(count):
        refused += bool(judge(damaged_json(chance)))
    assert 0 < refused < count
    proof.record("fuzz-luks-json", count=count, seed=2, refused=refused)


@pytest.mark.proof("luks2-any-json-text", examples=EXAMPLES)
@settings(max_examples=EXAMPLES)
@given(st.binary(max_size=3000))
def test_any_json_area_at_all(text: bytes) -> None:
    assert judge(sealed(text))


@pytest.mark.proof("luks2-any-json-value", examples=EXAMPLES)
@settings(max_examples=EXAMPLES)
@given(JSON)
def test_any_json_value_at_all(value: object) -> None:
    assert judge(sealed(json.dumps(value).encode("utf-8", "surrogatepass")))


@pytest.mark.parametrize("text", [b"[" * 12000, b'{"a":' * 2400, b"1" * 12000, b'"' + b"\\u0000" * 1900 + b'"'])
def test_json_that_costs_a_careless_parser_its_stack_or_its_time(text: bytes) -> None:
    assert judge_bounded(sealed(text))


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 1 << 22, (1 << 22) + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_size_out_of_all_bounds_takes_no_memory(size: int) -> None:
    data = bytearray(seeds()[2])
    for at in (0, 16384):
        struct.pack_into(">Q", data, at + 8, size)  # hdr_size
    assert judge_bounded(bytes(data))
