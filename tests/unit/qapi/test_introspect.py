"""The shape of query-qmp-schema's answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qmpd.qapi.introspect import schema_info
from qmpd.qapi.schema import STORAGE_DAEMON_ROOT, SYSTEM_ROOT, load, load_file
from qmpd.qapi.visit import validate


def info(folder: Path, text: str) -> list[dict[str, Any]]:
    (folder / "root.json").write_text(text)
    return schema_info(load_file(folder / "root.json"))


def test_types_are_numbered_in_order_of_use_and_integers_are_all_alike(tmp_path: Path) -> None:
    assert info(
        tmp_path,
        """
        { 'enum': 'E', 'data': [ 'a', { 'name': 'b', 'features': [ 'deprecated' ] } ] }
        { 'struct': 'B', 'data': { 'n': 'uint8', '*s': [ 'size' ] } }
        { 'struct': 'S', 'base': 'B', 'data': { 'e': { 'type': 'E', 'features': [ 'unstable' ] } } }
        { 'command': 'c', 'data': { '*x': 'A' }, 'returns': [ 'S' ], 'allow-oob': true, 'features': [ 'f' ] }
        { 'alternate': 'A', 'data': { 's': 'str', 'o': 'S' } }
        { 'event': 'V' }
        """,
    ) == [
        {
            "name": "c",
            "meta-type": "command",
            "features": ["f"],
            "arg-type": "0",
            "ret-type": "[1]",
            "allow-oob": True,
        },
        {"name": "V", "meta-type": "event", "arg-type": "2"},
        {"name": "0", "meta-type": "object", "members": [{"name": "x", "type": "3", "default": None}]},
        {"name": "[1]", "meta-type": "array", "element-type": "1"},
        {
            "name": "1",
            "meta-type": "object",
            "members": [
                {"name": "n", "type": "int"},
                {"name": "s", "type": "[int]", "default": None},
                {"name": "e", "type": "4", "features": ["unstable"]},
            ],
        },
        {"name": "2", "meta-type": "object", "members": []},
        {"name": "3", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "1"}]},
        {"name": "int", "meta-type": "builtin", "json-type": "int"},
        {"name": "[int]", "meta-type": "array", "element-type": "int"},
        {
            "name": "4",
            "meta-type": "enum",
            "members": [{"name": "a"}, {"name": "b", "features": ["deprecated"]}],
            "values": ["a", "b"],
        },
        {"name": "str", "meta-type": "builtin", "json-type": "string"},
    ]


def test_a_union_shows_a_variant_for_every_value_of_its_tag(tmp_path: Path) -> None:
    entries = info(
        tmp_path,
        """
        { 'enum': 'E', 'data': [ 'a', 'b' ] }
        { 'struct': 'S', 'data': { 'n': 'int' } }
        { 'union': 'U', 'base': { 't': 'E' }, 'discriminator': 't', 'data': { 'b': 'S' } }
        { 'command': 'c', 'data': 'U', 'boxed': true }
        """,
    )
    union = next(entry for entry in entries if "tag" in entry)
    assert union["tag"] == "t"
    assert union["members"] == [{"name": "t", "type": "2"}]
    assert union["variants"] == [{"case": "a", "type": "1"}, {"case": "b", "type": "3"}]


def test_notes_to_ourselves_are_not_shown() -> None:
    assert "sensitive" not in json.dumps(schema_info(load(SYSTEM_ROOT)))


def test_the_answer_fits_the_schema_it_describes_and_every_type_it_names_is_there() -> None:
    for root in (SYSTEM_ROOT, STORAGE_DAEMON_ROOT):
        entries = schema_info(load(root))
        assert validate(load(root), "[SchemaInfo]", entries) == entries
        names = [entry["name"] for entry in entries]
        assert len(set(names)) == len(names)
        for entry in entries:
            wanted = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
            if entry["meta-type"] in ("object", "alternate"):
                wanted += [member["type"] for member in [*entry["members"], *entry.get("variants", [])]]
            assert set(wanted) <= set(names)
