"""Options dataclasses made of validated members."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from qmpd.qapi.bind import build


@dataclass(frozen=True, slots=True)
class Inner:
    host_name: str
    port: int = 10809


@dataclass(frozen=True, slots=True)
class Options:
    node_name: str
    child: NotImportedHere | None = None  # type: ignore[name-defined]  # noqa: F821
    size: int | None = None
    inner: Inner | None = None
    many: list[Inner] = field(default_factory=list)
    names: tuple[str, ...] = ()
    extra: dict[str, Any] | None = None


def test_wire_names_become_fields_and_absent_members_their_defaults() -> None:
    assert build(Options, {"node-name": "n", "size": 5}) == Options(node_name="n", size=5)


def test_structs_become_dataclasses_where_the_field_is_one() -> None:
    options = build(Options, {"node-name": "n", "inner": {"host-name": "h"}, "many": [{"host-name": "i", "port": 1}]})
    assert options.inner == Inner("h")
    assert options.many == [Inner("i", 1)]


def test_an_array_becomes_a_tuple_where_the_field_is_one() -> None:
    assert build(Options, {"node-name": "n", "names": ["a", "b"]}).names == ("a", "b")


def test_other_values_are_taken_as_they_are() -> None:
    edge, extra = object(), {"wire-name": 1}
    options = build(Options, {"node-name": "n", "child": edge, "extra": extra})
    assert options.child is edge
    assert options.extra is extra


def test_the_backing_edge_may_stay_with_the_graph() -> None:
    assert build(Inner, {"host-name": "h", "backing": None}) == Inner("h")


def test_a_member_without_a_field_is_a_mistake_in_the_program() -> None:
    with pytest.raises(TypeError, match="Options has no field for member 'no-such'"):
        build(Options, {"node-name": "n", "no-such": 1})
    with pytest.raises(TypeError):
        build(Options, {})
