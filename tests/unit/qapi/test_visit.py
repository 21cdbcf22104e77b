"""Arguments against the schema: what is accepted, as what, and the texts for what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qmpd.errors import ValidationError
from qmpd.qapi.schema import STORAGE_DAEMON_ROOT, SYSTEM_ROOT, load
from qmpd.qapi.visit import snake_case, validate, validate_arguments
from tests.unit.qapi.texts import NOT_NEGOTIATED, OPTION_TYPES, OPTIONS, REFUSED

SYSTEM = load(SYSTEM_ROOT)
DAEMON = load(STORAGE_DAEMON_ROOT)


def shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("command", "arguments", "text"), [*REFUSED, *NOT_NEGOTIATED], ids=shown)
def test_what_does_not_fit_is_refused_in_the_words_of_the_reference(
    command: str, arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValidationError) as refusal:
        validate_arguments(DAEMON, command, arguments)
    assert str(refusal.value) == text
    assert refusal.value.error_class == "GenericError"


@pytest.mark.parametrize(("option", "tree", "text"), OPTIONS, ids=shown)
def test_option_texts_are_read_as_the_reference_reads_them(option: str, tree: dict[str, Any], text: str | None) -> None:
    if text is None:
        validate(DAEMON, OPTION_TYPES[option], tree, keyval=True)
        return
    with pytest.raises(ValidationError) as refusal:
        validate(DAEMON, OPTION_TYPES[option], tree, keyval=True)
    assert str(refusal.value) == text


def test_top_level_members_become_keyword_arguments_and_inner_ones_keep_their_wire_names() -> None:
    arguments = {"addr": {"type": "inet", "data": {"host": "h", "port": "1", "keep-alive": True}}, "tls-creds": "t"}
    assert validate_arguments(DAEMON, "nbd-server-start", arguments) == {
        "addr": {"type": "inet", "data": {"host": "h", "port": "1", "keep-alive": True}},
        "tls_creds": "t",
    }


def test_a_boxed_command_gets_one_argument() -> None:
    node = {"driver": "null-co", "node-name": "n", "read-zeroes": True}
    assert validate_arguments(DAEMON, "blockdev-add", node) == {"options": node}


def test_a_command_that_checks_its_own_arguments_gets_them_as_they_came() -> None:
    arguments = {"driver": "scsi-hd", "serial": 5, "nosuch": None}
    assert validate_arguments(SYSTEM, "device_add", arguments) == {"options": arguments}


def test_absent_optional_members_stay_absent() -> None:
    assert validate_arguments(DAEMON, "query-named-block-nodes", {}) == {}


def test_the_callers_values_are_not_changed_and_not_shared() -> None:
    arguments = {"driver": "null-co", "cache": {"direct": True}}
    options = validate_arguments(DAEMON, "blockdev-add", arguments)["options"]
    options["cache"]["direct"] = False
    assert arguments == {"driver": "null-co", "cache": {"direct": True}}


@pytest.mark.parametrize(
    ("sent", "meant"), [(-1, (1 << 64) - 1), (-(1 << 63), 1 << 63), ((1 << 64) - 1, (1 << 64) - 1)]
)
def test_negative_numbers_wrap_where_a_member_has_no_sign(sent: int, meant: int) -> None:
    assert validate(DAEMON, "uint64", sent) == meant
    assert validate(DAEMON, "size", sent) == meant


@pytest.mark.parametrize(
    ("type_name", "low", "high"),
    [("int8", -128, 127), ("int16", -(1 << 15), (1 << 15) - 1), ("uint8", 0, 255), ("uint16", 0, 65535)],
)
def test_narrow_integers_hold_their_width_and_no_more(type_name: str, low: int, high: int) -> None:
    for value in (low, high):
        assert validate(DAEMON, type_name, value) == value
    for value in (low - 1, high + 1):
        with pytest.raises(ValidationError, match=f"Parameter 'null' expects {type_name}_t"):
            validate(DAEMON, type_name, value)


@pytest.mark.parametrize("value", [None, True, 5, 1.5, "x", [1], {"a": [None]}])
def test_any_value_passes_where_any_is_declared(value: Any) -> None:
    arguments = {"path": "/", "property": "p", "value": value}
    assert validate_arguments(DAEMON, "qom-set", arguments) == arguments


def test_a_number_may_be_an_integer_but_an_integer_no_number() -> None:
    assert validate(DAEMON, "number", 3) == 3
    assert validate(DAEMON, "[number]", [1.5, 2]) == [1.5, 2]
    with pytest.raises(ValidationError, match="Invalid parameter type for '<anonymous>', expected: number"):
        validate(DAEMON, "number", True)


def test_an_explicit_null_is_a_branch_of_its_own() -> None:
    node = {"driver": "qcow2", "file": "f", "backing": None}
    assert validate(DAEMON, "BlockdevOptions", node)["backing"] is None


def test_nesting_deeper_than_the_stack_is_an_error_and_not_a_crash() -> None:
    node: dict[str, Any] = {"driver": "null-co"}
    for _ in range(100_000):
        node = {"driver": "raw", "file": node}
    with pytest.raises(ValidationError, match="nested too deeply"):
        validate_arguments(DAEMON, "blockdev-add", node)
    while "file" in node:  # taken apart by hand: the garbage collector would recurse
        node = node.pop("file")


def test_a_hundred_levels_of_nodes_are_accepted() -> None:
    node: dict[str, Any] = {"driver": "null-co"}
    for _ in range(100):
        node = {"driver": "raw", "file": node}
    assert validate(DAEMON, "BlockdevOptions", node) == node


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        *[("512", 512), ("0x200", 512), ("1k", 1024), ("1.5K", 1536), (".5k", 512), ("1.k", 1024), ("2b", 2)],
        *[(" 5M", 5 << 20), ("+1G", 1 << 30), ("010", 10), ("15.5E", 31 << 59), ("1e", 1 << 60), ("1.0", 1)],
        *[("0.1k", 102), ("1.1M", 1153434), ("0.3G", 322122547), ("1.99999k", 2048), ("08", 8)],
    ],
)
def test_sizes_are_read_with_their_suffixes(text: str, bytes_: int) -> None:
    assert validate(DAEMON, "size", text, keyval=True) == bytes_


@pytest.mark.parametrize(
    "text", ["x", "", "1.5", "-1", "5k ", "0x10k", "16E", "99999999999999999999", "1e3", "1.5B", "1KiB", "inf", "0x"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="Parameter '<anonymous>' expects a size value"):
        validate(DAEMON, "size", text, keyval=True)


def test_numbers_on_a_command_line_are_finite() -> None:
    assert validate(DAEMON, "number", "1.5e3", keyval=True) == 1500
    for text in ("inf", "nan", "1e999", "0x10", "", "1,5"):
        with pytest.raises(ValidationError, match="expects number"):
            validate(DAEMON, "number", text, keyval=True)


def test_python_names_of_wire_names() -> None:
    assert snake_case("node-name") == "node_name"
    assert snake_case("from") == "from_"
