"""The framer against what qemu-storage-daemon 10.0.2 answered to the same bytes."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qmpd.protocols import qmp
from qmpd.protocols.qmp import CommandFramer, Malformed, from_text
from qmpd.protocols.qmp_parser import JsonError


def bad(text: str) -> Malformed:
    return Malformed(f"JSON parse error, {text}")


def feed(data: bytes) -> list[Any]:
    """Outcomes of `data` with a line end behind it, which ends numbers and keywords."""
    return CommandFramer().feed(data + b"\n")


VALUES: list[tuple[bytes, Any]] = [
    (b"0", 0),
    (b"-0", 0),
    (b"9223372036854775808", 1 << 63),
    (b"18446744073709551615", (1 << 64) - 1),
    (b"18446744073709551616", float(1 << 64)),
    (b"-9223372036854775808", -(1 << 63)),
    (b"-9223372036854775809", -float(1 << 63)),
    (b"1e3", 1000.0),
    (b"0.5e3", 500.0),
    (b"1E-2", 0.01),
    (b"1e999", float("inf")),
    (b"-1e999", float("-inf")),
    (b"true", True),
    (b"null", None),
    (b"[]", []),
    (b'{"a":{}}', {"a": {}}),
    (b'"\x7f"', "\x7f"),
    (b'"\\u0000"', "\0"),
    (b'"\xc0\x80"', "\0"),
    (b'"\\ud83d\\ude00"', "\U0001f600"),
    ('"\U0001f600é"'.encode(), "\U0001f600é"),
    (b"'a\"b'", 'a"b'),
    (b'"a\\\'b"', "a'b"),
    (b"'it\\'s'", "it's"),
    (b'"a\\/b\\\\c\\"d\\b\\f\\n\\r\\t"', 'a/b\\c"d\b\f\n\r\t'),
    (b'"%s"', "%s"),
]


@pytest.mark.parametrize(("text", "value"), VALUES, ids=[repr(text) for text, _ in VALUES])
def test_values_are_those_of_the_reference(text: bytes, value: Any) -> None:
    outcome = feed(text)
    assert outcome == [value]
    assert type(outcome[0]) is type(value)
    inside = feed(b'{"execute":"x","id":' + text + b"}")
    assert inside == [{"execute": "x", "id": value}]
    assert type(inside[0]["id"]) is type(value)


ERRORS: list[tuple[bytes, list[Any]]] = [
    (b'{"execute":}', [bad("expecting value")]),
    (b'{"execute" "x"}', [bad("missing : in object pair")]),
    (b'{execute:"x"}', [bad("invalid keyword 'execute'")]),
    (b'{"execute":"x",}', [bad("expecting value")]),
    (b"}", [bad("expecting value")]),
    (b"]]", [bad("expecting value")] * 2),
    (b'{"execute":"x"]', [bad("expected separator in dict")]),
    (b"[}", [bad("expecting value")]),
    (b"[1 2]", [bad("expected separator in list")]),
    (b"[,]", [bad("expecting value")]),
    (b"[1,]", [bad("expecting value")]),
    (b'{"a":1,"a":2}', [bad("duplicate key")]),
    (b'{"a\\u0000b":1,"a\\u0000b":1}', [bad("duplicate key")]),
    (b"{1:2}", [bad("key is not a string in object")]),
    (b'{{"a":1}:2}', [bad("key is not a string in object")]),
    (b'{"a":1 "b"}', [bad("expected separator in dict")]),
    (b'"unterminated', [bad("stray '\"unterminated\n'")]),
    (b"nonsense", [bad("invalid keyword 'nonsense'")]),
    (b"truefalse", [bad("invalid keyword 'truefalse'")]),
    (b'{"a":01}', [bad("stray '01'"), bad("expecting value")]),
    (b'{"a":1.}', [bad("stray '1.}'")]),
    (b'{"a":+1}', [bad("stray '+'"), bad("expecting value")]),
    (b'{"a":.5}', [bad("stray '.'"), bad("expecting value")]),
    (b'{"a":1e}', [bad("stray '1e}'")]),
    (b'{"a":0e1}', [bad("expected separator in dict")]),
    (b'{"a":NaN}', [bad("stray 'N'"), bad("expecting value")]),
    (b'{"a":Infinity}', [bad("stray 'I'"), bad("expecting value")]),
    (b"-", [bad("stray '-\n'")]),
    (b"--1", [bad("stray '--'")]),
    (b"12a", [12, bad("invalid keyword 'a'")]),
    (b"@", [bad("stray '@'")]),
    (b'@ "x" , 5 ,', [bad("stray '@'"), bad("expecting value"), 5, bad("expecting value")]),
    (b"@@@ {}", [bad("stray '@'"), {}]),
    (b"%s", [bad("stray '%'")]),
    (b'"\\x41"', [bad("invalid escape sequence in string")]),
    (b'"\\u12"', [bad('\\u12" is not a valid Unicode character')]),
    (b'"\\u12zz34"', [bad("\\u12zz is not a valid Unicode character")]),
    (b'"\\ud800"', [bad("\\ud800 is not a valid Unicode character")]),
    (b'"\\ud83d\\u0041"', [bad("\\ud83d is not a valid Unicode character")]),
    (b'"\\uFFFE"', [bad("\\uFFFE is not a valid Unicode character")]),
    (b'"\\ufdd0"', [bad("\\ufdd0 is not a valid Unicode character")]),
    (b'"\xef\xbf\xbf"', [bad("invalid UTF-8 sequence in string")]),
    (b'"\xef\xb7\x90"', [bad("invalid UTF-8 sequence in string")]),
    (b'"\xed\xa0\x80"', [bad("invalid UTF-8 sequence in string")]),
    (b'"\xc0\x81"', [bad("invalid UTF-8 sequence in string")]),
    (b'"\x80"', [bad("invalid UTF-8 sequence in string")]),
    (b'"tab\there"', [bad("stray '\"tab\t'")]),
    (b"\x00", [bad("stray ''")]),
    (b"@x\t+\n+", [bad("stray '@'"), bad("stray '+'")]),
    (b'"\xe2\x82\xe2\x82\xac\x01', [bad("stray '\"\ufffd\u20ac\x01'")]),
    (b'"\xc0\x80\xef\xbf\xbe\xf8\x88\x80\x80\x80\x80\x01', [bad("stray '\"\0\ufffd\ufffd\ufffd\x01'")]),
    (b"a\0b", [bad("invalid keyword 'a'"), bad("stray ''")]),
    (b"\x01", [bad("stray '\x01'")]),
    (b"\x1b[A", [bad("stray '\x1b'"), bad("stray 'A'")]),
    (b'{"a":] {}', [bad("expecting value"), {}]),
    (b"[" * 1025, [Malformed("JSON nesting depth limit exceeded")]),
]


@pytest.mark.parametrize(("text", "outcomes"), ERRORS, ids=[repr(text[:20]) for text, _ in ERRORS])
def test_errors_are_those_of_the_reference(text: bytes, outcomes: list[Any]) -> None:
    assert feed(text) == outcomes


@pytest.mark.parametrize("text", [text for text, _ in ERRORS], ids=[repr(text[:20]) for text, _ in ERRORS])
def test_the_next_command_is_understood_after_any_error(text: bytes) -> None:
    assert feed(text + b'\n{"execute":"x"}')[-1] == {"execute": "x"}


def test_invalid_bytes_in_a_stray_text_are_shown_as_replacement_characters() -> None:
    """A byte FF resets the parser, also inside an unfinished command."""
    (error, fresh) = feed(b'{"execute":\xff{"execute":"x"}')
    assert qmp.to_text(error.text) == "\"JSON parse error, stray '\\uFFFD'\""
    assert fresh == {"execute": "x"}


def test_1024_levels_are_fine_and_one_more_is_not() -> None:
    deep = b"[" * 1023 + b"]" * 1023
    (value,) = feed(b'{"id":' + deep + b"}")
    assert qmp.to_text(value["id"]).encode() == deep
    assert feed(b'{"id":[' + deep + b"]}")[0] == Malformed("JSON nesting depth limit exceeded")


@pytest.mark.parametrize("brackets", [b"{", b'{"a":', b"[{"])
def test_deep_unfinished_input_is_refused_without_a_deep_stack(brackets: bytes) -> None:
    assert Malformed("JSON nesting depth limit exceeded") in feed(brackets * 1025)


def test_size_and_count_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "MAX_TOTAL", 100)
    monkeypatch.setattr(qmp, "MAX_TOKENS", 20)
    assert feed(b'["' + b"x" * 95 + b'"]')[0] == ["x" * 95]  # the fast way knows no limit below a read
    framer = CommandFramer()
    assert framer.feed(b"[") == []
    assert framer.feed(b'"' + b"x" * 98 + b'"') == [Malformed("JSON token size limit exceeded")]
    assert framer.feed(b'{"execute":"x"}') == [{"execute": "x"}]
    assert framer.feed(b"[" + b"1," * 20)[0] == Malformed("JSON token count limit exceeded")


def test_blank_lines_answer_nothing() -> None:
    assert feed(b"\n\n   \t\r\n") == []


commands = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
).map(lambda value: json.dumps({"execute": "x", "id": value}, ensure_ascii=False).encode("utf-8", "surrogatepass"))
pieces = st.one_of(
    commands,
    st.sampled_from([text for text, _ in ERRORS]),
    st.sampled_from([text for text, _ in VALUES]),
    st.binary(max_size=12),
    st.sampled_from([b"\n", b" ", b"\xff", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\r\n"]),
)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(places)]


@settings(max_examples=400)
@given(st.lists(pieces, max_size=8).map(b"".join), st.lists(st.integers(0, 1 << 16), max_size=12))
@example(b'{"a":"\xc3\xa9"}{"a":1}', [6])
@example(b"12 34", [1, 2, 3, 4])
def test_any_split_of_the_input_gives_the_same_outcomes(data: bytes, cuts: list[int]) -> None:
    whole = CommandFramer()
    expected = whole.feed(data) + whole.finish()
    for chunks in (split(data, cuts), [bytes((byte,)) for byte in data]):
        framer = CommandFramer()
        outcomes = [outcome for chunk in chunks for outcome in framer.feed(chunk)] + framer.finish()
        assert repr(outcomes) == repr(expected)


@settings(max_examples=300)
@given(commands)
def test_the_fast_way_reads_what_the_careful_one_reads(command: bytes) -> None:
    fast = CommandFramer().feed(command)
    careful = CommandFramer()
    careful.feed(command[:1])
    assert repr(careful.feed(command[1:])) == repr(fast)


def test_long_and_slow_input_costs_linear_time() -> None:
    """Regression guard by counting: the time per byte may not grow with what is held back already."""

    def seconds(size: int) -> float:
        data = b'{"execute":"x","id":"' + b"y" * size + b'"}'
        framer = CommandFramer()
        began = time.process_time()
        found: list[Any] = []
        for at in range(0, len(data), 16):
            found += framer.feed(data[at : at + 16])
        assert len(found) == 1
        return time.process_time() - began

    seconds(1 << 14)
    assert seconds(1 << 20) < 64 * max(seconds(1 << 16), 0.01)


def test_a_stream_of_brackets_and_escapes_is_linear() -> None:
    for unit in (b'{"a":[{},"\\u00e9\\\\",1.5e3,true]}', b"'x'", b"[[]]", b"\\", b"@ ", b'"\\'):
        framer = CommandFramer()
        began = time.process_time()
        for _ in range(20):
            framer.feed(unit * 2000)
        assert time.process_time() - began < 20


COMMAND_LINE = [
    ('{"driver":"null-co",', "JSON parse error, premature EOI"),
    ("{", "JSON parse error, premature EOI"),
    ('{"a"', "JSON parse error, premature EOI"),
    ('{"a":', "JSON parse error, premature EOI"),
    ('{"a":1', "JSON parse error, premature EOI"),
    ('{"driver":}', "JSON parse error, expecting value"),
    ("{}{}", "Expecting at most one JSON value"),
    ('{"a":"b', "JSON parse error, stray '\"b'"),
    ("", "Expecting a JSON value"),
    ("{'a':1,'a':1}", "JSON parse error, duplicate key"),
]


@pytest.mark.parametrize(("text", "error"), COMMAND_LINE)
def test_json_of_the_command_line_has_the_texts_of_the_reference(text: str, error: str) -> None:
    with pytest.raises(JsonError) as caught:
        from_text(text)
    assert str(caught.value) == error


def test_json_of_the_command_line_is_one_value() -> None:
    assert from_text(" {'a': [1, 2]} \n") == {"a": [1, 2]}
    assert from_text("12") == 12
