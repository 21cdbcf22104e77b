"""The reader of the QAPI language: what it makes of a text, and what it says of a wrong one."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from qmpd.qapi.ir import EnumValue, Member, ObjectType, SchemaError
from qmpd.qapi.schema import STORAGE_DAEMON_ROOT, SYSTEM_ROOT, Schema, load, load_file, schema_directory


def read(folder: Path, text: str, **others: str) -> Schema:
    for name, content in {"root": text, **others}.items():
        (folder / f"{name}.json").write_text(content)
    return load_file(folder / "root.json")


def test_members_have_types_arrays_options_and_features(tmp_path: Path) -> None:
    schema = read(
        tmp_path,
        """
        { 'enum': 'E', 'data': [ 'a', { 'name': 'b', 'features': [ 'deprecated' ] } ] }
        { 'struct': 'S',  # a comment with { and ' in it
          'data': { 'one': 'E', '*two': [ 'str' ],
                    '*three': { 'type': 'int', 'features': [ 'unstable' ] } },
          'features': [ 'new' ] }
        """,
    )
    struct = schema.object_type("S")
    assert struct.members == (
        Member("one", "E"),
        Member("two", "[str]", optional=True),
        Member("three", "int", optional=True, features=("unstable",)),
    )
    assert struct.features == ("new",)
    assert schema.enum("E").values == (EnumValue("a"), EnumValue("b", ("deprecated",)))


def test_members_of_bases_come_first(tmp_path: Path) -> None:
    schema = read(
        tmp_path,
        """
        { 'struct': 'C', 'base': 'B', 'data': { 'c': 'int' } }
        { 'struct': 'B', 'base': 'A', 'data': { 'b': 'int' } }
        { 'struct': 'A', 'data': { 'a': 'int' } }
        """,
    )
    assert [member.name for member in schema.members("C")] == ["a", "b", "c"]


def test_commands_and_events_may_have_members_of_their_own_or_name_a_type(tmp_path: Path) -> None:
    schema = read(
        tmp_path,
        """
        { 'struct': 'S', 'data': { 'x': 'int' } }
        { 'command': 'none' }
        { 'command': 'own', 'data': { 'y': 'str' }, 'returns': [ 'S' ], 'allow-oob': true }
        { 'command': 'named', 'data': 'S', 'boxed': true, 'allow-preconfig': true, 'coroutine': true,
          'success-response': false }
        { 'event': 'GONE', 'data': { '*z': 'bool' } }
        """,
    )
    assert schema.commands["none"].arguments is None
    own = schema.commands["own"]
    assert schema.members(own.arguments) == (Member("y", "str"),)
    assert (own.returns, own.allow_oob, own.success_response) == ("[S]", True, True)
    named = schema.commands["named"]
    assert (named.arguments, named.boxed, named.allow_preconfig) == ("S", True, True)
    assert (named.coroutine, named.success_response) == (True, False)
    assert schema.members(schema.events["GONE"].data) == (Member("z", "bool", optional=True),)


def test_a_file_is_included_once(tmp_path: Path) -> None:
    schema = read(
        tmp_path,
        "{ 'include': 'a.json' }\n{ 'include': 'b.json' }",
        a="{ 'include': 'b.json' }\n{ 'struct': 'A', 'data': { 'b': 'B' } }",
        b="{ 'include': 'a.json' }\n{ 'struct': 'B', 'data': { } }",
    )
    assert list(schema.types) == ["B", "A"]


def test_a_doc_comment_belongs_to_the_expression_behind_it(tmp_path: Path) -> None:
    schema = read(
        tmp_path, "##\n# @A:\n#\n# What A is.\n##\n{ 'enum': 'A', 'data': [] }\n{ 'enum': 'B', 'data': [] }\n"
    )
    assert schema.types["A"].doc_text == "# @A:\n#\n# What A is.\n"
    assert schema.types["B"].doc is None


def test_places_name_the_file_and_the_line(tmp_path: Path) -> None:
    folder = tmp_path / "qapi"
    folder.mkdir()
    schema = read(folder, "# one\n\n{ 'struct': 'S',\n  'data': { 'a': 'int',\n            '*b': 'int' } }\n")
    struct = schema.types["S"]
    assert struct.place == "qapi/root.json:3"
    assert struct.member_place("*b") == "qapi/root.json:5"


GOOD = "{ 'enum': 'E', 'data': [ 'e' ] }\n{ 'struct': 'S', 'data': { } }\n"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{ 'struct': 'X' 'data': { } }", "3: Expecting ',' delimiter"),
        ("{ 'struct': 'X', 'data': { }", "3: Expecting ',' delimiter"),
        ("{ 'struct': 'X', 'data': { 'a': 'int', 'a': 'str' } }", "3: duplicate key 'a'"),
        ('{ "struct": "X" }', "3: stray '\"'"),
        ("{ 'struct': 'X', 'data': { }, 'if': 'Y' }", "3: struct has unknown key 'if'"),
        ("{ 'pragma': { } }", "3: expected an object with one of include, enum"),
        ("[ ]", "3: expected an object with one of"),
        ("{ 'struct': 'S', 'data': { } }", "3: 'S' is already defined .*root.json:2"),
        ("{ 'struct': 'int', 'data': { } }", "3: 'int' is a builtin type"),
        ("{ 'struct': 'X', 'data': { 'a': 'Y' } }", "3: 'a' of 'X' has unknown type 'Y'"),
        ("{ 'struct': 'X',\n 'data': { '*a': [ 'Y' ] } }", "4: 'a' of 'X' has unknown type '.Y.'"),
        ("{ 'struct': 'X', 'data': { 'a': [ 'S', 'S' ] } }", "3: 'a' of 'X' must name a type"),
        ("{ 'struct': 'X', 'data': [ ] }", "3: 'data' of 'X' must be an object"),
        ("{ 'enum': 'X', 'data': { } }", "3: 'data' of 'X' must be an array"),
        ("{ 'enum': 'X', 'data': [ 'a', 'a' ] }", "3: enum 'X' has a value twice"),
        ("{ 'enum': 'X', 'data': [ 5 ] }", "3: a value of enum 'X' must be a string"),
        ("{ 'struct': 'X', 'base': 'E', 'data': { } }", "3: 'base' of 'X' is 'E', which is no struct"),
        ("{ 'struct': 'X', 'base': 'X', 'data': { } }", "3: 'X' is its own base"),
        ("{ 'union': 'X', 'data': { } }", "3: union 'X' needs 'base' and 'discriminator'"),
        (
            "{ 'union': 'X', 'base': { 't': 'str' }, 'discriminator': 't', 'data': { } }",
            "3: discriminator 't' of 'X' is no required enum member of its base",
        ),
        (
            "{ 'union': 'X', 'base': { 't': 'E' }, 'discriminator': 't', 'data': { 'f': 'S' } }",
            "3: branch 'f' of 'X' is no value of 'E'",
        ),
        (
            "{ 'union': 'X', 'base': { 't': 'E' }, 'discriminator': 't', 'data': { 'e': 'E' } }",
            "3: branch 'e' of 'X' is 'E', which is no struct",
        ),
        ("{ 'alternate': 'X', 'data': { 'a': 'Y' } }", "3: 'X' uses unknown type 'Y'"),
        ("{ 'command': 'X', 'returns': 'Y' }", "3: 'X' returns unknown type 'Y'"),
        ("{ 'command': 'X', 'data': 'E' }", "3: 'data' of 'X' is 'E', which is no struct"),
        ("{ 'command': 'X', 'boxed': 'yes' }", "3: 'boxed' of 'X' must be true or false"),
        ("{ 'command': 'X', 'features': [ ] }", "3: 'features' of 'X' must be an array of strings"),
        ("{ 'include': 'nosuch.json' }", "3: cannot read 'nosuch.json': No such file or directory"),
    ],
    ids=lambda value: value[:50],
)
def test_a_wrong_text_is_refused_with_its_place(tmp_path: Path, line: str, text: str) -> None:
    with pytest.raises(SchemaError, match=f"^{re.escape(tmp_path.name)}/root.json:{text}"):
        read(tmp_path, GOOD + line)


def test_a_member_may_not_stand_in_the_base_too(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="'B' has member 'a' twice"):
        read(
            tmp_path,
            "{ 'struct': 'A', 'data': { 'a': 'int' } }\n{ 'struct': 'B', 'base': 'A', 'data': { 'a': 'int' } }",
        )


def test_the_storage_daemons_schema_is_a_part_of_the_systems() -> None:
    system, daemon = load(SYSTEM_ROOT), load(STORAGE_DAEMON_ROOT)
    for table in ("commands", "events", "types"):
        whole, part = getattr(system, table), getattr(daemon, table)
        assert part.keys() < whole.keys()
        assert all(whole[name] is entity for name, entity in part.items()), "read once, shared by both roots"


NOT_OF_COMMANDS = {
    "NbdServerOptions": "--nbd-server",
    "MonitorOptions": "--monitor",
}
"""Types that no command or event uses, and the command line option that does."""


def test_every_type_is_used() -> None:
    schema = load(SYSTEM_ROOT)
    used: set[str] = set()
    waiting = [command.arguments for command in schema.commands.values()]
    waiting += [command.returns for command in schema.commands.values()]
    waiting += [event.data for event in schema.events.values()]
    waiting += list(NOT_OF_COMMANDS)
    while waiting:
        name = (waiting.pop() or "").strip("[]")
        if name in used or name not in schema.types:
            continue
        used.add(name)
        found = schema.types[name]
        waiting += getattr(found, "branches", {}).values()
        if isinstance(found, ObjectType):
            waiting += [member.type for member in found.members]
            waiting.append(found.base)
    assert schema.types.keys() - used == set()


def test_a_root_loads_fast_enough_for_every_start() -> None:
    """No timing assert is meant here: ten times the time it takes is still a mistake in the reader."""
    best = min(_seconds_to_load() for _ in range(5))
    assert best < 0.1


def _seconds_to_load() -> float:
    before = time.process_time()
    load_file(Path(schema_directory()) / SYSTEM_ROOT)
    return time.process_time() - before
