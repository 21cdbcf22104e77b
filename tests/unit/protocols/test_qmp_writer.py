"""Replies byte for byte as qemu-storage-daemon 10.0.2 writes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.protocols.qmp_writer import quote, to_text, to_wire

TEXTS: list[tuple[Any, str]] = [
    ({"return": {}, "id": 1}, '{"return": {}, "id": 1}'),
    ([1, [], {"a": None}, True, False], '[1, [], {"a": null}, true, false]'),
    ("\x7f é \0 \x1f \U0001f600 ÿ \\u00ff", '"\\u007F \\u00E9 \\u0000 \\u001F \\uD83D\\uDE00 \\u00FF \\\\u00ff"'),
    ('a/b\\c"d\b\f\n\r\t', '"a/b\\\\c\\"d\\b\\f\\n\\r\\t"'),
    (1000.0, "1000"),
    (0.1, "0.10000000000000001"),
    (float(1 << 64), "1.8446744073709552e+19"),
    (-9.2233720368547758e18, "-9.2233720368547758e+18"),
    (float("inf"), "inf"),
    (float("-inf"), "-inf"),
    (-0.0, "-0"),
    ([1.5, {"a": 2.0}], '[1.5, {"a": 2}]'),
    ({"a": float("inf")}, '{"a": inf}'),
    ((1 << 64) - 1, "18446744073709551615"),
    ("qmpd 0.1.0, 1.5 [2.5", '"qmpd 0.1.0, 1.5 [2.5"'),
    ("\udcff", '"\\uFFFD"'),
]


@pytest.mark.parametrize(("value", "text"), TEXTS, ids=[text for _, text in TEXTS])
def test_texts_are_those_of_the_reference(value: Any, text: str) -> None:
    assert to_text(value) == text
    assert to_wire({"x": value}) == f'{{"x": {text}}}\r\n'.encode()


def test_depth_is_no_matter_of_the_stack() -> None:
    value: Any = []
    for _ in range(20_000):
        value = [value]
    assert to_text(value) == "[" * 20_001 + "]" * 20_001


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": {1, 2}}, b"bytes", {1.5: 2.5}])
def test_what_json_has_no_form_for_is_our_own_mistake(value: Any) -> None:
    with pytest.raises(TypeError):
        to_text([1.5, value])


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_quoted_text_is_ascii_and_reads_back(text: str) -> None:
    assert quote(text).isascii()
    assert json.loads(quote(text)) == text
    assert to_text(text) == quote(text)
